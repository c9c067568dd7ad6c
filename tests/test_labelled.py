"""Labelled photos: each is found and read by itself, its pixels depend on (seed, epoch, photo) and on nothing else."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import lzma
import multiprocessing
import os
import pickle
import random
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, RandAugment
from torch.utils.data._utils.pin_memory import pin_memory

from tec_cache.data.passed_over import PassedOver
from tec_cache.data.source import Source, open_source
from tec_cache.errors import ConfigError, LayoutError, SourceError, StorageError, TecCacheError
from tec_cache.labelled import (
    EvaluationReader,
    LabelledBatch,
    LabelledIndex,
    PhotoIndex,
    PhotoReader,
    evaluation_transform,
    index_photos,
    photo_order,
    probe_transform,
    train_transform,
)
from tec_cache.labelled.making import Made, generators_kept, seed_generators
from tec_cache.labelled.names import Names
from tec_cache.labelled.order import share_of
from tec_cache.labelled.transforms import keep_zero_bits
from tec_cache.rng import key64
from tests.conftest import encoded, photo, write_shards, write_tar
from tests.web_server import web_server

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
AUGMENT = train_transform(16, mean=MEAN, std=STD)
CENTER = evaluation_transform(16, MEAN, STD)


def indexed(place: Path | str, **options: Any) -> LabelledIndex:
    return index_photos(open_source(str(place)).with_labels(), **options)


def assert_same_as_reading(source: Source, index: LabelledIndex) -> None:
    read = [(shard, photo) for shard in source.shards for photo in shard.photos()]
    whole = [(shard, photo) for shard, photo in read if photo.label is not None and not photo.problem]
    assert index.keys == [photo.key for _, photo in whole] == [index.key(i) for i in range(len(index))]
    assert index.label.tolist() == [photo.label for _, photo in whole]
    assert [index.place(i) for i in range(len(index))] == [shard.place for shard, _ in whole]
    assert index.sample_keys.tolist() == [key64("sample", shard.name, photo.key) for shard, photo in whole]
    numbers = np.random.default_rng(0).permutation(len(index)).tolist()
    assert [index.read(i) for i in numbers] == [whole[i][1].data for i in numbers]
    assert index.unlabelled.count == sum(photo.label is None and not photo.problem for _, photo in read)
    assert index.unusable.count == sum(bool(photo.problem) for _, photo in read)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LabelledIndex:
    """29 photos in two shards."""
    return indexed(write_shards(tmp_path_factory.mktemp("small"), [16, 13]))


def pixels(batches: list[LabelledBatch]) -> dict[tuple[int, int], bytes]:
    """(epoch, number) -> pixels and label."""
    return {
        (batch.epoch, number): image.numpy().tobytes() + bytes([label])
        for batch in batches
        for number, image, label in zip(batch.numbers.tolist(), batch.images, batch.labels.tolist(), strict=True)
    }


def taken(index: LabelledIndex, start: int = 0, stop: int = 6, *, micro_batches: int = 1, **options: Any) -> Any:
    reader = PhotoReader(index, AUGMENT, **({"batch_size": 12, "seed": 5, "workers": 0} | options))
    return list(reader.batches(start, stop, micro_batches=micro_batches))


# ----------------------------------------------------------------------------------------------------------- the index


def odd_tar(path: Path) -> Path:
    """A shard with everything that a photo may have beside it, and photos that are not to be learned from."""
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes = b"", **fields: object) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))

        add("x", type=tarfile.DIRTYPE)
        for i in range(4):
            add(f"x/{i}.cls", str(i).encode())
            add(f"x/{i}.txt", b"a caption")
            add(f"x/{i}.jpg", encoded(photo(i)))
            add(f"x/{i}.seg.png", encoded(photo(10 + i), "PNG"))
            add(f"x/._{i}.jpg", b"a system's own")
        add("x/" + "long" * 60 + ".jpg", encoded(photo(4)))
        add("x/" + "long" * 60 + ".cls", b"4")
        add("x/link.jpg", type=tarfile.LNKTYPE, linkname="x/2.jpg")
        add("x/link.cls", b"5")
        add("x/again.jpg", type=tarfile.LNKTYPE, linkname="x/link.jpg")
        add("x/again.json", b'{"label": 6}')
        add("x/nowhere.jpg", type=tarfile.LNKTYPE, linkname="y.jpg")
        add("x/nowhere.cls", b"1")
        add("x/soft.jpg", type=tarfile.SYMTYPE, linkname="x/2.jpg")
        add("x/two.jpg", encoded(photo(7)))
        add("x/two.png", encoded(photo(7), "PNG"))
        add("x/two.cls", b"1")
        add("x/none.jpg", encoded(photo(8)))
        add("x/poem.jpg", encoded(photo(9)))
        add("x/poem.cls", b"a poem")
        add("README.md", b"words")
        add("x/last.jpg", encoded(photo(12)))
        add("x/last.cls", b"0")
    return path


def test_an_index_of_tars_is_what_reading_them_gives(tmp_path: Path) -> None:
    odd_tar(tmp_path / "a.tar")
    write_shards(tmp_path, [5])
    source = open_source(str(tmp_path)).with_labels()
    index = index_photos(source, on_error="skip")
    assert_same_as_reading(source, index)
    assert len(index) == 4 + 1 + 2 + 1 + 5
    assert index.unlabelled.count == 2
    assert "'x/none': no label" in str(index.unlabelled)
    assert "'a poem' is a name" in str(index.unlabelled)
    assert index.unusable.count == 2
    assert "'y.jpg'" in str(index.unusable)
    counted = PassedOver()
    for shard in source.shards:
        list(shard.photos(counted))
    assert index.passed_over == counted
    assert {"hidden", "symbolic links", ".md files"} <= set(counted)
    with pytest.raises(SourceError, match="nowhere"):
        index_photos(source)


def test_names_of_classes_become_their_numbers(tmp_path: Path) -> None:
    members = [(f"{i}.{kind}", data) for i in range(6) for kind, data in (("jpg", encoded(photo(i))), ("cls", b"cat"))]
    members[3] = ("1.cls", b"ant")
    write_tar(tmp_path / "a.tar", members)
    index = indexed(tmp_path)
    assert index.classes == ("ant", "cat")
    assert index.label.tolist() == [1, 0, 1, 1, 1, 1]
    assert index.num_classes == 2


def test_an_index_of_a_folder_is_what_reading_it_gives(tmp_path: Path) -> None:
    for i in range(9):
        path = tmp_path / f"class{i % 2}" / f"p{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(photo(i), "PNG"))
    (tmp_path / "beside.png").write_bytes(encoded(photo(20), "PNG"))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/class0/\xff.png")).write_bytes(encoded(photo(21), "PNG"))
    (tmp_path / "class0" / "notes.txt").write_text("words")
    source = open_source(str(tmp_path))
    index = index_photos(source)
    assert_same_as_reading(source, index)
    assert len(index) == 10
    assert index.unlabelled.count == 1
    assert index.passed_over == {".txt files": 1}
    assert pixels(taken(index, 0, 3, batch_size=5, workers=1)) == pixels(taken(index, 0, 3, batch_size=5))
    (tmp_path / "class1" / "p1.png").unlink()
    with pytest.raises(SourceError, match=r"class1/p1\.png'.*cannot be read"):
        taken(index, 0, 2, batch_size=5)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_read_like_the_plain_one(
    tmp_path: Path, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, [6, 5])
    plain = indexed(tmp_path)
    expected, photos = pixels(taken(plain, 0, 3, batch_size=4)), [plain.read(i) for i in range(11)]
    path = tmp_path / "shard-000000.tar"
    packed = pack(path.read_bytes())
    path.write_bytes(packed)
    found = indexed(tmp_path)
    assert found.keys == plain.keys
    assert found.fingerprint() == plain.fingerprint()
    assert [found.read(i) for i in range(11)] == photos
    for workers in (0, 2):
        assert pixels(taken(found, 0, 3, batch_size=4, workers=workers)) == expected
    path.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(SourceError, match="cut or corrupt"):
        indexed(tmp_path)
    assert 5 <= len(indexed(tmp_path, on_error="skip")) < 11
    path.write_bytes(packed)
    monkeypatch.setattr("tec_cache.labelled.index.MOST_UNPACKED", 1000)
    for on_error in ("stop", "skip"):
        with pytest.raises(ConfigError, match="unpack it"):
            indexed(tmp_path, on_error=on_error)


def test_a_damaged_shard_stops_or_is_used_up_to_there(tmp_path: Path) -> None:
    write_shards(tmp_path, [8, 3])
    path = tmp_path / "shard-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="damaged"):
        indexed(tmp_path)
    index = indexed(tmp_path, on_error="skip")
    assert 3 < len(index) < 11
    assert "damaged" in str(index.unusable)
    assert [key for key in index.keys if key >= "p00008"] == ["p00008", "p00009", "p00010"]


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "a.tar", [("1.jpg", encoded(photo(1)))])
    with pytest.raises(SourceError, match=r"no photo has a label; without one are 1: .*'1': no label"):
        indexed(tmp_path / "a")
    write_tar(tmp_path / "b" / "b.tar", [("1.jpg", encoded(photo(1))), ("1.cls", b"-1")])
    with pytest.raises(ConfigError, match="class -1"):
        indexed(tmp_path / "b")
    write_tar(tmp_path / "c" / "c.tar", [("x/1.jpg", encoded(photo(1))), ("y/1.cls", b"1")])
    with pytest.raises(LayoutError, match="different folders"):
        indexed(tmp_path / "c")


def test_a_photo_stored_as_a_sparse_file_is_not_taken_for_its_bytes(tmp_path: Path) -> None:
    data = encoded(photo(1))
    write_tar(tmp_path / "a.tar", [("0.jpg", data), ("0.cls", b"1"), ("1.jpg", data), ("1.cls", b"1")])
    text = bytearray((tmp_path / "a.tar").read_bytes())
    header = memoryview(text)[:512]
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"00000000000\0" + b"%011o\0" % len(data)
    header[483:495] = b"%011o\0" % len(data)
    header[257:265] = b"ustar  \0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(text)
    index = indexed(tmp_path, on_error="skip")
    assert index.keys == ["1"]
    assert "sparse" in str(index.unusable)


def test_an_index_is_small_where_it_is_pickled(small: LabelledIndex) -> None:
    again = pickle.loads(pickle.dumps(small))
    assert again.keys == small.keys
    assert again.read(3) == small.read(3)
    count = 100_000
    names = Names.of(f"photo-{i:08d}" for i in range(count))
    assert names[-1] == "photo-00099999"
    assert names[3:5] == ["photo-00000003", "photo-00000004"]
    assert len(pickle.dumps(names)) < count * (14 + 8) + 1000
    with pytest.raises(IndexError):
        names[count]


def test_photos_of_a_web_server_are_read_by_parts_in_other_processes(tmp_path: Path, small: LabelledIndex) -> None:
    write_shards(tmp_path, [16, 13])
    with web_server(tmp_path) as server:
        index = indexed(server.url("shard-{000000..000001}.tar"))
        index.read(0)  # this process has connections of its own
        remote = taken(index, 0, 2, workers=2)
    assert [(b.numbers.tolist(), b.labels.tolist()) for b in remote] == [
        (b.numbers.tolist(), b.labels.tolist()) for b in taken(small, 0, 2)
    ]
    assert max(asked.size for asked in server.asked[-20:]) < 10_000


def test_a_shard_that_is_gone_is_no_broken_photo(tmp_path: Path) -> None:
    index = indexed(write_shards(tmp_path, [4]))
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(SourceError, match="the shard has changed"):
        taken(index, 0, 1, batch_size=4)
    shard.unlink()
    for workers in (0, 1):
        with pytest.raises(StorageError, match="cannot be read"):
            taken(index, 0, 1, batch_size=4, workers=workers, on_error="skip")


# ----------------------------------------------------------------------------------------------------- order and pixels


def test_an_order_is_a_permutation_of_seed_and_epoch() -> None:
    order = photo_order(1, 2, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(order, photo_order(1, 2, 1000))
    assert not np.array_equal(order, photo_order(1, 3, 1000))
    assert not np.array_equal(order, photo_order(2, 2, 1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize(("count", "world_size"), [(0, 2), (1, 3), (29, 1), (29, 2), (29, 3), (30, 4)])
def test_shares_hold_each_number_once(count: int, world_size: int) -> None:
    shares = [list(share_of(count, rank, world_size)) for rank in range(world_size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_follow_the_order_and_leave_out_the_tail(small: LabelledIndex) -> None:
    reader = PhotoReader(small, AUGMENT, batch_size=12, seed=5, workers=0)
    assert (reader.steps_per_epoch, reader.left_out) == (2, 5)
    batches = list(reader.batches(0, 4))
    assert [len(batch) for batch in batches] == [12] * 4
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1]
    for epoch in (0, 1):
        numbers = [n for batch in batches if batch.epoch == epoch for n in batch.numbers.tolist()]
        assert numbers == photo_order(5, epoch, 29)[:24].tolist()
    first = batches[0]
    assert (first.images.dtype, first.images.shape) == (torch.float32, (12, 3, 16, 16))
    assert first.labels.tolist() == small.label[first.numbers].tolist()
    assert [tensor.shape for tensor in first.to(torch.device("cpu")).tensors()] == [(12, 3, 16, 16), (12,)]


@pytest.mark.parametrize(
    ("workers", "world_size", "micro_batches"),
    [*((0, ranks, micro) for ranks in (1, 2, 3) for micro in (1, 2)), (1, 1, 1), (1, 2, 2), (3, 1, 2), (3, 3, 1)],
)
def test_pixels_depend_on_seed_epoch_and_photo_alone(
    small: LabelledIndex, workers: int, world_size: int, micro_batches: int
) -> None:
    expected = taken(small)
    by_rank = [
        taken(small, workers=workers, rank=rank, world_size=world_size, micro_batches=micro_batches)
        for rank in range(world_size)
    ]
    for batches in by_rank:
        assert [len(batch) for batch in batches] == [12 // world_size // micro_batches] * 6 * micro_batches
    # step by step, too: ranks in turn give the step's photos in their order
    parts = [
        by_rank[r][s * micro_batches + m] for s in range(6) for r in range(world_size) for m in range(micro_batches)
    ]
    assert np.array_equal(np.concatenate([b.numbers for b in parts]), np.concatenate([b.numbers for b in expected]))
    assert torch.equal(torch.cat([b.images for b in parts]), torch.cat([b.images for b in expected]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch(small: LabelledIndex, workers: int) -> None:
    assert pixels(taken(small, 3, 6, workers=workers)) == pixels(taken(small)[3:])


def test_another_epoch_and_another_seed_augment_otherwise(small: LabelledIndex) -> None:
    first, second = taken(small, 0, 2), taken(small, 2, 4)
    both = {n for _, n in pixels(first)} & {n for _, n in pixels(second)}
    assert len(both) > 15
    assert not any(pixels(first)[0, n] == pixels(second)[1, n] for n in both)
    other = pixels(taken(small, 0, 2, seed=6))
    same = [name for name in other if name in pixels(first)]
    assert len(same) > 15
    assert not any(other[name] == pixels(first)[name] for name in same)


def test_nothing_before_the_first_step_is_read(small: LabelledIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    real = PhotoIndex.read
    monkeypatch.setattr(PhotoIndex, "read", lambda self, number: read.append(number) or real(self, number))
    batches = taken(small, 1, 2)
    assert read == batches[0].numbers.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_of_this_process_stay_as_they_are(small: LabelledIndex, workers: int) -> None:
    seed_generators(7)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    reader = PhotoReader(small, AUGMENT, batch_size=12, workers=workers)
    for _ in reader.batches(0, 2):
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1][1])  # type: ignore[index]
        assert torch.equal(torch.get_rng_state(), before[2])


def test_keys_of_64_bits_seed_all_three_generators() -> None:
    def drawn(key: int) -> tuple[float, float, float, float]:
        with generators_kept():
            seed_generators(key)
            return random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(()))

    assert drawn(2**64 - 1) == drawn(2**64 - 1)
    every = [value for key in (0, 1, 1 << 32, 2**64 - 1) for value in drawn(key)]
    assert len(set(every)) == 16, "two generators, or two keys, draw the same"


# ---------------------------------------------------------------------------------------------------- each photo once


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_photo_is_judged_once(small: LabelledIndex, world_size: int, workers: int) -> None:
    numbers: list[int] = []
    for rank in range(world_size):
        reader = EvaluationReader(small, CENTER, batch_size=4, rank=rank, world_size=world_size, workers=workers)
        batches = list(reader.once())
        assert all(len(batch) == 4 for batch in batches[:-1])
        for batch in batches:
            assert batch.labels.tolist() == small.label[batch.numbers].tolist()
            numbers += batch.numbers.tolist()
        if rank == 0:
            decoded = Image.open(io.BytesIO(small.read(0)))
            assert torch.allclose(batches[0].images[0], CENTER(decoded), atol=0.05)
            assert torch.equal(torch.cat([b.images for b in reader.once()]), torch.cat([b.images for b in batches]))
    assert numbers == list(range(29))


def test_a_rank_may_have_no_photo(tmp_path: Path) -> None:
    index = indexed(write_shards(tmp_path, [2]))
    shares = [
        [b.numbers.tolist() for b in EvaluationReader(index, CENTER, batch_size=4, rank=r, world_size=3).once()]
        for r in range(3)
    ]
    assert sorted(map(len, shares)) == [0, 1, 1]


# ------------------------------------------------------------------------------------------------------ broken photos


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> LabelledIndex:
    """12 photos, of which the second and the third are none."""
    members = [(f"p{i}.{kind}", b"") for i in range(12) for kind in ("jpg", "cls")]
    for place, (name, _) in enumerate(members):
        number = place // 2
        whole = encoded(photo(number))
        data = whole[: len(whole) // 2] if number == 1 else b"words" if number == 2 else whole
        members[place] = (name, str(number).encode() if name.endswith("cls") else data)
    return indexed(write_tar(tmp_path_factory.mktemp("broken") / "b.tar", members))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_photo_stops_with_its_name(broken: LabelledIndex, workers: int) -> None:
    with pytest.raises(SourceError, match=r"photo 'p[12]': not a") as caught:
        taken(broken, 0, 1, workers=workers)
    assert type(caught.value) is SourceError
    assert caught.value.where.endswith("b.tar")
    assert "--on-error skip" in caught.value.todo
    reader = EvaluationReader(broken, CENTER, batch_size=12, workers=workers)
    with pytest.raises(SourceError, match="photo 'p1': not a whole image"):
        list(reader.once())


@pytest.mark.parametrize(("world_size", "micro_batches", "workers"), [(1, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 0)])
def test_the_next_whole_photo_of_the_step_stands_in(
    broken: LabelledIndex, world_size: int, micro_batches: int, workers: int
) -> None:
    numbers: list[int] = []
    images: list[torch.Tensor] = []
    damaged: set[str] = set()
    for rank in range(world_size):
        reader = PhotoReader(
            broken, AUGMENT, batch_size=12, seed=1, rank=rank, world_size=world_size, workers=workers, on_error="skip"
        )
        for batch in reader.batches(0, 1, micro_batches=micro_batches):
            numbers += batch.numbers.tolist()
            images += list(batch.images)
            assert batch.labels.tolist() == batch.numbers.tolist()
        damaged |= reader.damaged
    order = photo_order(1, 0, 12).tolist()
    expected = list(order)
    for place in reversed(range(24)):
        if order[place % 12] in (1, 2):
            expected[place % 12] = expected[(place + 1) % 12]
    assert numbers == expected
    assert len(damaged) == 2
    assert any("'p1': not a whole image" in text for text in damaged)
    seen: dict[int, torch.Tensor] = {}
    for number, image in zip(numbers, images, strict=True):
        assert torch.equal(seen.setdefault(number, image), image)


def test_a_step_without_a_whole_photo_is_an_error(tmp_path: Path) -> None:
    members = [(f"{i}.{kind}", b"1") for i in range(4) for kind in ("jpg", "cls")]
    index = indexed(write_tar(tmp_path / "b.tar", members))
    with pytest.raises(SourceError, match="every photo of a step is broken"):
        taken(index, 0, 1, batch_size=4, on_error="skip")
    reader = EvaluationReader(index, CENTER, batch_size=3, workers=0, on_error="skip")
    assert list(reader.once()) == []
    assert len(reader.damaged) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_stands_in_where_photos_are_judged(broken: LabelledIndex, workers: int) -> None:
    reader = EvaluationReader(broken, CENTER, batch_size=3, workers=workers, on_error="skip")
    assert [b.numbers.tolist() for b in reader.once()] == [[0], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert len(reader.damaged) == 2


# ----------------------------------------------------------------------------------------------------------- processes


def children() -> set[int]:
    """Processes that this one has begun and that have not been waited for."""
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


class Slow:
    """Takes its time for each photo but the first ones of a process."""

    def __init__(self, seconds: float, quick: int = 12) -> None:
        self.seconds, self.quick, self.calls = seconds, quick, 0

    def __call__(self, image: Image.Image) -> torch.Tensor:
        self.calls += 1
        time.sleep(self.seconds * (self.calls > self.quick))
        return CENTER(image)


@pytest.mark.parametrize("transform", [AUGMENT, Slow(0.5)])
def test_no_process_is_left(small: LabelledIndex, broken: LabelledIndex, transform: Any) -> None:
    before = children()
    reader = PhotoReader(small, transform, batch_size=12, workers=2)
    batches = reader.batches(0, 1000)
    next(batches)
    assert len(children() - before) == 2
    start = time.monotonic()
    batches.close()
    assert children() == before
    assert time.monotonic() - start < 4
    batches = reader.batches(0, 1000)
    next(batches)
    reader.close()
    assert children() == before
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    with pytest.raises(SourceError):
        list(PhotoReader(broken, transform, batch_size=12, workers=2).batches(0, 4))
    assert children() == before
    assert len(list(reader.batches(0, 2))) == 2
    assert children() == before


def test_workers_go_on_over_epochs_and_hear_no_signal(small: LabelledIndex) -> None:
    reader = PhotoReader(small, AUGMENT, batch_size=12, workers=2)
    batches = reader.batches(0, 8)
    first = [next(batches)]
    begun = children()
    for pid in begun:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, name)
    for _ in range(5):
        first.append(next(batches))
        assert children() == begun
    batches.close()
    assert pixels(first) == pixels(taken(small, 0, 6, seed=0))


def test_a_worker_that_is_killed_is_an_error_of_ours(small: LabelledIndex) -> None:
    before = children()
    reader = PhotoReader(small, Slow(0.05), batch_size=12, workers=1)
    batches = reader.batches(0, 1000)
    next(batches)
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(TecCacheError, match="a process that makes batches has ended"):
        list(batches)
    assert children() == before


def fails(image: Image.Image) -> torch.Tensor:
    raise ZeroDivisionError("a transform's own")


def halves(image: Image.Image) -> torch.Tensor:
    return CENTER(image).half()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_transform_does_wrong_is_told(small: LabelledIndex, workers: int) -> None:
    for transform, kind, text in (
        (fails, ZeroDivisionError, "a transform's own"),
        (halves, ConfigError, "float16"),
        (lambda image: CENTER(image)[:, : random.randint(3, 16)], ConfigError, "different shapes"),
    ):
        with pytest.raises(kind, match=text):
            list(PhotoReader(small, transform, batch_size=12, workers=workers).batches(0, 1))


def leaves(index: LabelledIndex, how: str, pids: Any) -> None:
    """Begin workers, say which, and end while they are in the midst of a photo."""
    batches = PhotoReader(index, Slow(60), batch_size=12, workers=2).batches(0, 10**6)
    next(batches)
    pids.send(children())
    globals()["kept"] = batches  # so that nobody closes it
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)


def is_there(pid: int) -> bool:
    """Say whether a process lives; what nobody waits for stays a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["killed", "ends without closing"])
def test_workers_end_with_the_process_that_began_them(small: LabelledIndex, how: str) -> None:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=leaves, args=(small, how, sender))
    process.start()
    pids = receiver.recv()
    process.join(20)
    assert process.exitcode == (-signal.SIGKILL if how == "killed" else 0)
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(is_there, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_there, pids))


def test_batches_are_pinned_as_a_whole(small: LabelledIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    # there is no pinned memory without an accelerator: what is pinned becomes zeros here
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: torch.zeros_like(tensor))
    (batch,) = taken(small, 0, 1, pin_memory=True)
    assert not any(tensor.any() for tensor in batch.tensors())
    (plain,) = taken(small, 0, 1)
    made = pin_memory(Made(plain, ("a",)))  # what torch does in a thread
    assert isinstance(made, Made)
    assert not any(tensor.any() for tensor in made.batch.tensors())
    assert np.array_equal(made.batch.numbers, plain.numbers)
    assert list(made.damaged) == ["a"]


def test_settings_that_cannot_be_meant(small: LabelledIndex) -> None:
    for options, text in (
        ({"batch_size": 12, "world_size": 5}, "12 photos does not divide among 5 ranks"),
        ({"batch_size": 30}, "does not fit into an epoch of 29"),
        ({"batch_size": 0}, "does not fit"),
        ({"on_error": "hope"}, "'hope'"),
    ):
        with pytest.raises(ConfigError, match=text):
            taken(small, **options)
    with pytest.raises(ConfigError, match="12 photos cannot be divided into 5"):
        taken(small, micro_batches=5)
    with pytest.raises(ConfigError, match="a batch of 0"):
        EvaluationReader(small, CENTER, batch_size=0)


def test_errors_survive_pickling() -> None:
    error = StorageError("what", where="where", todo="todo", details=["a", "b"], command="tec-cache x")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is StorageError
    assert str(again) == str(error)
    assert vars(again) == vars(error)


# ---------------------------------------------------------------------------------------------------------- transforms


def same_as_timm(ours: Any, **settings: Any) -> bool:
    theirs = timm.data.create_transform(interpolation="bicubic", mean=MEAN, std=STD, **settings)
    equal = []
    for seed in range(12):
        image = photo(seed, 300, 240)
        made = []
        for transform in (ours, theirs):
            with generators_kept():
                seed_generators(seed)
                made.append(transform(image))
        equal.append(torch.equal(*made))
    return all(equal)


def test_a_posterization_may_keep_no_bit() -> None:
    settings: dict[str, Any] = {"prob": 1.0, "hparams": {"magnitude_std": 0}}
    image = photo(1)
    for magnitude in (0, 3, 9, 10):
        operation = AugmentOp("PosterizeIncreasing", magnitude=magnitude, **settings)
        expected = np.asarray(operation(image)) if magnitude < 10 else np.zeros((60, 80, 3), np.uint8)
        keep_zero_bits(operation)
        assert np.array_equal(np.asarray(operation(image)), expected)
    (augment,) = [part for part in AUGMENT.transforms if isinstance(part, RandAugment)]  # type: ignore[attr-defined]
    (operation,) = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    operation = copy.copy(operation)
    operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
    assert not np.asarray(operation(image)).any()


def test_transforms_are_timms() -> None:
    recipe = {"color_jitter": None, "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    ours = train_transform(64, mean=MEAN, std=STD)
    assert same_as_timm(ours, input_size=64, is_training=True, **recipe)
    assert not same_as_timm(ours, input_size=64, is_training=True, **(recipe | {"re_mode": "const"}))
    plain = {"color_jitter": None, "auto_augment": None, "re_prob": 0.0, "scale": (0.08, 1.0), "hflip": 0.5}
    assert same_as_timm(probe_transform(64, mean=MEAN, std=STD), input_size=64, is_training=True, **plain)
    for size, crop in ((64, 0.875), (224, 0.875), (256, 1.0)):
        judged = evaluation_transform(size, MEAN, STD)
        assert same_as_timm(judged, input_size=size, is_training=False, crop_pct=crop)
        assert not same_as_timm(judged, input_size=size, is_training=False, crop_pct=0.9)


def test_pixels_are_those_of_to_tensor_and_normalize_to_the_bit() -> None:
    from timm.data import create_transform

    from tec_cache.labelled.transforms import Pixels

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = evaluation_transform(48, mean, std)
    assert any(isinstance(part, Pixels) for part in ours.transforms)  # type: ignore[attr-defined]
    theirs = create_transform(48, is_training=False, interpolation="bicubic", mean=mean, std=std, crop_pct=0.875)
    for number in range(4):
        image = photo(number, 90, 70)
        assert torch.equal(ours(image), theirs(image))
        assert ours(image).is_contiguous()
    trained = train_transform(32, mean=mean, std=std)
    assert sum(isinstance(part, Pixels) for part in trained.transforms) == 1  # type: ignore[attr-defined]
