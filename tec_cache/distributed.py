"""Ranks of torchrun, and which units are a rank's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from tec_cache.errors import ConfigError

T = TypeVar("T")


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


def agreed(value: T, ranks: Ranks) -> T:
    """Return rank 0's value in every rank of a process group."""
    if ranks.world_size == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def process_group(ranks: Ranks, device: str) -> Iterator[None]:
    """Join torch's process group (nccl on GPUs, gloo on CPUs) for the length of the block."""
    if ranks.world_size == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
