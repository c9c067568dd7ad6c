"""Pictures of attention, features and token similarity: their numbers against independent ones."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tec_cache import draw
from tec_cache.base.load import load_base
from tec_cache.base.model import FrozenBase
from tec_cache.draw.attention import LEAST_PEAK, OPACITY
from tec_cache.draw.figures import require_matplotlib, similarity_shares
from tec_cache.errors import ConfigError, TecCacheError
from tec_cache.targets import normalize_features
from tec_cache.types import Targets
from tests.conftest import photo


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> FrozenBase:
    return load_base(str(tiny_base), grid=4, k=0)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_maps_are_timms_own_attention(base: FrozenBase, images: torch.Tensor) -> None:
    maps = draw.attention_maps(base(images))
    attention: Any = base.model.blocks[-1].attn  # type: ignore[index, union-attr]
    seen: list[torch.Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda _m, _i, out: seen.append(out))
    attention.fused_attn = False
    try:
        with torch.no_grad():
            base.model.forward_features(images)  # type: ignore[operator]
    finally:
        hook.remove()
        attention.fused_attn = True
    rows = seen[0][:, :, 0, 1:]
    assert maps.shape == (3, 3, 4, 4)
    assert torch.allclose(maps.flatten(2), rows / rows.sum(-1, keepdim=True), atol=1e-6)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(3, 3), atol=1e-6)


def test_maps_need_attention() -> None:
    with pytest.raises(ConfigError, match="hold no attention"):
        draw.attention_maps(Targets(torch.zeros(1, 4, 2)))


@pytest.mark.parametrize("how", ["none", "feature", "patch"])
def test_similarity_is_that_of_a_plain_loop(base: FrozenBase, images: torch.Tensor, how: Any) -> None:
    features = normalize_features(base(images).features, how)
    found = draw.token_similarity(features)
    wanted = []
    for view in features.double().tolist():
        for one, other in itertools.combinations(view, 2):
            dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
            wanted.append(dot / math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other)))
    assert found.shape == (3 * 16 * 15 // 2,)
    assert found == pytest.approx(wanted, abs=1e-12)
    shares, edges = similarity_shares(found)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] == pytest.approx(sum(value < edges[1] for value in wanted) / len(wanted))


def test_components_are_those_of_a_singular_value_decomposition(base: FrozenBase, images: torch.Tensor) -> None:
    features = base(images).features
    found = draw.Components.of(features)
    tokens = features.double().flatten(0, 1).numpy()
    _, _, directions = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    for own, theirs in zip(found.directions.T.numpy(), directions[:3], strict=True):
        assert abs(own @ theirs) == pytest.approx(1, abs=1e-9)
        assert own[np.abs(own).argmax()] > 0, "the sign is chosen, not left to the solver"
    pictures = draw.component_colours(features, (4, 4))
    assert (pictures.shape, pictures.dtype) == ((3, 4, 4, 3), np.uint8)
    assert np.array_equal(pictures, found.colours(features, (4, 4)))
    first = (tokens - tokens.mean(0)) @ found.directions[:, 0].numpy()
    assert pictures[..., 0].flatten()[first.argmax()] == 255
    assert pictures[..., 0].flatten()[first.argmin()] == 0
    # others in the same colours: what is the same is coloured the same
    assert np.array_equal(found.colours(features[1:2], (4, 4))[0], pictures[1])


def test_features_of_two_channels_have_colours_too() -> None:
    pictures = draw.component_colours(torch.randn(1, 6, 2), (2, 3))
    assert pictures.shape == (1, 2, 3, 3)
    assert len(np.unique(pictures[..., 2])) == 1


def test_a_head_colours_what_it_looks_at() -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    maps = torch.zeros(3, 4, 4)
    maps[0, 0, 0] = maps[1, 3, 3] = maps[2, 0, 3] = 1.0
    colours = draw.head_colours(3)
    together = draw.attention_overlay(pixels, maps).astype(float)
    grey = 0.75 * 200
    for head, place in enumerate([(0, 0), (31, 31), (0, 31)]):
        wanted = (1 - OPACITY) * grey + OPACITY * 255 * colours[head]
        assert together[place] == pytest.approx(wanted, abs=1)
        alone = draw.head_overlay(pixels, maps, head).astype(float)
        assert alone[place] == pytest.approx(wanted, abs=1)
        assert alone[31 - place[0], 31 - place[1]] == pytest.approx(np.full(3, grey), abs=1)


def test_a_head_that_looks_nowhere_in_particular_stays_faint() -> None:
    pixels = np.full((8, 8, 3), 200, np.uint8)
    flat = draw.head_overlay(pixels, torch.full((1, 4, 4), 1 / 16), 0).astype(float)
    opacity = OPACITY / LEAST_PEAK
    assert flat[4, 4] == pytest.approx((1 - opacity) * 150 + opacity * 255 * draw.head_colours(1)[0], abs=1)


@pytest.mark.parametrize("count", [1, 2, 3, 6, 12, 16, 24])
def test_every_head_has_a_colour_of_its_own(count: int) -> None:
    assert len({tuple(np.round(255 * colour)) for colour in draw.head_colours(count)}) == count


def test_three_lines_make_a_figure_and_leave_nothing_global(tmp_path: Path, tiny_base: Path) -> None:
    """In a process of its own: whatever imported pyplot before would hide it."""
    code = f"""
import sys, numpy as np, torch, tec_cache
from tec_cache import draw
base = tec_cache.load_base({str(tiny_base)!r}, grid=4, k=0)
maps = draw.attention_maps(base(torch.randn(1, 3, 32, 32)))[0]
draw.attention_figure(np.zeros((32, 32, 3), np.uint8), {{"one $x": maps, "two": maps}}).savefig("attention.png")
draw.similarity_figure({{"raw": draw.token_similarity(torch.randn(1, 9, 4))}}).savefig("similarity.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    for name in ("attention.png", "similarity.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name).convert("L")))) > 2


def test_a_figure_has_a_panel_for_each_head(base: FrozenBase, images: torch.Tensor) -> None:
    maps = draw.attention_maps(base(images))
    pixels = np.asarray(photo(0, 32, 32))
    figure = draw.attention_figure(pixels, {"base": maps[0], "new": maps[1, :2]})
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == (2 + 3) + (2 + 2)
    assert np.array_equal(shown[0].images[0].get_array(), pixels)
    figure.savefig(io.BytesIO())


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TecCacheError) as caught:
        require_matplotlib("here")
    assert (caught.value.what, caught.value.where) == ("plots are drawn by matplotlib, which is not installed", "here")
    assert "pip install" in caught.value.todo
    with pytest.raises(TecCacheError, match="not installed"):
        draw.similarity_figure({})
