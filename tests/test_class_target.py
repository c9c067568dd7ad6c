"""The class-token target: what the base gives, how it is stored, and what a training makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from pipelines.export import student_of_run
from pipelines.extract import extract
from pipelines.train import train
from pipelines.verify import verify
from tec_cache.base.model import FrozenBase
from tec_cache.codec.errors import target_errors
from tec_cache.codec.fit import fit_transform
from tec_cache.codec.fp16 import Float16Codec
from tec_cache.config import TrainConfig
from tec_cache.errors import ConfigError, IdentityError, NonFiniteError
from tec_cache.run.settings import load_settings
from tec_cache.student.heads.class_token import class_loss
from tec_cache.targets import narrow_rows, normalize_targets
from tec_cache.types import Targets, TargetSpec
from tests.conftest import last_checkpoint, tiny_config, tiny_training

WIDTH, GRID = 48, 4
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": {"reg_tokens": 3},
    "no class token": {"class_token": False, "global_pool": "avg"},
}


def frozen(**changes: Any) -> FrozenBase:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=3,
        num_heads=3,
        num_classes=0,
        **changes,
    )
    same: Any = (0.5, 0.5, 0.5)
    return FrozenBase(model, name="b", identity={}, mean=same, std=same, k=2, class_target=True)


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_last_blocks_output_at_the_class_token_or_the_patches_mean(kind: str) -> None:
    base, images = frozen(**MODELS[kind]), torch.randn(3, 3, 32, 32)
    token = base(images).class_token
    model: Any = base.model
    with torch.no_grad():
        outputs = model.forward_intermediates(
            images, indices=[2], norm=False, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )[0]
    right = outputs.mean(1) if kind == "no class token" else outputs[1][:, 0]
    assert token is not None
    torch.testing.assert_close(token, right)
    assert base.spec("patch").class_token


def test_it_is_normalized_over_its_channels_and_raw_where_nothing_is_normalized() -> None:
    raw = Targets(torch.randn(2, 9, 6), class_token=torch.randn(2, 6) * 5 + 3)
    assert raw.class_token is not None
    mean, std = raw.class_token.mean(1, keepdim=True), raw.class_token.std(1, keepdim=True)
    for how in ("patch", "feature"):
        token = normalize_targets(raw, how).class_token  # type: ignore[arg-type]
        torch.testing.assert_close(token, (raw.class_token - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normalize_targets(raw, "none").class_token, raw.class_token)


def test_fewer_rows_leave_it_as_it_is() -> None:
    targets = Targets(
        torch.randn(2, 9, 6), torch.randn(2, 3, 4, 9), torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 6)
    )
    for k in (None, 0, 2):
        assert narrow_rows(targets, k).class_token is targets.class_token


def spec_of(k: int | None = 3) -> TargetSpec:
    heads = 0 if k is None else 2
    return TargetSpec(grid=4, channels=24, num_heads=heads, k=k, normalization="patch", class_token=True)


def some(spec: TargetSpec, count: int = 40) -> Targets:
    g = torch.Generator().manual_seed(1)
    features, token = torch.randn(count, 16, 24, generator=g), torch.randn(count, 24, generator=g)
    logits = rows = None
    if spec.num_rows:
        logits = torch.randn(count, 2, spec.num_rows, 16, generator=g)
        rows = torch.stack([torch.randperm(16, generator=g)[: spec.num_rows - 1] for _ in range(count)])
    return normalize_targets(Targets(features, logits, rows, token), "patch")


@pytest.mark.parametrize("k", [None, 0, 3])
@pytest.mark.parametrize("fitted", [False, True])
def test_both_codecs_give_it_back_in_half_precision(k: int | None, fitted: bool) -> None:
    spec = spec_of(k)
    targets = some(spec)
    codec: Any = fit_transform(targets, spec, mse=0.1, kl=None if k is None else 0.1) if fitted else Float16Codec()
    if fitted:
        codec = type(codec).from_bytes(codec.to_bytes())
    stored = {name: torch.from_numpy(values) for name, values in codec.encode(targets, spec).items()}
    assert {name: tuple(a.shape[1:]) for name, a in stored.items()} == {
        name: array.shape for name, array in codec.arrays(spec).items()
    }
    decoded = codec.decode(stored, spec)
    assert targets.class_token is not None
    torch.testing.assert_close(decoded.class_token, targets.class_token.half().float(), rtol=0, atol=0)
    errors = target_errors(targets, decoded).summary()
    assert 0 < errors["class"] < 1e-6
    assert errors["class_max"] >= errors["class"]
    assert (decoded.attention is None) == (k is None)


def test_one_that_is_not_finite_is_never_stored() -> None:
    spec = spec_of(None)
    targets = some(spec)
    assert targets.class_token is not None
    targets.class_token[3, 5] = float("inf")
    with pytest.raises(NonFiniteError, match="class tokens"):
        Float16Codec().encode(targets, spec)


def test_the_loss_is_the_squared_error_of_every_mask_against_its_view() -> None:
    predicted, target = torch.randn(6, 5), torch.randn(2, 5)
    right = sum(float((predicted[row] - target[row % 2]).square().mean()) for row in range(6)) / 6
    assert float(class_loss(predicted, target)) == pytest.approx(right, rel=1e-6)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, shards: Path, tiny_base: Path) -> Path:
    """A cache with a set `plain`, and one `whole` with class tokens."""
    cache = tmp_path_factory.mktemp("class") / "cache"
    extract(tiny_config(shards, cache, tiny_base, name="plain"))
    extract(tiny_config(None, cache, tiny_base, name="whole", class_target=True, quality="default"))
    return cache


def test_a_training_learns_it_and_cached_equals_online(stored: Path, tiny_base: Path, tmp_path: Path) -> None:
    cached = train(tiny_training(stored, tmp_path / "cached", target="whole", steps=3))
    online = train(
        tiny_training(stored, tmp_path / "online", online=str(tiny_base), k="3", tau=1.8, class_target=True, steps=3)
    )
    assert set(cached.losses) >= {"feature", "attention", "class"}
    assert cached.losses["class"] == pytest.approx(online.losses["class"], rel=1e-3)
    assert cached.losses["loss"] == pytest.approx(
        sum(cached.losses[name] for name in ("feature", "attention", "class")), rel=1e-5
    )
    student = student_of_run(load_settings(tmp_path / "cached"))
    assert "class" in student.heads[0]  # type: ignore[operator]
    student.load_state_dict(last_checkpoint(tmp_path / "cached")["model"])


def test_weight_zero_leaves_it_out_to_the_last_bit(stored: Path, tiny_base: Path, tmp_path: Path) -> None:
    plain = train(tiny_training(stored, tmp_path / "plain", target="plain", steps=2))
    extract(tiny_config(None, stored, tiny_base, name="exact-too", class_target=True))
    without = train(tiny_training(stored, tmp_path / "without", target="exact-too", class_weight=0.0, steps=2))
    assert "class" not in without.losses
    assert without.parameters == plain.parameters
    one, other = (last_checkpoint(tmp_path / name)["model"] for name in ("plain", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_set_keeps_what_it_was_begun_with(stored: Path, tiny_base: Path, tmp_path: Path) -> None:
    again = extract(tiny_config(None, stored, tiny_base, name="whole", quality="default", class_target=True))
    assert again.targets_made == 0
    gone_on = extract(tiny_config(None, stored, None, name="whole"))
    assert gone_on.targets_made == 0
    with pytest.raises(IdentityError, match="class_token"):
        extract(tiny_config(None, stored, tiny_base, name="plain", class_target=True))


def test_the_option_is_for_a_base_in_the_loop(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--class-target"):
        TrainConfig(cache=str(stored), out=str(tmp_path / "r"), target="plain", class_target=True)


def test_verify_runs_the_base_and_compares_it(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sure = {"base": True, "sample": 24, "target": "whole", "device": "cpu"}
    verdict = verify(str(stored), **sure)
    assert not verdict.findings
    assert verdict.base[0]["measured"]["class"] < verdict.base[0]["allowed"]["class"]
    monkeypatch.setattr(FrozenBase, "_token", lambda self, last: last[:, 1])
    (finding,) = verify(str(stored), **sure).findings
    assert finding.kind == "base"
    assert "class" in finding.what
