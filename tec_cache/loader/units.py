"""What is kept in memory of an epoch: its order, and of each unit who its crops are and where they and its codes lie.

About 55 bytes a view, keys included: lists of numbers become arrays, and names one string.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import Cache, TargetSet
from tec_cache.cache.record import TargetRecord, ViewsRecord
from tec_cache.loader.order import EpochOrder
from tec_cache.rng import key64

T = TypeVar("T")

Block = tuple[list[bytes], dict[str, npt.NDArray[np.generic]]]
"""A block of rows as it is read: JPEGs, and stored arrays (rows, ...)."""


class OpenUnit:
    """A unit whose record was read: it reads blocks and knows the samples."""

    def __init__(self, cache: Cache, targets: TargetSet | None, unit: Unit) -> None:
        self.cache, self.targets, self.unit = cache, targets, unit
        record = cache.views_record(unit)
        shard = cache.shards[unit.shard]
        self.sample_keys = np.array([key64("sample", shard, key) for key in record.keys], dtype=np.uint64)
        self.labels = np.array([-1 if x is None else x for x in record.labels], dtype=np.int64)
        self.record: ViewsRecord = replace(compact(record), labels=[], skipped=[])

    def __len__(self) -> int:
        return len(self.sample_keys)

    @functools.cached_property
    def target_record(self) -> TargetRecord | None:
        """Where the targets' blocks lie, read by the first worker that needs them."""
        return None if self.targets is None else compact(self.targets.record(self.unit, self.record))

    def block(self, number: int) -> Block:
        """Read one block: JPEGs and stored rows, each array from one range of its file."""
        return self.cache.read_block(self.record, number, self.targets, self.target_record)


@dataclass(frozen=True)
class Epoch:
    """One epoch: the units of its view, and the order of their rows."""

    number: int
    units: list[OpenUnit]
    order: EpochOrder


class _Strings(Sequence[str]):
    """A list of strings in one string."""

    def __init__(self, strings: Iterable[str]) -> None:
        strings = list(strings)
        self._text = "".join(strings)
        self._ends = array("l", [0])
        for string in strings:
            self._ends.append(self._ends[-1] + len(string))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._text[self._ends[place] : self._ends[place + 1]]


def compact(value: T) -> T:
    """Return a record with its lists of numbers and of strings in a quarter of the memory, whatever it nests."""
    found: Any = value
    if is_dataclass(value) and not isinstance(value, type):
        found = replace(value, **{f.name: compact(getattr(value, f.name)) for f in fields(value)})
    elif isinstance(value, dict):
        found = {name: compact(item) for name, item in value.items()}
    elif isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            found = array("q", value)
        elif all(isinstance(item, str) for item in value):
            found = _Strings(value)
        elif all(isinstance(item, list) for item in value):
            found = [compact(item) for item in value]
    return found
