"""Ranks of torchrun: which units are a rank's own, how ranks meet, and what torchrun is told when one fails."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.rendezvous import fresh_store

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

LAST_WORD = 2.0
"""Seconds that a rank waits when another one is gone. torchrun looks ten times a second, names whoever it sees end
first as the cause, and ends the others: the cause must not be this one."""
PATIENCE = timedelta(days=20)
"""How long ranks wait for each other in a patient group: torch gives up after 10 minutes on GPUs, after 30 on CPUs."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; 0 of 1 without it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """Processes on this machine."""
    part: int = 0
    """Which of several independent jobs this is, from zero."""
    parts: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read what torchrun sets."""
        try:
            world_size = int(os.environ.get("WORLD_SIZE", 1))
            return cls(
                rank=int(os.environ.get("RANK", 0)),
                local_rank=int(os.environ.get("LOCAL_RANK", 0)),
                world_size=world_size,
                local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            )
        except ValueError as error:
            raise ConfigError(f"RANK, LOCAL_RANK, WORLD_SIZE or LOCAL_WORLD_SIZE is not a number: {error}") from error

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that talks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether this process does all the work."""
        return self.world_size * self.parts == 1

    def with_part(self, part: tuple[int, int]) -> Ranks:
        """Return the same rank as one of part i (from zero) of n independent jobs."""
        return replace(self, part=part[0], parts=part[1])

    def owns(self, shard: int, group: int, num_shards: int) -> bool:
        """Say whether a group of samples is this rank's work.

        With many shards each rank reads its own; with few (less than 4 a rank) all read and take turns by group.
        """
        workers, worker = self.world_size * self.parts, self.part * self.world_size + self.rank
        if self.by_shard(num_shards):
            return shard % workers == worker
        return (shard + group) % workers == worker

    def by_shard(self, num_shards: int) -> bool:
        """Say whether the work is divided by whole shards."""
        return num_shards >= 4 * self.world_size * self.parts


def agreed(value: T, ranks: Ranks, group: Any = None) -> T:
    """Return rank 0's value in every rank of a process group. group: of `patient_group`, where it may take long."""
    if ranks.world_size == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def patient_group(ranks: Ranks) -> Any:
    """Return a group in which all ranks may wait as long as one of them works; every rank calls this.

    On GPUs too they wait on the CPU. The end of a process still ends the waiting at once.
    """
    return None if ranks.world_size == 1 else gloo_group(PATIENCE)


def gloo_group(timeout: timedelta | None = None) -> Any:
    """Return a group of all ranks that talk on the CPU, beside nccl too; every rank calls this.

    timeout: how long ranks wait in it; torch's own by default. Raises TecCacheError where they do not reach each other.
    """
    import torch.distributed as dist

    with _explained_connecting():
        return dist.new_group(backend="gloo", timeout=timeout)


def gathered(value: T, ranks: Ranks) -> list[T]:
    """Return the values of all ranks of a process group, in every rank."""
    if ranks.world_size == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Join torch's process group (nccl on GPUs, gloo on CPUs) for the length of the block.

    A block that ends well leaves the group. One that fails does not: leaving is a collective in nccl, and the other
    ranks wait in another one, so that nobody would hear of the error before the watchdog's ten minutes are over. The
    process is meant to print its error and end at once; see `in_group`.
    Raises TecCacheError where another rank ends before its time, or ranks do not reach each other.
    """
    if ranks.world_size == 1:
        yield
        return
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size))
    store = fresh_store(store, ranks.rank, ranks.world_size)
    joining: dict[str, Any] = {"store": store, "rank": ranks.rank, "world_size": ranks.world_size}
    if device.type == "cuda":
        # told the device, nccl connects now, where a fault is explained, and guesses at none in a barrier
        dist.init_process_group("nccl", device_id=device, **joining)
    else:
        with _explained_connecting():
            dist.init_process_group("gloo", **joining)
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeErrors that name its source file
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        time.sleep(LAST_WORD)
        raise TecCacheError(
            "another process of this job has ended",
            where=f"rank {ranks.rank} was waiting for it",
            todo="see that one's error; the same command goes on from the last checkpoint",
        ) from error
    dist.destroy_process_group()


def in_group() -> bool:
    """Say whether this process belongs to a process group: after an error it must end without a word to the others.

    Python's own way out would run what torch does at the end of a process, which may wait for them.
    """
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


@contextmanager
def _explained_connecting() -> Iterator[None]:
    """Say what to do where gloo finds no way from one process to another. Raises TecCacheError."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        name = os.environ.get("GLOO_SOCKET_IFNAME")
        raise TecCacheError(
            f"the processes of this job do not reach each other over gloo: {first}",
            where=f"GLOO_SOCKET_IFNAME={name}" if name else "over the address of this machine's own name",
            todo="unless another process has failed: set GLOO_SOCKET_IFNAME, on each node, to the name of the network "
            "interface through which the others reach it (`ip -br address` lists them)",
        ) from error


def under_torchrun() -> bool:
    """Say whether torchrun started this process, also where it is the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def tell_torchrun(message: str) -> None:
    """Leave an error where torchrun looks for it: it shows it last, below all that the other ranks still say."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
        with suppress(OSError), open(path, "w") as file:  # the error itself must still be printed
            json.dump({"message": told}, file)
