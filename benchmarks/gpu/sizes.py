"""How large the parts are: for one GPU of 80 GB and 16 cores, and so small that a CPU does all of it in a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Model:
    """A base and a student of one architecture; `args` change it."""

    architecture: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of everything. `main` names the model of the parts that take only one."""

    name: str
    device: str
    photos: int
    photo_edges: tuple[int, int]
    size: int
    grid: int
    models: Mapping[str, Model]
    main: str
    student: Mapping[str, Any]
    """Further fields of TrainConfig."""
    micro_batches: tuple[int, ...]
    compiles: bool
    """Whether --compile compiles: else such a training is as any other, and no test waits for a compiler."""
    compiled: tuple[int, ...]
    """Micro-batches of the compiled trainings: each is compiled for itself, three times."""
    tried: tuple[int, ...]
    """Micro-batches whose memory is looked at."""
    default_batch: int
    """The step's batch for which the default micro-batch is chosen."""
    steps: int
    rounds: int
    fidelity_batch: int
    decoded: int
    """Views that are decoded and encoded at once."""
    workers: tuple[int, ...]
    loader_batch: int
    loader_seconds: float
    stage_photos: int
    stage_views: tuple[int, int]
    """Views of a photo where the base binds, and where photos do."""


GPU = Size(
    name="gpu",
    device="cuda",
    photos=4096,
    photo_edges=(500, 375),
    size=224,
    grid=14,
    models={
        "base": Model("vit_base_patch16_224"),
        "small": Model("vit_small_patch16_224"),
        "large": Model("vit_large_patch16_224"),
    },
    main="base",
    student={},
    micro_batches=(64, 128, 256, 512),
    compiles=True,
    compiled=(256,),
    tried=(64, 128, 256, 512, 1024, 2048),
    default_batch=4096,
    steps=8,
    rounds=3,
    fidelity_batch=64,
    decoded=256,
    workers=(1, 2, 4, 8, 16),
    loader_batch=256,
    loader_seconds=6.0,
    stage_photos=2048,
    stage_views=(2, 4),
)

TINY = Size(
    name="tiny",
    device="cpu",
    photos=32,
    photo_edges=(60, 45),
    size=32,
    grid=4,
    models={"base": Model("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8})},
    main="base",
    student={"decoder_width": 32, "decoder_heads": 4, "decoder_depth": 1},
    micro_batches=(4, 8),
    compiles=False,
    compiled=(8,),
    tried=(4, 8),
    default_batch=32,
    steps=1,
    rounds=1,
    fidelity_batch=8,
    decoded=8,
    workers=(1, 2),
    loader_batch=8,
    loader_seconds=0.2,
    stage_photos=8,
    stage_views=(1, 2),
)

SIZES = {size.name: size for size in (GPU, TINY)}
