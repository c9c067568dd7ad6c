"""Whatever a file calls an encoder's parts, and behind whatever keys they lie: the same weights, the same features."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tec_cache.base.load import load_base, native_grid
from tec_cache.errors import WeightsError
from tec_cache.weights.files import read_weights, sha256_of_state
from tec_cache.weights.load import load_strict

SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}


def randomized(model: Any) -> Any:
    """Give every parameter its own values: two of those mixed up would go unseen among zeros and ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def vit(**changes: Any) -> VisionTransformer:
    return randomized(VisionTransformer(**{**SHAPE, "num_classes": 0, "global_pool": "", **changes}))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def prefixed(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in state.items()}


def digest(path: Path) -> str:
    return sha256_of_state(read_weights(path).state)


# Wrappers


def wrapped(state: dict[str, Tensor], keys: list[str], words: list[str], inner: str) -> dict[str, Any]:
    """Put a state behind prefixes and dictionary keys, with a compiler's word in the middle of its names."""
    prefix = "".join(f"{word}." for word in words)
    content: dict[str, Any] = {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        content[prefix + (f"{first}.{inner}.{rest}" if inner and first == "blocks" else name)] = value
    content["criterion.center"] = torch.zeros(1, 8)
    for key in keys:
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    return content


WORDS = ("model", "module", "encoder", "backbone", "student", "teacher", "_orig_mod", "_fsdp_wrapped_module", "trunk",
         "visual", "vit", "net", "base_model", "_forward_module")  # fmt: skip


@settings(derandomize=True, max_examples=20, deadline=None)
@given(
    keys=st.lists(st.sampled_from(["state_dict", "model", "teacher", "student", "model_ema", "network"]), max_size=3),
    words=st.lists(st.sampled_from(WORDS), max_size=4),
    inner=st.sampled_from(["", "_orig_mod", "module", "_fsdp_wrapped_module"]),
)
def test_an_encoder_is_found_behind_any_keys_and_prefixes(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], words: list[str], inner: str
) -> None:
    state = vit(depth=1).state_dict()
    folder = tmp_path_factory.mktemp("wrapped")
    content = wrapped(state, keys, words, inner)
    if not words:
        del (content if not keys else _innermost(content, keys))["criterion.center"]
    assert digest(saved(folder / "weights.pth", content)) == sha256_of_state(state)


def _innermost(content: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    for key in reversed(keys):
        content = content[key]
    return content


def test_names_may_be_nested_down_to_the_tensors(tmp_path: Path) -> None:
    state = vit().state_dict()
    nested: dict[str, Any] = {}
    for name, value in state.items():
        *path, last = name.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    assert digest(saved(tmp_path / "nested.pth", {"params": nested})) == sha256_of_state(state)


PREFERRED: dict[str, Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "teacher": lambda good, bad: {"teacher": good, "student": bad},
    "EMA of Lightning": lambda good, bad: {"state_dict": prefixed(bad, "model.") | prefixed(good, "ema_model.")},
    "EMA beside": lambda good, bad: {"model": bad, "model_ema": {"module": good}},
    "target encoder": lambda good, bad: {"encoder": bad, "target_encoder": prefixed(good, "module.")},
    "base of MoCo": lambda good, bad: {
        "state_dict": prefixed(bad, "module.momentum_encoder.") | prefixed(good, "module.base_encoder.")
    },
}


@pytest.mark.parametrize("name", PREFERRED)
def test_of_two_networks_the_released_one_is_taken(name: str, tmp_path: Path) -> None:
    good = vit().state_dict()
    bad = {key: value + 1 for key, value in good.items()}
    path = saved(tmp_path / "two.pth", PREFERRED[name](good, bad))
    assert digest(path) == sha256_of_state(good)


def test_two_networks_that_nothing_tells_apart_are_refused_by_their_names(tmp_path: Path) -> None:
    state = vit(depth=1).state_dict()
    other = {key: value + 1 for key, value in state.items()}
    with pytest.raises(WeightsError, match=r"2 different encoders are in this file, under 'left\.', 'right\.'"):
        read_weights(saved(tmp_path / "two.pth", {"left": state, "right": other}))
    # the same weights twice are no question
    assert digest(saved(tmp_path / "same.pth", {"left": state, "right": dict(state)})) == sha256_of_state(state)


def test_a_file_without_an_encoder_shows_the_names_inside_it(tmp_path: Path) -> None:
    content = {"epoch": 1, "state_dict": {f"model.layer1.{i}.conv.weight": torch.ones(2) for i in range(9)}}
    with pytest.raises(WeightsError) as error:
        read_weights(saved(tmp_path / "resnet.pth", content))
    assert "state_dict.model.layer1.0.conv.weight" in str(error.value)
    assert "9: " in str(error.value)


def test_a_container_that_holds_itself_ends(tmp_path: Path) -> None:
    state = vit(depth=1).state_dict()
    content: dict[str, Any] = {"model": dict(state)}
    content["self"] = content
    wide: Any = {}
    for _ in range(40):  # doubled forty times: walked as a tree it would have 10^12 leaves
        wide = {"a": wide, "b": wide}
    content["wide"] = wide
    assert digest(saved(tmp_path / "loop.pth", content)) == sha256_of_state(state)


def test_a_checkpoint_of_our_own_run_is_not_taken_without_its_input_adapter(tmp_path: Path) -> None:
    student = prefixed(vit(depth=1).state_dict(), "encoder.") | {"input_adapter.fc1.weight": torch.ones(2, 2)}
    with pytest.raises(WeightsError, match="tec-cache export RUN OUT"):
        read_weights(saved(tmp_path / "step-000000100.pt", {"student": student, "step": 100}))


# DINOv2's chunks


@pytest.mark.parametrize("chunks", [1, 2, 3, 6])
def test_chunked_blocks_are_the_blocks(chunks: int, tmp_path: Path) -> None:
    state = vit(depth=6, init_values=1e-5).state_dict()
    size = 6 // chunks

    def chunked(name: str) -> str:
        parts = name.split(".")
        return ".".join(["blocks", str(int(parts[1]) // size), *parts[1:]]) if parts[0] == "blocks" else name

    teacher = {f"backbone.{chunked(name)}": value for name, value in state.items()}
    teacher |= {"backbone.mask_token": torch.zeros(1, 48), "dino_head.mlp.0.weight": torch.ones(8, 8)}
    weights = read_weights(saved(tmp_path / "teacher.pth", {"teacher": teacher}))
    assert sha256_of_state(weights.state) == sha256_of_state(state)
    assert weights.release == "dinov2"


def test_chunks_that_count_from_zero_each_are_refused_and_not_mixed(tmp_path: Path) -> None:
    state = vit(depth=2).state_dict()
    local = {
        name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.0."): v for name, v in state.items()
    }
    with pytest.raises(WeightsError, match=r"in chunks, and two of them hold a blocks\.0\."):
        read_weights(saved(tmp_path / "local.pth", local))


# DINOv3

DINOV3_NAMES = ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3")
DINOV3: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 64}


def official_dinov3(state: dict[str, Tensor], *, zero: bool) -> dict[str, Tensor]:
    """The authors' names, with the biases of a fused projection and the mask on its key part."""
    official, biases = {}, {}
    for name, value in state.items():
        if name.endswith(("q_bias", "v_bias")):
            biases[name] = value
            continue
        for ours, theirs in (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"),
                             ("fc1_g", "w1"), ("fc1_x", "w2")):  # fmt: skip
            name = name.replace(ours, theirs)
        official[name.replace("mlp.fc2", "mlp.w3") if "blocks.0.mlp.fc1_g.weight" in state else name] = value
    for block in range(2):
        parts = [biases.get(f"blocks.{block}.attn.{part}_bias", torch.zeros(64)) for part in "qv"]
        assert zero == (not biases)
        mask = torch.ones(192)
        mask[64:128] = 0
        official[f"blocks.{block}.attn.qkv.bias"] = torch.cat([parts[0], torch.full((64,), 7.0), parts[1]])
        official[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    official["mask_token"] = torch.zeros(1, 64)
    official["rope_embed.periods"] = (100.0 ** (2 * torch.arange(8) / 16)).bfloat16().float()
    return official


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"]
)
def test_dinov3s_own_file_is_timms(name: str, tmp_path: Path) -> None:
    model = randomized(timm.create_model(name, num_classes=0, **DINOV3))
    state = model.state_dict()
    official = official_dinov3(dict(state), zero="qkvb" not in name)
    path = saved(tmp_path / "dinov3.pth", official)
    weights = read_weights(path)
    assert sha256_of_state(weights.state) == sha256_of_state(state)
    assert (weights.release, weights.num_heads) == ("dinov3", 2)
    save_file(state, tmp_path / "timm.safetensors")
    assert digest(tmp_path / "timm.safetensors") == sha256_of_state(state)


def test_zero_biases_load_into_both_of_timms_classes(tmp_path: Path) -> None:
    plain = randomized(timm.create_model("vit_small_patch16_dinov3", num_classes=0, **DINOV3))
    path = saved(tmp_path / "dinov3.pth", official_dinov3(dict(plain.state_dict()), zero=True))
    args = {name: value for name, value in DINOV3.items() if name != "img_size"}
    bases = []
    for name in ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architecture": name, "model_args": args}))
        bases.append(load_base(str(folder), path, grid=4, k=3))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(bases[0](images).features, bases[1](images).features, rtol=0, atol=1e-5)
    assert bases[0].identity["weights_sha256"] == bases[1].identity["weights_sha256"]


def test_rotary_periods_that_timm_would_not_compute_are_refused(tmp_path: Path) -> None:
    model = randomized(timm.create_model("vit_small_patch16_dinov3", num_classes=0, **DINOV3))
    official = official_dinov3(dict(model.state_dict()), zero=True)
    official["rope_embed.periods"] = 10000.0 ** (2 * torch.arange(8) / 16)
    with pytest.raises(WeightsError, match="rotary embedding"):
        read_weights(saved(tmp_path / "other.pth", official))


# The transformers library: its own models, as it saves them and as it holds them

HF: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32,
                      "patch_size": 8}  # fmt: skip
KINDS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**HF, intermediate_size=100)),
    "vit quick_gelu, no bias": lambda: transformers.ViTModel(
        transformers.ViTConfig(**HF, intermediate_size=96, hidden_act="quick_gelu", qkv_bias=False, layer_norm_eps=1e-3)
    ),
    "classifier": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**HF, intermediate_size=96)),
    "vit_mae": lambda: transformers.ViTMAEModel(transformers.ViTMAEConfig(**HF, intermediate_size=96, mask_ratio=0.0)),
    "vit_mae pretraining": lambda: transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(**HF, intermediate_size=96, mask_ratio=0.0, decoder_num_hidden_layers=1,
                                  decoder_hidden_size=32, decoder_intermediate_size=32, decoder_num_attention_heads=2)
    ),
    "vit_msn": lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**HF, intermediate_size=96)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**HF, intermediate_size=96)),
    "ijepa": lambda: transformers.IJepaModel(transformers.IJepaConfig(**HF, intermediate_size=96)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF)),
    "dinov2 swiglu": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF, use_swiglu_ffn=True)),
    "dinov2 registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**HF, num_register_tokens=3)
    ),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**HF, intermediate_size=96, num_register_tokens=4)
    ),
    "dinov3 gated": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**HF, intermediate_size=96, num_register_tokens=4, use_gated_mlp=True,
                                   hidden_act="silu")
    ),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HF, intermediate_size=96)),
}  # fmt: skip


def features_of_transformers(model: nn.Module, images: Tensor) -> Tensor:
    """The mean of the last two blocks' patch tokens, in the order of the grid."""
    options: dict[str, Any] = {}
    if "MAE" in type(model).__name__:  # it shuffles even what it does not mask
        options["noise"] = torch.arange(16.0).expand(len(images), -1)
    with torch.no_grad():
        states = model(images, output_hidden_states=True, **options).hidden_states
    return (states[-1][:, -16:] + states[-2][:, -16:]) / 2


@pytest.mark.parametrize("held", ["as it saves it", "in several files", "as it holds it"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_gives_the_librarys_own_features(kind: str, held: str, tmp_path: Path) -> None:
    model = randomized(KINDS[kind]())
    model.save_pretrained(tmp_path, **({"max_shard_size": "40KB"} if held == "in several files" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (held == "in several files")
    if held == "as it holds it":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    base = load_base(str(tmp_path), grid=4, k=3)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(base(images).features, features_of_transformers(model, images), rtol=0, atol=1e-5)
    assert (base.num_heads, native_grid(str(tmp_path))) == (3, 4)


def test_pixel_statistics_are_the_preprocessors(tmp_path: Path) -> None:
    randomized(KINDS["vit"]()).save_pretrained(tmp_path)
    config = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(config))
    base = load_base(str(tmp_path), grid=4)
    assert (base.mean, base.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    file.write_text(json.dumps(config | {"do_normalize": False}))
    assert load_base(str(tmp_path), grid=4).std == (1.0, 1.0, 1.0)
    for wrong in ({"rescale_factor": 1.0}, {"image_std": [0.4, 0, 0.6]}, {"image_mean": [0.1]}, {"do_rescale": False}):
        file.write_text(json.dumps(config | wrong))
        with pytest.raises(WeightsError, match=r"preprocessor_config\.json"):
            load_base(str(tmp_path), grid=4)


# CLIP's own names and torchvision's


def official_clip(model: VisionTransformer) -> dict[str, Tensor]:
    names = (("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"), ("norm_pre", "ln_pre"),
             ("norm1", "ln_1"), ("norm2", "ln_2"), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj"),
             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("cls_token", "class_embedding"))  # fmt: skip
    official = {}
    for name, value in model.state_dict().items():
        new = f"ln_post.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
        for ours, theirs in names:
            new = new.replace(ours, theirs)
        new = new.replace("blocks.", "transformer.resblocks.")
        value = value[0, 0] if name == "cls_token" else value[0] if name == "pos_embed" else value
        official[f"visual.{new}"] = value
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "token_embedding.weight": torch.ones(4, 4)}
    return official | text | {"visual.proj": torch.ones(48, 8), "logit_scale": torch.ones(())}


def test_clips_own_names_are_timms(tmp_path: Path) -> None:
    model = vit(pre_norm=True)
    weights = read_weights(saved(tmp_path / "clip.pt", official_clip(model)))
    assert sha256_of_state(weights.state) == sha256_of_state(model.state_dict())
    assert weights.release == "clip"
    assert {"visual.proj", "proj", "logit_scale"} & set(weights.dropped)


def test_torchvisions_names_are_timms(tmp_path: Path) -> None:
    model = vit()
    names = {"patch_embed.proj": "conv_proj", "cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
    theirs = {}
    for name, value in model.state_dict().items():
        new = f"encoder.ln.{name[5:]}" if name.startswith("norm.") else name
        new = new.replace("blocks.", "encoder.layers.encoder_layer_").replace(".norm", ".ln_")
        new = new.replace("attn.qkv.", "self_attention.in_proj_").replace("attn.proj", "self_attention.out_proj")
        new = new.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3")
        for ours, other in names.items():
            new = new.replace(ours, other)
        theirs[new] = value
    theirs["heads.head.weight"] = torch.ones(3, 48)
    assert digest(saved(tmp_path / "tv.pth", theirs)) == sha256_of_state(model.state_dict())


# A network in three layouts is one network


def test_one_network_has_one_hash_in_timms_names_dinov2s_and_transformers(tmp_path: Path) -> None:
    model = randomized(KINDS["dinov2 registers"]())
    model.save_pretrained(tmp_path / "hf")
    weights = read_weights(tmp_path / "hf" / "model.safetensors")
    shape = SHAPE | {"init_values": 1e-5, "reg_tokens": 3, "no_embed_class": True}
    timms = vit(**shape)
    load_strict(timms, weights.state, what="transformers")
    save_file(timms.state_dict(), tmp_path / "timm.safetensors")
    state = dict(timms.state_dict())
    official = state | {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 48)}
    del official["reg_token"]
    official["pos_embed"] = torch.cat([torch.zeros(1, 1, 48), state["pos_embed"]], dim=1)
    hashes = {digest(tmp_path / "hf" / "model.safetensors"), digest(tmp_path / "timm.safetensors")}
    assert hashes == {digest(saved(tmp_path / "official.pth", official))}


def test_a_packed_swiglu_and_an_eva_pass_through_wrappers(tmp_path: Path) -> None:
    packed = vit(mlp_layer=SwiGLUPacked, init_values=1e-5).state_dict()
    official = {
        name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for name, value in packed.items()
    }
    path = saved(tmp_path / "swiglu.pth", {"teacher": prefixed(official, "backbone.")})
    assert digest(path) == sha256_of_state(packed)
    eva = randomized(Eva(**SHAPE, num_classes=0, use_rot_pos_emb=True, init_values=1e-5)).state_dict()
    assert digest(saved(tmp_path / "eva.pth", {"module": prefixed(eva, "visual.trunk.")})) == sha256_of_state(eva)


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    model = randomized(KINDS["vit"]()).half()
    model.save_pretrained(tmp_path)
    assert {value.dtype for value in read_weights(tmp_path / "model.safetensors").state.values()} == {torch.float16}
    assert np.isfinite(load_base(str(tmp_path), grid=4)(torch.zeros(1, 3, 32, 32)).features.numpy()).all()
