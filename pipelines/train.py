"""Stage two: crops and targets from the cache -> a new ViT. As often as wanted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipelines.judging.student_judge import StudentJudge, probe_config
from pipelines.training.running import Ran, prepared_compute, run_task, with_micro_batch
from pipelines.training.target_sources import OnlineTargets, base_weights_for, choose_targets, target_sets
from pipelines.training.warm_start import warm_start
from tec_cache.cache.opening import open_cache
from tec_cache.cache.reader import Cache
from tec_cache.config import TrainConfig, parse_bytes
from tec_cache.device import Compute
from tec_cache.distributed import Ranks, agreed, process_group
from tec_cache.errors import CacheError
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.run.extending import Extension
from tec_cache.run.folder import begun_run
from tec_cache.run.layout import FORMAT
from tec_cache.run.loop import LoopSummary
from tec_cache.run.metrics import read_metrics
from tec_cache.store.staged import StagedStore
from tec_cache.student.model import Goal, Student, create_encoder, student_options
from tec_cache.tasks.pretrain import MOST_AT_ONCE, Pretrain
from tec_cache.tasks.targets import Sources
from tec_cache.urls import without_secrets
from tec_cache.weights.load import load_strict


@dataclass(kw_only=True)
class TrainSummary(LoopSummary):
    """What a pretraining did."""

    base_calls: dict[str, int]
    """How often each base in the loop ran, for --online."""
    left_out: int
    """Number of views in each epoch that did not fill a batch; they differ in each epoch."""
    damaged: list[str]
    """Damaged blocks that this process met and replaced by other rows (--on-error skip)."""
    target_errors: dict[str, float]
    """The measured relative mean squared error of each target set's stored, normalized features."""
    gradients: dict[str, float]
    """The last measured norm of each set's weighted gradient at the encoder's output, if there are several sets."""
    dwarfed: str
    """Which set's gradient is many times which other's; empty if none is."""
    scores: dict[str, float]
    """probe_knn and probe_linear, 0 to 1, of the last periodic judgement, and its step; empty if there was none."""
    remarks: list[str]
    """What was assumed about the photos used for judging, and which of them were left out."""
    foreign: list[str] = field(default_factory=list)
    """Foreign files in the run's folder: none of them is ever read or removed."""
    init: dict[str, Any] | None = None
    """What was taken from an export or a run (--init), and what of the student stayed random."""
    extensions: list[Extension] = field(default_factory=list)
    """How the run was lengthened (--extend)."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def train(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    extend: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
    ranks: Ranks | None = None,
) -> TrainSummary:
    """Train a student on the targets of a cache, of a base online, or on pixels.

    Goes on from the last checkpoint of `config.out` where there is one. overwrite: remove the run that lies there
    first, and nothing else. extend: a run of another number of epochs goes on under the schedule of `config.epochs`
    (`tec_cache.run.extending`). Raises ConfigError, IdentityError, CacheError, WeightsError, NonFiniteError,
    SourceError for photos to be judged on, or TecCacheError where the folder holds something that is no run.
    """
    ranks = ranks or Ranks.from_environment()
    shown = ranks.main and not quiet
    compute = prepared_compute(config, ranks)
    cache = staged(config, open_cache(config.cache))
    run = Path(config.out)
    with process_group(ranks, compute.device):
        begun = begun_run(run, Pretrain.name)
        if begun is not None and not overwrite:
            config = as_begun(config, begun)
        if config.partial:
            # rank 0 decides: the others may list the cache a moment later
            kept = None if overwrite else begun
            groups, num_views = agreed(finished_groups(config, cache, kept) if ranks.main else None, ranks) or ((), 0)
            cache, config = cache.narrowed(groups), replace(config, views=num_views)
        config = with_micro_batch(config, Pretrain.name, MOST_AT_ONCE, compute, ranks, overwrite=overwrite)
        sources, student = prepare_student(config, cache, compute)
        init = warm_start(config, student, sources, None if overwrite else begun)

        def task() -> Pretrain:
            judge = judge_of(config, student, compute, ranks, shown)
            return Pretrain(config, cache, sources, student, compute, ranks, judge)

        settings = resolved_settings(config, cache, sources, student) | ({} if init is None else {"init": init})
        how = {"overwrite": overwrite, "extend": extend, "dry_run": dry_run, "quiet": not shown}
        ran = run_task(task, settings, config, compute, ranks, **how)
        judged = ran.task.judge is not None and ranks.main and not dry_run
        return replace(summary_of(ran, last_scores(run) if judged else {}), init=init)


def judge_of(config: TrainConfig, student: Student, compute: Compute, ranks: Ranks, shown: bool) -> StudentJudge | None:
    """Return what judges the student while it trains, once its photos are looked at; None where nobody asks for it."""
    probing = probe_config(config)
    size = int(student.encoder.patch_embed.img_size[0])
    return None if probing is None else StudentJudge(probing, size, compute, ranks, quiet=not shown)


def last_scores(run: Path) -> dict[str, float]:
    """Return the scores of a run's last judgement, and its step; nothing where there was none."""
    judged = [line for line in read_metrics(run) if "probe_knn" in line]
    return {name: judged[-1][name] for name in ("step", "probe_knn", "probe_linear")} if judged else {}


def summary_of(ran: Ran[Pretrain], scores: dict[str, float]) -> TrainSummary:
    """Add to what the loop did what is pretraining's alone."""
    task = ran.task
    return TrainSummary(
        **vars(ran.done),
        base_calls={
            name or source.base.name: source.base.num_calls
            for name, source in task.sources.items()
            if isinstance(source, OnlineTargets)
        },
        left_out=task.loader.left_out,
        damaged=sorted(task.loader.damaged),
        target_errors=task.target_errors(),
        gradients=dict(task.gradients.last) if task.gradients is not None else {},
        dwarfed=task.gradients.note() if task.gradients is not None else "",
        scores=scores,
        remarks=task.judge.remarks() if isinstance(task.judge, StudentJudge) else [],
        foreign=ran.foreign,
        extensions=ran.extensions,
    )


def staged(config: TrainConfig, cache: Cache) -> Cache:
    """Return the same cache, its payloads read from copies on a local disk where that was asked for."""
    if config.stage is None:
        return cache
    return replace(cache, store=StagedStore(cache.store, Path(config.stage), parse_bytes(config.stage_bytes)))


def as_begun(config: TrainConfig, stored: dict[str, Any]) -> TrainConfig:
    """Take what was left open, but may have changed in the cache since, from the run as it began.

    A run goes on with its own views and target sets when the cache has grown by others.
    """
    changes: dict[str, Any] = {}
    if config.views is None:
        changes["views"] = stored["num_views"]
    chosen = bool(config.target or config.online or config.pixels)
    if config.target == ("all",) or (not chosen and all(of["kind"] == "cached" for of in stored["targets"])):
        cached = [of for of in stored["targets"] if of["kind"] == "cached"]
        changes["target"] = tuple(f"{of['name']}:{of['weight']!r}" for of in cached)
    return replace(config, **changes)


def finished_groups(
    config: TrainConfig, cache: Cache, begun: dict[str, Any] | None
) -> tuple[frozenset[tuple[int, int]], int]:
    """Return the groups of photos that are finished now, or were when the run began, and in how many views."""
    if begun is not None and begun["groups"] is not None:
        return frozenset((shard, group) for shard, group in begun["groups"]), int(begun["num_views"])
    num_views = config.views or cache.num_views
    names: list[str | None] = [None]  # of the views alone
    if not (config.online or config.pixels):
        names = list(target_sets(config, cache))
    groups = frozenset.intersection(*(cache.finished_groups(num_views, name) for name in names))
    if not groups:
        todo = "wait until tec-cache extract has finished some"
        raise CacheError("no group of photos is finished in all its views yet", where=config.cache, todo=todo)
    return groups, num_views


def prepare_student(config: TrainConfig, cache: Cache, compute: Compute) -> tuple[Sources, Student]:
    """Resolve the targets, then build the student with heads that fit them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = create_encoder(config.student, cache.grid, config.student_args)
        sources = choose_targets(config, cache, compute, int(encoder.patch_embed.img_size[0]))
        torch.manual_seed(config.seed)  # again: loading a base draws from the generator too
        student = Student(
            encoder,
            {name: Goal(spec=source.spec, tau=source.tau) for name, source in sources.items()},
            **student_options(vars(config)),
            checkpointing=config.checkpointing,
        )
    if config.init == "base":
        state = base_weights_for(config, sources, student.encoder)
        load_strict(student.encoder, state, what="the student, from the base's weights")
    return sources, student


def resolved_settings(config: TrainConfig, cache: Cache, sources: Sources, student: Student) -> dict[str, Any]:
    """Return everything that made a run, as it is kept in run.json."""
    named = {name: getattr(config, name) for name in ("cache", "probe_train", "probe_test")}
    places: dict[str, Any] = {name: without_secrets(place) for name, place in named.items() if place}
    return {
        "format": FORMAT,
        "task": Pretrain.name,
        "config": asdict(replace(config, **places)),
        "targets": [
            source.identity()
            | {"spec": source.spec.to_json(), "tau": source.tau, "weight": source.weight, "goal": goal}
            for goal, source in sources.items()
        ],
        "cache": cache.fingerprint,
        "num_views": config.views or cache.num_views,
        "groups": None if cache.only is None else sorted(list(group) for group in cache.only),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
