"""Shared fixtures: the golden case, tiny models, and small sets of synthetic photos."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.extract import extract
from pipelines.pack import pack
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.config import ExtractConfig, TrainConfig
from tec_cache.loader import Batch, Loader
from tec_cache.run.checkpoint import load_checkpoint
from tec_cache.run.layout import checkpoints
from tec_cache.run.settings import load_settings, run_identity

GOLDEN = Path(__file__).parent / "data" / "golden_mae_like.npz"


def pytest_collection_finish() -> None:
    """What is imported stays: without it among what is looked through for garbage, the tests take a tenth less."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tests run side by side under xdist; more threads than cores only slows them down."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def photo(seed: int, width: int = 80, height: int = 60, mode: str = "RGB") -> Image.Image:
    """A smooth random picture: compresses like a photo, and no two are alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: list[int], *, start: int = 0) -> Path:
    """Write shards of labelled synthetic photos: class = number mod 4."""
    number = start
    for shard, count in enumerate(counts):
        members = []
        for _ in range(count):
            members += [
                (f"p{number:05d}.jpg", encoded(photo(number))),
                (f"p{number:05d}.cls", str(number % 4).encode()),
            ]
            number += 1
        write_tar(folder / f"shard-{shard:06d}.tar", members)
    return folder


TINY = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8}
"""A vision transformer small enough for a test; with --size 32 --grid 4 it sees 16 patches."""


def write_tiny_base(folder: Path, seed: int = 0, **changes: object) -> Path:
    """Write a random model in the layout of an export, which `--base FOLDER` takes."""
    args: dict[str, Any] = TINY | changes | {"img_size": 4 * int(TINY["patch_size"])}
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    with torch.no_grad():
        for parameter in model.parameters():
            # timm's tiny initial weights would make every attention row nearly flat
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": args, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 40, 24 and 33 labelled photos."""
    return write_shards(tmp_path_factory.mktemp("photos"), [40, 24, 33])


def tiny_config(shards: Path | None, cache: Path, base: Path | None, **changes: object) -> ExtractConfig:
    values: dict[str, Any] = {
        "input": None if shards is None else str(shards),
        "cache": str(cache),
        "base": None if base is None else str(base),
        "workers": 2,
    }
    if not changes.get("views_only"):
        values |= {"device": "cpu", "threads": 1}
    if shards is not None:
        values |= {"views": 2, "size": 32, "grid": 4, "group_size": 16}
    if base is not None:
        # exact, so that numbers can be compared; what a lossy quality changes is tested for itself
        values |= {"k": "3", "batch_size": 8, "quality": "exact"}
    return ExtractConfig(**(values | changes))


@pytest.fixture(scope="session")
def made_cache(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_base: Path) -> Path:
    """A cache of two views with the target set "tiny"; tests that change it copy it first."""
    cache = tmp_path_factory.mktemp("caches") / "made"
    extract(tiny_config(shards, cache, tiny_base))
    return cache


@pytest.fixture(scope="session")
def coded_cache(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_base: Path) -> Path:
    """The same with the default quality: a fitted codec and int8 codes."""
    cache = tmp_path_factory.mktemp("caches") / "coded"
    extract(tiny_config(shards, cache, tiny_base, quality="default"))
    return cache


@pytest.fixture(scope="session")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of five labelled photos."""
    return write_shards(tmp_path_factory.mktemp("five"), [5])


@pytest.fixture(scope="session")
def pair(five: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two units of those five with a fitted set, and beside it a pack of it; tests copy what they change."""
    folder = tmp_path_factory.mktemp("pair")
    extract(tiny_config(five, folder / "cache", tiny_base, quality="default"))
    pack(str(folder / "cache"), str(folder / "pack"))
    return folder


def tiny_training(cache: Path, run: Path, **changes: object) -> TrainConfig:
    values: dict[str, Any] = {
        "cache": str(cache),
        "out": str(run),
        "student": "vit_tiny_patch16_224",
        "student_args": dict(TINY),
        "decoder_width": 32,
        "decoder_heads": 4,
        "batch_size": 32,
        "epochs": 10,
        "warmup_epochs": 1,
        "base_lr": 5e-3,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "save_minutes": 0.0,
    }
    return TrainConfig(**(values | changes))


def last_checkpoint(run: Path) -> dict[str, Any]:
    """What the last checkpoint of a run holds."""
    return load_checkpoint(checkpoints(run)[-1], run_identity(load_settings(run)))


def payload_of(cache: Cache, unit: Unit, target: str | None = None) -> Path:
    """The tar of a unit of a local cache, or the zip of its targets."""
    record = cache.views_record(unit) if target is None else cache[target].record(unit)
    assert record.payload is not None
    return Path(cache.store.place(record.payload.name))


def codes_of(batch: Batch) -> dict[tuple[str, str], torch.Tensor]:
    """All arrays of all target sets of a batch."""
    return {(target, name): values for target, arrays in batch.codes.items() for name, values in arrays.items()}


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def load_everything(path: Path) -> None:
    """Read all that training reads."""
    cache = open_cache(path)
    loader = Loader(cache, cache["tiny"], batch_size=1, pixel_sizes=(32,))
    for _ in loader.batches(0, loader.steps_per_epoch * loader.num_views):
        pass
