#!/usr/bin/env python3
"""Photos per second of the reader of labelled photos against timm's loader, with the same transform and photos.

    python -m benchmarks.tuning.reader 'photos-*.tar'

Ours reads each photo from its tar by itself; timm's loader has all of them in memory, decodes with Pillow, and stacks
them (`create_loader`, `use_prefetcher=False`). One core: batches are made in this process, and photos are
counted per second of processor time. Workers: batches come from processes, and photos are counted per second of the
clock. The kinds take turns, in several rounds; figures are medians, ratios are of them.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import torch
from PIL import Image
from timm.data import create_loader
from torch.utils.data import Dataset

from benchmarks.machine import describe
from tec_cache.data.source import open_source
from tec_cache.labelled import LabelledIndex, PhotoReader, index_photos, train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class InMemory(Dataset[tuple[torch.Tensor, int]]):
    """Photos as timm's data sets give them."""

    transform: Callable[[Image.Image], torch.Tensor]

    def __init__(self, index: LabelledIndex) -> None:
        self.photos = [(index.read(i), int(index.label[i])) for i in range(len(index))]

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        data, label = self.photos[number]
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB")), label


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="shards of labelled photos")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each kind in each round")
    args = parser.parse_args()
    print(describe("cpu"))
    torch.set_num_threads(1)
    begin = time.process_time()
    index = index_photos(open_source(args.photos).with_labels())
    print(f"{len(index):,} photos; finding them took {(time.process_time() - begin) / len(index) * 1e6:.0f} us each")
    in_memory = InMemory(index)
    for title, workers, clock in (
        ("one core, photos per second of processor time", 0, time.process_time),
        (f"{args.workers} workers, photos per second", args.workers, time.perf_counter),
    ):
        rates: dict[str, list[float]] = {"ours": [], "timm": []}
        for _ in range(args.rounds):
            with closing(ours(index, args.size, args.batch, workers)) as batches:
                rates["ours"].append(rate(batches, args.seconds, clock))
            with closing(timms(in_memory, args.size, args.batch, workers)) as batches:
                rates["timm"].append(rate(batches, args.seconds, clock))
        middle = {name: statistics.median(values) for name, values in rates.items()}
        print(f"\n{title}")
        for name, values in rates.items():
            print(f"  {name:6} {middle[name]:8.1f}   ({', '.join(f'{value:.1f}' for value in values)})")
        print(f"  ratio  {middle['ours'] / middle['timm']:8.2f}")


def ours(index: LabelledIndex, size: int, batch: int, workers: int) -> Generator[int, None, None]:
    """Yield the photos of each batch of ours."""
    transform = train_transform(size, mean=MEAN, std=STD)
    with closing(PhotoReader(index, transform, batch_size=batch, workers=workers)) as reader:
        for made in reader.batches(0, 10**9):
            yield len(made)


def timms(photos: InMemory, size: int, batch: int, workers: int) -> Generator[int, None, None]:
    """Yield the photos of each batch of timm's."""
    loader = create_loader(
        photos,
        input_size=size,
        batch_size=batch,
        is_training=True,
        use_prefetcher=False,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=False,
    )
    photos.transform = train_transform(size, mean=MEAN, std=STD)
    for _ in itertools.count():
        for images, _ in loader:
            yield len(images)


def rate(batches: Iterator[int], seconds: float, clock: Callable[[], float]) -> float:
    """Return the photos per second, after the first two batches."""
    for _ in range(2):
        next(batches)
    begin, photos, until = clock(), 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        photos += next(batches)
    return photos / (clock() - begin)


if __name__ == "__main__":
    main()
