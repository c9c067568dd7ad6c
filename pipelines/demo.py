"""The whole story on 1,797 real images in a few minutes: `make demo`.

Handwritten digits that come with scikit-learn -> shards -> views -> round zero (a masked autoencoder on
pixels) -> its export as the base -> targets -> a new model from the cache, with as many epochs -> export. The
control is a masked autoencoder with twice the epochs: what the same computing gives when it is spent on the base.
All are probed and fine-tuned, and the sentence at the end follows from the numbers, whatever came out.
"""

from __future__ import annotations

import io
import math
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from pipelines.export import export
from pipelines.extract import extract
from pipelines.finetune import finetune
from pipelines.info import info
from pipelines.judging.demo_picture import draw
from pipelines.probe import probe
from pipelines.train import train
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig, ProbeConfig, TrainConfig
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.printable import counted
from tec_cache.progress import human_bytes
from tec_cache.run.loop import LoopSummary
from tec_cache.run.metrics import read_metrics
from tec_cache.student.heads.attention import target_distribution

T = TypeVar("T")
S = TypeVar("S", bound=LoopSummary)

SIZE, GRID = 32, 4
"""A patch is 2 x 2 pixels of a digit. With patches of one pixel (a grid of 8) the base's attention is all but even over
the patches, and nothing of it can be learned."""
STUDENT: dict[str, Any] = {"patch_size": SIZE // GRID, "embed_dim": 64, "depth": 6, "num_heads": 4}
EPOCHS = 20
TUNE_EPOCHS = 8
ONLINE_STEPS = 30
SHARD = 512


def demo(out: Path) -> dict[str, Any]:
    """Run the story below `out`; return what was measured. `out` is emptied first."""
    if out.exists():
        if not (out / "photos").is_dir():
            raise SystemExit(f"{out} is not a folder of this demo; name another one")
        shutil.rmtree(out)
    seconds: dict[str, float] = {}

    def stage(name: str, work: Callable[[], T]) -> T:
        begin = time.monotonic()
        result = work()
        seconds[name] = time.monotonic() - begin
        print(f"  {name:34s} {seconds[name]:6.1f} s")
        return result

    print(f"tec-cache demo, in {out}/")
    photos = out / "photos"
    train_images, test_images = stage("digits to shards", lambda: write_digits(photos))
    cache = str(out / "cache")
    train_shards, test_shards = str(photos / "train-*.tar"), str(photos / "test-*.tar")
    plan: dict[str, Any] = {"size": SIZE, "grid": GRID, "scale": (0.5, 1.0), "flip": 0.0, "views": 4}
    stage("views", lambda: extract(ExtractConfig(input=train_shards, cache=cache, views_only=True, **plan)))
    recipe = training_recipe(cache, EPOCHS)
    zero = TrainConfig(out=str(out / "zero"), pixels=True, **recipe)
    stage("round zero: masked pixels", lambda: whole(train(zero)))
    base = export(out / "zero", out / "base")
    longer = TrainConfig(out=str(out / "zero-longer"), pixels=True, **recipe | {"epochs": 2 * EPOCHS})
    stage("control: twice as many epochs", lambda: whole(train(longer)))
    control = export(out / "zero-longer", out / "control")
    stage("targets of round zero", lambda: extract(ExtractConfig(cache=cache, base=str(base))))
    # a seed of its own: with its base's, it would begin as its base began
    one = TrainConfig(out=str(out / "one"), seed=1, **recipe)
    new_run = stage("new model from the cache", lambda: whole(train(one)))
    new = export(out / "one", out / "new")
    yardstick = recipe | {"online": str(base), "steps": ONLINE_STEPS}
    online = stage("yardstick: base in the loop", lambda: train(TrainConfig(out=str(out / "online"), **yardstick)))
    yardstick = recipe | {"steps": ONLINE_STEPS}
    cached = stage("yardstick: cached", lambda: train(TrainConfig(out=str(out / "cached"), **yardstick)))

    models = {"untrained": f"random:{base}", "base": str(base), "new model": str(new), "control": str(control)}
    judged = {}
    for name, model in models.items():
        run = None if name == "untrained" else out / f"tuned-{name}".replace(" ", "-")
        work = partial(judge, model, train_shards, test_shards, run, TUNE_EPOCHS)
        judged[name] = stage(f"judge: {name}", work)
    picture = out / "demo.png"
    curves = {name: read_metrics(out / run) for name, run in (("round zero", "zero"), ("new model", "one"))}
    stage("picture", lambda: draw(picture, test_shards, base, new, GRID, curves))
    target = info(cache)["targets"]["base"]
    result = {
        "train_images": train_images,
        "test_images": test_images,
        "epochs": EPOCHS,
        "bytes_per_view_targets": target["bytes_per_view"],
        "bytes_per_view_crops": sum(v["bytes"] for v in info(cache)["views"]) / (4 * train_images),
        "seconds": seconds,
        "images_per_second": {"online": online.images_per_second, "cached": cached.images_per_second},
        "losses": new_run.losses,
        "attention_entropy": attention_entropy(cache),
        "judged": judged,
        "picture": str(picture),
    }
    for line in table(result):
        print(line)
    return result


class Judged(NamedTuple):
    """Shares of the test images that are classified correctly, 0 to 1."""

    knn: float
    linear: float
    tuned: float | None = None
    """None where it was not fine-tuned."""


def training_recipe(cache: str, epochs: int) -> dict[str, Any]:
    """Return what all trainings have in common."""
    return {
        "cache": cache,
        "student": "vit_tiny_patch16_224",
        "student_args": STUDENT,
        "decoder_depth": 1,
        "decoder_width": 64,
        "decoder_heads": 4,
        "batch_size": 128,
        "epochs": epochs,
        "base_lr": 1e-3,
        "workers": 1,
        "log_every": 10,
        "save_every": float(2 * epochs),
    }


def judge(model: str, train_shards: str, test_shards: str, run: Path | None, epochs: int) -> Judged:
    """Probe a model, and fine-tune it; run: folder of that, None for none."""
    found = probe(ProbeConfig(model=model, train=train_shards, test=test_shards, l2=1e-3))
    if run is None:
        return Judged(found.knn, found.linear)
    how: dict[str, Any] = {"base_lr": 4e-3, "crop_scale": (0.5, 1.0), "flip": 0.0, "auto_augment": "none"}
    tuned = finetune(
        FinetuneConfig(
            model=model, train=train_shards, test=test_shards, out=str(run), recipe="small", workers=1,
            epochs=epochs, judge_every=epochs, save_every=float(epochs), **how,
        )
    )  # fmt: skip
    return Judged(found.knn, found.linear, whole(tuned).last["test_top1"])


def attention_entropy(cache: str) -> float:
    """Return the mean entropy of the attention targets of the first block of views, in nats.

    The attention loss is a cross entropy: it begins near log(patches), and cannot come below this.
    """
    opened = open_cache(cache)
    target = opened["base"]
    rows = target.read_block(target.record(target.units[0]), 0)
    targets = target.decode({name: torch.from_numpy(values.copy()) for name, values in rows.items()})
    assert targets.attention is not None
    return float(torch.distributions.Categorical(target_distribution(targets.attention, 1.0)).entropy().mean())


def whole(summary: S) -> S:
    """Return what a training did. Raises KeyboardInterrupt where a signal stopped it: its model is no result."""
    if not summary.finished:
        raise KeyboardInterrupt
    return summary


def write_digits(folder: Path) -> tuple[int, int]:
    """Write scikit-learn's digits, enlarged to 32 pixels, as shards; one in five is kept for testing, by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train_part, test_part = train_test_split(numbers, test_size=0.2, random_state=0, stratify=digits.target)
    folder.mkdir(parents=True)
    for name, part in (("train", train_part), ("test", test_part)):
        for shard, start in enumerate(range(0, len(part), SHARD)):
            with wds.TarWriter(str(folder / f"{name}-{shard:06d}.tar"), encoder=False, mtime=0) as tar:
                for i in part[start : start + SHARD]:
                    image = Image.fromarray((digits.images[i] * (255 / 16)).astype(np.uint8))
                    stream = io.BytesIO()
                    image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(stream, "PNG")
                    label = str(digits.target[i]).encode()
                    tar.write({"__key__": f"digit{i:04d}", "png": stream.getvalue(), "cls": label})
    return len(train_part), len(test_part)


def table(result: dict[str, Any]) -> list[str]:
    """Lay out what was measured."""
    speed, judged = result["images_per_second"], result["judged"]
    ratio = speed["cached"] / speed["online"]
    count, epochs, losses = result["test_images"], result["epochs"], result["losses"]
    even, least = math.log(GRID**2), result["attention_entropy"]
    learned = (even - losses["attention"]) / (even - least)
    lines = [
        "",
        f"{counted(result['train_images'], 'image')} to learn from, {count} to judge on",
        f"per view      {human_bytes(result['bytes_per_view_crops'])} of crops, "
        f"{human_bytes(result['bytes_per_view_targets'])} of targets",
        f"training      {speed['cached']:,.0f} images/s cached, {speed['online']:,.0f} online ({ratio:.2f} times)",
        f"losses        feature {losses['feature']:.3f}; attention {losses['attention']:.3f}, {learned:.0%} of the way "
        f"from knowing nothing ({even:.3f})",
        f"              to knowing its target ({least:.3f})",
        "",
        f"{'':34s}{'kNN':>8s}{'linear':>15s}{'fine-tuned':>16s}",
    ]
    titles = {
        "untrained": "random weights",
        "base": f"base: masked pixels, {counted(epochs, 'epoch')}",
        "new model": f"new model of it, {counted(epochs, 'epoch')}",
        "control": f"control: the base, {counted(2 * epochs, 'epoch')}",
    }
    for name, title in titles.items():
        shares = [
            "" if share is None else f"{share:6.1%} ± {100 * standard_error(share, count):.1f}"
            for share in judged[name]
        ]
        lines.append(f"{title:32s}" + "".join(f"{share:>14s}" for share in shares))
    lines.append(f"{'':32s}  ± one standard error over the {count} test images; one seed")
    return [*lines, "", *sentence(judged, count), f"picture       {result['picture']}"]


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share of `count` images."""
    return math.sqrt(share * (1 - share) / count)


def sentence(judged: dict[str, Judged], count: int) -> list[str]:
    """Say what follows from the fine-tuned accuracies: a difference counts from two standard errors on."""
    words = []
    for name, called in (("base", "its base"), ("control", "that base with the same computing spent on it")):
        new, other = judged["new model"].tuned, judged[name].tuned
        assert new is not None
        assert other is not None
        error = math.hypot(standard_error(new, count), standard_error(other, count))
        off = f"{100 * (new - other):+.1f} ± {100 * error:.1f} points"
        if abs(new - other) < 2 * error:
            words.append(f"not told from {called} ({off})")
        else:
            words.append(f"{'better' if new > other else 'worse'} than {called} ({off})")
    return [
        f"Fine-tuned, the new model is here {words[0]}, and",
        f"{words[1]}.",
        "Where it is better, and where not, over several seeds: docs/gain.md.",
    ]


if __name__ == "__main__":
    try:
        demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
    except KeyboardInterrupt:
        sys.exit(130)
