"""Students with LayerScale, query and key norms, and registers: what they compute, and the way to a tuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.convert import convert
from pipelines.export import export, trained_student
from pipelines.extract import extract
from pipelines.finetune import finetune
from pipelines.train import train
from tec_cache.base.load import load_base
from tec_cache.flops import student_macs
from tec_cache.run.settings import load_settings
from tec_cache.student.masking import random_mask
from tec_cache.student.model import Student, create_student
from tec_cache.types import Targets, TargetSpec
from tests.conftest import TINY, last_checkpoint, tiny_config, tiny_training, write_shards
from tests.test_base_models import randomized
from tests.test_finetune import tuning
from tests.test_student import run, some_targets, spec

# name of timm's, arguments that make it small, tokens before the patches
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.1}, 1),
    "query and key norm": ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}, 5),
    "no class position": ("vit_tiny_patch16_224", {"no_embed_class": True}, 1),
    "dinov2": ("vit_small_patch14_dinov2", {}, 1),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"qk_norm": True}, 5),
}


def made(kind: str, targets: TargetSpec | None = None, **options: Any) -> Student:
    """A small student of a kind, moved off its first weights: LayerScale of 1e-5 would hide the blocks."""
    name, args, _ = KINDS[kind]
    options = {"decoder_width": 32, "decoder_heads": 4} | options
    student = create_student(name, targets=targets or spec(), model_args=TINY | args, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in student.encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize("kind", KINDS)
def test_an_unmasked_student_computes_what_timm_computes(kind: str) -> None:
    student = made(kind, adapters="none").double().eval()
    prefix = KINDS[kind][2]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        layers = student.forward_layers(images, random_mask(order, 0.0))
        theirs = student.encoder.forward_intermediates(
            images, norm=False, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        whole = student.encoder.forward_features(images)
    assert student.num_prefix == prefix
    torch.testing.assert_close(layers[-1], whole, rtol=0, atol=1e-9)
    for ours, (patches, tokens) in zip(layers[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(ours, torch.cat([tokens, patches], dim=1), rtol=0, atol=1e-9)
    assert (layers[0] - layers[1]).abs().mean() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_registers_are_never_masked_and_end_before_the_adapters(kind: str) -> None:
    student, prefix = made(kind), KINDS[kind][2]
    seen: list[Tensor] = []
    student.encoder.blocks[0].register_forward_hook(lambda _m, given, _o: seen.append(given[0]))
    images = torch.randn(2, 3, 32, 32)
    mask = random_mask(torch.rand(4, 16), 0.75)
    layers = student.forward_layers(images, mask)
    assert [layer.shape for layer in layers] == [(4, prefix + 4, 48)] * 3
    assert all(torch.equal(seen[0][row, :prefix], seen[0][0, :prefix]) for row in range(4))
    (encoded,) = student.fused(layers)
    assert encoded.shape == (4, 5, 48)
    # each token by itself: what the adapters make of class token and patches needs no register
    kept = [torch.cat([layer[:, :1], layer[:, prefix:]], dim=1) for layer in layers]
    torch.testing.assert_close(encoded, student.encoder_adapters[0](kept))
    assert not student.encoder.pos_embed[:, : student.encoder.pos_embed.shape[1] - 16].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_trained_parameter_gets_a_gradient(kind: str) -> None:
    student = made(kind)
    sum(run(student, some_targets(student.goals[""].spec)).values()).backward()  # type: ignore[union-attr]
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    names = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in student.encoder.named_parameters()}
    assert ("ls1" in names) == (kind in ("layer scale", "dinov2", "dinov2 with registers"))


def test_the_first_weights_of_scales_and_registers() -> None:
    name, args, _ = KINDS["dinov2 with registers"]
    encoder = create_student(name, targets=spec(), model_args=TINY | args, decoder_width=32).encoder
    assert all(block.ls1.gamma.allclose(torch.tensor(1e-5)) for block in encoder.blocks)
    assert 0.01 < encoder.reg_token.std() < 0.04
    assert all(block.attn.q_norm.weight.eq(1).all() for block in encoder.blocks)


def test_macs_count_the_registers() -> None:
    student = made("registers", adapters="encoder")
    s = student.goals[""].spec
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(student(torch.randn(1, 3, 32, 32), some_targets(s, batch=1), noise=torch.rand(1, 16)).values())
    assert student_macs(student, 4) == counter.get_total_flops() / 2


def test_from_a_training_to_a_tuned_model(made_cache: Path, tmp_path: Path) -> None:
    name, args, prefix = KINDS["dinov2 with registers"]
    chosen = {"student": name, "student_args": TINY | args}
    train(tiny_training(made_cache, tmp_path / "run", steps=3, **chosen))
    out = export(tmp_path / "run", tmp_path / "out")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert type(model).__name__ == "VisionTransformer"
    assert (model.num_prefix_tokens, model.num_reg_tokens) == (prefix, 4)
    student = trained_student(tmp_path / "run")[0].eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        layers = student.forward_layers(images, random_mask(torch.arange(16.0).expand(2, -1), 0.0))
        torch.testing.assert_close(model.forward_features(images), layers[-1], rtol=0, atol=1e-5)
    # the base of the next round, and the start of another run
    targets: Targets = load_base(str(out), grid=4, k=3)(images)
    assert targets.attention is not None
    assert targets.attention.shape == (2, 3, 4, 16)
    train(tiny_training(made_cache, tmp_path / "again", steps=1, init=str(out), **chosen))
    assert load_settings(tmp_path / "again")["init"]["taken"][0] == "encoder"
    # tuned, as a whole and with the adapters
    photos = tmp_path / "photos"
    write_shards(photos / "train", [24])
    write_shards(photos / "test", [13], start=100)
    for tune in ("full", "adapters"):
        config = tuning(photos, out, tmp_path / tune, epochs=1, **({} if tune == "full" else {"tune": tune}))
        assert finetune(config).finished
    tuned = timm.create_model(f"local-dir:{export(tmp_path / 'full', tmp_path / 'tuned')}", pretrained=True)
    assert (tuned.num_classes, tuned.num_reg_tokens) == (4, 4)


def test_a_student_with_registers_starts_from_a_base_with_registers(shards: Path, tmp_path: Path) -> None:
    name, args, _ = KINDS["dinov2 with registers"]
    base = write_base(tmp_path / "base", name, args)
    extract(tiny_config(shards, tmp_path / "cache", base, limit=8, views=1))
    chosen = {"student": name, "student_args": TINY | args, "batch_size": 4}
    train(
        tiny_training(
            tmp_path / "cache", tmp_path / "run", init="base", base_lr=0.0, weight_decay=0.0, steps=1, **chosen
        )
    )
    state, given = last_checkpoint(tmp_path / "run")["model"], load_file(base / "model.safetensors")
    for part in ("reg_token", "cls_token", "blocks.1.ls2.gamma", "blocks.2.attn.q_norm.weight"):
        assert torch.equal(state[f"encoder.{part}"], given[part])
    expected = resample_abs_pos_embed(given["pos_embed"], [4, 4], [6, 6], num_prefix_tokens=0)
    torch.testing.assert_close(state["encoder.pos_embed"], expected, rtol=0, atol=1e-6)


def write_base(folder: Path, name: str, args: dict[str, Any]) -> Path:
    """Write a random model over 6 x 6 patches, as timm's hub lays it out."""
    model = randomized(lambda: timm.create_model(name, num_classes=0, img_size=48, **TINY | args))
    folder.mkdir()
    save_file({n: value.contiguous() for n, value in model.state_dict().items()}, folder / "model.safetensors")
    config = {
        "architecture": name,
        "model_args": TINY | args | {"img_size": 48},
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.2] * 3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_student_of_dinov2s_kind_converts_to_dinov2s_class(made_cache: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    chosen = {"student": "vit_small_patch14_reg4_dinov2", "student_args": dict(TINY)}
    train(tiny_training(made_cache, tmp_path / "run", steps=2, **chosen))
    out = export(tmp_path / "run", tmp_path / "out")
    theirs = AutoModel.from_pretrained(convert(out, tmp_path / "there", to="transformers").out).eval()
    assert type(theirs).__name__ == "Dinov2WithRegistersModel"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = theirs(pixel_values=images).last_hidden_state
        ours = timm.create_model(f"local-dir:{out}", pretrained=True).eval().forward_features(images)
    torch.testing.assert_close(found, ours, rtol=0, atol=2e-5)
