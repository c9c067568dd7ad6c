"""What no shape shows of a base: settled from its name, its files, its release and the user, or refused.

What a recognised release fixes holds whichever way its weights come in; who contradicts it is told so. What nobody
says is the architecture's own, with its origin, so that it can be seen and changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from tec_cache.base.source import Given, Source
from tec_cache.errors import ConfigError, WeightsError
from tec_cache.weights.releases import RELEASES, Colours, Release, contradict


class Fact(NamedTuple):
    """One thing that a base assumes, as text, and who says so."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True)
class Settled:
    """A base of which nothing is open any more."""

    model_args: dict[str, Any]
    mean: Colours
    std: Colours
    facts: tuple[Fact, ...]


ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "SiLU": "silu", "ReLU": "relu"}
"""Class of a plain MLP's activation -> timm's name of it."""


def settle(source: Source, release: str | None, num_heads: int | None, given: Given, made: nn.Module) -> Settled:
    """Settle arguments, pixel statistics and facts of a base.

    release, num_heads: what the weights themselves tell. made: the architecture with the source's and the given
    arguments, on any device. Raises ConfigError or WeightsError where two who should know contradict each other.
    """
    named = source.release
    if release is not None and named is not None and contradict(release, named):
        raise WeightsError(
            f"these are weights of {RELEASES[release].title}, and {RELEASES[named].title}'s were named",
            where=str(source.weights or source.timm_name),
            todo=f"give the file of {RELEASES[named].title}, or name the architecture alone: "
            f"--base timm:{source.architecture}",
        )
    whose = release or named
    known = RELEASES[whose] if whose else None
    args = merged_args(source, given)
    origins = dict.fromkeys(source.model_args, source.says or "config.json") | dict.fromkeys(given.args, "--base-arg")
    parts: Any = made
    heads = _heads(parts, known, num_heads, args, origins, source)
    if heads != parts.blocks[-1].attn.num_heads:
        args["num_heads"] = heads
    activation = _activation(parts, known, args, origins)
    mean, mean_origin = _colours("mean", 0, source, known, given)
    std, std_origin = _colours("std", 1, source, known, given)
    class_says = f"timm's {source.architecture}"

    def origin(name: str, fixed: str = "") -> str:
        return origins.get(name) or fixed or class_says

    title = f"{known.title}'s" if known else ""
    facts = [
        _whose(known, release, source),
        Fact("mean", _three(mean), mean_origin),
        Fact("std", _three(std), std_origin),
        Fact("heads", str(heads), origin("num_heads", title if known and parts.embed_dim in known.heads else "")),
    ]
    if activation:
        facts.append(Fact("activation", activation, origin("act_layer", title if known and known.activation else "")))
    eps = args.get("norm_eps") or next(m.eps for m in made.modules() if hasattr(m, "eps"))
    facts.append(Fact("norm eps", f"{eps:g}", origin("norm_eps")))
    facts += [Fact("note", note, "timm") for note in source.notes]
    return Settled(args, mean, std, tuple(facts))


def _whose(known: Release | None, release: str | None, source: Source) -> Fact:
    """Say whose weights these are."""
    if known is None:
        return Fact("weights", "nothing in them tells their release", "")
    return Fact("weights", known.title, "told by the file itself" if release else f"named, as {source.timm_name}")


def require_alike(base: nn.Module, student: nn.Module, name: str) -> None:
    """Refuse a student that cannot start from a base's weights although they fit: heads, activation, norms.

    Raises WeightsError naming what differs.
    """
    ours, theirs = hidden_shape(student), hidden_shape(base)
    different = [f"{what} {ours[what]}, the base's {theirs[what]}" for what in theirs if ours[what] != theirs[what]]
    if different:
        raise WeightsError(
            f"a student cannot start from the weights of {name}: it would compute something else with them",
            details=different,
            todo="make the student alike with --student-arg, or use --init random",
        )


def hidden_shape(model: nn.Module) -> dict[str, Any]:
    """Return what a transformer computes that its weights' shapes do not show."""
    parts: Any = model
    eps = sorted({float(module.eps) for module in model.modules() if isinstance(module, nn.LayerNorm)})
    return {"heads": int(parts.blocks[-1].attn.num_heads), "activation": _made_activation(parts), "norm eps": eps}


def merged_args(source: Source, given: Given) -> dict[str, Any]:
    """Return the architecture's arguments: the source's, then those that were given, which may not contradict."""
    for name, value in given.args.items():
        said = source.model_args.get(name, value)
        if said != value:
            raise ConfigError(
                f"--base-arg {name}={value} contradicts {source.says or 'config.json'}, which says {said}",
                todo=f"leave out --base-arg {name}",
            )
    return source.model_args | given.args


def _heads(
    parts: Any, known: Release | None, told: int | None, args: dict[str, Any], origins: dict[str, str], source: Source
) -> int:
    """Return the number of heads; whoever states another than the release or the file does is refused."""
    made, width = int(parts.blocks[-1].attn.num_heads), int(parts.embed_dim)
    fixed = told or (known.heads.get(width) if known else None)
    if fixed is None or fixed == made:
        return made
    if "num_heads" in args:
        who = "the file's own positions say" if told else f"{known.title} of width {width} has"  # type: ignore[union-attr]
        raise ConfigError(
            f"{origins['num_heads']} says num_heads = {made}, {who} {fixed}",
            where=str(source.weights or source.timm_name),
            todo="leave num_heads as it is",
        )
    return fixed


def _activation(parts: Any, known: Release | None, args: dict[str, Any], origins: dict[str, str]) -> str:
    """Return the name of a plain MLP's activation, the release's where it fixes one; "" for gated ones."""
    made = _made_activation(parts)
    if not made:
        return ""
    if known is None or known.activation is None or known.activation == made:
        return made
    if "act_layer" in args:
        raise ConfigError(
            f"{origins['act_layer']} says the activation is {made}, {known.title}'s is {known.activation}",
            todo="leave act_layer as it is",
        )
    args["act_layer"] = known.activation
    return known.activation


def _made_activation(parts: Any) -> str:
    """Return the name of a plain MLP's activation, "" for a gated one."""
    mlp = parts.blocks[-1].mlp
    if type(mlp).__name__ != "Mlp":
        return ""
    return ACTIVATIONS.get(type(mlp.act).__name__, type(mlp.act).__name__)


def _colours(name: str, place: int, source: Source, known: Release | None, given: Given) -> tuple[Colours, str]:
    """Return a pixel statistic and who says so: the user, else the name or folder, else the release."""
    wish: Colours | None = getattr(given, name)
    if wish is not None:
        return wish, f"--{name}"
    said: Colours = getattr(source, name)
    fixed = known.statistics if known else None
    if known is None or fixed is None:
        return said, source.origin if source.firm else f"{source.origin}; --{name} R G B to change it"
    allowed = {fixed[place], *(other[place] for other in known.also)}
    if not source.firm:
        return fixed[place], f"{known.title}'s"
    if not any(_close(said, one) for one in allowed):
        raise ConfigError(
            f"{source.origin} says {name} = {_three(said)}, {known.title}'s is {_three(fixed[place])}",
            where=str(source.weights or source.timm_name),
            todo=f"say which is right: --{name} R G B",
        )
    return said, source.origin


def _close(one: Colours, other: Colours) -> bool:
    return all(abs(a - b) < 2e-3 for a, b in zip(one, other, strict=True))


def _three(values: Colours) -> str:
    return ", ".join(f"{value:g}" for value in values)
