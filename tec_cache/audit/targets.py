"""Is one target set in order: its manifest, its codec, and all units against the views that they were made from?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tec_cache.audit.findings import AGAIN, DROP, REFIT, REMAKE, unreadable
from tec_cache.audit.index import check_index
from tec_cache.audit.ledger import Ledger
from tec_cache.audit.payloads import check_payload
from tec_cache.audit.units import Facts, check_targets
from tec_cache.cache import layout
from tec_cache.cache.index.details import PLACE
from tec_cache.cache.index.reading import open_targets_index
from tec_cache.cache.layout import Unit
from tec_cache.cache.manifest import read_manifest
from tec_cache.cache.reader import Cache, target_manifest_problem
from tec_cache.cache.record import CodecRecord
from tec_cache.cache.target_set import TargetSet
from tec_cache.codec import ArraySpec
from tec_cache.errors import CacheError
from tec_cache.printable import counted


@dataclass(frozen=True)
class TargetSetAudit:
    """The audit of one target set."""

    ledger: Ledger
    cache: Cache
    name: str
    units: Collection[Unit]
    """Units that have a record."""

    def run(self, views: Mapping[Unit, Facts], wanted: Collection[Unit], foreign: Collection[Unit]) -> None:
        """Check everything, the index of the set where all that it is made of is whole.

        views: what the sound records of views say; wanted: units that should be there; foreign: units whose views
        are of other photos than this cache's.
        """
        ledger, store = self.ledger, self.ledger.store
        whole_before = ledger.whole
        target = self._manifest()
        codec = self._codec(target)
        arrays = self._arrays(target) if target is not None and codec is not None else None
        checked = ledger.check(
            lambda unit: check_targets(store, self.name, unit, arrays, full=ledger.full), self.units, self._record
        )
        facts = {c.unit: c.facts for c in checked if c.facts is not None}
        if target is not None:
            manifest = layout.target_manifest(self.name)
            ledger.strangers(facts, "identity", target.fingerprint, manifest, self._record, "target set")
        if codec is not None:
            sha256 = codec.payload.sha256 if codec.payload else ""
            ledger.strangers(facts, "codec_sha256", sha256, layout.codec_record(self.name), self._record, "codec")
        self._against_views(facts, views, foreign)
        there = set(self.units)
        for unit in wanted:
            if target is not None and unit not in there:
                what = f"these targets of {self.name!r} are missing"
                ledger.find("missing", self._record(unit), what, AGAIN, unit)
        bad = {finding.unit for finding in ledger.report.findings}
        ledger.report.target_units[self.name] = len(facts)
        indexed = whole_before and ledger.whole and self.cache.index is not None
        if indexed and target is not None and arrays is not None:
            check_index(ledger, layout.target_index(self.name), lambda: open_targets_index(target), facts, PLACE)
        ledger.report.sound[self.name] = sorted(u for u in facts if u in views and str(u) not in bad)

    def _record(self, unit: Unit) -> str:
        return layout.target_record(self.name, unit)

    def _manifest(self) -> TargetSet | None:
        """Check target.json; return the set where it is sound."""
        where, find, store = layout.target_manifest(self.name), self.ledger.find, self.ledger.store
        if store.size(where) is None:
            if self.units:
                find("manifest", where, f"is gone, but not {counted(len(self.units), 'record')} of this set", REMAKE)
            return None
        self.ledger.report.files += 1
        try:
            target = TargetSet(self.cache, self.name, read_manifest(store, where))
        except CacheError as error:
            find("manifest", where, error.what, REMAKE)
            return None
        problem = target_manifest_problem(target.manifest, self.cache.manifest)
        if problem:
            find("manifest", where, problem, REMAKE)
        return None if problem else target

    def _codec(self, target: TargetSet | None) -> CodecRecord | None:
        """Check codec.json and the parameters; return the record where it is sound."""
        where, ledger = layout.codec_record(self.name), self.ledger
        if ledger.store.size(where) is None:
            if target is not None and self.units:
                ledger.find("codec", where, f"is gone; it coded {counted(len(self.units), 'unit')}", REFIT)
            elif target is not None:
                ledger.find("missing", where, f"the codec of {self.name!r} was not fitted yet", AGAIN)
            return None
        ledger.report.files += 1
        try:
            codec = CodecRecord.read(ledger.store, where)
        except CacheError as error:
            cause = error.__cause__
            if isinstance(cause, OSError):
                ledger.report.findings.append(unreadable(where, "", cause, where))
            else:
                ledger.find("codec", where, error.what, REFIT)
            ledger.unknown.add(where)
            return None
        if target is not None and codec.identity != target.fingerprint:
            ledger.find("codec", where, "the codec of another target set", REFIT)
        if codec.payload is not None:
            ledger.count(codec.payload)
            # small, and nothing can be decoded without it: hashed by a quick audit too
            for found in check_payload(ledger.store, codec.payload, where, "", lambda stream: ""):
                kind = "codec" if found.kind == "payload" else found.kind
                ledger.find(kind, found.where, found.what, REFIT)
        return codec

    def _arrays(self, target: TargetSet) -> dict[str, ArraySpec] | None:
        """Return the arrays that the codec stores, None where it cannot be made."""
        try:
            return target.codec.arrays(target.spec)
        except (CacheError, KeyError, TypeError, ValueError):
            return None  # the parameters' own finding says why

    def _against_views(
        self, facts: Mapping[Unit, Facts], views: Mapping[Unit, Facts], foreign: Collection[Unit]
    ) -> None:
        """Targets must be those of the very crops beside them."""
        for unit, fact in facts.items():
            crops = views.get(unit)
            if crops is None:
                continue  # a finding of the views
            tar = crops.payload.sha256 if crops.payload else ""
            of_these = (fact.rows, fact.keys_sha256, fact.views_sha256) == (crops.rows, crops.keys_sha256, tar)
            if unit in foreign or not of_these:
                name = self._record(unit)
                self.ledger.find("record", name, "these targets were made from other crops", DROP, unit, (name,))
