"""How the ranks of a job find each other, also after torchrun has started them again.

torchrun keeps one store for all attempts of a job, and what an attempt that was killed wrote there still stands: the
addresses of processes that are gone. Ranks that are started again would call those, and fail or hang
(https://github.com/pytorch/pytorch/issues/167288). Nothing that torchrun tells a process numbers the attempts alike on
all nodes: TORCHELASTIC_RESTART_COUNT is each node's own. So rank 0 gives each attempt a name of its own, and does not
go on before every rank that lives has it.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from tec_cache.errors import TecCacheError

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = 1800.0
"""Seconds that a rank waits for the others: torch's own, for a process group."""

_PAUSE = 0.02
"""Between two looks. Waiting inside torch would let no signal through."""


def fresh_store(store: Store, rank: int, world_size: int) -> Store:
    """Return a part of a store that only this attempt's ranks use. Raises TecCacheError where some do not come."""
    from torch.distributed import PrefixStore

    attempt = _call_all(store, world_size) if rank == 0 else _answer(store, rank)
    return PrefixStore(attempt, store)


def _call_all(store: Store, world_size: int) -> str:
    """Name the attempt, and tell it to whoever asks until each rank has said that it knows.

    A question may be one of an earlier attempt, whose rank is gone: it gets its answer too, and says nothing more.
    """
    attempt, answered = f"attempt-{uuid.uuid4().hex}", set()
    waiting, end = set(range(1, world_size)), time.monotonic() + PATIENCE
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"{attempt}/{rank}"]):
                waiting.remove(rank)
            elif store.check([f"question/{rank}"]):
                question = store.get(f"question/{rank}").decode()
                if question not in answered:
                    store.set(question, attempt)
                    answered.add(question)
        _pause(end, f"ranks {sorted(waiting)} have not begun")
    return attempt


def _answer(store: Store, rank: int) -> str:
    """Ask for the attempt's name under a word that nobody used before, and say that it is known."""
    question, end = f"question-{uuid.uuid4().hex}", time.monotonic() + PATIENCE
    store.set(f"question/{rank}", question)
    while not store.check([question]):
        _pause(end, "rank 0 has not begun")
    attempt = store.get(question).decode()
    store.set(f"{attempt}/{rank}", "")
    return attempt


def _pause(end: float, what: str) -> None:
    if time.monotonic() > end:
        raise TecCacheError(what, todo="see their errors, or whether the nodes reach each other; then start again")
    time.sleep(_PAUSE)
