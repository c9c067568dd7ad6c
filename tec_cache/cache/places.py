"""Where a unit's crops and targets lie, as much as reading them takes: a record says it, and so does an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tec_cache.cache.record import Payload

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = Sequence[int] | npt.NDArray[np.unsignedinteger[Any]]


class Places(Protocol):
    """Where one piece of each row lies in a file."""

    @property
    def offsets(self) -> Numbers:
        """Byte position of each."""

    @property
    def sizes(self) -> Numbers:
        """Bytes of each."""

    @property
    def crc32(self) -> Numbers:
        """CRC-32 of each."""


class CropPlaces(Places, Protocol):
    """Where the crops of a unit lie."""

    @property
    def unit(self) -> str:
        """Name of the unit."""

    @property
    def payload(self) -> Payload | None:
        """The tar; None for a unit without crops."""


class TargetPlaces(Protocol):
    """Where the targets of a unit lie."""

    @property
    def count(self) -> int:
        """Rows."""

    @property
    def payload(self) -> Payload | None:
        """The zip; None for a unit without rows."""

    @property
    def blocks(self) -> Mapping[str, Sequence[Sequence[int]]]:
        """Array -> [byte position, bytes, CRC-32] of each block of rows."""
