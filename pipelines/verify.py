"""Is a cache what its records say, and is that still what the base says? And drop what is not."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.extraction.storage import Needed, explained_storage
from pipelines.loading.base_of_set import base_again, same_base, set_meant
from tec_cache.audit.audit import audit
from tec_cache.audit.findings import Finding
from tec_cache.audit.ledger import Report
from tec_cache.cache import layout, version1
from tec_cache.cache.index.writing import refresh
from tec_cache.cache.lock import cache_lock
from tec_cache.cache.manifest import read_manifest, require_current
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.cache.remove import clear_leftovers, remove_index
from tec_cache.data.image_pool import ImagePool
from tec_cache.errors import CacheError, ConfigError
from tec_cache.printable import shell_words
from tec_cache.progress import Progress
from tec_cache.store import Store, open_store

DECODERS = 4
"""Threads that decode the sampled crops."""


@dataclass(frozen=True, kw_only=True)
class How:
    """How a base is run again."""

    base: str | None = None
    """Its name, file or folder, where that is not the one that the target set names; or the name of a target set."""
    weights: str | None = None
    """Its weight file, or its file or folder where that was moved."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    base_args: dict[str, Any] = field(default_factory=dict)
    """What no file says of it; where these are left out, what the target set was made with."""
    sample: int = 64
    """Views of each target set."""
    seed: int = 0
    device: str = "auto"


@dataclass
class Verdict:
    """What verifying a cache found, and did."""

    cache: str
    report: Report
    findings: list[Finding]
    """What is wrong, missing or left over; after a repair, what still is."""
    base: list[dict[str, Any]] = field(default_factory=list)
    """Figures of each target set that the base was run for again."""
    dropped: list[Finding] = field(default_factory=list)
    """What repairing dropped."""
    removed: list[str] = field(default_factory=list)
    """Payloads without a record that repairing removed."""
    next: list[str] = field(default_factory=list)
    """Commands that go on, where something has to be made."""
    seconds: float = 0.0

    def count(self, level: str) -> int:
        """Count the findings of a level: damage, missing or note."""
        return sum(finding.level == level for finding in self.findings)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong and nothing is missing; notes do not count."""
        return not self.count("damage") and not self.count("missing")

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        report = self.report
        return {
            "cache": self.cache,
            "clean": self.clean,
            "damage": self.count("damage"),
            "missing": self.count("missing"),
            "notes": self.count("note"),
            "files": report.files,
            "payloads": report.payloads,
            "bytes": report.num_bytes,
            "view_units": report.view_units,
            "crops": report.crops,
            "target_units": report.target_units,
            "base": self.base,
            "findings": [finding.to_json() for finding in self.findings],
            "dropped": [finding.to_json() for finding in self.dropped],
            "removed": self.removed,
            "next": self.next,
            "seconds": self.seconds,
        }


def verify(
    path: str,
    *,
    full: bool = False,
    base: bool | str = False,
    repair: bool = False,
    sample: int | None = None,
    seed: int | None = None,
    target: str | None = None,
    base_weights: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    base_args: dict[str, Any] | None = None,
    device: str | None = None,
    quiet: bool = True,
) -> Verdict:
    """Check a cache: records and sizes; `full`: every byte; `base`: a sample against the base itself.

    base: True runs each target set's own base; a name, weight file or folder runs that one, for the target sets that it
    made, and a target set's name that set's own. The settings below it are for running the base: 64 views, seed 0, all
    target sets, device "auto".
    With `repair` what is bad is dropped, so that the same extraction makes it again; the index of what is whole is made
    again at once. Raises ConfigError where there is no cache or no such target set, TecCacheError where another job
    writes (repair only), WeightsError and StorageError; what is wrong with the cache is returned, not raised.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"--sample {sample}", todo="give a number of at least 1")
    own: dict[str, Any] = {
        "sample": sample,
        "seed": seed,
        "target": target,
        "base-weights": base_weights,
        "device": device,
    }
    own |= {"mean": mean, "std": std, "base-arg": base_args}
    if not base and any(value is not None for value in own.values()):
        names = ", ".join(f"--{name}" for name, value in own.items() if value is not None)
        raise ConfigError(f"not used: {names}; only --base runs the base again", todo="add --base, or leave them out")
    begin, store = time.monotonic(), version1.adapted(open_store(path))
    if store.size(layout.MANIFEST) is None and not store.names(layout.RECORDS):
        open_cache(path)  # says that there is none
    if store.size(layout.PACK) is not None:
        todo = "tec-cache unpack checks every byte of it"
        raise ConfigError("this is a pack, not a cache", where=path, todo=todo)
    if repair:
        _require_repairable(store, path)
    with cache_lock(store) if repair else nullcontext() as lock:
        if lock is not None:
            lock.own()  # before looking: what is found must still be so when it is dropped
        with Progress("verify", noun="file", quiet=quiet) as progress:
            report = audit(store, full=full, progress=progress)
        verdict = Verdict(store.url, report, list(report.findings))
        if base:
            how = How(
                base=base if isinstance(base, str) else None,
                weights=base_weights,
                mean=mean,
                std=std,
                base_args=base_args or {},
                sample=64 if sample is None else sample,
                seed=seed or 0,
                device=device or "auto",
            )
            _run_bases(verdict, path, how, target, quiet)
        if repair:
            with explained_storage(store, Needed()):
                _repair(store, verdict, quiet)
    verdict.seconds = time.monotonic() - begin
    return verdict


def _require_repairable(store: Store, path: str) -> None:
    """Refuse to drop what no extraction can make again: the units of a cache of an older format version."""
    try:
        require_current(read_manifest(store, layout.MANIFEST), path)
    except CacheError:
        return  # the audit says what is wrong with it


def _run_bases(verdict: Verdict, path: str, how: How, only: str | None, quiet: bool) -> None:
    """Run the base of each target set again, where the set's own files are in order."""
    if any(finding.where == layout.MANIFEST for finding in verdict.findings):
        return
    from pipelines.checking.base_check import check_base

    cache = open_cache(path)
    if only is not None and only not in verdict.report.target_units:
        _ = cache[only]  # says which there are
    names = [only] if only is not None else [n for n in verdict.report.target_units if n in cache.target_names]
    meant = None if how.base is None else set_meant(how.base, cache)
    if meant is not None:
        base, weights = base_again(meant.manifest["notes"], how.weights, target=meant.name)
        names, how = names if only is not None else [meant.name], replace(how, base=base, weights=weights)
    elif how.base is not None and only is None:
        names = _made_by(how.base, {name: str(cache[name].manifest["notes"]["base"]) for name in names})
    if how.weights is not None and len(names) > 1:
        raise ConfigError(
            f"--base-weights is one base's, the cache has the target sets {', '.join(names)}",
            todo=f"choose one: --target {names[0]}",
        )
    for name in names:
        own = (layout.target_manifest(name), layout.codec_record(name))
        if any(f.where in own or (f.kind == "codec" and f.where.startswith(f"{layout.target_folder(name)}/"))
               for f in verdict.findings):  # fmt: skip
            continue  # what is stored cannot be decoded
        with ImagePool(DECODERS, "crops") as pool:
            check = check_base(
                cache[name],
                verdict.report.sound[name],
                how,
                pool=pool,
                quiet=quiet,
            )
        known = {finding.where for finding in verdict.findings}
        verdict.base.append(check.to_json())
        verdict.findings += [f for f in check.findings if f.kind == "base" or f.where not in known]


def _made_by(base: str, bases: dict[str, str]) -> list[str]:
    """Choose the target sets that a base made, by that base's name; where there is but one set, it is meant."""
    names = [name for name, made_by in bases.items() if same_base(made_by, base)]
    if names or len(bases) == 1:
        return names or list(bases)
    raise ConfigError(
        f"no target set was made by {base!r}",
        todo="leave the name out to run each set's own base, or choose a set with --target NAME",
        details=[f"{name}: made by {made_by}" for name, made_by in bases.items()],
    )


def _repair(store: Store, verdict: Verdict, quiet: bool) -> None:
    """Drop what is bad, record first, and what no record names; make the index of what is complete; look again."""
    verdict.dropped = [
        finding for finding in verdict.findings if finding.drop and all(map(layout.file_of, finding.drop))
    ]
    if any(finding.kind != "index" for finding in verdict.dropped):  # it says that these are there
        remove_index(store)
    for finding in verdict.dropped:
        for name in finding.drop:
            store.remove(name)
    try:
        verdict.removed = clear_leftovers(store)
    except CacheError:
        verdict.removed = []  # a damaged codec.json: nobody can say which parameters it names
    with suppress(CacheError), Progress("index", noun="unit", quiet=quiet) as progress:
        refresh(Cache(store, read_manifest(store, layout.MANIFEST)), progress)
    after = audit(store).findings
    known = {(finding.kind, finding.where) for finding in after}
    stays = [f for f in verdict.findings if f.level == "damage" and f not in verdict.dropped]
    stays = [f for f in stays if (f.kind, f.where) not in known]
    verdict.findings = [*stays, *after]
    verdict.next = _next_commands(verdict)


def _next_commands(verdict: Verdict) -> list[str]:
    """Say which commands make what is missing now."""
    missing = [finding.where for finding in verdict.findings if finding.level == "missing"]
    sets, views = verdict.report.target_units, verdict.report.num_views
    cache = shell_words(["--cache", verdict.cache])
    if any(name.startswith((layout.VIEW_RECORDS, layout.SOURCE_RECORDS)) for name in missing):
        photos = f"tec-cache extract PHOTOS {cache} --views {views}"
        return [f"{photos} --name {name}" for name in sets] or [f"{photos} --views-only"]
    folders = {name: (f"{layout.target_records(name)}/", f"{layout.target_folder(name)}/") for name in sets}
    extended = (name for name, of_set in folders.items() if any(file.startswith(of_set) for file in missing))
    return [f"tec-cache extract {cache} --name {name}" for name in extended]
