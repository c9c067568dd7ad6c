"""Segmenters against what was not written here: timm's encoder, transformers' UPerNet, torch's losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead
from transformers.models.upernet.modeling_upernet import UperNetHead as TheirHead

from tec_cache.errors import ConfigError
from tec_cache.finetune.classifier import LoadedEncoder
from tec_cache.run.optimizer import create_schedule
from tec_cache.segment.groups import parameter_groups
from tec_cache.segment.model import HEAD_STD, create_segmenter, taps
from tec_cache.segment.predict import predict, starts, windows
from tec_cache.segment.upernet import UperNetHead
from tec_cache.tasks.segment import pixel_loss


@pytest.fixture(scope="module")
def encoder() -> LoadedEncoder:
    """Twelve blocks, random, its norm not the identity."""
    args = {"embed_dim": 24, "depth": 12, "num_heads": 3, "patch_size": 8, "img_size": 64}
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    nn.init.normal_(model.norm.weight, 1.0, 0.3)
    nn.init.normal_(model.norm.bias, 0.0, 0.3)
    args.pop("img_size")
    return LoadedEncoder(model.eval(), "vit_tiny_patch16_224", args, (0.5,) * 3, (0.5,) * 3, made_of={})


def test_the_linear_head_reads_timms_tokens_and_scales_logits_by_two(encoder: LoadedEncoder) -> None:
    model = create_segmenter(encoder, 5).eval()
    nn.init.normal_(model.head.weight)
    for height, width in ((64, 64), (72, 120)):
        images = torch.randn(2, 3, height, width)
        theirs: Any = timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, img_size=64, dynamic_img_size=True, **encoder.model_args
        )
        theirs.load_state_dict(encoder.model.state_dict())
        with torch.no_grad():
            logits = model(images)
            tokens = theirs.eval().forward_features(images)[:, 1:]
            maps = tokens.transpose(1, 2).reshape(2, 24, height // 8, width // 8)
            expected = torch.einsum("nc,bchw->bnhw", model.head.weight[:, :, 0, 0], maps)
            expected = expected + model.head.bias[:, None, None]
        assert logits.shape == (2, 5, height // 4, width // 4)
        torch.testing.assert_close(logits, interpolate(expected, scale_factor=2.0, mode="bilinear"))
    square = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # at the size of training the encoder is the loaded one, its pretrained norm included
        torch.testing.assert_close(model.maps(square)[0].flatten(2).transpose(1, 2),
                                   encoder.model.forward_features(square)[:, 1:])  # fmt: skip


def test_new_weights_are_a_function_of_the_seed_and_as_small_as_published(encoder: LoadedEncoder) -> None:
    before = torch.get_rng_state()
    one, same, other = (create_segmenter(encoder, 151, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert one.head.weight.std().item() == pytest.approx(HEAD_STD, rel=0.05)
    assert not one.head.bias.any()
    up = [create_segmenter(encoder, 3, head="upernet", seed=0).state_dict() for _ in range(2)]
    assert all(torch.equal(value, up[1][name]) for name, value in up[0].items())


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_every_parameter_is_in_one_group_at_its_share_of_the_rate(encoder: LoadedEncoder, head: str) -> None:
    model = create_segmenter(encoder, 4, head=head)  # type: ignore[arg-type]
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.6)
    scale = {n: g["lr_scale"] for g in groups for n in g["names"]}
    decay = {n: g["weight_decay"] for g in groups for n in g["names"]}
    listed = [n for g in groups for n in g["names"]]
    assert sorted(listed) == sorted(n for n, _ in model.named_parameters())
    assert len(set(listed)) == len(listed)
    for name, parameter in model.named_parameters():
        if name.startswith("vit.blocks."):
            layer = int(name.split(".")[2]) + 1
        else:
            layer = 0 if name.startswith(("vit.cls_token", "vit.pos_embed", "vit.patch_embed")) else 13
        assert scale[name] == pytest.approx(0.6 ** (13 - layer)), name
        small = parameter.ndim <= 1 or name in ("vit.cls_token", "vit.pos_embed")
        assert decay[name] == (0.0 if small else 0.05), name
    frozen = create_segmenter(encoder, 4, head=head, tune="head")  # type: ignore[arg-type]
    names = [n for g in parameter_groups(frozen, weight_decay=0.05, layer_decay=1.0) for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in frozen.named_parameters() if n.startswith("head."))
    assert not frozen.train().vit.training


def _copy_into(theirs: nn.Module, ours: nn.Module) -> None:
    """Copy weights in the order of the layers: convolutions and norms."""

    def layers(module: nn.Module) -> list[nn.Module]:
        return [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]

    for to, of in zip(layers(theirs), layers(ours), strict=True):
        to.load_state_dict(of.state_dict(), strict=False)


def test_upernet_is_transformers_upernet() -> None:
    torch.manual_seed(0)
    head = UperNetHead(16, 7, width=32)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    config = UperNetConfig(hidden_size=32, pool_scales=[1, 2, 3, 6], num_labels=7, auxiliary_channels=256)
    theirs = TheirHead(config, in_channels=[16] * 4).eval()
    theirs.classifier.load_state_dict(head.classifier.state_dict())
    for to, of in (
        (theirs.psp_modules, head.pools),
        (theirs.bottleneck, head.bottleneck),
        (theirs.lateral_convs, head.laterals),
        (theirs.fpn_convs, head.smooth),
        (theirs.fpn_bottleneck, head.fusion),
    ):
        _copy_into(to, of)
    maps = [torch.randn(2, 16, 12, 12) for _ in range(4)]
    head.eval()
    with torch.no_grad():
        pyramid = [scale(found) for scale, found in zip(head.scales, maps, strict=True)]
        assert [tuple(p.shape[2:]) for p in pyramid] == [(48, 48), (24, 24), (12, 12), (6, 6)]
        torch.testing.assert_close(head(maps), theirs(pyramid))
    head.train()
    logits, auxiliary = head(maps)
    assert (logits.shape, auxiliary.shape) == ((2, 7, 48, 48), (2, 7, 12, 12))
    other = UperNetFCNHead(config, in_channels=[16] * 4, in_index=2)
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in head.auxiliary.parameters())


def test_upernet_on_an_encoder_reads_the_published_blocks(encoder: LoadedEncoder) -> None:
    assert taps(12) == (3, 5, 7, 11)
    assert taps(24) == (7, 11, 15, 23)
    assert taps(8) == (1, 3, 5, 7)
    with pytest.raises(ConfigError, match="upernet reads four blocks"):
        taps(3)
    model = create_segmenter(encoder, 6, head="upernet").eval()
    images = torch.randn(1, 3, 64, 64)
    outputs: list[torch.Tensor] = []
    for block in encoder.model.blocks:
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    with torch.no_grad():
        encoder.model.forward_features(images)
        for found, number in zip(model.maps(images), (3, 5, 7, 11), strict=True):
            torch.testing.assert_close(found.flatten(2).transpose(1, 2), outputs[number][:, 1:])
        assert model(images).shape == (1, 6, 32, 32)


def test_windows_cover_everything_and_are_averaged(encoder: LoadedEncoder) -> None:
    assert starts(512, 512) == [0]
    assert starts(683, 512) == [0, 171]
    assert starts(1100, 512) == [0, 341, 588]
    for edge in (512, 513, 900, 2048):
        covered = torch.zeros(edge)
        for start in starts(edge, 512):
            covered[start : start + 512] += 1
        assert covered.min() >= 1

    class Position(nn.Module):
        """Says the number of the window in which it is asked."""

        kind, num_classes, input_size = "upernet", 1, 64
        asked = 0.0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.asked += 1
            return torch.full((1, 1, 16, 16), self.asked)

    found = windows(Position(), torch.zeros(1, 3, 64, 100))  # type: ignore[arg-type]
    assert found.shape == (1, 1, 64, 100)
    assert found[0, 0, 0, [0, 35, 36, 63, 64, 99]].tolist() == [1.0, 1.0, 1.5, 1.5, 2.0, 2.0]
    model = create_segmenter(encoder, 6, head="upernet").eval()
    nn.init.normal_(model.head.classifier.weight)  # type: ignore[union-attr]
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        alone = interpolate(model(images), size=(100, 90), mode="bilinear", align_corners=False).argmax(1)
        one = interpolate(model(images), size=(64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(windows(model, images), one)
        assert (predict(model, images, (100, 90)) == alone).float().mean() > 0.95
        small = predict(model, torch.randn(1, 3, 40, 64), (80, 128))
    assert small.shape == (1, 80, 128)


def test_the_loss_is_torchs_over_known_pixels_and_nothing_without_any() -> None:
    logits, classes = torch.randn(2, 5, 8, 8, requires_grad=True), torch.randint(-1, 5, (2, 8, 8))
    expected = cross_entropy(logits, classes, ignore_index=-1)
    torch.testing.assert_close(pixel_loss(logits, classes), expected)
    none = pixel_loss(logits, torch.full((2, 8, 8), -1))
    none.backward()
    assert none.item() == 0
    assert not logits.grad.any()  # type: ignore[union-attr]
    large = torch.arange(4).reshape(1, 2, 2).repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(pixel_loss(logits[:1], large),
                               cross_entropy(logits[:1], large[:, 1::2, 1::2], ignore_index=-1))  # fmt: skip


def test_the_linear_schedule_is_its_closed_form() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    schedule = create_schedule(optimizer, total_steps=110, warmup_steps=10, min_lr=0.5, kind="linear")
    for step in range(110):
        schedule.step_update(step)
        expected = 2.0 * step / 10 if step < 10 else 0.5 + 1.5 * (1 - (step - 10) / 100)
        assert math.isclose(optimizer.param_groups[0]["lr"], expected, rel_tol=1e-12), step


def test_a_prediction_lies_where_its_mask_lies() -> None:
    """Labels that are taken down to logits and scaled up again must not move: not by half a logit either."""
    from tec_cache.segment.scores import Scores, confusion

    torch.manual_seed(0)
    coarse = torch.randn(4, 1, 6, 6)
    masks = (interpolate(coarse, size=(96, 96), mode="bicubic")[:, 0] > 0).long()

    class Learner(nn.Module):
        """The logits themselves are what is trained."""

        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(4, 2, 12, 12))

    model = Learner()
    for _ in range(60):
        model.zero_grad()
        pixel_loss(model.logits, masks).backward()
        with torch.no_grad():
            model.logits -= 2000 * model.logits.grad  # type: ignore[operator]
    said = interpolate(model.logits, size=(96, 96), mode="bilinear", align_corners=False).argmax(1)

    def score(down: int) -> float:
        moved = torch.roll(said, (down, down), (1, 2))[:, 8:-8, 8:-8]
        return Scores.of(confusion(masks[:, 8:-8, 8:-8], moved, 2)).mean_iou

    assert abs(max(range(-4, 5), key=score)) <= 1, "at the corners of eight pixels it would be 4"
    assert score(0) > 0.8
