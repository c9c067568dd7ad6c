"""Does a cache hold what its records say, and do its files belong together? Nothing is changed here.

Every file is looked at by itself (does it parse, does it have its own checksum), then against those that it must
fit: records against the manifest, units against the source shards' records, targets against their views and codec.
"""

from __future__ import annotations

from tec_cache.audit.findings import AGAIN, ALONE, DROP, REMAKE, RESTORE, damaged_record
from tec_cache.audit.index import check_index
from tec_cache.audit.ledger import Ledger, Report
from tec_cache.audit.targets import TargetSetAudit
from tec_cache.audit.units import Facts, check_views
from tec_cache.cache import layout, version1
from tec_cache.cache.index.details import CROP
from tec_cache.cache.index.reading import open_views_index
from tec_cache.cache.layout import Unit
from tec_cache.cache.manifest import read_manifest
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import AskedRecord, ContentRecord, SourceRecord
from tec_cache.cache.remove import provably_ours
from tec_cache.errors import CacheError
from tec_cache.printable import counted
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
        except CacheError as error:
            self.ledger.find("manifest", layout.MANIFEST, error.what, REMAKE)
            return
        self._sort_names()
        self.ledger.progress.total = len(self.view_units) + sum(map(len, self.target_units.values()))
        self._sources()
        self._asked()
        views = self._views()
        self._content(views)
        self._groups(views)
        if self.ledger.whole:
            check_index(self.ledger, layout.views_index(), lambda: open_views_index(self.cache), views, CROP)
        for name in self.names:
            records = self.target_units.get(name, [])
            units = [unit for unit in records if not self._beyond(unit, layout.target_record(name, unit))]
            TargetSetAudit(self.ledger, self.cache, name, units).run(views, self.view_units, self.foreign)
        self._leftovers()

    def _sort_names(self) -> None:
        """Tell records by their names; whatever else lies among them is foreign, another spelling of a name too."""
        self.source_names: dict[int, str] = {}
        self.asked_names: dict[int, str] = {}
        self.view_units: list[Unit] = []
        self.target_units: dict[str, list[Unit]] = {}
        for name in self.store.names(layout.RECORDS):
            match layout.file_of(name):
                case layout.File(kind="content"):
                    pass
                case layout.File(kind="asked", number=int(view)):
                    self.asked_names[view] = name
                case layout.File(kind="source", number=int(shard)):
                    self.source_names[shard] = name
                case layout.File(kind="views", unit=Unit() as unit):
                    self.view_units.append(unit)
                case layout.File(kind="targets", unit=Unit() as unit, target=target):
                    self.target_units.setdefault(target, []).append(unit)
                case _:
                    self.ledger.find("unknown", name, "a file among the records that is none", ALONE)
        files = map(layout.file_of, self.store.names(layout.TARGETS))
        sets = (file.target for file in files if file is not None and file.kind == "target")
        self.names = sorted({*self.target_units, *sets})

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

    def _content(self, views: dict[Unit, Facts]) -> None:
        """The source shards' records are those of which the cache was made, once that is known, and fit the units."""
        content, self.strangers = self._content_record(), set[int]()
        fits: dict[int, set[bool]] = {}
        for unit, facts in views.items():
            if unit.shard in self.sources:
                hashes = self.sources[unit.shard].group_sha256
                fits.setdefault(unit.shard, set()).add(facts.photos_sha256 == hashes[unit.group])
        for number, source in list(self.sources.items()):
            known = content is not None
            other = content is not None and source.sha256 != content.source_sha256[number]
            no_unit_fits = fits.get(number) == {False}
            if other and not no_unit_fits:
                self.strangers.add(number)
            elif no_unit_fits and (other or not known):
                self._drop_source(number, "says of its photos what no unit shows")
                if other:  # without it the units are as they should be
                    del self.sources[number]
        if len(self.strangers) == len(self.cache.shards):
            what = "says of every source shard that it was another than the records and units have"
            self.ledger.find("manifest", layout.CONTENT_RECORD, what, RESTORE)
            self.strangers.clear()
        for number in self.strangers:
            self._drop_source(number, "the shard had other photos when this cache was finished; its units go with it")

    def _drop_source(self, number: int, what: str) -> None:
        name = layout.source_record(number)
        self.ledger.find("record", name, what, DROP, drop=(name,))

    def _content_record(self) -> ContentRecord | None:
        """Check and return the record of what all photos were, where it is there and sound."""
        name = layout.CONTENT_RECORD
        if self.swapped:
            return None  # it is not the records that are of another cache
        for asked in self.asked_of_others:
            self.ledger.find("record", asked, "what was asked of another cache", DROP, drop=(asked,))
        if self.store.size(name) is None:
            if self.cache.bound and len(self.sources) == len(self.cache.shards):
                self.ledger.find("missing", name, "what all photos were was not recorded yet", AGAIN)
            return None
        self.ledger.report.files += 1
        try:
            return self.cache.content_record
        except CacheError as error:
            self.ledger.report.findings.append(damaged_record(error, name, ""))
            return None

    def _asked(self) -> None:
        """How many views of each photo were asked for."""
        asked: list[int] = []
        self.asked_of_others: list[str] = []
        for view, name in sorted(self.asked_names.items()):
            self.ledger.report.files += 1
            try:
                record = AskedRecord.read(self.store, name)
            except CacheError as error:
                self.ledger.report.findings.append(damaged_record(error, name, ""))
                continue
            if record.identity != self.cache.fingerprint:
                self.asked_of_others.append(name)
            asked.append(view)
        units = [*self.view_units, *(unit for units in self.target_units.values() for unit in units)]
        number = max((view + 1 for view in (*asked, *(unit.view for unit in units))), default=0)
        self.ledger.report.num_views = number
        for view in range(number if self.cache.bound else 0):
            if view not in self.asked_names:
                what = f"that view {view} was asked for is not recorded"
                self.ledger.find("missing", layout.asked_record(view), what, AGAIN)

    def _views(self) -> dict[Unit, Facts]:
        """Check all units of views; return what the sound records say."""
        units = [unit for unit in self.view_units if not self._beyond(unit, layout.views_record(unit))]
        self.view_units = units
        shards = self.cache.shards
        checked = self.ledger.check(
            lambda unit: check_views(self.store, unit, shards[unit.shard], full=self.ledger.full),
            units,
            layout.views_record,
        )
        facts = {c.unit: c.facts for c in checked if c.facts is not None}
        self.swapped = self.ledger.strangers(
            facts, "identity", self.cache.fingerprint, layout.MANIFEST, layout.views_record, "cache"
        )
        self.ledger.report.view_units, self.ledger.report.crops = len(facts), sum(f.rows for f in facts.values())
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

    def _groups(self, views: dict[Unit, Facts]) -> None:
        """Each group shows all photos of its part of the source, and the same ones in every view."""
        first: dict[tuple[int, int], Facts] = {}
        self.foreign: set[Unit] = set()
        for unit, facts in sorted(views.items()):
            name = layout.views_record(unit)
            problem = self._group_problem(unit, facts)
            if not problem and photos_of(first.setdefault((unit.shard, unit.group), facts)) != photos_of(facts):
                problem = "shows other photos, or other labels, than another view of the group"
            if problem:
                self.foreign.add(unit)
                self.ledger.find("record", name, problem, DROP, unit, (name,))

    def _group_problem(self, unit: Unit, facts: Facts) -> str:
        """Compare a unit with what was read of its source shard."""
        size, source = self.cache.identity["group_size"], self.sources.get(unit.shard)
        if self.cache.bound == (facts.photos_sha256 == version1.UNKNOWN):
            return "a unit of another format version"
        if unit.shard in self.strangers:
            return "of a source shard that had other photos when this cache was finished"
        if source is None:
            return f"more than {counted(size, 'photo')} in a group" if facts.rows + facts.skipped > size else ""
        if facts.photos_sha256 != source.group_sha256[unit.group]:
            return "shows other photos than the source shard had when it was read to its end"
        wanted = min(size, source.photos - unit.group * size)
        if facts.rows + facts.skipped != wanted:
            units = f"{counted(facts.rows, 'crop')} and {counted(facts.skipped, 'broken photo')}"
            return f"{units}, the source has {counted(wanted, 'photo')} here"
        return ""

    def _leftovers(self) -> None:
        """Payloads that no record names: harmless, nothing reads them."""
        known = {file(name) for name in self.names for file in (layout.target_manifest, layout.codec_record)}
        for name in [*self.store.names(layout.VIEWS), *self.store.names(layout.TARGETS)]:
            file = layout.file_of(name)
            if name in self.ledger.used or name in known or (file is not None and file.record in self.ledger.unknown):
                continue
            of_a_set = file is not None and file.target in ("", *self.names)
            if file is not None and (file.record if of_a_set else provably_ours(self.store, name)):
                todo = "nothing reads it; extract or verify --repair removes it, unless another job is writing it now"
                self.ledger.find("leftover", name, "no record names it", todo, file.unit or "")
            else:
                self.ledger.find("unknown", name, "not a file of the cache", ALONE)
        for name in self.store.names(layout.INDEX):
            file = layout.file_of(name)
            if file is None:
                self.ledger.find("unknown", name, "a file among the indices that is none", ALONE)
            elif file.target not in ("", *self.names):
                todo = "nothing reads it; extract or verify --repair removes it"
                self.ledger.find("leftover", name, "of a target set that is not there", todo)


def photos_of(facts: Facts) -> tuple[str, str, str]:
    """Return what must be the same in all views of a group."""
    return facts.photos_sha256, facts.keys_sha256, facts.labels_sha256
