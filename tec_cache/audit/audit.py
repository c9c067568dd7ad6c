"""Does a cache hold what its records say, and do its files belong together? Nothing is changed here.

Every file is looked at by itself (does it parse, does it have its own checksum), then against those that it must
fit: records against the manifest, units against the source shards' records, targets against their views and codec.
"""

from __future__ import annotations

from tec_cache.audit.findings import AGAIN, ALONE, DROP, REMAKE, damaged_record
from tec_cache.audit.ledger import Ledger, Report
from tec_cache.audit.targets import TargetSetAudit
from tec_cache.audit.units import Facts, check_views
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.manifest import read_manifest
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import SourceRecord
from tec_cache.errors import CacheError
from tec_cache.progress import Progress
from tec_cache.store import Store


def audit(store: Store, *, full: bool = False, progress: Progress | None = None) -> Report:
    """Check a cache: all records and the payloads' sizes; `full`: all payloads' SHA-256 and contents as well.

    progress counts payloads and bytes. Raises OSError where the store itself cannot be listed.
    """
    ledger = Ledger(store, full, progress or Progress("verify", quiet=True))
    _Audit(ledger).run()
    return ledger.report


class _Audit:
    """One audit; its methods in the order they run."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.store = ledger, ledger.store

    def run(self) -> None:
        """Check everything; without cache.json there is nothing to check against."""
        self.ledger.report.files += 1
        if self.store.size(layout.MANIFEST) is None:
            self.ledger.find("manifest", layout.MANIFEST, "is gone, and records are there", REMAKE)
            return
        try:
            self.cache = Cache(self.store, read_manifest(self.store, layout.MANIFEST))
            group_size = int(self.cache.identity["group_size"])
        except (CacheError, KeyError, TypeError, ValueError) as error:
            self.ledger.find("manifest", layout.MANIFEST, getattr(error, "what", f"makes no sense: {error}"), REMAKE)
            return
        self._sort_names()
        self.ledger.progress.total = len(self.view_units) + sum(map(len, self.target_units.values()))
        self._sources()
        views = self._views()
        self._groups(views, group_size)
        for name in self.names:
            records = self.target_units.get(name, [])
            units = [unit for unit in records if not self._beyond(unit, layout.target_record(name, unit))]
            TargetSetAudit(self.ledger, self.cache, name, units).run(views, self.view_units)
        self._leftovers()

    def _sort_names(self) -> None:
        """Tell records by their names; whatever else lies among them is foreign, another spelling of a name too."""
        self.source_names: dict[int, str] = {}
        self.view_units: list[Unit] = []
        self.target_units: dict[str, list[Unit]] = {}
        for name in self.store.names("records"):
            match layout.file_of(name):
                case layout.File(kind="source", shard=int(shard)):
                    self.source_names[shard] = name
                case layout.File(kind="views", unit=Unit() as unit):
                    self.view_units.append(unit)
                case layout.File(kind="targets", unit=Unit() as unit, target=target):
                    self.target_units.setdefault(target, []).append(unit)
                case _:
                    self.ledger.find("unknown", name, "a file among the records that is none", ALONE)
        files = map(layout.file_of, self.store.names(layout.TARGETS))
        self.names = sorted({*self.target_units, *(file.target for file in files if file is not None)})

    def _sources(self) -> None:
        """Which source shards were read to their end, and how many photos they gave."""
        self.sources: dict[int, SourceRecord] = {}
        shards = self.cache.shards
        for number, name in self.source_names.items():
            self.ledger.report.files += 1
            try:
                record = SourceRecord.read(self.store, name)
            except CacheError as error:
                self.ledger.report.findings.append(damaged_record(error, name, ""))
                continue
            if number >= len(shards) or record.shard != shards[number]:
                self.ledger.find("record", name, f"is the record of shard {record.shard!r}", DROP, drop=(name,))
                continue
            self.sources[number] = record
        for number, shard in enumerate(shards):
            if number not in self.source_names:
                what = f"source shard {shard} was not read to its end"
                self.ledger.find("missing", layout.source_record(number), what, AGAIN)

    def _views(self) -> dict[Unit, Facts]:
        """Check all units of views; return what the sound records say."""
        units = [unit for unit in self.view_units if not self._beyond(unit, layout.views_record(unit))]
        self.view_units = units
        checked = self.ledger.check(
            lambda unit: check_views(self.store, unit, full=self.ledger.full), units, layout.views_record
        )
        facts = {c.unit: c.facts for c in checked if c.facts is not None}
        self.ledger.strangers(facts, "identity", self.cache.fingerprint, layout.MANIFEST, layout.views_record, "cache")
        self.ledger.report.view_units, self.ledger.report.crops = len(facts), sum(f.rows for f in facts.values())
        self.ledger.report.num_views = max((unit.view + 1 for unit in units), default=0)
        there = set(units)
        for number, source in sorted(self.sources.items()):
            for unit in (Unit(number, g, v) for g in range(source.groups) for v in range(self.ledger.report.num_views)):
                if unit not in there:
                    self.ledger.find("missing", layout.views_record(unit), "these views are missing", AGAIN, unit)
        return facts

    def _beyond(self, unit: Unit, name: str) -> bool:
        """Say (and note) whether a unit is of no group of the source."""
        source = self.sources.get(unit.shard)
        beyond = unit.shard >= len(self.cache.shards) or (source is not None and unit.group >= source.groups)
        if beyond:
            self.ledger.find("foreign", name, "the source has no such group of photos", DROP, unit, (name,))
        return beyond

    def _groups(self, views: dict[Unit, Facts], group_size: int) -> None:
        """Each group shows all photos of its part of the source, and the same ones in every view."""
        first: dict[tuple[int, int], Facts] = {}
        for unit, facts in sorted(views.items()):
            name, source = layout.views_record(unit), self.sources.get(unit.shard)
            wanted = min(group_size, source.photos - unit.group * group_size) if source else None
            if wanted is not None and facts.rows + facts.skipped != wanted:
                what = f"{facts.rows} crops and {facts.skipped} broken photos, the source has {wanted} photos here"
                self.ledger.find("record", name, what, DROP, unit, (name,))
            if first.setdefault((unit.shard, unit.group), facts).keys_sha256 != facts.keys_sha256:
                self.ledger.find(
                    "record", name, "shows other photos than another view of the group", DROP, unit, (name,)
                )

    def _leftovers(self) -> None:
        """Payloads that no record names: harmless, nothing reads them."""
        known = {file(name) for name in self.names for file in (layout.target_manifest, layout.codec_record)}
        for name in [*self.store.names(layout.VIEWS), *self.store.names(layout.TARGETS)]:
            file = layout.file_of(name)
            if name in self.ledger.used or name in known or (file is not None and file.record in self.ledger.unknown):
                continue
            if file is not None and file.record:
                todo = "nothing reads it; extract or verify --repair removes it, unless another job is writing it now"
                self.ledger.find("leftover", name, "no record names it", todo, file.unit or "")
            else:
                self.ledger.find("unknown", name, "not a file of the cache", ALONE)
