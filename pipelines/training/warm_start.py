"""`train --init` an export or a run: what of it a student takes, part by part, and what stays random.

The encoder is taken whole, or it is an error. All else is taken part by part, each whole or not at all, and said by
name. Position embeddings are fixed and stay the student's own: an export over another grid has others, and the same
ones over the same grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor, nn

from pipelines.export import trained_student
from tec_cache.base.facts import require_alike
from tec_cache.base.folders import check_model_hash
from tec_cache.base.load import outline
from tec_cache.documents import read_as
from tec_cache.errors import ConfigError, TecCacheError, WeightsError, nearest
from tec_cache.kinds import EXPORT_FILE, WEIGHTS_FILE, Kind, what_is
from tec_cache.run.export import (
    ADAPTERS_FILE,
    ENCODER_ADAPTERS,
    INPUT_ADAPTER,
    OF_SET,
    adapters_state,
    below,
    export_state,
)
from tec_cache.run.layout import checkpoint_file, checkpoints
from tec_cache.run.settings import load_settings
from tec_cache.student.model import Student
from tec_cache.tasks.targets import Sources
from tec_cache.weights.content import load_content
from tec_cache.weights.files import sha256_of_state
from tec_cache.weights.load import load_strict

WORDS = ("random", "base")
"""What `--init` takes beside a folder; a folder of such a name is given as ./base."""


class _Settings(msgspec.Struct):
    task: str
    config: dict[str, Any]
    targets: list[dict[str, Any]] = []


class _Made(msgspec.Struct):
    settings: _Settings
    step: int
    model_sha256: str
    adapters_sha256: str | None


class _Document(msgspec.Struct):
    """What is asked of an export's config.json."""

    tec_cache: _Made


@dataclass(frozen=True)
class Source:
    """The weights of an export or a run."""

    place: str
    kind: str
    step: int
    settings: dict[str, Any]
    """`config` and `targets` of the run's run.json."""
    encoder: Mapping[str, Tensor]
    """As it is exported: the input adapter folded into the class token."""
    adapters: Mapping[str, Tensor]
    """As they lie beside an export."""
    student: Student | None = None
    """Of a run: the decoder's blocks and the heads are its alone."""

    @property
    def sha256(self) -> str:
        """Of all weights that could be taken."""
        rest = {} if self.student is None else {f"run.{n}": v for n, v in self.student.state_dict().items()}
        adapters = {f"adapters.{name}": value for name, value in self.adapters.items()}
        return sha256_of_state({**self.encoder, **adapters, **rest})

    def names(self) -> dict[str, str]:
        """Return the names of the target sets that it learned from, by the names of its goals."""
        return {of["goal"]: of["goal"] or of.get("name") or of["kind"] for of in self.settings["targets"]}


@dataclass
class Taking:
    """A student that takes up parts, and which it took."""

    taken: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)

    def part(self, name: str, own: nn.Module, state: Mapping[str, Tensor] | None) -> None:
        """Copy a part if all of it is there in the same shapes."""
        mine = own.state_dict()
        fits = state is not None and {n: v.shape for n, v in mine.items()} == {n: v.shape for n, v in state.items()}
        (self.taken if fits else self.random).append(name)
        if fits and state is not None:
            load_strict(own, state, what=f"the {name}")


def warm_start(config: Any, student: Student, sources: Sources, begun: dict[str, Any] | None) -> dict[str, Any] | None:
    """Give a student the weights that `config.init` names, and return what run.json keeps of that.

    begun: run.json of the run that goes on, if any. Once that has a checkpoint, what it began with is needed no more;
    while it is there, it must be the same. None for `--init random` and `base`. Raises ConfigError where there is
    neither an export nor a run, WeightsError for an encoder that does not fit.
    """
    if config.init in WORDS:
        return None
    checkpoint = None
    known = begun.get("init") if begun is not None and checkpoints(Path(config.out)) else None
    if begun is not None and known is not None and begun["config"]["init"] == config.init:
        kind = what_is(config.init)
        if kind is Kind.RUN:
            checkpoint = checkpoint_file(Path(config.init), known["step"])
        if kind.value != known["kind"] or (checkpoint is not None and not checkpoint.exists()):
            return dict(known)
    source = read_source(config.init, checkpoint)
    taking = take(source, student, sources)
    about = {"kind": source.kind, "step": source.step, "sha256": source.sha256}
    return about | {"taken": taking.taken, "random": taking.random}


def read_source(place: str, checkpoint: Path | None = None) -> Source:
    """Read an export, or a run as of its last checkpoint (or a named one)."""
    kind = what_is(place)
    if kind is Kind.RUN:
        settings = load_settings(Path(place), "pretrain")
        student, step = trained_student(Path(place), checkpoint)
        return Source(place, "run", step, settings, export_state(student), adapters_state(student), student)
    if kind is not Kind.EXPORT:
        raise ConfigError(
            f"--init: there is neither an export nor a run here{nearest(place, WORDS)}",
            where=place,
            todo="give random, base, or the folder that tec-cache export or tec-cache train made",
        )
    made = read_as(Path(place) / EXPORT_FILE, _Document).tec_cache
    if made.settings.task != "pretrain":
        raise WeightsError(
            "this is the export of a tuned model, whose encoder is no student's",
            where=place,
            todo="give the export of a run of tec-cache train",
        )
    state, adapters = _export_files(Path(place), made)
    settings = {"config": made.settings.config, "targets": made.settings.targets}
    return Source(place, "export", made.step, settings, state, adapters)


def _export_files(place: Path, made: _Made) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    check_model_hash(place / WEIGHTS_FILE, made.model_sha256)
    if made.adapters_sha256 is None:
        return load_content(place / WEIGHTS_FILE), {}
    check_model_hash(place / ADAPTERS_FILE, made.adapters_sha256)
    return load_content(place / WEIGHTS_FILE), load_content(place / ADAPTERS_FILE)


def take(source: Source, student: Student, sources: Sources) -> Taking:
    """Give a student all that fits. Raises WeightsError, the student then untouched, where the encoder does not."""
    config, what = source.settings["config"], f"the {source.kind} {source.place}"
    try:
        made = outline(config["student"], config["student_args"], what)
    except TecCacheError as error:
        raise WeightsError(f"{what} is of a model that timm cannot create", where=source.place) from error
    require_alike(made, student.encoder, what)
    # compared by the name of its set, so that two sets never exchange their adapters or heads
    mine = {goal: goal or str(of.identity().get("name") or of.identity()["kind"]) for goal, of in sources.items()}
    taking = Taking()
    _encoder(source, student, taking, what)
    _encoder_adapters(source, student, taking, mine)
    _decoder(source, student, taking, mine)
    return taking


def _encoder(source: Source, student: Student, taking: Taking, what: str) -> None:
    """Take the encoder, and the input adapter with the class token from before it."""
    state = dict(source.encoder) | {"pos_embed": student.encoder.pos_embed.detach()}
    adapter = below(INPUT_ADAPTER, source.adapters)
    token = None if adapter is None else adapter.pop("class_token", None)
    if student.input_adapter is not None and adapter is not None and token is not None:
        state["cls_token"] = token
    load_strict(student.encoder, state, what=what)
    taking.taken.append("encoder")
    if student.input_adapter is not None:
        taking.part("input adapter", student.input_adapter, adapter)


def _encoder_adapters(source: Source, student: Student, taking: Taking, mine: Mapping[str, str]) -> None:
    """Take each set's encoder adapters, or the one of all, whose name is ""."""
    theirs = source.names()
    table = {name: below(f"{OF_SET}{goal}.", source.adapters) for goal, name in theirs.items()}
    if (one := below(ENCODER_ADAPTERS, source.adapters)) is not None:
        table = {"" if len(theirs) > 1 else next(iter(theirs.values())): one}
    modules = list(student.encoder_adapters)
    names = list(mine.values()) if len(modules) == len(mine) else [""] * len(modules)
    for name, module in zip(names, modules, strict=True):
        state = table.get(name, next(iter(table.values())) if len(table) == len(modules) == 1 else None)
        taking.part(f"encoder adapters of {name}" if len(modules) > 1 else "encoder adapters", module, state)


def _decoder(source: Source, student: Student, taking: Taking, mine: Mapping[str, str]) -> None:
    """Take the decoder's blocks and the heads of a run; an export has neither."""
    theirs, other = source.names(), source.student
    blocks = student.decoder.blocks
    if len(blocks):
        given = None if other is None else other.decoder.blocks
        alike = given is not None and _heads_of(given) == _heads_of(blocks)
        taking.part("decoder blocks", blocks, given.state_dict() if given is not None and alike else None)
    others: dict[str | None, Any] = {} if other is None else dict(zip(other.goals, other.heads, strict=True))
    for (goal, name), heads in zip(mine.items(), student.heads, strict=True):
        found: Any = others.get(_same_set(name, mine, theirs))
        for kind, head in heads.items():  # type: ignore[operator]
            same: Any = found[kind] if found is not None and kind in found else None
            alike = same is not None and getattr(same, "num_heads", None) == getattr(head, "num_heads", None)
            taking.part(f"{kind} head{f' of {goal}' if goal else ''}", head, same.state_dict() if alike else None)


def _same_set(name: str, mine: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """Return the goal of a source that a set of ours continues: of the same name, or the only one of an only one."""
    if len(theirs) == len(mine) == 1:
        return next(iter(theirs))
    return next((goal for goal, other in theirs.items() if other == name), None)


def _heads_of(blocks: Any) -> list[int]:
    return [int(block.attn.num_heads) for block in blocks]
