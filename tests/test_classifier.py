"""Classifiers, groups, optimizers and recipes of fine-tuning against timm, the student and written-out formulas."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from pipelines.loading.encoder_source import load_encoder
from tec_cache.base.source import Given
from tec_cache.config import TrainConfig
from tec_cache.errors import ConfigError, WeightsError
from tec_cache.finetune.classifier import FullClassifier, LoadedEncoder
from tec_cache.finetune.groups import parameter_groups
from tec_cache.finetune.mixing import soft_target_loss, soft_targets
from tec_cache.finetune.model import create_classifier
from tec_cache.finetune.optimizers import create_optimizer
from tec_cache.finetune.recipes import RECIPES, FinetuneRecipe, recipe_for, rule_for
from tec_cache.recipes import IMAGENET_MEAN
from tec_cache.run.export import write_export
from tec_cache.run.optimizer import create_schedule
from tec_cache.student.masking import random_mask
from tec_cache.student.model import Student, create_student
from tec_cache.types import TargetSpec
from tests.conftest import TINY, write_tiny_base

IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).mul(40).sin().reshape(4, 3, 32, 32)
SPEC = TargetSpec(grid=4, channels=48, num_heads=3, k=3, normalization="patch")
CLASSES = 5


def made_student(depth: int = 3, adapters: Any = "both") -> Student:
    """A student of which every weight counts: none is zero or one, none like another."""
    args = TINY | {"depth": depth}
    student = create_student("vit_tiny_patch16_224", targets=SPEC, model_args=args, decoder_width=32, decoder_heads=4,
                             adapters=adapters)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return student.eval()


def exported(student: Student, out: Path, **config: Any) -> Path:
    args = TINY | {"depth": len(student.encoder.blocks)}
    write_export(student, out, config=config, encoder_name="vit_tiny_patch16_224", model_args=args)
    return out


@pytest.fixture(scope="module")
def student() -> Student:
    return made_student()


@pytest.fixture(scope="module")
def export(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(student, tmp_path_factory.mktemp("exports") / "tiny")


@pytest.fixture(scope="module")
def source(export: Path) -> LoadedEncoder:
    return load_encoder(str(export))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedEncoder]:
    out = exported(made_student(12), tmp_path_factory.mktemp("deep") / "tiny")
    return out, load_encoder(str(out))


def student_layers(student: Student) -> tuple[Tensor, Tensor]:
    """The student's encoder and Z_e on whole images, patches in their order."""
    layers: list[Tensor] = []
    hook = student.encoder.norm.register_forward_hook(lambda *a: layers.append(a[2]))
    with torch.no_grad():
        given = student.forward_layers(IMAGES, random_mask(torch.arange(16.0).expand(4, -1), 0.0))
        (fused,) = student.fused(given)
    hook.remove()
    return layers[0], fused


# full fine-tuning


def test_the_mae_classifier_is_timms_own_model(export: Path, source: LoadedEncoder) -> None:
    model = create_classifier(source, CLASSES, drop_path=0.1).eval()
    theirs = timm.create_model(f"local-dir:{export}", pretrained=True, global_pool="avg", num_classes=CLASSES,
                               drop_path_rate=0.1).eval()  # fmt: skip
    assert str(model.vit) == str(theirs)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == []
    assert dict(model.vit.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    features = theirs.forward_head(theirs.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(model.vit.forward_head(model.vit.forward_features(IMAGES), pre_logits=True), features)
    theirs.head.load_state_dict(model.vit.head.state_dict())
    assert torch.equal(model(IMAGES), theirs(IMAGES))
    assert [block.drop_path1.drop_prob for block in model.vit.blocks if hasattr(block.drop_path1, "drop_prob")] == (
        pytest.approx([0.05, 0.1])
    )


def test_the_pretrained_norm_is_dropped_and_the_new_one_does_nothing_yet(source: LoadedEncoder) -> None:
    before = create_classifier(source, CLASSES)(IMAGES)
    changed = dict(source.model.state_dict())
    changed["norm.weight"], changed["norm.bias"] = changed["norm.weight"] * 3, changed["norm.bias"] + 1
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY)
    model.load_state_dict(changed)
    other = create_classifier(dataclasses.replace(source, model=model), CLASSES)
    assert torch.equal(other(IMAGES), before)
    assert isinstance(other.vit.norm, nn.Identity)
    assert other.vit.fc_norm.eps == 1e-6
    assert other.vit.fc_norm.weight.eq(1).all()
    assert other.vit.fc_norm.bias.eq(0).all()
    with torch.no_grad():
        model.patch_embed.proj.weight.mul_(2)
    assert not torch.equal(create_classifier(dataclasses.replace(source, model=model), CLASSES)(IMAGES), before)


def test_norms_keep_their_eps_and_the_new_one_has_its_own(tiny_base: Path) -> None:
    source = load_encoder(str(tiny_base), given=Given(args={"norm_eps": 1e-12, "act_layer": "relu"}))
    model = create_classifier(source, CLASSES)
    found = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert found.pop("vit.fc_norm") == 1e-6
    assert set(found.values()) == {1e-12}
    assert isinstance(model.vit.blocks[0].mlp.act, nn.ReLU)


@pytest.mark.parametrize(("tune", "std"), [("full", 2e-5), ("head", 0.01)])
def test_a_new_head_is_small(source: LoadedEncoder, tune: Any, std: float) -> None:
    model = create_classifier(source, 2000, tune=tune)
    head: Any = model.vit.head if tune == "full" else model.head
    assert head.weight.std().item() == pytest.approx(std, rel=0.02)
    assert head.weight.mean().abs() < std / 50
    assert head.bias.count_nonzero() == 0


def test_the_tec_rule_trains_the_adapter_on_and_begins_as_the_folded_model(
    source: LoadedEncoder, student: Student
) -> None:
    folded = create_classifier(source, CLASSES).eval()
    model = create_classifier(source, CLASSES, rule="tec").eval()
    assert isinstance(model, FullClassifier)
    assert torch.equal(model.vit.cls_token, student.encoder.cls_token)
    torch.testing.assert_close(model(IMAGES), folded(IMAGES), rtol=0, atol=1e-6)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["vit.pos_embed"]
    soft_target_loss(model(IMAGES), torch.eye(CLASSES)[:4]).backward()
    for part in (model.vit.cls_token, *model.input_adapter.parameters()):
        assert part.grad is not None
        assert part.grad.count_nonzero() > 0
    assert model.vit.pos_embed.grad is None
    with torch.no_grad():
        model.input_adapter.fc2.bias.add_(1)
    state = model.vit.state_dict() | {"cls_token": model.class_token.detach()}
    assert state.keys() == folded.vit.state_dict().keys()
    folded.vit.load_state_dict(state)
    torch.testing.assert_close(folded(IMAGES), model(IMAGES), rtol=0, atol=1e-6)
    assert not torch.equal(state["cls_token"], source.model.cls_token)


def facts(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """What each parameter gets, by its identity, and that none is in two groups."""
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups)
    return found


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    found = facts(groups)
    for group in groups:
        named = dict(model.named_parameters())
        assert [id(named[name]) for name in group["names"]] == [id(p) for p in group["params"]]
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def expected(name: str, ndim: int, decay: float, depth: int = 12) -> tuple[float, float]:
    """MAE's facts written out: embeddings are layer 0, block i is layer i + 1, norm and head are the last."""
    inner = name.removeprefix("vit.")
    if inner in ("cls_token", "pos_embed") or inner.startswith("patch_embed."):
        layer = 0
    elif inner.startswith("blocks."):
        layer = int(inner.split(".")[1]) + 1
    else:
        layer = depth + 1
    fixed = ndim <= 1 or inner in ("cls_token", "pos_embed")
    return decay ** (depth + 1 - layer), 0.0 if fixed else 0.05


def test_mae_groups_are_timms_and_maes(deep: tuple[Path, LoadedEncoder]) -> None:
    folder, source = deep
    model = create_classifier(source, CLASSES)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.65)
    assert len(groups) == 28
    ours = by_name(model, groups)
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert ours[name] == pytest.approx(expected(name, parameter.ndim, 0.65), rel=1e-12), name
    assert ours["vit.cls_token"] == pytest.approx((0.0036972, 0), rel=1e-4)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, global_pool="avg", num_classes=CLASSES)
    optimizer = create_optimizer_v2(theirs, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.65)
    found = facts(optimizer.param_groups)
    assert {f"vit.{name}": found[id(p)] for name, p in theirs.named_parameters()} == ours
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in groups]


def test_tec_groups_differ_from_maes_in_three_things(deep: tuple[Path, LoadedEncoder]) -> None:
    model = create_classifier(deep[1], CLASSES, rule="tec")
    ours = by_name(model, parameter_groups(model, weight_decay=0.05, layer_decay=0.65))
    assert ours.keys() == dict(model.named_parameters()).keys() - {"vit.pos_embed"}
    special = {
        "vit.cls_token": (1.0, 0.0),
        "input_adapter.fc1.weight": (1.0, 0.05),
        "input_adapter.fc2.weight": (1.0, 0.05),
        "input_adapter.fc1.bias": (1.0, 0.0),
        "input_adapter.fc2.bias": (1.0, 0.0),
    }
    for name, parameter in model.named_parameters():
        if name != "vit.pos_embed":
            assert ours[name] == pytest.approx(special.get(name) or expected(name, parameter.ndim, 0.65)), name


@pytest.mark.parametrize("tune", ["head", "input-adapter", "adapters"])
def test_a_frozen_encoder_leaves_the_rest_at_scale_one(source: LoadedEncoder, tune: Any) -> None:
    model = create_classifier(source, CLASSES, tune=tune)
    ours = by_name(model, parameter_groups(model, weight_decay=0.1, layer_decay=0.5))
    assert ours.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in ours:
            assert ours[name] == (1.0, 0.1 if parameter.ndim > 1 and name != "vit.cls_token" else 0.0), name


@pytest.mark.parametrize(
    ("tune", "rule"), [("full", "mae"), ("full", "tec"), ("head", "mae"), ("input-adapter", "tec"), ("adapters", "tec")]
)
def test_every_parameter_of_a_group_takes_part_in_bfloat16_too(source: LoadedEncoder, tune: Any, rule: Any) -> None:
    """Processes that share gradients would wait for one that never comes."""
    model = create_classifier(source, CLASSES, tune=tune, rule=rule)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(IMAGES)
    soft_target_loss(logits, torch.eye(CLASSES)[:4]).backward()
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.65)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, _ in model.named_parameters() if any(name in group["names"] for group in groups)
    ]
    torch.testing.assert_close(logits.float(), model(IMAGES), rtol=0, atol=0.05)


# frozen encoders


def test_a_linear_probe_reads_the_class_token_after_the_pretrained_norm(
    source: LoadedEncoder, student: Student
) -> None:
    model = create_classifier(source, CLASSES, tune="head").train()
    encoded, _ = student_layers(student)
    for rule, read in (("mae", encoded[:, 0]), ("tec", encoded[:, 1:].mean(dim=1))):
        model = create_classifier(source, CLASSES, tune="head", rule=rule).train()  # type: ignore[arg-type]
        normalized = (read - read.mean(0)) / (read.var(0, unbiased=False) + 1e-6).sqrt()
        expected = normalized @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(IMAGES), expected, rtol=0, atol=2e-5)
        after = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm1d) and m is not model.vit.norm]
        outside = [m for m in after if not any(m is one for one in model.vit.blocks.modules())]
        assert outside == [model.norm]
        assert list(model.norm.parameters()) == []
        assert model.norm.eps == 1e-6


def test_a_mean_pooled_model_is_not_probed_through_a_norm_that_was_never_trained(tmp_path: Path) -> None:
    """What timm would do with such a model asks for an fc_norm; ours reads the output of the norm that was trained."""
    folder = write_tiny_base(tmp_path / "pooled")
    config = json.loads((folder / "config.json").read_text())
    config["model_args"]["global_pool"] = "avg"
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    with pytest.raises(WeightsError, match="do not fit"):  # nothing fills its fc_norm
        load_encoder(str(folder))
    config["model_args"]["fc_norm"] = False
    (folder / "config.json").write_text(json.dumps(config))
    model = create_classifier(load_encoder(str(folder)), CLASSES, tune="head", rule="tec").eval()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY).eval()
    plain.load_state_dict(state)
    read = plain.forward_features(IMAGES)[:, 1:].mean(dim=1)
    torch.testing.assert_close(model.features(IMAGES), read, rtol=0, atol=1e-6)


def test_adapters_read_what_the_student_read(source: LoadedEncoder, student: Student) -> None:
    encoded, fused = student_layers(student)
    tuned = create_classifier(source, CLASSES, tune="adapters")
    torch.testing.assert_close(tuned.features(IMAGES), fused[:, 1:].mean(dim=1), rtol=0, atol=1e-5)
    tuned = create_classifier(source, CLASSES, tune="input-adapter")
    torch.testing.assert_close(tuned.features(IMAGES), encoded[:, 1:].mean(dim=1), rtol=0, atol=1e-5)
    assert (encoded[:, 1:].mean(dim=1) - fused[:, 1:].mean(dim=1)).abs().max() > 0.1


TRAINED = {
    "head": {"head"},
    "input-adapter": {"head", "input_adapter", "vit.cls_token"},
    "adapters": {"head", "input_adapter", "vit.cls_token", "encoder_adapters"},
}


@pytest.mark.parametrize("tune", TRAINED)
def test_what_is_frozen_gets_no_gradient_and_stays_in_evaluation_mode(source: LoadedEncoder, tune: Any) -> None:
    open_model = copy.deepcopy(source.model).requires_grad_(True).train()
    model = create_classifier(dataclasses.replace(source, model=open_model), CLASSES, tune=tune).train()
    assert all(p.requires_grad for p in open_model.parameters())
    before = {name: value.clone() for name, value in model.vit.state_dict().items()}
    assert not any(module.training for module in model.vit.modules())
    assert model.norm.training
    soft_target_loss(model(IMAGES), torch.eye(CLASSES)[:4]).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
    wanted = {n for n, _ in model.named_parameters() if n in TRAINED[tune] or n.split(".")[0] in TRAINED[tune]}
    if tune == "adapters":  # a BatchNorm follows: a shift that all images share is taken out again
        wanted.discard("encoder_adapters.norm_after.bias")
        moved.discard("encoder_adapters.norm_after.bias")
    assert moved == wanted
    groups = parameter_groups(model, weight_decay=0.0, layer_decay=1.0)
    create_optimizer("sgd", groups, lr=0.1, momentum=0.9, betas=(0.9, 0.999)).step()
    changed = {name for name, value in model.vit.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({"cls_token"} if tune != "head" else set())
    assert not model.eval().norm.training


def test_the_control_is_drawn_and_a_function_of_its_seed(source: LoadedEncoder, tiny_base: Path) -> None:
    loaded = create_classifier(source, CLASSES, tune="adapters").state_dict()
    drawn, again, other = (
        create_classifier(source, CLASSES, tune="adapters", adapters_from="random", seed=seed).state_dict()
        for seed in (0, 0, 1)
    )
    adapters = [n for n in drawn if n.startswith(("input_adapter.", "encoder_adapters.")) or n == "vit.cls_token"]
    assert drawn.keys() == loaded.keys()
    for name in drawn:
        assert torch.equal(drawn[name], again[name])
        assert torch.equal(drawn[name], loaded[name]) == (name not in adapters), name
        new = name in adapters and not name.endswith("bias") and ".norm_" not in name
        assert torch.equal(drawn[name], other[name]) == (not new and name != "head.weight"), name
    with pytest.raises(WeightsError, match="no input adapter beside"):
        create_classifier(load_encoder(str(tiny_base)), CLASSES, tune="adapters")
    control = create_classifier(load_encoder(str(tiny_base)), CLASSES, tune="adapters", adapters_from="random")
    assert control(IMAGES).shape == (4, CLASSES)
    limit = math.sqrt(6 / (48 + 192))
    assert control.input_adapter.fc1.weight.abs().max() <= limit
    assert control.input_adapter.fc1.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.03)
    assert control.encoder_adapters.mlps[0].fc1.weight.shape == (4 * 512, 48)


def test_every_weight_is_a_function_of_the_seed_and_torchs_generator_is_left_alone(source: LoadedEncoder) -> None:
    states = []
    for start in (1, 2):
        torch.manual_seed(start)
        before = torch.get_rng_state()
        model = create_classifier(source, CLASSES, rule="tec", seed=7)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = create_classifier(source, CLASSES, rule="tec", seed=8).state_dict()
    assert [name for name in other if not torch.equal(other[name], states[0][name])] == ["vit.head.weight"]


# sources


def test_an_encoder_is_found_by_whatever_names_it(export: Path, source: LoadedEncoder, tmp_path: Path) -> None:
    assert source.made_of["export"]["adapters_sha256"]
    assert source.mean == pytest.approx(IMAGENET_MEAN)
    assert source.input_size == 32
    plain = load_encoder(str(export), export / "model.safetensors")
    assert plain.input_adapter_state is None
    assert "export" not in plain.made_of
    assert torch.equal(plain.model.norm.weight, source.model.norm.weight)
    drawn = load_encoder(f"random:{export}", seed=3)
    assert drawn.adapters_states == {}
    assert not torch.equal(drawn.model.patch_embed.proj.weight, source.model.patch_embed.proj.weight)
    larger = create_classifier(load_encoder(str(export), grid=6), CLASSES, rule="tec")
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, CLASSES)
    assert larger.input_size == 48


def test_adapters_of_another_export_are_refused(export: Path, student: Student, tmp_path: Path) -> None:
    out = exported(student, tmp_path / "out")
    file = out / "adapters" / "adapters.safetensors"
    state = load_file(file)
    save_file({name: value + 1 for name, value in state.items()}, file)
    with pytest.raises(WeightsError, match="other weights"):
        load_encoder(str(out))
    file.unlink()
    with pytest.raises(WeightsError, match="no such weight file"):
        load_encoder(str(out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "adapters", "rule": "mae"}, "MAE's rule knows no adapters"),
        ({"tune": "all"}, "unknown tune"),
        ({"rule": "ibot"}, "unknown rule"),
        ({"adapters_from": "random"}, "random adapters were asked for"),
        ({"tune": "adapters", "adapters_from": "base"}, "no encoder adapters of base"),
        ({"tune": "head", "drop_path": 0.1}, "drop path"),
        ({"num_classes": 1}, "a classifier of 1 class"),
    ],
)
def test_what_cannot_be_meant_is_refused(source: LoadedEncoder, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_classifier(source, **{"num_classes": CLASSES} | options)


def test_what_the_encoder_lacks_is_said(tmp_path: Path) -> None:
    only = load_encoder(str(exported(made_student(adapters="input"), tmp_path / "input")))
    with pytest.raises(WeightsError, match="no encoder adapters beside"):
        create_classifier(only, CLASSES, tune="adapters")
    assert create_classifier(only, CLASSES, tune="input-adapter")(IMAGES).shape == (4, CLASSES)
    none = load_encoder(str(exported(made_student(adapters="none"), tmp_path / "none")))
    with pytest.raises(WeightsError, match="no input adapter beside"):
        create_classifier(none, CLASSES, rule="tec")
    whole = dict(only.input_adapter_state)
    for state, message in (
        (whole | {"fc1.bias": torch.zeros(3)}, "of the wrong shape"),
        (whole | {"fc3.bias": torch.zeros(3)}, "unexpected"),
        ({name: value for name, value in whole.items() if name != "class_token"}, "missing: 1: class_token"),
        (whole | {"class_token": torch.full((1, 1, 48), torch.nan)}, "NaN"),
    ):
        with pytest.raises(WeightsError, match=message):
            create_classifier(dataclasses.replace(only, input_adapter_state=state), CLASSES, rule="tec")
    tokenless: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, class_token=False,
                                       global_pool="avg", fc_norm=False, **TINY)  # fmt: skip
    args = TINY | {"class_token": False, "global_pool": "avg", "fc_norm": False}
    bare = LoadedEncoder(tokenless, "vit_tiny_patch16_224", args, IMAGENET_MEAN, IMAGENET_MEAN)
    with pytest.raises(ConfigError, match="it has no class token"):
        create_classifier(bare, CLASSES, tune="head")
    assert create_classifier(bare, CLASSES)(IMAGES).shape == (4, CLASSES)


# optimizers and schedule


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 6), (4,), (2, 3))]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_lars_is_its_formula(decay: float) -> None:
    """Tensors of more than one dimension move by momentum over lr * 0.001 * |w| / |g| * g, biases by plain momentum."""
    params = parameters()
    groups = [{"params": params, "names": ["a", "b", "c"], "lr_scale": 0.5, "weight_decay": decay}]
    optimizer = create_optimizer("lars", groups, lr=3.0, momentum=0.9, betas=(0.9, 0.999))
    plain = [p.detach().clone() for p in params]
    moments = [torch.zeros_like(p) for p in plain]
    for step in range(5):
        for i, gradient in enumerate(gradients(step)):
            params[i].grad = gradient.clone()
            change = gradient
            if gradient.ndim > 1:
                change = gradient + decay * plain[i]
                denominator = gradient.norm() + decay * plain[i].norm()
                change = change * 0.001 * plain[i].norm() / denominator
            moments[i] = 0.9 * moments[i] + change
            plain[i] = plain[i] - 3.0 * 0.5 * moments[i]
        optimizer.step()
    for ours, formula in zip(params, plain, strict=True):
        torch.testing.assert_close(ours.detach(), formula, rtol=1e-5, atol=1e-6)
    assert [(g["names"], g["always_adapt"]) for g in optimizer.param_groups] == [(["a", "c"], True), (["b"], False)]


def test_sgd_and_adamw_are_their_formulas() -> None:
    for name in ("sgd", "adamw"):
        params = parameters()
        groups = [{"params": params, "names": ["a", "b", "c"], "lr_scale": 0.25, "weight_decay": 0.1}]
        optimizer = create_optimizer(name, groups, lr=0.4, momentum=0.8, betas=(0.7, 0.9))  # type: ignore[arg-type]
        plain = [p.detach().clone() for p in params]
        first, second = ([torch.zeros_like(p) for p in plain] for _ in range(2))
        for step in range(3):
            for i, gradient in enumerate(gradients(step)):
                params[i].grad = gradient.clone()
                if name == "sgd":
                    first[i] = 0.8 * first[i] + gradient + 0.1 * plain[i] if step else gradient + 0.1 * plain[i]
                    plain[i] = plain[i] - 0.1 * first[i]
                    continue
                plain[i] = plain[i] * (1 - 0.1 * 0.1)
                first[i] = 0.7 * first[i] + 0.3 * gradient
                second[i] = 0.9 * second[i] + 0.1 * gradient**2
                corrected = first[i] / (1 - 0.7 ** (step + 1)), second[i] / (1 - 0.9 ** (step + 1))
                plain[i] = plain[i] - 0.1 * corrected[0] / (corrected[1].sqrt() + 1e-8)
            optimizer.step()
        for ours, formula in zip(params, plain, strict=True):
            torch.testing.assert_close(ours.detach(), formula, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="did you mean"):
        create_optimizer("adam", groups, lr=0.4, momentum=0.8, betas=(0.7, 0.9))  # type: ignore[arg-type]


def test_the_schedule_is_its_closed_form_times_each_layers_scale(deep: tuple[Path, LoadedEncoder]) -> None:
    model = create_classifier(deep[1], CLASSES)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.65)
    optimizer = create_optimizer("adamw", groups, lr=2e-3, momentum=0.9, betas=(0.9, 0.999))
    schedule = create_schedule(optimizer, total_steps=50, warmup_steps=10, min_lr=1e-6)
    for step in range(50):
        schedule.step_update(step)
        lr = 2e-3 * step / 10
        if step >= 10:
            lr = 1e-6 + (2e-3 - 1e-6) / 2 * (1 + math.cos(math.pi * (step - 10) / 40))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(lr * group["lr_scale"], rel=1e-9, abs=1e-15)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == pytest.approx([0.65**i for i in range(13, -1, -1)])


# labels


def test_mixing_is_a_function_of_seed_step_and_rank_and_leaves_numpy_alone() -> None:
    recipe, labels = RECIPES["mae-b-300"], torch.tensor([0, 1, 2, 3])
    np.random.seed(5)
    wanted = np.random.rand(3)
    np.random.seed(5)

    def mixed(seed: int, step: int, rank: int) -> tuple[Tensor, Tensor]:
        return soft_targets(IMAGES, labels, recipe, num_classes=CLASSES, seed=seed, step=step, rank=rank)

    kept = IMAGES.clone()
    images, targets = mixed(0, 0, 0)
    assert np.array_equal(np.random.rand(3), wanted)
    assert torch.equal(IMAGES, kept)
    assert all(torch.equal(a, b) for a, b in zip(mixed(0, 0, 0), (images, targets), strict=True))
    others = [mixed(*place) for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert all(not torch.equal(images, other) for other, _ in others)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
    # of a row, the share of its own class follows from the share of its own pixels; the rest is its partner's
    cut = 0
    for place in range(24):
        images, targets = mixed(0, place, 0)
        own = (targets[:, :4].diagonal() - 0.02) / 0.9
        rebuilt = IMAGES * own[:, None, None, None] + IMAGES.flip(0) * (1 - own[:, None, None, None])
        if torch.allclose(images, rebuilt, atol=1e-5):
            continue
        cut += 1
        same = (images == IMAGES).all(dim=1).float().mean(dim=(1, 2))
        torch.testing.assert_close(same, own, rtol=0, atol=1e-5)
        assert ((images == IMAGES) | (images == IMAGES.flip(0))).all()
    assert 4 <= cut <= 20
    with pytest.raises(ConfigError, match="3 images cannot be mixed in pairs"):
        soft_targets(IMAGES[:3], labels[:3], recipe, num_classes=CLASSES, seed=0, step=0, rank=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_the_loss_is_that_of_smoothed_labels(smoothing: float) -> None:
    recipe = dataclasses.replace(RECIPES["linear"], smoothing=smoothing)
    labels, logits = torch.tensor([0, 4, 2]), torch.randn(3, CLASSES)
    images, targets = soft_targets(IMAGES[:3], labels, recipe, num_classes=CLASSES, seed=0, step=0, rank=0)
    assert torch.equal(images, IMAGES[:3])
    wanted = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(soft_target_loss(logits, targets), wanted)
    assert soft_target_loss(logits.bfloat16(), targets).dtype == torch.float32


# recipes


TABLE: Mapping[str, tuple[int, float, float, int, float]] = {
    "mae-b-300": (100, 5e-4, 0.65, 20, 1e-6),
    "mae-b-800": (100, 5e-4, 0.55, 20, 1e-6),
    "ibot-b-300": (100, 5e-4, 0.50, 5, 1e-6),
    "ibot-b-800": (100, 5e-4, 0.55, 5, 1e-6),
    "mae-l-300": (50, 1e-3, 0.65, 5, 1e-5),
}
SHARED = {"batch_size": 1024, "weight_decay": 0.05, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25,
          "auto_augment": "rand-m9-mstd0.5-inc1", "smoothing": 0.1, "optimizer": "adamw",
          "betas": (0.9, 0.999), "test_crop": 0.875}  # fmt: skip
FROZEN = {"weight_decay": 0, "drop_path": 0, "mixup": 0, "cutmix": 0, "reprob": 0, "auto_augment": None,
          "smoothing": 0, "momentum": 0.9, "base_lr": 0.1, "layer_decay": 1, "flip": 0.5, "crop_scale": (0.08, 1),
          "min_lr": 0}  # fmt: skip


def test_recipes_are_the_tables() -> None:
    for name, row in TABLE.items():
        r = RECIPES[name]
        assert (r.epochs, r.base_lr, r.layer_decay, r.warmup_epochs, r.min_lr) == row
        assert fields(r, SHARED) == SHARED
        assert r.mixes
    for name, special in {
        "linear": {"optimizer": "lars", "epochs": 90, "warmup_epochs": 10, "batch_size": 16384},
        "light": {"optimizer": "sgd", "epochs": 100, "warmup_epochs": 20, "batch_size": 1024},
    }.items():
        assert fields(RECIPES[name], FROZEN | special) == FROZEN | special
        assert not RECIPES[name].mixes
    assert RECIPES["linear"].base_lr * RECIPES["linear"].batch_size / 256 == pytest.approx(6.4)
    assert 64 <= RECIPES["small"].batch_size <= 128
    assert RECIPES.keys() == TABLE.keys() | {"linear", "light", "small"}


def fields(recipe: FinetuneRecipe, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in names}


def made_of(target: str | None = None, online: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    config = dataclasses.asdict(TrainConfig(cache="c", out="o", online=online, **changes))
    kind = "online" if online else "cached" if target else "pixels"
    return {
        "export": {"settings": {"config": config, "targets": [{"kind": kind} | ({"name": target} if target else {})]}}
    }


def several(*names: str) -> dict[str, Any]:
    made = made_of(names[0])
    made["export"]["settings"]["targets"] = [{"kind": "cached", "name": name} for name in names]
    return made


@pytest.mark.parametrize(
    ("made", "recipe", "why"),
    [
        (made_of("mae", epochs=300), "mae-b-300", "targets named mae, 300 epochs"),
        (made_of(online=("mae",), epochs=800), "mae-b-800", "800 epochs"),
        (made_of("ibot", epochs=100), "ibot-b-300", "the nearest row"),
        (made_of("ibot", epochs=600), "ibot-b-800", "the nearest row"),
        (made_of("mae_large", epochs=300, student="vit_large_patch16_224"), "mae-l-300", "vit_large"),
    ],
)
def test_a_recipe_is_chosen_by_what_an_export_was_made_of(made: dict[str, Any], recipe: str, why: str) -> None:
    chosen = recipe_for("full", None, made, num_images=1_281_167)
    assert chosen.name == recipe
    assert chosen.recipe == RECIPES[recipe]
    assert why in chosen.why
    assert recipe_for("full", "tec", made, num_images=5000).name == "small"
    assert recipe_for("head", None, made).name == "linear"
    assert recipe_for("head", "tec", made).name == recipe_for("adapters", None, made).name == "light"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "no export"),
        ({"export": {"settings": {"config": {}, "targets": {}}}}, "does not say what it was trained on"),
        ({"export": {"settings": [1]}}, "does not say what it was trained on"),
        (several("mae", "ibot"), "no row for 2 target sets"),
        (made_of("mae_large", epochs=300), "no row for vit_base_patch16_224 on targets named mae_large"),
        (made_of("dino", epochs=300), "no row for"),
        (made_of(pixels=True), "targets named pixels"),
        (made_of("mae", student_args={"depth": 6}), "with another depth"),
        (made_of("mae", student="vit_base_patch32_224"), "no row for vit_base_patch32_224"),
    ],
)
def test_a_recipe_is_not_guessed(made: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_for("full", None, made)
    assert recipe_for("full", None, made, num_images=400).name == "small"


def test_a_rule_follows_from_what_is_tuned() -> None:
    rules = {"full": "mae", "head": "mae", "input-adapter": "tec", "adapters": "tec"}
    assert {tune: rule_for(tune, None) for tune in rules} == rules  # type: ignore[arg-type]
