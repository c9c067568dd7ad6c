"""What the parts work on, made when it is first asked for and kept beside the results for the next command."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.bases import write_base
from benchmarks.gpu.sizes import Size
from benchmarks.photos import write_photos
from benchmarks.step.kinds import Setting
from pipelines.extract import extract
from tec_cache.config import ExtractConfig
from tec_cache.device import available_cores

SHARDS = 8


@dataclass(frozen=True)
class Data:
    """Photos, bases and caches of one size below a folder."""

    folder: Path
    size: Size

    def photos(self) -> str:
        """Return the pattern of tars of photos."""
        return str(made(self.folder / "photos", self._write_photos) / "*.tar")

    def base(self, model: str) -> str:
        """Return the folder of a base with random weights."""
        chosen = self.size.models[model]

        def write(folder: Path) -> None:
            folder.rmdir()
            write_base(folder, chosen.architecture, dict(chosen.args), size=self.size.size)

        return str(made(self.folder / f"base-{model}", write))

    def cache(self, model: str) -> str:
        """Return a cache of one view of all photos, with the targets "t" of a model's base in the default quality."""

        def write(folder: Path) -> None:
            extract(self.extraction(folder, input=self.photos(), base=self.base(model), views=1))

        return str(made(self.folder / f"cache-{model}", write))

    def extraction(self, cache: Path, **more: Any) -> ExtractConfig:
        """Return settings of stage one for this size."""
        size = self.size
        shape = {"size": size.size, "grid": size.grid, "device": size.device, "name": "t"}
        return ExtractConfig(cache=str(cache), **shape, **more)

    def setting(self, model: str, batch_size: int, **more: Any) -> Setting:
        """Return a training of a model's student on its cache, in one micro-batch."""
        chosen, size = self.size.models[model], self.size
        changes = {name: more.pop(name) for name in ("precision", "compile") if name in more}
        fields = {"student_args": dict(chosen.args), **size.student, **more}
        run = self.folder / "run"
        return Setting(self.cache(model), run, chosen.architecture, batch_size, size.device, more=fields, **changes)

    def online(self, model: str) -> Mapping[str, Any]:
        """Return what puts a model's base in the loop of a training."""
        return {"online": self.base(model)}

    def _write_photos(self, folder: Path) -> None:
        each, (width, height) = self.size.photos // SHARDS, self.size.photo_edges
        jobs = [(folder / f"photos-{shard:03d}.tar", each, shard * each, width, height) for shard in range(SHARDS)]
        with ProcessPoolExecutor(min(SHARDS, available_cores()), mp_context=get_context("forkserver")) as pool:
            list(pool.map(_write_shard, jobs))


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """Return a folder that is there, or make it: what a kill left unfinished is made again."""
    if not path.exists():
        draft = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        make(draft)
        os.replace(draft, path)
    return path


def _write_shard(job: tuple[Path, int, int, int, int]) -> None:
    path, count, start, width, height = job
    write_photos(path, count, start=start, width=width, height=height)
