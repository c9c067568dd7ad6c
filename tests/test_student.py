"""The student: sizes, options, initialization, masks, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tec_cache.errors import ConfigError
from tec_cache.rng import key64
from tec_cache.student.heads.attention import attention_loss
from tec_cache.student.heads.feature import feature_loss
from tec_cache.student.masking import mask_noise, num_visible_patches, random_mask
from tec_cache.student.model import Student, create_student
from tec_cache.student.position import sincos_position
from tec_cache.types import Targets, TargetSpec
from tests.conftest import TINY

VIT_B = TargetSpec(grid=14, channels=768, num_heads=12, k=15, normalization="patch")


def spec(k: Any = 3, channels: int = 48, heads: int = 3) -> TargetSpec:
    return TargetSpec(grid=4, channels=channels, num_heads=0 if k is None else heads, k=k, normalization="patch")


def tiny(targets: TargetSpec | None = None, **options: Any) -> Student:
    options = {"decoder_width": 32, "decoder_heads": 4} | options
    return create_student("vit_tiny_patch16_224", targets=targets or spec(), model_args=dict(TINY), **options)


def some_targets(s: TargetSpec, batch: int = 2) -> Targets:
    g = torch.Generator().manual_seed(0)
    features = torch.randn(batch, s.num_tokens, s.channels, generator=g)
    if s.k is None:
        return Targets(features)
    rows = torch.stack([torch.randperm(s.num_tokens, generator=g)[: s.num_rows - 1] for _ in range(batch)])
    return Targets(features, torch.randn(batch, s.num_heads, s.num_rows, s.num_tokens, generator=g), rows)


def run(student: Student, targets: Targets, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    size = student.encoder.patch_embed.img_size[0]
    images = torch.randn(targets.features.shape[0], 3, size, size, generator=g)
    noise = torch.rand(targets.features.shape[:2], generator=g)
    out: dict[str, torch.Tensor] = student(images, targets, noise=noise)
    return out


def test_vit_base_has_exactly_the_papers_parameters() -> None:
    student = create_student("vit_base_patch16_224", targets=VIT_B)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    total = sum(p.numel() for p in student.parameters())
    assert (total, frozen, total - frozen) == (118_594_304, 252_160, 118_342_144)


@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [("vit_tiny_patch16_224", 512, 16), ("vit_small_patch16_224", 512, 16), ("vit_large_patch16_224", 768, 16)],
)
def test_decoder_follows_the_students_size(name: str, width: int, heads: int) -> None:
    with torch.device("meta"):
        student = Student(__import__("timm").create_model(name, num_classes=0), VIT_B)
    assert student.decoder.blocks[0].attn.num_heads == heads
    assert student.decoder.position.shape[-1] == width
    assert len(student.encoder_adapters) == 1
    assert student.encoder_adapters[0].mlps[0].fc1.out_features == 4 * width
    assert len(student.encoder_adapters[0].fuse) == len(student.encoder.blocks) // 3


@pytest.mark.parametrize("adapters", ["both", "input", "encoder", "none"])
@pytest.mark.parametrize("k", [None, 0, 3, "all"])
def test_every_trained_parameter_gets_a_gradient(adapters: str, k: Any) -> None:
    s = spec(k)
    student = tiny(s, adapters=adapters)
    losses = run(student, some_targets(s))
    assert set(losses) == ({"feature"} if k is None else {"feature", "attention"})
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_base_and_student_may_differ_in_every_size() -> None:
    s = spec(5, channels=80, heads=5)
    losses = run(tiny(s), some_targets(s))
    assert all(torch.isfinite(v) for v in losses.values())


def test_smaller_k_uses_the_first_rows_only() -> None:
    wide, narrow = spec(6), spec(2)
    targets = some_targets(wide)
    student = tiny(narrow)
    assert targets.attention is not None
    assert targets.rows is not None
    cut = Targets(targets.features, targets.attention[:, :, :3], targets.rows[:, :2])
    assert run(student, targets)["attention"].item() == run(student, cut)["attention"].item()
    with pytest.raises(ConfigError, match="k = 6"):
        run(tiny(wide), cut)


def test_losses_equal_their_definitions() -> None:
    g = torch.Generator().manual_seed(0)
    mask = random_mask(torch.rand(2, 16, generator=g), 0.75)
    target, predicted = torch.randn(2, 16, 5, generator=g), torch.randn(2, 12, 5, generator=g)
    by_hand = sum(
        float(((predicted[b, i] - target[b, mask.masked[b, i]]) ** 2).mean()) for b in range(2) for i in range(12)
    )
    assert feature_loss(predicted, target, mask).item() == pytest.approx(by_hand / 24, rel=1e-5)
    asked, given = torch.randn(2, 3, 4, 16, generator=g), torch.randn(2, 3, 4, 16, generator=g)
    p = np.exp(given.numpy() / 1.8)
    p /= p.sum(-1, keepdims=True)
    log_q = asked.numpy() - np.log(np.exp(asked.numpy()).sum(-1, keepdims=True))
    assert attention_loss(asked, given, 1.8).item() == pytest.approx(-(p * log_q).sum(-1).mean(), rel=1e-5)


def test_attention_loss_ignores_a_constant_per_row() -> None:
    s = spec()
    targets, student = some_targets(s), tiny(s)
    assert targets.attention is not None
    shifted = Targets(targets.features, targets.attention + 5.0, targets.rows)
    assert run(student, shifted)["attention"].item() == pytest.approx(
        run(student, targets)["attention"].item(), abs=1e-6
    )


def test_masked_pixels_do_not_reach_the_student() -> None:
    student = tiny()
    targets = some_targets(student.goals[""].spec)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    mask = random_mask(noise, 0.75)
    images = torch.randn(2, 3, 32, 32)
    changed = images.clone()
    for b in range(2):
        for patch in mask.masked[b].tolist():
            row, column = divmod(patch, 4)
            changed[b, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 7
    same = student(images, targets, noise=noise), student(changed, targets, noise=noise)
    assert same[0]["feature"].item() == same[1]["feature"].item()
    row, column = divmod(int(mask.visible[0, 0]), 4)
    changed[0, :, row * 8, column * 8] += 7
    assert student(changed, targets, noise=noise)["feature"].item() != same[0]["feature"].item()


def test_initialization() -> None:
    student = tiny(spec(channels=96))
    head = student.heads[0]["feature"].head
    bound = math.sqrt(6 / (head.in_features + head.out_features))
    assert 0.9 * bound < head.weight.abs().max() <= bound
    assert head.bias.abs().max() == 0
    kernel = student.encoder.patch_embed.proj.weight
    bound = math.sqrt(6 / (kernel[0].numel() + kernel.shape[0]))
    assert 0.9 * bound < kernel.abs().max() <= bound
    assert 0.005 < student.encoder.cls_token.std() < 0.04
    assert not student.encoder.pos_embed.requires_grad
    eps = {m.eps for n, m in student.named_modules() if isinstance(m, torch.nn.LayerNorm) and "adapters" not in n}
    assert eps == {1e-6}
    assert len(student.encoder_adapters) == 1
    assert {student.encoder_adapters[0].norm_before.eps, student.encoder_adapters[0].norm_after.eps} == {1e-5}


def test_seed_decides_the_weights_and_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.heads[0]["feature"].head.weight, other.heads[0]["feature"].head.weight)


def reference_position(width: int, grid: int) -> np.ndarray:
    """MAE's embedding, written entry by entry from its definition."""
    out = np.zeros((1 + grid * grid, width))
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                f = 10000 ** (-2 * i / (width / 2))
                out[1 + row * grid + column, [i, quarter + i, 2 * quarter + i, 3 * quarter + i]] = [
                    math.sin(column * f), math.cos(column * f), math.sin(row * f), math.cos(row * f)
                ]  # fmt: skip
    return out


@pytest.mark.parametrize(("width", "grid"), [(48, 4), (192, 14), (8, 2)])
def test_position_embedding(width: int, grid: int) -> None:
    np.testing.assert_allclose(sincos_position(width, grid)[0].numpy(), reference_position(width, grid), atol=1e-6)


def test_mask_keeps_the_patches_of_least_noise() -> None:
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    mask = random_mask(noise, 0.5)
    assert mask.visible.tolist() == [[1, 3]]
    assert mask.masked.tolist() == [[2, 0]]
    assert mask.order.gather(1, mask.restore).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("tokens", "ratio", "kept"), [(196, 0.75, 49), (196, 0.9, 19), (100, 0.9, 10), (16, 0.75, 4)])
def test_number_of_visible_patches(tokens: int, ratio: float, kept: int) -> None:
    assert num_visible_patches(tokens, ratio) == kept


def test_mask_noise_is_a_function_of_seed_epoch_sample_and_mask() -> None:
    keys = np.array([key64("sample", "s", str(i)) for i in range(500)], dtype=np.uint64)
    noise = mask_noise(keys, seed=0, epoch=3, num_tokens=196)
    assert noise.dtype == torch.float32
    assert torch.equal(noise[7:9], mask_noise(keys[7:9], seed=0, epoch=3, num_tokens=196))
    for other in ({"seed": 1}, {"epoch": 4}, {"mask_number": 1}):
        assert (mask_noise(keys, **({"seed": 0, "epoch": 3, "num_tokens": 196} | other)) != noise).float().mean() > 0.99
    assert abs(noise.mean().item() - 0.5) < 0.01
    seen = random_mask(noise, 0.75).visible.flatten().bincount(minlength=196).float()
    assert seen.min() > 80  # expected 125, deviation 9.7
    assert seen.max() < 170


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("vit_tiny_patch16_224", TINY | {"depth": 4}, "groups of 3"),
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer"),
        ("vit_tinny_patch16_224", {}, "vit_tiny_patch16_224"),
        ("deit_tiny_distilled_patch16_224", TINY, "VisionTransformerDistilled"),
        ("vit_small_patch16_dinov3", {}, "a Eva"),
        ("vit_base_patch14_dinov9", {}, "knows no model"),
        ("vit_tiny_patch16_224", TINY | {"class_token": False, "global_pool": "avg"}, "class token"),
        ("vit_tiny_patch16_224", TINY | {"pre_norm": True}, "LayerNorm before"),
        ("vit_tiny_patch16_224", TINY | {"no_such": 1}, "no_such"),
    ],
)
def test_encoders_that_cannot_be_students_are_refused_with_the_reason(name: str, args: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        create_student(name, targets=spec(), model_args=args)


@pytest.mark.parametrize(
    "options", [{"adapters": "some"}, {"mask_ratio": 1.0}, {"mask_ratio": 0.0}, {"tau": 0.0}, {"decoder_width": 30}]
)
def test_impossible_options_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError):
        tiny(**options)


def test_depth_that_three_does_not_divide_is_fine_without_encoder_adapters() -> None:
    student = create_student(
        "vit_tiny_patch16_224", targets=spec(), model_args=TINY | {"depth": 4}, adapters="input", decoder_width=32
    )
    assert len(student.encoder.blocks) == 4
