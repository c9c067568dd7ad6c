"""A model's arguments from a file or a command line: what names and values reach timm, and which never do."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

from tec_cache.errors import ConfigError
from tec_cache.model_args import MODEL_ARGS, check_model_args
from tec_cache.student.model import create_encoder


def test_what_a_model_is_made_of_passes_and_timm_takes_it() -> None:
    args = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "qkv_bias": False,
            "img_size": [32, 32], "init_values": 1e-5, "reg_tokens": 4, "qk_norm": True, "act_layer": "quick_gelu",
            "fc_norm": None, "global_pool": "token", "num_classes": 0}  # fmt: skip
    checked = check_model_args(args, "here")
    assert checked == args | {"img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", **checked)
    assert (len(model.blocks), model.embed_dim, model.num_prefix_tokens) == (2, 48, 5)
    assert type(model.blocks[0].mlp.act).__name__ == "QuickGELU"


def test_every_allowed_argument_is_one_of_timms_vision_transformer() -> None:
    known = inspect.signature(timm.models.vision_transformer.VisionTransformer.__init__).parameters
    assert set(MODEL_ARGS) <= set(known)


@pytest.mark.parametrize(
    "name",
    ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "block_fn",
     "embed_layer", "mlp_layer", "attn_layer", "weight_init", "features_only", "pruned", "scriptable", "device",
     "dtype", "pretrained_model_args", "custom_load", "use_naflex", "model_name", "__class__", "", "Depth"],
)  # fmt: skip
def test_any_other_name_is_refused_and_the_allowed_ones_are_listed(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_model_args({"depth": 2, name: "evil.pth"}, "run.json")
    assert repr(name) in error.value.what
    assert error.value.where == "run.json"
    assert "patch_size, in_chans" in error.value.todo


@pytest.mark.parametrize(
    ("name", "value"),
    [("depth", 0), ("depth", -1), ("depth", 10**9), ("depth", 2.0), ("depth", True), ("depth", "2"), ("depth", None),
     ("depth", [2]), ("embed_dim", 2**63), ("patch_size", 0), ("patch_size", [8, 16]), ("patch_size", [8]),
     ("patch_size", []), ("img_size", [[32, 32], 32]), ("img_size", {}), ("mlp_ratio", float("nan")),
     ("mlp_ratio", float("inf")), ("mlp_ratio", 10**400), ("mlp_ratio", 0), ("mlp_ratio", "4"), ("qkv_bias", 1),
     ("qkv_bias", "yes"), ("qkv_bias", None), ("init_values", -1), ("act_layer", "os.system"), ("act_layer", []),
     ("norm_layer", None), ("global_pool", "x"), ("in_chans", 1), ("drop_rate", 1.5), ("reg_tokens", 10**6)],
)  # fmt: skip
def test_a_value_that_cannot_be_meant_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        check_model_args({name: value}, "config.json")
    assert error.value.what.startswith(f"{name} = ")
    assert error.value.where == "config.json"
    assert len(error.value.what) < 250


@pytest.mark.parametrize("args", [None, [], "depth=3", 3, [["depth", 3]]])
def test_what_is_no_table_is_refused(args: Any) -> None:
    with pytest.raises(ConfigError, match="not a table"):
        check_model_args(args, "config.json")


@pytest.mark.parametrize(
    "args",
    [{"embed_dim": 8192, "depth": 256}, {"embed_dim": 8192, "depth": 16, "mlp_ratio": 16},
     {"img_size": 4096, "patch_size": 8}],
)  # fmt: skip
def test_a_model_that_no_machine_holds_is_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="makes"):
        check_model_args(args, "config.json")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(MODEL_ARGS)) | st.text(max_size=12), values, max_size=4))
def test_anything_at_all_is_either_taken_as_it_is_or_a_config_error(args: dict[str, Any]) -> None:
    try:
        checked = check_model_args(args, "here")
    except ConfigError:
        return
    assert set(checked) == set(args) <= set(MODEL_ARGS)
    assert all(type(value) in (int, float, bool, str, type(None)) for value in checked.values())


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg", "features_only"])
def test_a_student_is_never_created_from_them(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        create_encoder("vit_tiny_patch16_224", 4, {name: "evil.pth"})
