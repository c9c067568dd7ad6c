"""Conversions: equal features in the real libraries, nothing dropped unsaid, nothing half written."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer_sam import VisionTransformerSAM

from pipelines.convert import convert
from pipelines.export import export
from pipelines.train import train
from tec_cache.base.load import load_base
from tec_cache.formats.detectron2_vitdet import global_blocks
from tests.conftest import photo, tiny_training
from tests.small_exports import random_export, timm_model

CLOSE: dict[str, float] = {"rtol": 0, "atol": 2e-5}
KINDS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "patches of 4": {"patch_size": 4, "size": 24},
    "patches of 14": {"patch_size": 14, "size": 42},
    "layer scale": {"init_values": 0.3},
    "no bias of query, key and value": {"qkv_bias": False},
    "no bias of projections": {"proj_bias": False, "init_values": 0.3},
    "no position of the class token": {"no_embed_class": True},
    "no positions": {"pos_embed": "none"},
    "narrow mlp": {"mlp_ratio": 2.0},
}
REGISTERS: dict[str, dict[str, Any]] = {
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "registers with positions": {"reg_tokens": 3, "init_values": 0.3},
}


def images(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens_of(folder: Path, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Some images, and what timm makes of them."""
    model = timm_model(folder, **changes)
    given = images(model.patch_embed.img_size[0])
    with torch.no_grad():
        return given, model.forward_features(given)


@pytest.fixture(scope="module")
def trained(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a run with both adapters."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_training(made_cache, folder / "run", steps=3, adapters="both"))
    return export(folder / "run", folder / "export")


def transformers_model(out: Path, kind: str = "AutoModel", **options: Any) -> Any:
    import transformers

    model, about = getattr(transformers, kind).from_pretrained(out, output_loading_info=True, **options)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    assert not about["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", [*KINDS, *REGISTERS])
def test_transformers_gives_timms_features(kind: str, tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e", **(KINDS | REGISTERS)[kind])
    out = convert(folder, tmp_path / "out", to="transformers").out
    given, wanted = tokens_of(folder)
    options = {} if kind in REGISTERS else {"add_pooling_layer": False}
    model = transformers_model(Path(out), **options)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=given).last_hidden_state, wanted, **CLOSE)


def test_transformers_gives_the_features_of_a_trained_export_with_its_adapter_folded(
    trained: Path, tmp_path: Path
) -> None:
    summary = convert(trained, tmp_path / "out", to="transformers")
    given, wanted = tokens_of(trained)
    with torch.no_grad():
        found = transformers_model(tmp_path / "out", add_pooling_layer=False)(pixel_values=given).last_hidden_state
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert set(summary.left_out) == {"adapters: input_adapter", "adapters: encoder_adapters"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "left out: `adapters: encoder_adapters`" in card


def test_transformers_classifies_as_timm_does(tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e", num_classes=3, names=["ant", "bee", "cow"])
    convert(folder, tmp_path / "out", to="transformers")
    model = transformers_model(tmp_path / "out", "AutoModelForImageClassification")
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=images(32)).logits, timm_model(folder)(images(32)), **CLOSE)
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cow"}


def test_transformers_sees_the_photo_as_timm_does(tmp_path: Path) -> None:
    from timm.data import create_transform, resolve_data_config
    from transformers import AutoImageProcessor

    folder = random_export(tmp_path / "e")
    convert(folder, tmp_path / "out", to="transformers")
    seen: Image.Image = photo(3, 80, 60)
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "out")(seen, return_tensors="pt")["pixel_values"][0]
    ours = create_transform(**resolve_data_config({}, model=timm_model(folder)))(seen)
    assert theirs.shape == ours.shape == (3, 32, 32)
    assert (theirs - ours).abs().mean() < 0.02  # the two resizers round differently


@pytest.mark.parametrize("to", ["transformers", "timm"])
def test_positions_at_another_size_are_timms(to: str, tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e")
    convert(folder, tmp_path / "out", to=to, size=56)
    given, wanted = tokens_of(folder, img_size=56)
    assert given.shape[-1] == 56
    if to == "timm":
        found = tokens_of(tmp_path / "out")[1]
    else:
        with torch.no_grad():
            found = transformers_model(tmp_path / "out", add_pooling_layer=False)(pixel_values=given).last_hidden_state
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_a_converted_model_comes_in_again_as_a_base(tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e", init_values=0.3)
    convert(folder, tmp_path / "out", to="transformers")
    bases = [load_base(str(place), grid=4, k=3) for place in (folder, tmp_path / "out")]
    ours, theirs = (base(images(32)).features for base in bases)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert bases[0].mean == pytest.approx(bases[1].mean)


def sam_body(out: Path, window: int, everywhere: tuple[int, ...], depth: int, width: int, patch: int) -> Any:
    """timm's body of Segment Anything, which is ViTDet's, with a converted checkpoint in it."""
    state = torch.load(out / "model.pth", weights_only=True)["model"]
    state = {name.removeprefix("backbone.net."): value for name, value in state.items()}
    grid = int((state["pos_embed"].shape[1] - 1) ** 0.5)
    # rows of the class token are passed over, as ViTDet does with pretrain_use_cls_token
    state["pos_embed"] = state["pos_embed"][:, 1:].reshape(1, grid, grid, width)
    model = VisionTransformerSAM(
        img_size=grid * patch, patch_size=patch, embed_dim=width, depth=depth, num_heads=3, num_classes=0, neck_chans=0,
        window_size=window, global_attn_indexes=everywhere, use_rel_pos=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / width, qkv_bias="blocks.0.attn.qkv.bias" in state,
    )  # fmt: skip
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("rel_pos" in name or name.startswith("neck.") for name in missing), "new in a detector"
    return model.eval()


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("patches of 4", "patches of 14")])
def test_detectron2s_body_gives_the_blocks_of_the_export_in_windows(kind: str, window: int, tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e", **KINDS[kind])
    convert(folder, tmp_path / "out", to="detectron2")
    everywhere, model, given = (2,), timm_model(folder), images(32)
    body = sam_body(tmp_path / "out", window, everywhere, depth=3, width=48, patch=8)
    with torch.no_grad():
        theirs = body.blocks(body.patch_embed(given) + body.pos_embed)
        ours = model.patch_embed(given)
        if model.pos_embed is not None:
            ours = ours + model.pos_embed[:, -16:]
        for number, block in enumerate(model.blocks):
            if window == 0 or number in everywhere:
                ours = block(ours)
            else:  # four windows of 2 x 2 patches
                cut = ours.reshape(2, 2, 2, 2, 2, 48).transpose(2, 3).reshape(8, 4, 48)
                ours = block(cut).reshape(2, 2, 2, 2, 2, 48).transpose(2, 3).reshape(2, 16, 48)
    torch.testing.assert_close(theirs.reshape(2, 16, 48), ours, **CLOSE)


@pytest.mark.parametrize("kind", ["as it is", "patches of 14"])
def test_detectron2s_configuration_sets_what_the_body_needs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library does not install from the index: its configuration runs on stand-ins of the names it imports."""
    folder = random_export(tmp_path / "e", **KINDS[kind])
    convert(folder, tmp_path / "out", to="detectron2")
    source = (tmp_path / "out" / "config.py").read_text()
    bare = SimpleNamespace
    parts = {
        "common/models/mask_rcnn_vitdet.py": bare(model=bare(backbone=bare(net=bare()))),
        "common/train.py": bare(train=bare(amp=bare())),
        "common/optim.py": bare(AdamW=bare(params=bare())),
    }
    stand_ins: dict[str, dict[str, Any]] = {
        "fvcore": {}, "fvcore.common": {},
        "fvcore.common.param_scheduler": {"MultiStepParamScheduler": dict},
        "detectron2": {"model_zoo": bare(get_config=parts.__getitem__)},
        "detectron2.config": {"LazyCall": lambda kind: kind},
        "detectron2.modeling": {}, "detectron2.modeling.backbone": {},
        "detectron2.modeling.backbone.vit": {"get_vit_lr_decay_rate": lambda name, **more: more},
        "detectron2.solver": {"WarmupParamScheduler": dict},
    }  # fmt: skip
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    names: dict[str, Any] = {"__file__": str(tmp_path / "out" / "config.py")}
    exec(compile(source, "config.py", "exec"), names)
    net = names["model"].backbone.net
    patch = KINDS[kind].get("patch_size", 8)
    assert (net.embed_dim, net.depth, net.num_heads, net.mlp_ratio, net.patch_size) == (48, 3, 3, 4.0, patch)
    assert (net.pretrain_img_size, net.pretrain_use_cls_token) == (KINDS[kind].get("size", 32), True)
    assert net.norm_layer(8).eps == 1e-6
    assert net.img_size == names["model"].backbone.square_pad == 64 * patch
    assert names["model"].pixel_mean == pytest.approx([127.5, 102.0, 76.5])
    assert Path(names["train"].init_checkpoint) == tmp_path / "out" / "model.pth"
    assert names["optimizer"].params.lr_factor_func("blocks.0") == {"num_layers": 3, "lr_decay_rate": 0.7}
    assert ("powers of two" in source) == (patch == 14)


def test_the_last_block_of_each_quarter_sees_the_whole_image() -> None:
    assert global_blocks(12) == [2, 5, 8, 11]
    assert global_blocks(24) == [5, 11, 17, 23]
    assert global_blocks(32) == [7, 15, 23, 31]


def test_detectron2_names_what_a_detector_has_no_place_for(tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e", num_classes=3, reg_tokens=2)
    left_out = convert(folder, tmp_path / "out", to="detectron2").left_out
    assert set(left_out) == {"cls_token", "reg_token", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    kept = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["model"]
    assert {n.removeprefix("backbone.net.") for n in kept} == set(load_file(folder / "model.safetensors")) - set(
        left_out
    )
    for name in left_out:
        assert name.rpartition(".")[0] in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_timms_own_folder_holds_the_model_alone(kind: str, tmp_path: Path) -> None:
    folder = random_export(tmp_path / "e", adapters={"input_adapter.fc1.weight": torch.zeros(2, 2)}, **KINDS[kind])
    summary = convert(folder, tmp_path / "out", to="timm")
    assert "tec_cache" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(summary.left_out) == ["adapters: input_adapter"]
    (_, ours), (_, theirs) = tokens_of(folder), tokens_of(tmp_path / "out")
    assert torch.equal(ours, theirs)


def test_mmpretrains_names_are_the_documented_ones(tmp_path: Path) -> None:
    """Names and shapes of mmpretrain 1.2's VisionTransformer; tests/test_mmpretrain.py asks the library itself."""
    folder = random_export(tmp_path / "e", num_classes=3, global_pool="avg", depth=1)
    convert(folder, tmp_path / "out", to="mmpretrain")
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["state_dict"]
    linear = {"attn.qkv": (144, 48), "attn.proj": (48, 48), "ffn.layers.0.0": (192, 48), "ffn.layers.1": (48, 192)}
    wanted: dict[str, tuple[int, ...]] = {
        "backbone.cls_token": (1, 1, 48), "backbone.pos_embed": (1, 17, 48), "backbone.patch_embed.projection.weight":
        (48, 3, 8, 8), "backbone.patch_embed.projection.bias": (48,), "head.fc.weight": (3, 48), "head.fc.bias": (3,),
    }  # fmt: skip
    for name, shape in linear.items():
        wanted |= {f"backbone.layers.0.{name}.weight": shape, f"backbone.layers.0.{name}.bias": shape[:1]}
    for norm in ("layers.0.ln1", "layers.0.ln2", "ln2"):
        wanted |= {f"backbone.{norm}.{part}": (48,) for part in ("weight", "bias")}
    assert {name: tuple(value.shape) for name, value in state.items()} == wanted
    theirs = load_file(folder / "model.safetensors")
    assert np.array_equal(state["backbone.ln2.weight"], theirs["fc_norm.weight"])
