"""Does an index say what the records say? It is looked at only where all that it is made of is whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from tec_cache.audit.findings import INDEX
from tec_cache.audit.ledger import Ledger
from tec_cache.audit.units import Facts
from tec_cache.cache.index.heading import Heading
from tec_cache.cache.index.reading import StaleIndex, UnitIndex
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import RECORD_THREADS
from tec_cache.errors import listed

if TYPE_CHECKING:
    import numpy as np

H = TypeVar("H", bound=Heading)


def check_index(
    ledger: Ledger,
    name: str,
    open_index: Callable[[], UnitIndex[H]],
    facts: Mapping[Unit, Facts],
    dtype: np.dtype[np.void],
) -> None:
    """Compare an index with the records: its table, and in a full audit the details of each unit as well.

    facts: what the records say. dtype: of the details. That there is no index is nothing to be told.
    """
    problem = ""
    try:
        problem = _problem(open_index(), facts, dtype if ledger.full else None)
    except (FileNotFoundError, NotADirectoryError):
        if ledger.store.size(name) is None:
            return
        problem = "it cannot be read"
    except (OSError, ValueError) as error:
        problem = str(error)
    ledger.report.files += 1
    if problem:
        ledger.find("index", name, f"does not fit the records: {problem}", INDEX, drop=(name,))


def _problem(index: UnitIndex[H], facts: Mapping[Unit, Facts], dtype: np.dtype[np.void] | None) -> str:
    """Say what is wrong with an index that fits by its heading; empty where nothing is. dtype: to read the details."""
    units = [index.unit(number) for number in range(len(index))]
    recorded = [facts[unit].entry if unit in facts else b"" for unit in units]
    indexed = [entry.tobytes() for entry in index.entries]
    others = [unit for unit, a, b in zip(units, recorded, indexed, strict=True) if a != b]
    if others:
        return f"they say otherwise of {listed(map(str, others))}"
    if dtype is None:
        return ""

    def damage(number: int) -> str:
        try:
            index.details(number, dtype)
        except StaleIndex as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(RECORD_THREADS, thread_name_prefix="audit") as pool:
        return next(filter(None, pool.map(damage, range(len(units)))), "")
