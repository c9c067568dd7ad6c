"""What `benchmarks.fidelity` compares: two configurations, and the cells of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SIZE, GRID = 32, 8
"""Pixels of a crop and patches of a grid, per side: patches of 4 pixels."""
QUALITIES = ("exact", "high", "default", "small")
BASE, UNTRAINED, ONLINE = "base", "untrained", "online"
"""The kinds of models beside those that learn from a stored target set, which are named by its quality."""


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """One configuration. Everything in it decides what comes out."""

    images: int | None
    """Photos to learn from, the first of the shards; None: all."""
    judged: int | None
    """Test photos of the held-out loss, and photos of each part of the probes."""
    width: int
    depth: int
    """Of the encoder: a multiple of 3, as the encoder adapters want it."""
    heads: int
    """Of encoder and decoder."""
    decoder_depth: int
    """Its width is the encoder's: the default of 512 would outweigh so small an encoder."""
    mask_ratio: float
    """Of the new models. With the recipe's 0.75 a few hundred steps teach little more than each position's mean."""
    epochs: int
    base_epochs: int
    """Of round zero."""
    batch_size: int
    base_lr: float
    seeds: int
    views: tuple[int, ...] = (1, 2, 4, 8)
    """Beside these, a new view in every epoch."""
    quality_views: int = 4
    """Views of the cells that compare qualities: the program's default."""
    masks: int = 2
    """Masks of each photo in the held-out loss."""


CPU = Fidelity(
    images=320, judged=2000, width=48, depth=3, heads=3, decoder_depth=1, mask_ratio=0.5,
    epochs=48, base_epochs=144, batch_size=32, base_lr=0.06, seeds=3,
)  # fmt: skip
GPU = Fidelity(
    images=None, judged=None, width=192, depth=12, heads=3, decoder_depth=2, mask_ratio=0.75,
    epochs=32, base_epochs=96, batch_size=512, base_lr=1e-3, seeds=5,
)  # fmt: skip
CONFIGS = {"cpu": CPU, "gpu": GPU}


class Cell(NamedTuple):
    """Models that differ by their seed alone."""

    kind: str
    views: int

    def label(self, config: Fidelity) -> str:
        """Say in words what the cell is."""
        if self.kind in (BASE, UNTRAINED):
            return self.kind
        views = "1 view" if self.views == 1 else f"{self.views} views"
        return f"{self.kind}, " + ("new view in every epoch" if self.views == config.epochs else views)


class Job(NamedTuple):
    """One model to be made and judged."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder and of its line in the results."""
        return f"{self.cell.kind}-{self.cell.views}-seed{self.seed}"


def quality_cells(config: Fidelity) -> list[Cell]:
    """Cells that differ by how targets are stored; the first is the reference: not stored at all."""
    return [Cell(kind, config.quality_views) for kind in (ONLINE, *QUALITIES)]


def view_cells(config: Fidelity) -> list[Cell]:
    """Cells that differ by their views, at two qualities; the first is the reference: the original method."""
    views = (config.epochs, *sorted(config.views, reverse=True))
    return [Cell(kind, number) for kind in ("exact", "default") for number in views]


def jobs_of(config: Fidelity) -> list[Job]:
    """List every model once, seed by seed, so that a part of the results is already of whole pairs."""
    cells = dict.fromkeys([Cell(UNTRAINED, 0), *quality_cells(config), *view_cells(config)])
    seeds = range(1, config.seeds + 1)  # 0 is the base's: a student must not begin with the base's own beginning
    return [Job(Cell(BASE, 0), 0), *(Job(cell, seed) for seed in seeds for cell in cells)]
