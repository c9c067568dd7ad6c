"""Memory that does not suffice, of a GPU or of the machine: what was being done, and the number to give instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tec_cache.errors import TecCacheError

_TEXTS = ("DefaultCPUAllocator: can't allocate", "CUDA out of memory", "CUDA_ERROR_OUT_OF_MEMORY",
          "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")  # fmt: skip
"""How torch says it in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out; without importing torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"OutOfMemoryError", "MemoryError"}:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


@contextmanager
def explained_memory(doing: Callable[[], str], where: str, todo: Callable[[], str]) -> Iterator[None]:
    """Turn memory that ran out within the block into a TecCacheError.

    doing: what of, in words that follow "memory does not suffice for". where: the device, as torch names it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, doing(), where=where, todo=todo()) from error


def out_of_memory(error: BaseException, doing: str, *, where: str = "", todo: str) -> TecCacheError:
    """Return the error for memory that ran out, with what torch says of it."""
    said = str(error).strip().partition("\n")[0].partition(" See documentation")[0]
    return TecCacheError(f"memory does not suffice for {doing}", where=where, todo=todo, details=[said] if said else [])
