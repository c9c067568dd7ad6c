"""Weight files: every official format comes back as the model it was written from; nothing else passes."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from tec_cache.errors import WeightsError
from tec_cache.weights.files import Weights, read_weights, sha256_of_state
from tec_cache.weights.load import load_strict

GOLDEN = Path(__file__).parent / "data" / "golden_mae_like.npz"
# Values as the official scripts keep them beside the network; the NumPy scalar is a "best accuracy".
EXTRAS = {"epoch": 7, "args": Namespace(lr=0.1, arch="vit_base"), "best": np.float64(82.5), "scaler": None}


def vit(seed: int = 0, **changes: Any) -> VisionTransformer:
    settings: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(seed)
    model = VisionTransformer(**{**settings, "num_classes": 0, "global_pool": "", **changes})
    return randomized(model)


def randomized(model: Any) -> Any:
    # Fresh models have zero biases and unit norms: two of those mixed up would go unseen.
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.2)
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def prefixed(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_same_model(weights: Weights, original: VisionTransformer, **changes: Any) -> None:
    """The file's weights in a fresh model give bit for bit what the original gives."""
    fresh = vit(seed=99, **changes)
    images = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(fresh(images), original(images))
        load_strict(fresh, weights.state, what="test")
        assert torch.equal(fresh(images), original(images))


HEADS = {"head.mlp.0.weight": torch.ones(3, 48), "head.last_layer.weight_g": torch.ones(3, 1)}
IBOT_HEADS = {**HEADS, "head.last_layer2.weight_g": torch.ones(3, 1)}
DECODER = {"decoder_embed.weight": torch.ones(32, 48), "decoder_blocks.0.norm1.bias": torch.ones(32)}


def dino_networks(good: Mapping[str, Tensor], prefix: str, heads: Mapping[str, Tensor]) -> dict[str, Any]:
    """A teacher with the good weights beside a student with others, heads next to the backbones."""
    head_prefix = "module." if "module." in prefix else ""
    student = vit(seed=5).state_dict()
    return {
        "teacher": {**prefixed(good, prefix), **prefixed(heads, head_prefix)},
        "student": {**prefixed(student, prefix), **prefixed(heads, head_prefix)},
    }


def moco(good: Mapping[str, Tensor], used: str) -> dict[str, Any]:
    state = {
        **prefixed(good, f"module.{used}."),
        f"module.{used}.head.0.weight": torch.ones(4, 48),
        "module.predictor.0.weight": torch.ones(4, 4),
    }
    if used == "base_encoder":
        state.update(prefixed(vit(seed=5).state_dict(), "module.momentum_encoder."))
    return {**EXTRAS, "arch": "vit_base", "state_dict": state}


FORMATS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "mae, the encoder only": ("mae", lambda s: {"model": s}),
    "mae, with decoder and optimizer": (
        "mae",
        lambda s: {
            **EXTRAS,
            "model": {**s, **DECODER, "mask_token": noise(1, 1, 32)},
            "optimizer": {"state": {}},
        },
    ),
    "dino, full": ("dino", lambda s: {**EXTRAS, **dino_networks(s, "module.backbone.", HEADS)}),
    "dino, prefixes the other way": ("dino", lambda s: dino_networks(s, "backbone.module.", HEADS)),
    "dino, student only": (
        "dino",
        lambda s: {"student": dino_networks(s, "module.backbone.", HEADS)["teacher"]},
    ),
    "dino, plain teacher": ("timm", lambda s: s),
    "ibot, full": (
        "ibot",
        lambda s: {
            **EXTRAS,
            **dino_networks({**s, "masked_embed": noise(1, 48)}, "module.backbone.", IBOT_HEADS),
            "ibot_loss": {"center": noise(1, 3)},
        },
    ),
    "ibot, teacher file": ("ibot", lambda s: {"state_dict": {**s, "masked_embed": noise(1, 48)}}),
    "ibot, teacher file with heads": (
        "ibot",
        lambda s: {"state_dict": {**s, **prefixed(IBOT_HEADS, "module.")}},
    ),
    "moco v3, base encoder": ("mocov3", lambda s: moco(s, "base_encoder")),
    "moco v3, momentum encoder only": ("mocov3", lambda s: moco(s, "momentum_encoder")),
    "dinov2, plain": ("dinov2", lambda s: {**s, "mask_token": noise(1, 48)}),
    "dinov2, teacher file": (
        "dinov2",
        lambda s: {"teacher": {**prefixed(s, "backbone."), "dino_head.mlp.0.weight": torch.ones(3, 48)}},
    ),
    "timm, with a head": (
        "timm",
        lambda s: {**s, "head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)},
    ),
    "timm, training checkpoint": (
        "timm",
        lambda s: {**EXTRAS, "state_dict": prefixed(s, "module."), "optimizer": {"param_groups": []}},
    ),
    "timm, averaged copy preferred": (
        "timm",
        lambda s: {"model": vit(seed=5).state_dict(), "model_ema": {**s, "head.bias": torch.ones(5)}},
    ),
    "timm, averaged copy of its own trainer": (
        "timm",
        lambda s: {
            "state_dict": vit(seed=5).state_dict(),
            "state_dict_ema": {**s, "head_dist.bias": noise(5)},
        },
    ),
    "a compiled model": ("timm", lambda s: prefixed(s, "module._orig_mod.")),
    "an ordered dict of parameters": (
        "timm",
        lambda s: OrderedDict((name, nn.Parameter(value)) for name, value in s.items()),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_back_the_model_it_was_written_from(name: str, tmp_path: Path) -> None:
    kind, wrap = FORMATS[name]
    original = vit()
    weights = read_weights(saved(tmp_path / "weights.pth", wrap(original.state_dict())))
    assert weights.format == kind
    assert set(weights.state) == set(original.state_dict())
    assert weights.path == str(tmp_path / "weights.pth")
    assert not any(value.requires_grad for value in weights.state.values())
    assert_same_model(weights, original)


def test_what_was_left_out_is_named(tmp_path: Path) -> None:
    state = vit().state_dict()
    mae = {"model": {**state, **DECODER, "mask_token": noise(1, 1, 32), "head.bias": noise(3), "step": 3}}
    assert read_weights(saved(tmp_path / "mae.pth", mae)).dropped == (
        "decoder_blocks.0.norm1.bias",
        "decoder_embed.weight",
        "head.bias",
        "mask_token",
        "step",
    )
    dino = read_weights(saved(tmp_path / "dino.pth", dino_networks(state, "module.backbone.", HEADS)))
    assert "head.mlp.0.weight" in dino.dropped
    assert "student.module.backbone.cls_token" in dino.dropped
    mocov3 = read_weights(saved(tmp_path / "moco.pth", moco(state, "base_encoder")))
    assert {"predictor.0.weight", "momentum_encoder.cls_token", "head.0.weight"} <= set(mocov3.dropped)


def test_dinov2_registers_and_swiglu_become_what_timm_makes_of_them(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "reg_tokens": 4,
        "no_embed_class": True,
        "mlp_layer": SwiGLUPacked,
        "init_values": 1e-5,
    }
    original = vit(**shape)
    official = dict(original.state_dict())
    official["register_tokens"] = official.pop("reg_token")
    official["pos_embed"] = torch.cat([noise(1, 1, 48), official["pos_embed"]], dim=1)
    official["mask_token"] = noise(1, 48)
    for name in [name for name in official if ".mlp.fc" in name]:
        official[name.replace(".fc1.", ".w12.").replace(".fc2.", ".w3.")] = official.pop(name)
    expected = checkpoint_filter_fn(dict(official), original)

    weights = read_weights(saved(tmp_path / "dinov2.pth", official))
    assert weights.format == "dinov2"
    assert weights.dropped == ("mask_token",)
    assert set(weights.state) == set(expected)
    assert all(torch.equal(weights.state[name], expected[name]) for name in expected)
    original.load_state_dict(expected)
    assert_same_model(weights, original, **shape)


def test_an_unpacked_swiglu_keeps_its_names(tmp_path: Path) -> None:
    state = {f"blocks.0.mlp.{layer}.weight": noise(4, 4) for layer in ("w1", "w2", "w3")}
    assert set(read_weights(saved(tmp_path / "dinov3.pth", state)).state) == set(state)


@pytest.mark.parametrize("wrapped", [True, False])
def test_tec_checkpoint_folds_its_input_adapter_and_keeps_the_encoder(wrapped: bool, tmp_path: Path) -> None:
    with np.load(GOLDEN) as golden:
        file = {
            name.removeprefix("student/"): torch.from_numpy(golden[name])
            for name in golden.files
            if name.startswith("student/")
        }
    adapter = nn.Sequential(nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))
    adapter.load_state_dict(
        {f"{i}.{part}": file[f"cls_token_mlp.fc{i // 2 + 1}.{part}"] for i in (0, 2) for part in ("weight", "bias")}
    )
    weights = read_weights(saved(tmp_path / "tec.pth", {"model": file} if wrapped else file))
    assert weights.format == "tec"
    model = vit(img_size=224, patch_size=16, depth=6)
    assert set(weights.state) == set(model.state_dict())
    torch.testing.assert_close(weights.state["cls_token"], adapter(file["cls_token"]).detach(), rtol=0, atol=1e-6)
    assert all(torch.equal(weights.state[n], file[n]) for n in weights.state if n != "cls_token")
    assert {"encoder_adaptor.adap_after.bias", "forward_att_decoder.mask_token", "decoder_pos_embed"} <= set(
        weights.dropped
    )
    load_strict(model, weights.state, what="tec")


def test_tec_adapter_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    state = {**vit().state_dict(), "cls_token_mlp.fc1.weight": noise(192, 48)}
    with pytest.raises(WeightsError, match=r"cls_token_mlp\.fc1\.bias"):
        read_weights(saved(tmp_path / "tec.pth", state))


def test_eva_names_and_its_fc_norm_pass_through(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    shape |= {"num_classes": 0, "use_rot_pos_emb": True, "init_values": 1e-5, "dynamic_img_size": False}
    original = randomized(Eva(**shape))
    state = original.state_dict()
    assert {"fc_norm.weight", "blocks.0.gamma_1", "blocks.0.attn.q_bias"} <= set(state)
    weights = read_weights(saved(tmp_path / "eva.pth", state))
    assert weights.dropped == ()
    fresh = randomized(Eva(**shape))
    load_strict(fresh, weights.state, what="eva")
    images = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fresh(images), original(images))


def test_safetensors_keep_their_dtype(tmp_path: Path) -> None:
    original = vit()
    half = {name: value.bfloat16() for name, value in original.state_dict().items()}
    save_file(half, tmp_path / "weights.safetensors")
    weights = read_weights(tmp_path / "weights.safetensors")
    assert {value.dtype for value in weights.state.values()} == {torch.bfloat16}
    original.load_state_dict(half)
    assert_same_model(weights, original)


def test_numpy_values_of_either_generation_are_tolerated_but_not_rebuilt(tmp_path: Path) -> None:
    state = vit().state_dict()
    path = saved(tmp_path / "weights.pth", {"state_dict": state, "best": np.float64(1.5), "n": np.int64(3)})
    data = path.read_bytes()
    old = b"numpy.core.multiarray" if b"numpy.core.multiarray" in data else b"numpy._core.multiarray"
    assert old in data
    assert set(read_weights(path).state) == set(state)
    # The other name through a plain pickle, where the length of a name is not part of an archive's sums.
    other = {b"numpy.core.multiarray": b"numpy._core.multiarray"}.get(old, b"numpy.core.multiarray")
    legacy = tmp_path / "legacy.pth"
    torch.save({"state_dict": state, "best": np.float64(1.5)}, legacy, _use_new_zipfile_serialization=False)
    legacy.write_bytes(legacy.read_bytes().replace(old, other))
    assert set(read_weights(legacy).state) == set(state)


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("plain", [True, False])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(plain: bool, protocol: int, tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "evil.pth"
    content = {"model": vit().state_dict(), "args": Attack(marker)}
    if plain:
        path.write_bytes(pickle.dumps({"args": Attack(marker)}, protocol=protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol)
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    assert not marker.exists()
    assert str(path) in str(caught.value)
    assert caught.value.todo
    if protocol == 2:  # what torch.save writes; of a later one not even the first instruction is accepted
        assert "refused to unpickle posix.system" in str(caught.value)
    # The file would indeed have run the command.
    if plain:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


def test_refusing_a_class_names_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "module.pth", {"model": vit()})
    with pytest.raises(WeightsError, match=r"VisionTransformer") as caught:
        read_weights(path)
    assert "safetensors" in caught.value.todo


def truncated(path: Path) -> None:
    torch.save(vit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def truncated_safetensors(path: Path) -> None:
    save_file(vit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.pth", lambda path: None, "no such weight file"),
    "folder": ("a", lambda path: path.mkdir(), "folder"),
    "text": ("a.pth", lambda path: path.write_text("not weights\n" * 30), "not a checkpoint"),
    "empty": ("a.pth", lambda path: path.write_bytes(b""), "not a checkpoint"),
    "truncated": ("a.pth", truncated, "truncated"),
    "truncated safetensors": ("a.safetensors", truncated_safetensors, "truncated"),
    "text as safetensors": ("a.safetensors", lambda path: path.write_text("no\n" * 30), "not a checkpoint"),
    "a tensor": ("a.pth", lambda path: torch.save(noise(3), path), "holds a Tensor"),
    "no network": (
        "a.pth",
        lambda path: torch.save({"optimizer": {"lr": 1.0}, "epoch": 3}, path),
        "top-level keys: 2: optimizer, epoch",
    ),
    "head only": (
        "a.pth",
        lambda path: torch.save({"state_dict": {"head.bias": noise(3)}}, path),
        "top-level keys: 1: state_dict",
    ),
    "same name twice": (
        "a.pth",
        lambda path: torch.save({**vit().state_dict(), "module.cls_token": noise(1, 1, 48)}, path),
        "occur twice",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_without_weights_is_an_error_with_a_place_and_a_remedy(name: str, tmp_path: Path) -> None:
    file_name, write, message = BROKEN[name]
    write(tmp_path / file_name)
    with pytest.raises(WeightsError, match=re.escape(message)) as caught:
        read_weights(tmp_path / file_name)
    assert caught.value.where == str(tmp_path / file_name)
    assert caught.value.todo


def test_fine_tuned_file_is_refused_unless_the_final_norm_is_there(tmp_path: Path) -> None:
    state = vit().state_dict()
    pooled = {"fc_norm.weight": torch.ones(48), "fc_norm.bias": torch.ones(48), "head.bias": torch.ones(5)}
    tuned = {name: value for name, value in state.items() if not name.startswith("norm.")} | pooled
    with pytest.raises(WeightsError, match="fine-tuned"):
        read_weights(saved(tmp_path / "tuned.pth", {"model": tuned}))
    both = read_weights(saved(tmp_path / "both.pth", {"model": {**state, **pooled}}))
    assert set(both.state) == set(state)
    assert "fc_norm.weight" in both.dropped


def refused(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """The message of the refusal; the model must come out of it unchanged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_strict(model, state, what="the test's file")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "the test's file" in str(caught.value)
    assert caught.value.todo
    return str(caught.value)


def test_missing_misshaped_and_unexpected_names_are_all_told() -> None:
    state = vit(seed=1).state_dict()
    del state["blocks.1.norm2.bias"]
    state["norm.weight"] = noise(47)
    state["blocks.0.extra"] = noise(2)
    message = refused(vit(), state)
    assert "missing: 1: blocks.1.norm2.bias" in message
    assert "of the wrong shape: 1: norm.weight (47,) in the file, (48,) in the model" in message
    assert "unexpected: 1: blocks.0.extra" in message


def test_long_lists_are_cut_with_their_count() -> None:
    message = refused(vit(), {name: value for name, value in vit().state_dict().items() if "blocks.1" not in name})
    assert "missing: 12: " in message
    assert message.count("blocks.1.") == 8
    assert "and 4 more" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "unexpected: 12: blocks.2."),
        ({"depth": 1}, "missing: 12: blocks.1."),
        ({"embed_dim": 96}, "cls_token (1, 1, 96) in the file, (1, 1, 48) in the model"),
        (
            {"patch_size": 16},
            "patch_embed.proj.weight (48, 3, 16, 16) in the file, (48, 3, 8, 8) in the model",
        ),
        ({"patch_size": 4}, "patch_embed.proj.weight (48, 3, 4, 4) in the file, (48, 3, 8, 8) in the model"),
        # The patch differs and the grid does not: no resampled position gives it away.
        ({"patch_size": 16, "img_size": 64}, "patch_embed.proj.weight (48, 3, 16, 16) in the file"),
        ({"qkv_bias": False}, "missing: 2: blocks.0.attn.qkv.bias"),
        ({"init_values": 1e-5}, "unexpected: 4: blocks.0.ls1.gamma"),
        ({"reg_tokens": 4, "no_embed_class": True}, "do not form a grid"),
    ],
)
def test_weights_of_another_vit_are_refused(changes: dict[str, Any], message: str) -> None:
    assert message in refused(vit(), vit(seed=1, **changes).state_dict())


def test_a_head_in_the_state_is_ignored_and_a_head_in_the_model_is_not() -> None:
    state = {**vit(seed=1).state_dict(), "head.weight": noise(5, 48), "head.bias": noise(5)}
    model = vit()
    load_strict(model, state, what="with head")
    assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"])
    assert "missing: 2: head.weight, head.bias" in refused(vit(num_classes=5), vit(seed=1).state_dict())


def test_persistent_buffers_are_needed_too() -> None:
    model, source = vit(), vit(seed=1)
    model.register_buffer("scale", torch.zeros(3))
    assert "missing: 1: scale" in refused(model, source.state_dict())
    load_strict(model, {**source.state_dict(), "scale": torch.ones(3)}, what="with buffer")
    assert torch.equal(model.get_buffer("scale"), torch.ones(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    state = vit(seed=1).state_dict()
    state["blocks.1.mlp.fc1.weight"][3, 4] = value
    assert "blocks.1.mlp.fc1.weight" in refused(vit(), state)


def test_values_too_large_for_a_half_precision_model_are_refused() -> None:
    state = vit(seed=1).state_dict()
    state["norm.bias"][0] = 1e5
    load_strict(vit(), state, what="float32")
    assert "norm.bias (as torch.float16)" in refused(vit().half(), state)


def test_loading_casts_to_the_models_dtype() -> None:
    state = {name: value.bfloat16() for name, value in vit(seed=1).state_dict().items()}
    model = vit()
    load_strict(model, state, what="half")
    assert model.state_dict()["norm.weight"].dtype == torch.float32
    assert torch.equal(model.state_dict()["norm.weight"], state["norm.weight"].float())


@pytest.mark.parametrize("img_size", [64, 16, (32, 64)])
@pytest.mark.parametrize(
    "shape", [{}, {"reg_tokens": 4, "no_embed_class": True}, {"class_token": False}, {"reg_tokens": 2}]
)
def test_positions_are_resampled_as_timm_does(shape: dict[str, Any], img_size: Any) -> None:
    source = vit(seed=1, **shape).state_dict()
    model = vit(img_size=img_size, **shape)
    expected = checkpoint_filter_fn(dict(source), model)["pos_embed"]
    assert expected.shape != source["pos_embed"].shape
    load_strict(model, source, what="other grid")
    assert torch.equal(model.state_dict()["pos_embed"], expected)


def test_a_grid_that_is_not_square_has_to_be_given() -> None:
    source = vit(seed=1, img_size=(32, 64)).state_dict()
    assert "do not form a grid of 5 x 5" in refused(vit(), source)
    model = vit()
    load_strict(model, source, what="wide", grid=(4, 8))
    expected = resample_abs_pos_embed(source["pos_embed"], [4, 4], [4, 8], verbose=False)
    assert torch.equal(model.state_dict()["pos_embed"], expected)
    same = vit(img_size=(32, 64))
    load_strict(same, source, what="wide")
    assert torch.equal(same.state_dict()["pos_embed"], source["pos_embed"])


def test_a_given_grid_counts_even_where_the_number_of_tokens_agrees() -> None:
    source = vit(seed=1, img_size=(16, 64)).state_dict()
    model = vit()
    load_strict(model, source, what="wide", grid=(2, 8))
    patches = source["pos_embed"][:, 1:].reshape(1, 2, 8, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(patches, (4, 4), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    expected = torch.cat([source["pos_embed"][:, :1], resampled], dim=1)
    assert not torch.equal(expected, source["pos_embed"])
    assert torch.equal(model.state_dict()["pos_embed"], expected)


def test_sha_does_not_depend_on_order_or_layout() -> None:
    state = vit().state_dict()
    known = sha256_of_state(state)
    assert re.fullmatch(r"[0-9a-f]{64}", known)
    assert sha256_of_state(dict(reversed(list(state.items())))) == known
    state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].t().contiguous().t()
    assert sha256_of_state(state) == known


def test_sha_is_over_the_bytes_it_says() -> None:
    # Caches record it: a change here would make every one of them a stranger.
    state = {"b": torch.tensor([1.0, -2.0], dtype=torch.bfloat16), "a": torch.arange(3).reshape(1, 3)}
    state |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.5)}
    expected = b'["a", "torch.int64", [1, 3]]\n' + struct.pack("<3q", 0, 1, 2)
    expected += b'["b", "torch.bfloat16", [2]]\n' + struct.pack("<2H", 0x3F80, 0xC000)
    expected += b'["empty", "torch.float32", [0, 4]]\n'
    expected += b'["scalar", "torch.float32", []]\n' + struct.pack("<f", 1.5)
    assert sha256_of_state(state) == hashlib.sha256(expected).hexdigest()


def test_sha_sees_one_bit_a_name_a_shape_and_a_dtype() -> None:
    values = torch.zeros(4, 6, dtype=torch.bfloat16)
    one_bit = values.clone()
    one_bit.view(torch.int16)[3, 5] ^= 1
    variants = [
        {"a": values},
        {"a": one_bit},
        {"b": values},
        {"a": values.reshape(6, 4)},
        {"a": values.half()},
        {"a": values[:2], "b": values[2:]},
    ]
    assert len({sha256_of_state(variant) for variant in variants}) == len(variants)
