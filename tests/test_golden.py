"""The mathematics against the released program, to the last digit that matters.

tests/data/golden_mae_like.npz holds what the released program computed on random weights; see its
description in the file's origin: tiny sizes, float32, on a CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel

from tec_cache import targets as target_math
from tec_cache.base.model import FrozenBase
from tec_cache.student.model import Student
from tec_cache.targets import normalize_targets
from tec_cache.types import Targets
from tests.released import student_name, student_state

Golden = dict[str, Any]


def weights(golden: Golden, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in golden.items() if k.startswith(prefix)}


def vit(golden: Golden) -> VisionTransformer:
    dim, depth, heads = (int(golden[n]) for n in ("dim", "depth", "heads"))
    return VisionTransformer(224, 16, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0)


def base_of(golden: Golden) -> FrozenBase:
    model = vit(golden)
    model.load_state_dict(weights(golden, "base/"), strict=True)
    return FrozenBase(model, name="golden", identity={}, mean=(0, 0, 0), std=(1, 1, 1), k=int(golden["k"]))


def student_of(golden: Golden, base: FrozenBase) -> Student:
    student = Student(
        vit(golden),
        base.spec("patch"),
        tau=float(golden["tau"]),
        decoder_width=int(golden["decoder_dim"]),
        decoder_heads=int(golden["decoder_heads"]),
    )
    student.load_state_dict(student_state(weights(golden, "student/")), strict=True)
    return student


def losses_of(golden: Golden, student: Student, targets: Targets) -> dict[str, torch.Tensor]:
    images = torch.from_numpy(golden["imgs"]).float()
    return student(images, targets, noise=torch.from_numpy(golden["noise"]))


def worst_gradient(golden: Golden, student: Student) -> float:
    """Largest relative error of a gradient's norm over all trained parameters."""
    parameters = dict(student.named_parameters())
    errors = []
    for name, norm in golden.items():
        if name.startswith("gradnorm/"):
            gradient = parameters.pop(student_name(name.removeprefix("gradnorm/"))).grad
            assert gradient is not None, name
            errors.append(abs(gradient.norm().item() / float(norm) - 1))
    assert len(errors) == 135
    assert {n for n, p in parameters.items() if p.requires_grad} == set(), "a trained parameter has no golden gradient"
    return max(errors)


def golden_targets(golden: Golden) -> tuple[torch.Tensor, torch.Tensor]:
    # logits are stored in the order (batch, row, head, key)
    return torch.from_numpy(golden["feature"]), torch.from_numpy(golden["att_logits"]).permute(0, 2, 1, 3)


def test_base_gives_the_golden_features_logits_and_rows(golden: Golden) -> None:
    features, attention = golden_targets(golden)
    with sdpa_kernel(SDPBackend.MATH):  # the released program's arithmetic: no fused kernel
        targets = base_of(golden)(torch.from_numpy(golden["imgs"]).float())
    # equal to the bit on the processor that made the file (Intel Xeon); on an AMD EPYC, whose sums have another order,
    # up to 1.2e-5 at a value of 5.2, with torch 2.6 (or on a later EPYC with torch 2.14) up to 1.9e-5, the logits too.
    # The file itself is 2.2e-5 from the float64 truth.
    torch.testing.assert_close(targets.features, features, rtol=5e-6, atol=2.2e-5)
    torch.testing.assert_close(targets.attention, attention, rtol=5e-6, atol=2.2e-5)
    assert torch.equal(targets.rows, torch.from_numpy(golden["att_idx"]))


def test_fused_attention_is_no_further_from_the_truth_than_the_golden_case(golden: Golden) -> None:
    images = torch.from_numpy(golden["imgs"]).float()
    base = base_of(golden)
    fused = base(images)
    base.model.double()
    truth = base(images.double())
    features, attention = golden_targets(golden)
    assert (fused.features - truth.features).abs().max() <= 1.5 * (features - truth.features).abs().max()
    assert fused.attention is not None
    assert truth.attention is not None
    assert (fused.attention - truth.attention).abs().max() <= 1.5 * (attention - truth.attention).abs().max()
    assert torch.equal(fused.rows, torch.from_numpy(golden["att_idx"]))


def test_student_gives_the_golden_losses_and_gradients(golden: Golden) -> None:
    base = base_of(golden)
    student = student_of(golden, base)
    raw = base(torch.from_numpy(golden["imgs"]).float())
    losses = losses_of(golden, student, normalize_targets(raw, "patch"))
    assert losses["feature"].item() == pytest.approx(float(golden["loss_feature"]), abs=1e-5)
    assert losses["attention"].item() == pytest.approx(float(golden["loss_attention"]), abs=1e-5)
    (losses["feature"] + losses["attention"]).backward()
    assert worst_gradient(golden, student) < 1e-4


def biased(features: torch.Tensor, how: str) -> torch.Tensor:
    var, mean = torch.var_mean(features, dim=1, keepdim=True, unbiased=False)
    return (features - mean) / (var + target_math.EPS).sqrt()


@pytest.mark.parametrize("mistake", ["tau", "variance", "groups", "row order", "attention scale", "pixel mask"])
def test_a_mistake_would_be_noticed(golden: Golden, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(golden)
    student = student_of(golden, base)
    if mistake == "tau":
        student.goals = {"": replace(student.goals[""], tau=1.0)}
    elif mistake == "variance":
        monkeypatch.setattr(target_math, "normalize_features", biased)
    elif mistake == "groups":
        for part in (student.encoder_adapters[0].fuse, student.encoder_adapters[0].mlps):
            first, second = part[0].state_dict(), part[1].state_dict()
            swapped = ({k: v.clone() for k, v in second.items()}, {k: v.clone() for k, v in first.items()})
            part[0].load_state_dict(swapped[0])
            part[1].load_state_dict(swapped[1])
    elif mistake == "attention scale":
        student.heads[0]["attention"].scale = (48 / 3) ** -0.5
    raw = base(torch.from_numpy(golden["imgs"]).float())
    if mistake == "row order":
        assert raw.rows is not None
        raw = Targets(raw.features, raw.attention, raw.rows.flip(1))
    made = target_math.normalize_targets(raw, "patch")
    if mistake == "pixel mask":
        golden = golden | {"noise": golden["noise"][:, ::-1].copy()}
    losses = losses_of(golden, student, made)
    (losses["feature"] + losses["attention"]).backward()
    close = (
        abs(losses["feature"].item() - float(golden["loss_feature"])) < 1e-5
        and abs(losses["attention"].item() - float(golden["loss_attention"])) < 1e-5
        and worst_gradient(golden, student) < 1e-4
    )
    assert not close


@pytest.mark.parametrize(
    ("width", "depth", "heads", "k"), [(48, 3, 2, 0), (96, 9, 6, 4), (192, 12, 3, "all"), (64, 6, 4, None)]
)
def test_key_map_holds_for_other_sizes(width: int, depth: int, heads: int, k: Any) -> None:
    encoder = VisionTransformer(32, 8, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
    base = FrozenBase(encoder, name="b", identity={}, mean=(0, 0, 0), std=(1, 1, 1), k=k)
    student = Student(
        VisionTransformer(32, 8, embed_dim=width, depth=depth, num_heads=heads, num_classes=0),
        base.spec("patch"),
        decoder_width=32,
        decoder_heads=4,
    )
    ours = student.state_dict()
    theirs = {
        "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias",
        "decoder_pos_embed", "encoder_adaptor.adap_before.weight", "encoder_adaptor.adap_before.bias",
        "encoder_adaptor.adap_after.weight", "encoder_adaptor.adap_after.bias",
    }  # fmt: skip
    block = [
        f"{m}.{p}"
        for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for p in ("weight", "bias")
    ]
    theirs |= {f"blocks.{i}.{n}" for i in range(depth) for n in block}
    theirs |= {f"decoder_blocks.{i}.{n}" for i in range(2) for n in block}
    theirs |= {f"cls_token_mlp.{n}.{p}" for n in ("fc1", "fc2") for p in ("weight", "bias")}
    theirs |= {f"encoder_adaptor.fuse_fcs.{i}.{p}" for i in range(depth // 3) for p in ("weight", "bias")}
    theirs |= {
        f"encoder_adaptor.adap_mlps.{i}.{n}.{p}"
        for i in range(depth // 3)
        for n in ("fc1", "fc2")
        for p in ("weight", "bias")
    }
    heads_of = [("fea", "decoder_pred")] + ([] if k is None else [("att", "decoder_qk")])
    for short, head in heads_of:
        theirs |= {
            f"forward_{short}_decoder.{n}.{p}"
            for n in ("decoder_embed", "decoder_norm", head)
            for p in ("weight", "bias")
        }
        theirs.add(f"forward_{short}_decoder.mask_token")
    assert {student_name(name) for name in theirs} == set(ours)
    assert len({student_name(name) for name in theirs}) == len(theirs)
