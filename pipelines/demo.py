"""The whole story on 1,797 real images in a few minutes: `make demo`.

Handwritten digits that come with scikit-learn -> shards -> views -> round zero (a masked autoencoder on
pixels) -> its export as the base -> targets -> a new model from the cache -> export -> probes of an untrained
model, the base and the new one -> a picture. It prints whatever came out.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import webdataset as wds
from PIL import Image

from pipelines.export import export
from pipelines.extract import extract
from pipelines.info import info
from pipelines.judging.demo_picture import draw
from pipelines.probe import probe
from pipelines.train import TrainSummary, train
from tec_cache.config import ExtractConfig, ProbeConfig, TrainConfig
from tec_cache.progress import human_bytes
from tec_cache.run.metrics import read_metrics

T = TypeVar("T")

SIZE, GRID = 32, 8
STUDENT: dict[str, Any] = {"patch_size": SIZE // GRID, "embed_dim": 64, "depth": 6, "num_heads": 4}
EPOCHS = 15
ONLINE_STEPS = 30
SHARD = 512


def demo(out: Path, *, epochs: int = EPOCHS, say: Callable[[str], None] = print) -> dict[str, Any]:
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
        say(f"  {name:34s} {seconds[name]:6.1f} s")
        return result

    say(f"tec-cache demo, in {out}/")
    photos = out / "photos"
    train_images, test_images = stage("digits to shards", lambda: write_digits(photos))
    cache = str(out / "cache")
    train_shards, test_shards = str(photos / "train-*.tar"), str(photos / "test-*.tar")
    plan: dict[str, Any] = {"size": SIZE, "grid": GRID, "scale": (0.5, 1.0), "flip": 0.0, "views": 4}
    stage("views", lambda: extract(ExtractConfig(input=train_shards, cache=cache, views_only=True, **plan)))
    recipe: dict[str, Any] = {
        "cache": cache,
        "student": "vit_tiny_patch16_224",
        "student_args": STUDENT,
        "decoder_width": 64,
        "decoder_heads": 4,
        "batch_size": 128,
        "epochs": epochs,
        "base_lr": 1e-3,
        "workers": 1,
        "log_every": 10,
        "save_every": float(epochs),
    }
    zero = TrainConfig(out=str(out / "zero"), pixels=True, **recipe)
    stage("round zero: masked pixels", lambda: whole(train(zero)))
    base = export(out / "zero", out / "base")
    stage("targets of round zero", lambda: extract(ExtractConfig(cache=cache, base=str(base))))
    new_run = stage("new model from the cache", lambda: whole(train(TrainConfig(out=str(out / "one"), **recipe))))
    new = export(out / "one", out / "new")
    yardstick = recipe | {"online": str(base), "steps": ONLINE_STEPS}
    online = stage("yardstick: base in the loop", lambda: train(TrainConfig(out=str(out / "online"), **yardstick)))
    yardstick = recipe | {"steps": ONLINE_STEPS}
    cached = stage("yardstick: cached", lambda: train(TrainConfig(out=str(out / "cached"), **yardstick)))

    def judge(model: str) -> Any:
        return probe(ProbeConfig(model=model, train=train_shards, test=test_shards, l2=1e-3))

    models = {"untrained": f"random:{base}", "round zero (base)": str(base), "new model": str(new)}
    probes = {name: stage(f"probe: {name}", lambda m=model: judge(m)) for name, model in models.items()}  # type: ignore[misc]
    picture = out / "demo.png"
    curves = {name: read_metrics(out / run) for name, run in (("round zero", "zero"), ("new model", "one"))}
    stage("picture", lambda: draw(picture, test_shards, base, new, GRID, curves))
    target = info(cache)["targets"]["base"]
    result = {
        "train_images": train_images,
        "test_images": test_images,
        "bytes_per_view_targets": target["bytes_per_view"],
        "bytes_per_view_crops": sum(v["bytes"] for v in info(cache)["views"]) / (4 * train_images),
        "seconds": seconds,
        "images_per_second": {"online": online.images_per_second, "cached": cached.images_per_second},
        "losses": new_run.losses,
        "knn": {name: p.knn for name, p in probes.items()},
        "linear": {name: p.linear for name, p in probes.items()},
        "picture": str(picture),
    }
    for line in table(result):
        say(line)
    return result


def whole(summary: TrainSummary) -> TrainSummary:
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
    speed = result["images_per_second"]
    ratio = speed["cached"] / speed["online"]
    lines = [
        "",
        f"{result['train_images']} images to learn from, {result['test_images']} to judge on",
        f"per view      {human_bytes(result['bytes_per_view_crops'])} of crops, "
        f"{human_bytes(result['bytes_per_view_targets'])} of targets",
        f"training      {speed['cached']:,.0f} images/s cached, {speed['online']:,.0f} online ({ratio:.2f} times)",
        "",
        "                      kNN    linear",
    ]
    for name, knn in result["knn"].items():
        lines.append(f"{name:19s} {knn:6.1%}    {result['linear'][name]:6.1%}")
    note = "It shows how the parts work together; what the method gains on ImageNet is in the paper."
    return [*lines, "", note, f"picture       {result['picture']}"]


if __name__ == "__main__":
    try:
        demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
    except KeyboardInterrupt:
        sys.exit(130)
