"""Round after round: each new model is the base of the next one, over the same stored crops.

A round is a list of calls of the other programs, `extract` (from round 1 on), `train`, `export` and `rm`, and nothing
else. rounds.json says which of them are done; each of them goes on by itself where it was killed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.chaining.chain import Chain, resolved, round_name
from pipelines.chaining.commands import commands_left
from pipelines.chaining.estimate import Estimate, estimate
from pipelines.chaining.journal import Journal, Round, clear_drafts, read_journal
from pipelines.export import export, last_checkpoint
from pipelines.extract import extract
from pipelines.extraction.extract_summary import require_finished
from pipelines.remove import remove, set_names
from pipelines.train import last_scores, train
from tec_cache.cache.lock import writing
from tec_cache.cache.opening import open_cache
from tec_cache.distributed import Ranks
from tec_cache.documents import read_document
from tec_cache.errors import ConfigError
from tec_cache.kinds import EXPORT_FILE
from tec_cache.rounds_config import RoundsConfig
from tec_cache.run.layout import step_of
from tec_cache.run.metrics import is_loss, read_metrics
from tec_cache.run.settings import load_settings


@dataclass
class RoundsSummary:
    """What the rounds did, or would do."""

    out: str
    cache: str
    finished: bool
    """Whether all of them are done (else a signal stopped a training, and the same command goes on)."""
    rounds: list[dict[str, Any]]
    """See `pipelines.chaining.journal.Round`."""
    commands: list[str] = field(default_factory=list)
    """The calls that are left to do, as commands that could be typed."""
    estimate: dict[str, Any] | None = None
    """Of a dry run: disk and hours of what is left."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def rounds(
    config: RoundsConfig, *, dry_run: bool = False, quiet: bool = True, ranks: Ranks | None = None
) -> RoundsSummary:
    """Train a model, make it the base of the next one, and so on; goes on where an earlier call stopped.

    dry_run: write nothing, and say what is left to do, what disk it takes and how many hours. Raises ConfigError,
    IdentityError for settings other than those that the folder's rounds were begun with, TecCacheError for a folder
    that holds something else, and whatever `train`, `extract`, `export` and `remove` raise.
    """
    ranks = ranks or Ranks.from_environment()
    if ranks.world_size > 1:
        raise ConfigError(
            "rounds run in one process",
            todo="see the commands of all rounds with --dry-run; train and extract among them take torchrun",
        )
    folder = Path(config.train.out)
    if dry_run:
        journal, chain = _begun(config, folder)
        left = commands_left(chain, journal)
        found: Estimate | None = estimate(chain, journal, quiet=quiet) if left else None
        return _summary(chain, journal, left, found)
    _begun(config, folder)  # before anything is made, the folder among it
    with writing(folder, "these rounds", ranks):
        journal, chain = _begun(config, folder)
        clear_drafts(folder)
        journal.save()
        for number in range(config.rounds):
            if not _round(chain, journal, number, quiet):
                break
    return _summary(chain, journal, commands_left(chain, journal))


def _begun(config: RoundsConfig, folder: Path) -> tuple[Journal, Chain]:
    """Return what is done and what is to be done, once nothing is in the way."""
    begun = read_journal(folder)
    chain = resolved(config, begun.settings if begun else None)
    journal = begun or Journal(folder, chain.settings)
    if config.rounds < len(journal.rounds):
        todo = f"give at least --rounds {len(journal.rounds)}"
        raise ConfigError(f"--rounds {config.rounds}, of which more were begun", where=str(folder), todo=todo)
    names = set_names(open_cache(config.train.cache).store)
    for name in (chain.set_name(number) for number in range(1, config.rounds)):
        if name in names and name not in journal.sets:
            raise ConfigError(
                f"the cache has a target set {name!r} that these rounds did not make",
                where=config.train.cache,
                todo="give another --name, or remove the set with tec-cache rm",
            )
    return journal, chain


def _round(chain: Chain, journal: Journal, number: int, quiet: bool) -> bool:
    """Make the calls of one round that are left; False where a signal stopped its training."""
    one = _record(chain, journal, number)
    calls = {"extract": _extract, "train": _train, "export": _export, "rm": _remove}
    for name, call in calls.items():
        title = f"{round_name(number)} {name}"
        if title in journal.done or (name == "extract" and number == 0):
            continue
        if not call(chain, journal, one, quiet):
            return False
        journal.finished(title)
    return True


def _record(chain: Chain, journal: Journal, number: int) -> Round:
    if number == len(journal.rounds):
        run, out = (str(path.relative_to(chain.folder)) for path in (chain.run(number), chain.export(number)))
        journal.rounds.append(Round(number, run, out, chain.set_name(number) if number else None))
    return journal.rounds[number]


def _extract(chain: Chain, journal: Journal, one: Round, quiet: bool) -> bool:
    """Make the targets of the round before's model over the crops that are stored: no photo is read."""
    name = chain.set_name(one.number)
    if name not in journal.sets:
        journal.sets.append(name)
        journal.save()
    with journal.timed(one, "extract"):
        require_finished(extract(chain.extraction(one.number), quiet=quiet, ranks=Ranks()))
    cache = open_cache(chain.config.train.cache)
    target = cache[name]
    records = cache.of_units(target.units, target.record)
    codec = target.codec_record
    one.target_bytes = sum(record.payload.size for record in records if record.payload)
    one.base_calls = sum(record.count for record in records) + codec.fitted_views + codec.checked_views
    return True


def _train(chain: Chain, journal: Journal, one: Round, quiet: bool) -> bool:
    config = chain.training(one.number)
    with journal.timed(one, "train"):
        summary = train(config, quiet=quiet, ranks=Ranks())
    if not summary.finished:
        return False
    last = read_metrics(Path(config.out))[-1]
    one.steps, one.init = summary.steps, summary.init
    one.losses = {name: value for name, value in last.items() if is_loss(name)}
    one.scores = last_scores(Path(config.out))
    return True


def _export(chain: Chain, journal: Journal, one: Round, quiet: bool) -> bool:
    run, out = chain.run(one.number), chain.export(one.number)
    if not _is_exported(run, out):
        export(run, out)
    one.export_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return True


def _is_exported(run: Path, out: Path) -> bool:
    """Say whether a folder holds the export of a run as it is: config.json is written last."""
    if not (out / EXPORT_FILE).exists():
        return False
    made = read_document(out / EXPORT_FILE).get("tec_cache")
    wanted = {"settings": load_settings(run), "step": step_of(last_checkpoint(run, None))}
    return isinstance(made, dict) and {name: made.get(name) for name in wanted} == wanted


def _remove(chain: Chain, journal: Journal, one: Round, quiet: bool) -> bool:
    """Remove the target sets that are older than those to keep: this round has finished, and needs none."""
    cache = chain.config.train.cache
    for old in (journal.rounds[number] for number in chain.too_old(one.number)):
        if old.target is None or old.removed:
            continue
        if old.target in set_names(open_cache(cache).store):
            remove(cache, target=old.target, quiet=quiet)
        old.removed = True
        journal.save()
    return True


def _summary(chain: Chain, journal: Journal, left: list[str], found: Estimate | None = None) -> RoundsSummary:
    return RoundsSummary(
        out=str(chain.folder),
        cache=chain.config.train.cache,
        finished=not left,
        rounds=[asdict(replace(one)) for one in journal.rounds],
        commands=left,
        estimate=None if found is None else found.to_json(),
    )
