"""Units of views to units of targets: the base in the caller's thread, coding and writing behind it in others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pipelines.extraction.base_batches import Places, UnitBatch, batches_ahead, targets_of, unit_batches
from pipelines.extraction.fit import Coded
from pipelines.extraction.prepare_targets import TargetJob
from pipelines.extraction.tally import BASE, CODING, WRITERS, WRITING, Tally
from tec_cache.background import Channel, Stages
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import Cache
from tec_cache.cache.writer import TargetArrays, commit_targets
from tec_cache.data.image_pool import ImagePool
from tec_cache.device import Stopwatch, own_stream
from tec_cache.types import Targets

BATCHES_BEHIND = 2
"""Batches that the base is ahead of the coding: on a GPU the next ones are queued while one is coded."""


class Computed(NamedTuple):
    """A batch with its targets, which the device may still be computing."""

    part: UnitBatch
    targets: Targets | None
    watch: Stopwatch


class Filled(NamedTuple):
    """A unit whose rows are all coded."""

    part: UnitBatch
    arrays: TargetArrays


@dataclass(frozen=True)
class TargetMaker:
    """The targets of units of views.

    Memory: of pixels (uint8), VIEWS_AHEAD views and two batches; of targets (float32, on the device), BATCHES_BEHIND
    batches and two; of codes, the arrays of WRITERS + 1 units, one being filled and the others being written. A unit of
    1,024 views of a ViT-B takes 193 MB of codes at most qualities, 385 MB at quality exact with k = 15.
    """

    cache: Cache
    job: TargetJob
    coded: Coded
    pool: ImagePool
    tally: Tally

    def make(self, units: Iterable[Unit], stages: Stages) -> None:
        """Make the targets of all units that have none."""
        computed: Channel[Computed] = stages.channel(BATCHES_BEHIND)
        filled: Channel[Filled] = stages.channel(WRITERS)
        room: Channel[None] = stages.channel(WRITERS + 1)  # one for each unit that may be in memory
        for _ in range(WRITERS + 1):
            room.put(None)
        stages.start(self.code, computed, filled, room, torch.get_num_threads())
        for _ in range(WRITERS):
            stages.start(self.write, filled, room)
        ahead = batches_ahead(self.job)
        places = Places(self.job, self.pool, ahead + 2, stages.check)  # waiting, being begun, being computed
        batches = unit_batches(self.cache, self.job, self._without_targets(units), places)
        for part in stages.ahead(batches, ahead):
            computed.put(self.compute(part))
        computed.end()

    def _without_targets(self, units: Iterable[Unit]) -> Iterator[Unit]:
        done = set(self.cache.committed(self.job.name))
        for unit in units:
            if unit in done:
                continue
            if self.cache.store.size(layout.target_record(self.job.name, unit)) is None:
                yield unit
            else:  # another job was here meanwhile
                self.tally.found(len(self.cache.views_record(unit).keys))

    def compute(self, part: UnitBatch) -> Computed:
        """Run the base on a batch."""
        pixels = None if part.batch is None else part.batch.decoded()
        with Stopwatch(self.job.compute.device) as watch:
            targets = None if pixels is None else targets_of(self.job, pixels)
        if part.batch is not None:
            part.batch.done()
        return Computed(part, targets, watch)

    def code(self, batches: Iterable[Computed], filled: Channel[Filled], room: Iterator[None], threads: int) -> None:
        """Check and encode each batch; pass on the units that are whole.

        threads: torch's, which each thread has of its own and of which the last bits depend.
        """
        torch.set_num_threads(threads)
        device, codec, spec = self.job.compute.device, self.coded.codec, self.job.spec
        # a stream of its own, so that copies to the host do not wait for the batches queued on the device meanwhile
        with own_stream(device):
            for part, targets, watch in batches:
                self.tally.busy.add(BASE, watch.seconds())
                if part.rows.start == 0:
                    next(room)
                    arrays = TargetArrays(len(part.views.keys), codec.arrays(spec))
                if part.batch is not None and targets is not None:
                    with self.tally.busy.at(CODING):
                        part.batch.require_finite(targets)
                        arrays.add(codec.encode(targets, spec))
                    self.tally.coded(len(part.rows))
                if part.last:
                    filled.put(Filled(part, arrays))
        filled.end()

    def write(self, units: Iterable[Filled], room: Channel[None]) -> None:
        """Compress and commit units."""
        for part, arrays in units:
            with self.tally.busy.at(WRITING):
                record = commit_targets(
                    self.cache.store, self.job.name, part.unit, arrays, part.views, self.job.fingerprint,
                    self.coded.sha256,
                )  # fmt: skip
            self.tally.written(arrays.count, record.payload.size if record.payload else 0)
            room.put(None)
