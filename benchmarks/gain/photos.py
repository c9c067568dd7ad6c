"""The photos of `benchmarks.gain`, cut from shards once: to learn from, a tenth of those, to choose by, to judge on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import webdataset as wds

from benchmarks.gain.plan import Gain
from tec_cache.data.source import open_source
from tec_cache.errors import TecCacheError

LEARN, TENTH, VALID, TEST = "learn.tar", "tenth.tar", "valid.tar", "test.tar"


def cut(config: Gain, train: str, test: str, folder: Path) -> None:
    """Write the four parts below `folder`, where they are not there yet.

    The validation part is the end of the shards to learn from, and shares no photo with what is learned from. A tenth:
    every tenth photo. Raises TecCacheError where there are too few.
    """
    if all((folder / name).exists() for name in (LEARN, TENTH, VALID, TEST)):
        return
    folder.mkdir(parents=True, exist_ok=True)
    known, judged = read(train), read(test)
    learned = len(known) - config.valid if config.photos is None else config.photos
    if learned < 10 or learned + config.valid > len(known):
        what = f"{len(known):,} photos are too few for {learned:,} to learn from and {config.valid:,} to choose by"
        raise TecCacheError(what, where=train, todo="name more shards")
    write(folder / LEARN, known[:learned])
    write(folder / TENTH, known[:learned:10])
    write(folder / VALID, known[-config.valid :])
    write(folder / TEST, list(islice(judged, config.judged)))


def read(shards: str) -> list[tuple[str, bytes, int]]:
    """Return key, encoded photo and class of each photo, in the order of the shards."""
    photos = (photo for shard in open_source(shards).with_labels().shards for photo in shard.photos())
    return [(photo.key, photo.data, photo.label) for photo in photos if photo.label is not None]


def write(path: Path, photos: list[tuple[str, bytes, int]]) -> None:
    """Write a shard that is whole, or none."""
    draft = path.with_suffix(".draft")
    with wds.TarWriter(str(draft), encoder=False, mtime=0) as tar:
        for number, (key, data, label) in enumerate(photos):
            tar.write({"__key__": f"{number:06d}-{key}", "jpg": data, "cls": str(label).encode()})
    draft.rename(path)
