"""The book that an audit keeps: what was looked at, and what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tec_cache.audit.findings import DROP, RESTORE, Finding
from tec_cache.audit.units import Checked, Facts
from tec_cache.cache.layout import Unit
from tec_cache.cache.reader import RECORD_THREADS
from tec_cache.cache.record import Payload
from tec_cache.progress import Progress
from tec_cache.store import Store

FULL_THREADS = 4
"""Payloads that are hashed at once: enough for a disk, few enough for its heads and for memory."""


@dataclass
class Report:
    """What an audit looked at and found."""

    findings: list[Finding] = field(default_factory=list)
    files: int = 0
    """JSON files that were read."""
    payloads: int = 0
    num_bytes: int = 0
    """Of the payloads."""
    num_views: int = 0
    view_units: int = 0
    crops: int = 0
    target_units: dict[str, int] = field(default_factory=dict)
    """Target set -> units."""
    sound: dict[str, list[Unit]] = field(default_factory=dict)
    """Target set -> units of which neither views nor targets have a finding."""

    @property
    def levels(self) -> dict[str, int]:
        """Number of findings that are damage, missing, note."""
        count = Counter(finding.level for finding in self.findings)
        return {level: count[level] for level in ("damage", "missing", "note")}


class Ledger:
    """One audit's findings, and what its parts tell each other."""

    def __init__(self, store: Store, full: bool, progress: Progress) -> None:
        self.store, self.full, self.progress = store, full, progress
        self.report = Report()
        self.used: set[str] = set()
        """Payloads that a record names."""
        self.unknown: set[str] = set()
        """Records that could not be read: nobody can say which payload is theirs."""
        self.blamed: set[str] = set()
        """Records with a finding."""

    @property
    def whole(self) -> bool:
        """Whether nothing was found damaged or missing so far."""
        return all(finding.level == "note" for finding in self.report.findings)

    def find(
        self, kind: str, where: str, what: str, todo: str, unit: Unit | str = "", drop: tuple[str, ...] = ()
    ) -> None:
        """Note a finding; one reason to drop a record is enough."""
        if kind == "record" and where in self.blamed:
            return
        if kind == "record":
            self.blamed.add(where)
        self.report.findings.append(Finding(kind, where, str(unit), what, todo, drop))

    def check(
        self, check: Callable[[Unit], Checked], units: Iterable[Unit], record_of: Callable[[Unit], str]
    ) -> list[Checked]:
        """Check units, several at a time."""
        done = []
        with ThreadPoolExecutor(FULL_THREADS if self.full else RECORD_THREADS, thread_name_prefix="audit") as pool:
            for checked in pool.map(check, units):
                done.append(checked)
                self.report.findings += checked.findings
                self.report.files += 1
                if checked.facts is None:
                    self.unknown.add(record_of(checked.unit))
                elif checked.facts.payload is not None:
                    self.count(checked.facts.payload)
                    self.progress.advance(1, checked.facts.payload.size)
        return done

    def count(self, payload: Payload) -> None:
        """Note that a record names this payload."""
        self.used.add(payload.name)
        self.report.payloads += 1
        self.report.num_bytes += payload.size

    def strangers(
        self,
        facts: dict[Unit, Facts],
        what: str,
        wanted: str,
        where: str,
        record_of: Callable[[Unit], str],
        whole: str,
    ) -> bool:
        """Find units that are not of this cache, set or codec; where all are of one other, that file is the wrong one.

        Says whether it is. Otherwise a cache.json that was swapped by mistake would make --repair drop a whole cache.
        """
        values = Counter(getattr(fact, what) for fact in facts.values())
        if len(values) == 1 and wanted not in values and len(facts) > 1:
            kind = "codec" if whole == "codec" else "manifest"
            self.find(kind, where, f"all {len(facts)} units were made with another {whole}", RESTORE)
            return True
        for unit, fact in facts.items():
            if getattr(fact, what) != wanted:
                name = record_of(unit)
                self.find("record", name, f"a unit made with another {whole}", DROP, unit, (name,))
        return False
