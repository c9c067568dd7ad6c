"""The loader: an order that depends on (seed, epoch) alone, and rows that belong to their crops."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.loader.parts import largest_share
from tec_cache.cache.layout import BLOCK_ROWS
from tec_cache.cache.opening import open_cache
from tec_cache.cache.pixels import decode_crop
from tec_cache.errors import CacheError, ConfigError
from tec_cache.loader import Batch, EpochOrder, Loader
from tec_cache.loader.units import OpenUnit
from tec_cache.rng import key64


def loader(path: Path, **options: object) -> Loader:
    cache = open_cache(path)
    values = {"batch_size": 16, "pixel_sizes": (32,)} | options
    return Loader(cache, cache["tiny"], **values)  # type: ignore[arg-type]


def collect(loader: Loader, start: int, stop: int, micro_batches: int = 1) -> list[Batch]:
    return list(loader.batches(start, stop, micro_batches=micro_batches))


def keys_of(batches: list[Batch]) -> list[int]:
    return np.concatenate([b.sample_keys for b in batches]).tolist()


def order(counts: list[int], *, seed: int = 0, epoch: int = 0, buffer_blocks: int = 4) -> tuple[Any, Any]:
    whole = EpochOrder(counts, seed=seed, epoch=epoch, buffer_blocks=buffer_blocks)
    return whole.places(0, len(whole))


@pytest.mark.parametrize("buffer_blocks", [1, 3, 4, 1000])
def test_order_is_a_permutation_and_a_function_of_seed_and_epoch(buffer_blocks: int) -> None:
    counts = [100, 7, 0, 64, 1, 333, 0]
    units, rows = order(counts, seed=1, epoch=2, buffer_blocks=buffer_blocks)
    expected = {(u, r) for u, n in enumerate(counts) for r in range(n)}
    assert set(zip(units.tolist(), rows.tolist(), strict=True)) == expected
    assert len(units) == len(expected)
    again = order(counts, seed=1, epoch=2, buffer_blocks=buffer_blocks)
    assert np.array_equal(units, again[0])
    assert np.array_equal(rows, again[1])
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert not np.array_equal(rows, order(counts, **other, buffer_blocks=buffer_blocks)[1])
    assert len(EpochOrder([], seed=0, epoch=0, buffer_blocks=4)) == 0


def test_any_part_of_an_order_is_that_part_of_the_whole() -> None:
    counts = [100, 7, 64, 1, 333]
    units, rows = order(counts)
    asked = EpochOrder(counts, seed=0, epoch=0, buffer_blocks=4)
    for start, stop in ((0, 1), (127, 129), (3, 400), (128, 256), (504, 505), (40, 41), (7, 7)):
        part = asked.places(start, stop)
        assert np.array_equal(part[0], units[start:stop])
        assert np.array_equal(part[1], rows[start:stop])


def test_a_buffer_reads_few_blocks_and_mixes_all_of_them() -> None:
    counts = [1024] * 8
    units, rows = order(counts, buffer_blocks=16)
    buffer = slice(0, 16 * BLOCK_ROWS)
    blocks = units[buffer] * 32 + rows[buffer] // BLOCK_ROWS
    assert len(set(blocks.tolist())) == 16
    first = blocks[: 4 * BLOCK_ROWS]
    assert len(set(first.tolist())) == 16, "a quarter of the buffer holds rows of all its blocks"
    assert np.bincount(units[buffer], minlength=8).max() <= 8 * BLOCK_ROWS


def test_how_well_an_order_mixes_is_told_from_a_perfect_shuffle_and_from_none() -> None:
    counts = [1024] * 16
    mixed, whole = (EpochOrder(counts, seed=0, epoch=0, buffer_blocks=n) for n in (32, 512))
    found, perfect = largest_share(mixed, 256), largest_share(whole, 256)
    assert perfect < found < 2 * perfect, "a buffer of 32 blocks, and one that holds everything"
    assert largest_share(EpochOrder([1024], seed=0, epoch=0, buffer_blocks=32), 256) == 1.0


@pytest.mark.parametrize("quality", ["exact", "default"])
def test_every_row_comes_with_its_own_crop_targets_and_label(quality: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue("made_cache" if quality == "exact" else "coded_cache")
    cache = open_cache(path)
    expected = {}
    for unit in [u for u in cache.view_units if u.view == 1]:
        record = cache.views_record(unit)
        arrays = cache["tiny"].read_unit(cache["tiny"].record(unit))
        for row, data in enumerate(cache.read_crops(record, range(len(record.keys)))):
            key = key64("sample", cache.shards[unit.shard], record.keys[row])
            expected[key] = (decode_crop(data), {n: a[row] for n, a in arrays.items()}, record.labels[row])
    ours = loader(path)
    batches = collect(ours, ours.steps_per_epoch, 2 * ours.steps_per_epoch)  # epoch 1 reads view 1
    assert len(batches) == 97 // 16
    for batch in batches:
        for i, key in enumerate(batch.sample_keys.tolist()):
            pixels, arrays, label = expected.pop(key)
            assert np.array_equal(batch.pixels[32][i].numpy(), pixels)
            assert batch.labels[i] == label
            for name, values in arrays.items():
                assert np.array_equal(batch.codes["tiny"][name][i].numpy(), values)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_workers_and_micro_batches_do_not_change_the_order(made_cache: Path, workers: int, micro_batches: int) -> None:
    expected = keys_of(collect(loader(made_cache), 0, 13))
    assert keys_of(collect(loader(made_cache, workers=workers), 0, 13, micro_batches)) == expected


def test_ranks_divide_each_batch(made_cache: Path) -> None:
    whole = collect(loader(made_cache), 0, 13)
    parts = [collect(loader(made_cache, rank=rank, world_size=4), 0, 13) for rank in range(4)]
    assert {len(p) for p in parts} == {13}
    for step, batch in enumerate(whole):
        assert keys_of([p[step] for p in parts]) == batch.sample_keys.tolist()


def test_starting_in_the_middle_gives_the_same_batches(made_cache: Path) -> None:
    everything = collect(loader(made_cache), 0, 15)
    for start in (1, 5, 6, 7, 12):
        assert keys_of(collect(loader(made_cache), start, 15)) == keys_of(everything[start:])


def test_epochs_take_turns_at_the_views_and_leave_out_another_tail(made_cache: Path) -> None:
    ours = loader(made_cache)
    per_epoch = ours.steps_per_epoch
    seen = [set(keys_of(collect(loader(made_cache), e * per_epoch, (e + 1) * per_epoch))) for e in range(3)]
    assert {len(s) for s in seen} == {96}
    assert len(seen[0] | seen[1] | seen[2]) == 97
    opened = loader(made_cache)
    collect(opened, per_epoch, per_epoch + 1)
    assert {opened._units.name(u).view for u in opened._epoch.units} == {1}, "epoch 1 reads nothing of view 0"
    one = loader(made_cache, num_views=1)
    collect(one, per_epoch, per_epoch + 1)
    assert {one._units.name(u).view for u in one._epoch.units} == {0}


def test_pixels_are_resized_and_normalized_on_the_device(made_cache: Path) -> None:
    ours = loader(made_cache, pixel_sizes=(32, 48))
    (batch,) = collect(ours, 0, 1)
    assert batch.pixels[48].shape == (16, 48, 48, 3)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    images = batch.images(32, mean, std)
    expected = (batch.pixels[32].double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(images.permute(0, 2, 3, 1).double(), expected, rtol=1e-5, atol=1e-5)
    assert batch.pixels[32].dtype == torch.uint8


def test_an_incomplete_cache_and_an_impossible_batch_are_refused(made_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit into an epoch of 97"):
        loader(made_cache, batch_size=98)
    with pytest.raises(ConfigError, match="3 ranks"):
        loader(made_cache, world_size=3)
    broken = Path(shutil.copytree(made_cache, tmp_path / "c"))
    next((broken / "records" / "targets" / "tiny").glob("*/*.json")).unlink()
    with pytest.raises(CacheError, match="missing"):
        loader(broken)


def test_damage_reaches_the_reader_and_does_not_hang(made_cache: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(made_cache, tmp_path / "c"))
    paths = list((broken / "views").glob("*/*-v00.*.tar"))
    assert len(paths) == 8
    for path in paths:
        data = path.read_bytes()
        path.write_bytes(data[:1500] + bytes(len(data) - 1500))
    with pytest.raises(CacheError, match="damaged"):
        collect(loader(broken), 0, 6)


@pytest.mark.parametrize(("workers", "ranks", "micro_batches"), [(1, 1, 1), (4, 1, 8), (2, 4, 2), (8, 4, 1)])
def test_a_block_is_read_once_an_epoch_however_many_workers_ask(
    made_cache: Path, workers: int, ranks: int, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ranks, each reads only the blocks of its own rows, and the ranks together few of them twice."""
    reads: list[tuple[str, int]] = []
    block = OpenUnit.block

    def counted(self: OpenUnit, number: int) -> Any:
        reads.append((self.crops.unit, number))
        return block(self, number)

    monkeypatch.setattr(OpenUnit, "block", counted)
    batches: dict[int, list[Batch]] = {}
    for rank in range(ranks):
        ours = loader(made_cache, batch_size=64, rank=rank, world_size=ranks, workers=workers)
        before = len(reads)
        batches[rank] = collect(ours, 0, 1, micro_batches)
        mine = reads[before:]
        assert len(mine) == len(set(mine)), "a rank reads a block once"
    assert len(keys_of([b for parts in batches.values() for b in parts])) == 64
    assert len(reads) <= len(set(reads)) + 2 * (ranks - 1)
