"""What runs cost, as in table 8 of the paper: parameters, computing with and without gradient, base calls, hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.export import student_of_run
from pipelines.reporting.html import NOTHING, Html, heading, joined, paragraph, table, text
from pipelines.reporting.logged import Logged
from pipelines.reporting.outlines import outlined_macs, outlined_parameters
from pipelines.reporting.subjects import Subject
from tec_cache.cache.opening import open_cache
from tec_cache.errors import TecCacheError
from tec_cache.flops import BACKWARD, student_macs
from tec_cache.progress import human_seconds
from tec_cache.run.settings import load_settings
from tec_cache.student.masking import num_visible_patches

GIGA = 1e9


@dataclass(frozen=True)
class Costs:
    """Of one run. MAC are of one image, forward; one is two FLOP."""

    parameters: int
    trained: int
    gradient_macs: int
    """Of what is trained, and takes a backward pass too."""
    base_macs: int
    """Of what runs without gradient in each step."""
    spared_macs: int | None
    """Of the base of a cached target set, which does not run; None where it is not known."""
    images: int
    """That went through the model by now."""
    base_calls: int
    """Images that went through a base by now."""
    seconds: float | None
    """As the logged speed says; judging and loading of models come on top. None before a speed is logged."""

    @property
    def flop(self) -> float:
        """Of the run by now."""
        forward = self.images * (1 + BACKWARD) * self.gradient_macs
        return 2.0 * (forward + self.base_calls * self.base_macs)


def costs_section(runs: Sequence[tuple[Subject, Logged]]) -> Html:
    """Return the table of costs, with a column for each run."""
    found = [(subject, costs_of(subject, logged)) for subject, logged in runs]
    if not found:
        return NOTHING
    rows: list[list[object]] = [
        ["parameters, million", *(f"{c.parameters / 1e6:,.3f}" for _, c in found)],
        ["of them trained", *(f"{c.trained / 1e6:,.3f}" for _, c in found)],
        ["GMAC an image, with gradient", *(_giga(c.gradient_macs) for _, c in found)],
        ["GMAC an image, without gradient", *(_giga(c.base_macs) for _, c in found)],
        ["GMAC an image spared by the cache", *(_giga(c.spared_macs) for _, c in found)],
        ["images trained on", *(f"{c.images:,}" for _, c in found)],
        ["base calls in the training (images)", *(f"{c.base_calls:,}" for _, c in found)],
        ["FLOP by now", *(_flop(c.flop) for _, c in found)],
        ["time by now", *(None if c.seconds is None else human_seconds(c.seconds) for _, c in found)],
    ]
    said = (
        "MAC: multiply-accumulates of linear maps, convolutions and attention products, forward. What has a gradient "
        f"takes {1 + BACKWARD} times as many in a step. The base of a cached target set ran once for each stored view "
        "when the cache was made, and not here. The time is that of the steps up to the last line of the log: judging "
        "and starting come on top. Of a tuning, the head is not counted."
    )
    head = ["", *(text(subject.title) for subject, _ in found)]
    return joined([heading(2, "Time and computing", "costs"), table(head, rows, caption="What the runs cost"),
                   paragraph(said, kind="note")])  # fmt: skip


def _giga(macs: int | None) -> str | None:
    return None if macs is None else f"{macs / GIGA:,.4g}"


def _flop(count: float) -> str:
    """Write FLOP as people read them."""
    for power, unit in ((15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if count >= 10**power:
            return f"{count / 10**power:,.4g} {unit}"
    return f"{count:,.0f}"


def costs_of(subject: Subject, logged: Logged) -> Costs:
    """Count what a run costs. Raises TecCacheError where its model cannot be outlined."""
    settings = load_settings(subject.folder)
    config = settings["config"]
    steps = int(max([subject.about["step"] if subject.about else 0, *(line["step"] for line in logged.lines[-1:])]))
    images, timed = steps * int(config["batch_size"]), logged.points("seconds")[1]
    seconds = sum(timed) if timed else None
    if settings["task"] != "pretrain":
        model = settings["model"]
        grid = int(model["input_size"]) // _patch_of(model)
        macs, parameters = outlined_macs(model, grid, k=None), outlined_parameters(model, grid)
        whole = config["tune"] == "full"
        return Costs(parameters, parameters if whole else 0, macs if whole else 0, 0 if whole else macs, None, images,
                     0 if whole else images, seconds)  # fmt: skip
    with torch.device("meta"):
        student = student_of_run(settings)
    tokens = next(iter(student.goals.values())).spec.num_tokens
    macs = student_macs(student, num_visible_patches(tokens, config["mask_ratio"]))
    every = list(student.parameters())
    online = [of for of in settings["targets"] if of["kind"] == "online"]
    return Costs(
        parameters=sum(p.numel() for p in every),
        trained=sum(p.numel() for p in every if p.requires_grad),
        gradient_macs=macs,
        base_macs=sum(outlined_macs(of["base"], of["spec"]["grid"], of["spec"]["k"]) for of in online),
        spared_macs=_spared(settings),
        images=images,
        base_calls=len(online) * images // int(config["masks_per_view"]),
        seconds=seconds,
    )


def _patch_of(model: dict[str, Any]) -> int:
    from pipelines.reporting.outlines import outlined

    embed: Any = outlined(model, None).patch_embed
    return int(embed.patch_size[0])


def _spared(settings: dict[str, Any]) -> int | None:
    """Return the MAC of the bases of the cached sets, as far as their cache is still there."""
    cached = [of for of in settings["targets"] if of["kind"] == "cached"]
    try:
        cache = open_cache(settings["config"]["cache"]) if cached else None
        sets = [cache[of["name"]] for of in cached] if cache is not None else []
        return sum(outlined_macs(s.identity["base"], s.spec.grid, s.spec.k) for s in sets) if sets else None
    except (TecCacheError, OSError, KeyError, TypeError, ValueError):
        return None  # elsewhere by now, or no longer readable
