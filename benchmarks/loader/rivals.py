"""Other ways to feed a training: from the photos themselves, and from the same crops with targets in half precision."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from torchvision.transforms import v2

from tec_cache.cache.opening import open_cache
from tec_cache.data.source import open_source

SHUFFLE = 1024


class Rivals:
    """Writes what the others read into a folder; each method is one pass, yielding the views of each batch."""

    def __init__(self, photos: str, cache: str, folder: Path, batch: int) -> None:
        self.photo_files = [shard.place for shard in open_source(photos).shards]
        self.batch, self.folder = batch, folder
        opened = open_cache(cache)
        stored = opened["t"]
        self.tars = sorted(str(path) for path in Path(cache).glob("views/*/*.tar"))
        self.with_arrays = folder / "with_arrays"
        self.loose = folder / "loose"
        for path in (self.with_arrays, self.loose):
            path.mkdir()
        for unit in opened.view_units:
            record = opened.views_record(unit)
            crops = opened.read_crops(record, range(len(record.keys)))
            arrays = {n: torch.from_numpy(a) for n, a in stored.read_unit(stored.record(unit)).items()}
            with wds.TarWriter(str(self.with_arrays / f"{unit}.tar"), encoder=False) as tar:
                for row, crop in enumerate(crops):
                    targets = stored.decode({name: values[row : row + 1] for name, values in arrays.items()})
                    assert targets.attention is not None
                    halves = (npy(targets.features[0]), npy(targets.attention[0]))
                    key = f"{unit.shard}-{unit.group}-{unit.view}-{row:04d}"  # a key ends at its first dot
                    tar.write({"__key__": key, "jpg": crop, "features.npy": halves[0], "attention.npy": halves[1]})
                    for name, data in (("jpg", crop), ("features.npy", halves[0]), ("attention.npy", halves[1])):
                        (self.loose / f"{key}.{name}").write_bytes(data)

    def photos(self) -> Iterator[int]:
        """Decode the photos with PIL and cut a random view of each."""
        cut = v2.Compose([v2.RandomResizedCrop(224, (0.2, 1.0), interpolation=3), v2.RandomHorizontalFlip()])
        samples = wds.WebDataset(self.photo_files, shardshuffle=False).shuffle(SHUFFLE).decode("pil")
        yield from self._batches(np.asarray(cut(sample["jpg"].convert("RGB"))) for sample in samples)

    def crops(self) -> Iterator[int]:
        """Read the cache's own tars."""
        samples = wds.WebDataset(self.tars, shardshuffle=False).shuffle(SHUFFLE)
        yield from self._batches(simplejpeg.decode_jpeg(sample["jpg"]) for sample in samples)

    def crops_and_arrays(self) -> Iterator[int]:
        """Read tars of crops with their targets."""
        tars = sorted(str(path) for path in self.with_arrays.iterdir())
        samples = wds.WebDataset(tars, shardshuffle=False).shuffle(SHUFFLE)
        yield from self._batches(
            (
                simplejpeg.decode_jpeg(sample["jpg"]),
                np.load(io.BytesIO(sample["features.npy"])),
                np.load(io.BytesIO(sample["attention.npy"])),
            )
            for sample in samples
        )

    def files(self) -> Iterator[int]:
        """Read loose files in random order."""
        keys = sorted(path.name.removesuffix(".jpg") for path in self.loose.glob("*.jpg"))
        random.Random(0).shuffle(keys)
        yield from self._batches(
            (
                simplejpeg.decode_jpeg((self.loose / f"{key}.jpg").read_bytes()),
                np.load(self.loose / f"{key}.features.npy"),
                np.load(self.loose / f"{key}.attention.npy"),
            )
            for key in keys
        )

    def _batches(self, samples: Iterator[Any]) -> Iterator[int]:
        """Stack what belongs together, as a collate function does."""
        waiting: list[Any] = []
        for sample in samples:
            waiting.append(sample if isinstance(sample, tuple) else (sample,))
            if len(waiting) == self.batch:
                stacked = [torch.from_numpy(np.stack(part)) for part in zip(*waiting, strict=True)]
                yield len(stacked[0])
                waiting = []


def npy(values: torch.Tensor) -> bytes:
    """Return values in half precision as the bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, values.half().numpy())
    return stream.getvalue()
