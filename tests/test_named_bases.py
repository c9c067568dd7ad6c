"""Bases with names of their own: what timm builds of each name, read as exactly as any other, small and in full."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tec_cache.base import source as source_module
from tec_cache.base.load import find_source, load_base, outline
from tec_cache.base.source import Given
from tec_cache.errors import ConfigError
from tec_cache.licences import licence_of
from tec_cache.recipes import BASES, BaseRecipe
from tests.test_base_models import attention_of, images_for, picked, randomized, timm_says

# name -> (width, depth, heads, patch, tokens before the patches, class token)
SHAPES: dict[str, tuple[int, int, int, int, int, bool]] = {
    "dinov3_small": (384, 12, 6, 16, 5, True),
    "dinov3_base": (768, 12, 12, 16, 5, True),
    "dinov3_large": (1024, 24, 16, 16, 5, True),
    "clip_base": (768, 12, 12, 16, 1, True),
    "clip_large": (1024, 24, 16, 14, 1, True),
    "siglip2_base": (768, 12, 12, 16, 0, False),
    "siglip2_large": (1024, 24, 16, 16, 0, False),
    "eva02_small": (384, 12, 6, 14, 1, True),
    "eva02_base": (768, 12, 12, 14, 1, True),
    "eva02_large": (1024, 24, 16, 14, 1, True),
    "radio_base": (768, 12, 12, 16, 8, True),
    "radio_large": (1024, 24, 16, 16, 8, True),
}
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}
LICENCES = {"apache-2.0": "apache-2.0", "mit": "mit", "dinov3-license": "other", "nvidia-open-model-license": "other"}


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_model_has_the_shape_of_its_name(name: str) -> None:
    model: Any = outline(BASES[name].timm_name.partition(".")[0], {}, name)
    heads = {block.attn.num_heads for block in model.blocks}
    assert len(heads) == 1
    found = (model.embed_dim, len(model.blocks), heads.pop(), model.patch_embed.patch_size[0])
    assert (*found, model.num_prefix_tokens, model.cls_token is not None) == SHAPES[name]


@pytest.mark.parametrize("name", SHAPES)
def test_pixels_and_licence_are_those_that_timm_states_of_its_tag(name: str) -> None:
    config = timm.models.get_pretrained_cfg(BASES[name].timm_name)
    assert config is not None
    source = find_source(name, None)
    assert (source.mean, source.std) == (config.mean, config.std)
    if not name.startswith("clip"):  # OpenAI's repository says MIT, timm Apache 2.0
        assert config.license is not None
        assert licence_of(name).hub == LICENCES[config.license]
    assert config.hf_hub_id is not None
    assert f"/{config.hf_hub_id}/" in BASES[name].official_file
    assert "not in the paper" in BASES[name].source


def saved(name: str, folder: Path) -> tuple[Any, Path]:
    """A small random model of a name's architecture over 4 x 4 patches, and a file of its weights."""
    architecture = BASES[name].timm_name.partition(".")[0]
    edge = 4 * SHAPES[name][3]
    model: Any = randomized(lambda: timm.create_model(architecture, num_classes=0, img_size=edge, **SMALL))
    save_file({n: v.contiguous() for n, v in model.state_dict().items()}, folder / "weights.safetensors")
    return model, folder / "weights.safetensors"


@pytest.mark.parametrize("name", SHAPES)
def test_features_and_rows_are_timms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = saved(name, tmp_path)
    *_, prefix, class_token = SHAPES[name]
    images = images_for(model)
    features, full = timm_says(model, images, 2, monkeypatch)
    base = load_base(name, file, grid=4, k=3, given=Given(args=SMALL))
    targets = base(images)
    torch.testing.assert_close(targets.features, features.float(), rtol=0, atol=1e-4)
    attention, rows = attention_of(targets)
    expected = picked(full, rows, prefix, class_token).float()
    assert expected.std() > 0.1
    torch.testing.assert_close(attention, expected, rtol=0, atol=1e-4)
    scores = (full[:, :, 0] if class_token else full.mean(dim=2))[..., prefix:].mean(dim=1)
    assert torch.equal(rows, scores.topk(3, dim=1).indices)


def rotated(x: Tensor, grid: int) -> Tensor:
    """DINOv3's rotary embedding of patches (B, H, L, D), from its definition: each half of D turned by two axes."""
    quarter = x.shape[-1] // 4
    periods = 100.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    axis = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid * 2 - 1
    rows, columns = axis.repeat_interleave(grid), axis.repeat(grid)
    angles = 2 * math.pi * torch.cat([rows[:, None] / periods, columns[:, None] / periods], dim=1)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


@pytest.mark.parametrize("grid", [4, 7])
def test_dinov3s_rows_are_its_queries_and_keys_turned_by_their_places(grid: int, tmp_path: Path) -> None:
    model, file = saved("dinov3_small", tmp_path)
    base = load_base("dinov3_small", file, grid=grid, k=3, given=Given(args=SMALL))
    seen: list[Tensor] = []
    base.model.blocks[-1].attn.qkv.register_forward_hook(lambda _m, _i, out: seen.append(out.double()))  # type: ignore[index, union-attr]
    attention, rows = attention_of(base(images_for(base.model)))
    query, key, _ = seen[0].unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4).unbind(0)
    keys = rotated(key[:, :, 5:], grid)
    chosen = rotated(query[:, :, 5:], grid).gather(2, rows[:, None, :, None].expand(-1, 3, -1, 16))
    expected = torch.cat([query[:, :, :1], chosen], dim=2) @ keys.transpose(-2, -1) / 4
    torch.testing.assert_close(attention, expected.float(), rtol=0, atol=1e-4)
    assert model.rope is not None


def test_siglip2_has_no_class_token_and_says_whose_the_first_row_is(tmp_path: Path) -> None:
    _, file = saved("siglip2_base", tmp_path)
    base = load_base("siglip2_base", file, grid=4, k=3, given=Given(args=SMALL), class_target=True)
    assert "mean query of the patches" in base.first_row
    assert ("pixels", "64 x 64: 4 x 4 patches of 16, no class token", "--grid and the patch") in base.facts


def test_radios_positions_are_said_to_be_interpolated(tmp_path: Path) -> None:
    _, file = saved("radio_base", tmp_path)
    base = load_base("radio_base", file, grid=4, k=3, given=Given(args=SMALL))
    assert any(name == "note" and "128 x 128" in value for name, value, _ in base.facts)


def test_a_timm_that_lacks_a_named_base_is_told_apart_from_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = BaseRecipe(timm_name="vit_base_patch16_dinov9.x", hub=True, official_file="", release="dinov3")
    monkeypatch.setitem(source_module.BASES, "dinov3_base", recipe)
    with pytest.raises(ConfigError, match=r"has no vit_base_patch16_dinov9(.|\n)*upgrade timm"):
        load_base("dinov3_base")
