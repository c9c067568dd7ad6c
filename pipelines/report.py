"""Runs, caches and exports as one page to look at: curves, costs, what models see, crops, confusions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipelines.loading.base_given import given_by
from pipelines.reporting import exports, runs, tuned
from pipelines.reporting.caches import cache_section, skipped_section
from pipelines.reporting.costs import costs_section
from pipelines.reporting.crops import Crop, chosen_crops, decoded_section, sheet_section
from pipelines.reporting.html import Html, heading, joined, paragraph, problem
from pipelines.reporting.logged import read_logged
from pipelines.reporting.looks import looks_section
from pipelines.reporting.models import Looked, given_base, model_of
from pipelines.reporting.page import GENERATOR, whole_page
from pipelines.reporting.shown import Shown, given_photos, shown_crops
from pipelines.reporting.subjects import Subject, guarded, open_subjects
from tec_cache.cache.opening import open_cache
from tec_cache.device import Compute, resolve_compute
from tec_cache.draw.figures import require_matplotlib
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.kinds import Kind
from tec_cache.progress import Progress
from tec_cache.store.files import make_folder, write_atomically


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to report on, and what to look at it with."""

    places: tuple[str, ...]
    """Runs, caches, packs and exports."""
    out: str = "report.html"
    photos: str | None = None
    """That the models look at and are judged on; as extract takes them. None: stored crops."""
    base: str | None = None
    """Base model beside the new ones, and for exact targets."""
    base_weights: str | None = None
    mean: tuple[float, float, float] | None = None
    """Of the base's pixels; None: as its release has it. std, base_args: what else its files do not say."""
    std: tuple[float, float, float] | None = None
    base_args: dict[str, Any] = field(default_factory=dict)
    images: int = 4
    """Photos that are drawn in each part."""
    limit: int = 500
    """Photos that a tuned model is judged on for its confusions."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.base is None and (self.base_weights or self.mean or self.std or self.base_args):
            raise ConfigError("something is said of a base, and none is named", todo="give --base, or leave it out")
        for name in ("images", "limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}", todo="give a number of at least 1")


@dataclass
class ReportSummary:
    """What was written."""

    out: str
    bytes: int
    places: int
    sections: list[str]
    problems: list[str]
    """Parts that could not be shown, and why; the page says so in their places."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def report(config: ReportConfig, *, quiet: bool = True) -> ReportSummary:
    """Write one self-contained HTML page on runs, caches and exports. A report that lies at `out` is replaced.

    What cannot be read is said on the page and in the summary. Raises ConfigError for a place that holds nothing of
    this program's, TecCacheError where matplotlib is not installed or the page cannot be written.
    """
    require_matplotlib("tec-cache report")
    out = Path(config.out)
    require_replaceable(out)
    subjects = open_subjects(config.places)
    resolved = resolve_compute(config.device, "float32")
    made = Sections(config, subjects, resolved)
    with Progress("report", total=len(made.plan()), noun="part", quiet=quiet) as progress:
        sections = []
        for anchor, title, part in made.plan():
            sections.append((anchor, title, guarded(part, title, made.problems)))
            progress.advance(1, note=title)
    data = whole_page(subjects, sections).encode("utf-8", "backslashreplace")
    try:
        make_folder(out.parent)
        write_atomically(out, data)
    except OSError as error:
        todo = "name another --out"
        raise TecCacheError(f"the report cannot be written: {error.strerror}", where=str(out), todo=todo) from error
    shown = [title for _, title, content in sections if content]
    return ReportSummary(str(out), len(data), len(subjects), shown, made.problems)


def require_replaceable(out: Path) -> None:
    """Refuse an --out that is something else than a report."""
    if out.is_dir():
        raise ConfigError("--out is a folder", where=str(out), todo="name a file, for instance report.html")
    if out.exists() and GENERATOR not in out.open(errors="replace").read(4096):
        raise ConfigError("a file lies here that is no report", where=str(out), todo="name another --out")


class Sections:
    """The parts of the page in their order; what several of them need is read once."""

    def __init__(self, config: ReportConfig, subjects: Sequence[Subject], compute: Compute) -> None:
        self.config, self.subjects, self.compute = config, subjects, compute
        self.problems: list[str] = [f"{s.title}: {s.error.what}" for s in subjects if s.error is not None]
        whole = [subject for subject in subjects if subject.about is not None]
        self.runs = [(s, read_logged(s.folder, s.about or {})) for s in whole if s.kind is Kind.RUN]
        self.caches = [s for s in whole if s.kind in (Kind.CACHE, Kind.PACK)]
        self.exports = [s for s in whole if s.kind is Kind.EXPORT]

    def plan(self) -> list[tuple[str, str, Callable[[], Html]]]:
        """Return (anchor, title, maker) of every part that there is something for."""
        plan: list[tuple[str, str, Callable[[], Html]]] = []
        if any(subject.error is not None for subject in self.subjects):
            plan.append(("unreadable", "What cannot be read", self.unreadable))
        for task, title in runs.SECTIONS.items():
            if any(subject.task == task for subject, _ in self.runs):
                plan.append((task, title, functools.partial(self.runs_of, task)))
        if self.runs:
            plan.append(("costs", "Time and computing", lambda: costs_section(self.runs)))
        if self.exports:
            plan.append(("exports", "Exports", lambda: exports.exports_section(self.exports)))
        if self.runs or self.exports or self.config.base is not None:
            plan.append(("models", "What the models see", self.looks))
        for subject in self.caches:
            title = f"{subject.kind.value.capitalize()} {subject.title}"
            plan.append((f"cache-{subject.letter}", title, functools.partial(self.cache, subject, title)))
        return plan

    def unreadable(self) -> Html:
        """Say which places cannot be read."""
        return joined([heading(2, "What cannot be read", "unreadable"), runs.unreadable(self.subjects)])

    def runs_of(self, task: str) -> Html:
        """Show the runs of a task; of tuned models also what they confuse and what they predict."""
        config, of = self.config, [(subject, logged) for subject, logged in self.runs if subject.task == task]
        parts = [runs.runs_section(task, of)]
        if task == "pretrain":
            return joined(parts)
        parts.append(tuned.scores_part(of))
        for subject, _ in of:
            judge = functools.partial(
                tuned.confusion_part, subject, config.photos, config.limit, config.images, self.compute
            )
            title = f"{subject.title}: confusions"
            parts += [heading(3, title), guarded(judge, title, self.problems)]
            saved = functools.partial(tuned.predictions_part, subject, config.images)
            parts.append(guarded(saved, f"{subject.title}: saved predictions", self.problems))
        return joined(parts)

    def looks(self) -> Html:
        """Show what the models see, as far as there are pictures."""
        failed: list[Html] = []
        if isinstance(self.base, TecCacheError):
            failed.append(problem(self.base))
        models = [self.base] if isinstance(self.base, Looked) else []
        models += self.new_models(failed)
        pictures, where = self.pictures(failed)
        if not pictures or not models:
            title = heading(2, "What the models see", "models")
            said = "no model can be loaded yet" if pictures else "no photos: give some with --photos, or a cache"
            return joined([title, *failed, paragraph(f"Nothing can be drawn: {said}.", kind="note")])
        return joined([looks_section(models, pictures, where), *failed])

    @functools.cached_property
    def base(self) -> Looked | TecCacheError | None:
        """The base that was given, or why it cannot be loaded."""
        config = self.config
        if config.base is None:
            return None
        grids = [int(s.about["grid"]) for s in self.caches if s.about]
        grids += [int(s.about["targets"][0]["spec"]["grid"]) for s, _ in self.runs if s.about and s.task == "pretrain"]
        try:
            return given_base(config.base, config.base_weights, given_by(config), grids, self.compute)
        except TecCacheError as error:
            self.problems.append(f"the base: {error.what}")
            return error

    def new_models(self, failed: list[Html]) -> list[Looked]:
        """Load the models of the runs and exports; one that cannot be loaded is said."""
        found: list[Looked] = []

        def load(subject: Subject) -> Html:
            found.append(model_of(subject, self.compute))
            return Html("")

        for subject in [*(s for s, _ in self.runs), *self.exports]:
            failed.append(guarded(functools.partial(load, subject), f"the model of {subject.title}", self.problems))
        return found

    def pictures(self, failed: list[Html]) -> tuple[list[Shown], str]:
        """Return what is looked at: the photos that were given, else crops of a cache that is at hand."""
        config, found, where = self.config, list[Shown](), ""

        def read() -> Html:
            nonlocal found, where
            if config.photos is not None:
                found, where = given_photos(config.photos, config.images), "the photos that were given"
                return Html("")
            pretrained = [s.about["config"]["cache"] for s, _ in self.runs if s.about and s.task == "pretrain"]
            for place in [*(s.place for s in self.caches), *pretrained]:
                found, where = shown_crops(self.crops(place), config.images), "stored crops"
                if found:
                    break
            return Html("")

        failed.append(guarded(read, "pictures to look at", self.problems))
        return found, where

    def crops(self, place: str) -> list[Crop]:
        """Read some stored crops of a cache."""
        return chosen_crops(open_cache(place), self.config.images)

    def cache(self, subject: Subject, title: str) -> Html:
        """Show a cache or a pack; each part stands for itself, where one is damaged."""
        cache, crops, problems = open_cache(subject.place), list[Crop](), self.problems

        def sheet() -> Html:
            crops.extend(chosen_crops(cache, self.config.images))
            return sheet_section(crops)

        def decoded(name: str) -> Html:
            return decoded_section(cache[name], crops, self.base.model if isinstance(self.base, Looked) else None)

        parts = [heading(2, title, f"cache-{subject.letter}")]
        parts.append(guarded(lambda: cache_section(subject, cache), title, problems))
        parts.append(guarded(lambda: skipped_section(cache), f"{title}: skipped photos", problems))
        parts.append(guarded(sheet, f"{title}: crops", problems))
        for name in cache.target_names if crops else []:
            part = functools.partial(decoded, name)
            parts.append(guarded(part, f"{title}: targets {name}", problems))
        return joined(parts)
