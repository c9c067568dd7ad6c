"""The models that a report looks through: the base that was given, and what runs and exports hold."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipelines.export import trained_student
from pipelines.judging.student_judge import exported_encoder
from pipelines.loading.encoder_source import load_encoder
from pipelines.reporting.judged import tuned_model
from pipelines.reporting.subjects import Subject
from tec_cache.base.load import load_base, native_grid
from tec_cache.base.model import FrozenBase
from tec_cache.base.source import Given
from tec_cache.device import Compute
from tec_cache.kinds import Kind
from tec_cache.student.adapters import EncoderAdapters
from tec_cache.weights.load import load_strict


@dataclass(frozen=True)
class Looked:
    """A model as a base: images to features and attention; and its encoder adapters by target set, "" for all sets."""

    title: str
    model: FrozenBase
    adapters: dict[str, EncoderAdapters] = field(default_factory=dict)

    @torch.no_grad()
    def layers(self, images: Tensor) -> list[Tensor]:
        """Return what the adapters read: the outputs (B, N, C) of all blocks, the last one behind the final norm.

        images: (B, 3, S, S), normalized. All patches are seen, as in use, and not a quarter of them as in training.
        """
        vit: Any = self.model.model
        found: list[Tensor] = []
        hooks = [block.register_forward_hook(lambda _m, _i, out: found.append(out)) for block in vit.blocks]
        try:
            vit.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        found[-1] = vit.norm(found[-1])
        return found

    @torch.no_grad()
    def shares(self, images: Tensor) -> dict[str, list[float]]:
        """Return each encoder adapter's mean share of Z_e by target set: of each set they sum to 1.

        The length of Z'_n of a token, mean over tokens and images, over the sum of these means.
        """
        layers = self.layers(images) if self.adapters else []
        found = {}
        for name, adapters in self.adapters.items():
            lengths = [part.float().norm(dim=-1).mean() for part in adapters.contributions(layers)]
            found[name] = (torch.stack(lengths) / torch.stack(lengths).sum()).tolist()
        return found


def given_base(name: str, weights: str | None, given: Given, grids: Sequence[int], compute: Compute) -> Looked:
    """Load the base that was given, at the grid of what it is compared with, else its own."""
    grid = grids[0] if grids else native_grid(name, weights, given)
    model = load_base(name, weights, grid=grid, k=0, given=given)
    return Looked(f"base {name.rstrip('/').rpartition('/')[2]}", model.prepare(compute))


def model_of(subject: Subject, compute: Compute) -> Looked:
    """Load the model of a run's last checkpoint, or of an export. Raises TecCacheError where there is none yet."""
    adapters: dict[str, EncoderAdapters] = {}
    if subject.kind is Kind.EXPORT:
        source = load_encoder(str(subject.folder), tuned=True)
        vit, statistics = source.model, (source.mean, source.std)
        for name, state in source.adapters_states.items():
            hidden = len(state["mlps.0.fc1.weight"])
            adapters[name] = EncoderAdapters(len(vit.blocks), vit.embed_dim, hidden)
            load_strict(adapters[name], dict(state), what=f"the encoder adapters {name}")
    elif subject.task == "pretrain":
        student, _ = trained_student(subject.folder)
        judged = exported_encoder(student)
        vit, statistics = judged.model, (judged.mean, judged.std)  # type: ignore[assignment]
        names = list(student.goals) if len(student.encoder_adapters) > 1 else [""]
        adapters = dict(zip(names, student.encoder_adapters, strict=False))  # type: ignore[arg-type]
    else:
        tuned: Any = tuned_model(subject.folder)
        vit, statistics = copy.deepcopy(tuned.vit), (tuned.mean, tuned.std)
        if getattr(tuned, "input_adapter", None) is not None:
            with torch.no_grad():
                vit.cls_token.copy_(tuned.class_token)
        if getattr(tuned, "encoder_adapters", None) is not None:
            adapters[""] = tuned.encoder_adapters
    depth = len(vit.blocks)
    model = FrozenBase(vit, name=subject.name, identity={}, mean=statistics[0], std=statistics[1],
                       last_layers=min(2, depth), k=0)  # fmt: skip
    for module in adapters.values():
        module.to(compute.device).requires_grad_(False)
    return Looked(subject.title, model.prepare(compute), adapters)
