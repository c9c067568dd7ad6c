"""Base models: what each kind gives is what enters timm's own softmax; what cannot be right is refused."""

from __future__ import annotations

import copy
import json
import re
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import RmsNorm, resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tec_cache.base import load as load_module
from tec_cache.base.load import find_source, load_base, native_grid, random_model
from tec_cache.base.model import FrozenBase, check_supported
from tec_cache.device import Compute
from tec_cache.errors import ConfigError, WeightsError
from tec_cache.recipes import BASES, IMAGENET_MEAN, IMAGENET_STD
from tec_cache.types import Targets
from tec_cache.weights.files import sha256_of_state

GRID, WIDTH, HEADS, DEPTH = 4, 48, 3, 3
L = GRID * GRID

Make = Callable[[], nn.Module]


def kind(model_class: Callable[..., nn.Module], patch: int = 8, **changes: Any) -> Make:
    settings = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
    return partial(model_class, img_size=GRID * patch, patch_size=patch, **(settings | changes))


vit = partial(kind, VisionTransformer)
relpos = partial(kind, VisionTransformerRelPos)
beit = partial(kind, Beit)
# rotary embedding needs a head width that 4 divides: 48 / 3 = 16
eva = partial(kind, Eva)
rope: dict[str, Any] = {"use_rot_pos_emb": True}
dinov3 = rope | {"rope_type": "dinov3", "use_abs_pos_emb": False, "num_reg_tokens": 4, "no_embed_class": True}
dinov3 |= {"qkv_bias": False, "init_values": 1e-5, "rope_rotate_half": True, "global_pool": "token"}
without_class: dict[str, Any] = {"class_token": False, "global_pool": "avg"}

# name -> (how a small one is made, prefix tokens, class token)
KINDS: dict[str, tuple[Make, int, bool]] = {
    "patch 8": (vit(8), 1, True),
    "patch 14": (vit(14), 1, True),
    "patch 16": (vit(16), 1, True),
    "patch 32": (vit(32), 1, True),
    "layer scale": (vit(init_values=1e-5), 1, True),
    "query and key norm": (vit(qk_norm=True), 1, True),
    "pre norm, no class position": (vit(pre_norm=True, no_embed_class=True), 1, True),
    "post norm": (vit(block_fn=ResPostBlock, init_values=1.0), 1, True),
    "registers": (vit(reg_tokens=4), 5, True),
    "registers, no class position": (vit(reg_tokens=4, no_embed_class=True), 5, True),
    "dynamic image size": (vit(dynamic_img_size=True), 1, True),
    "distilled": (kind(VisionTransformerDistilled), 2, True),
    "no class token": (vit(**without_class), 0, False),
    "no class token, registers": (vit(reg_tokens=2, no_embed_class=True, **without_class), 2, False),
    "relative position, class token": (
        relpos(class_token=True, global_pool="token", rel_pos_type="bias"),
        1,
        True,
    ),
    "relative position": (relpos(rel_pos_type="bias"), 0, False),
    "relative position mlp, class token": (relpos(class_token=True, rel_pos_dim=16, qk_norm=True), 1, True),
    "relative position mlp, shared": (relpos(rel_pos_dim=16, shared_rel_pos=True), 0, False),
    "beit": (beit(use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1), 1, True),
    "beit, shared bias": (beit(use_shared_rel_pos_bias=True), 1, True),
    "beit, both biases": (beit(use_shared_rel_pos_bias=True, use_rel_pos_bias=True), 1, True),
    "eva": (eva(), 1, True),
    "eva02": (eva(swiglu_mlp=True, scale_mlp=True, qkv_fused=False, **rope), 1, True),
    "eva02, inner norm": (eva(swiglu_mlp=True, scale_attn_inner=True, **rope), 1, True),
    "eva, post norm": (eva(use_post_norm=True), 1, True),
    "dinov3": (eva(16, **dinov3), 5, True),
    "dinov3, swiglu": (eva(16, swiglu_mlp=True, swiglu_align_to=8, **dinov3), 5, True),
    "eva, mixed rope": (eva(attn_type="rope", rope_type="mixed", no_embed_class=True, **rope), 1, True),
    "eva, no class token": (eva(class_token=False, **rope), 0, False),
    "eva, grouped queries": (
        eva(attn_type="rope", qkv_fused=False, num_kv_heads=1, qk_norm=True, norm_layer=RmsNorm, **rope),
        1,
        True,
    ),
}


def randomized(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Move every parameter off its first value: zero biases and unit norms would hide a mistake."""
    torch.manual_seed(seed)
    model, generator = make(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
            else:
                value.copy_(0.15 * torch.randn(value.shape, generator=generator))
    return model.eval()


def built(name: str) -> nn.Module:
    return randomized(KINDS[name][0])


def frozen(model: nn.Module, **options: Any) -> FrozenBase:
    settings: dict[str, Any] = {"name": "b", "identity": {}, "mean": (0, 0, 0), "std": (1, 1, 1), "k": 3}
    return FrozenBase(model, **(settings | options))


def images_for(model: Any, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))


def timm_says(model: Any, images: Tensor, last_layers: int, patch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Features, and the whole matrix that enters the last softmax, from timm without its fused kernel.

    In float64, from a copy. Returns (B, L, C) and (B, H, N, N).
    """
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if isinstance(getattr(module, "freqs", None), nn.Parameter):
            module.float()  # timm before 1.0.31 multiplies learned frequencies by float32 numbers
    entered: list[Tensor] = []
    softmax = Tensor.softmax

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        entered.append(self)
        return softmax(self, *args, **kwargs)

    with torch.no_grad(), patch.context() as patched:
        patched.setattr(Tensor, "softmax", watched)
        outputs = model.forward_intermediates(
            images.double(), indices=last_layers, norm=False, output_fmt="NLC", intermediates_only=True
        )
    assert len(entered) == len(model.blocks)
    return sum(outputs) / last_layers, entered[-1]


def picked(full: Tensor, rows: Tensor, prefix: int, class_token: bool) -> Tensor:
    """Take the first row and the rows of the numbered patches out of the whole matrix, patch keys only."""
    first = full[:, :, :1] if class_token else full[:, :, prefix:].mean(dim=2, keepdim=True)
    chosen = torch.stack([full[b][:, rows[b] + prefix] for b in range(len(full))])
    return torch.cat([first, chosen], dim=2)[..., prefix:]


def attention_of(targets: Targets) -> tuple[Tensor, Tensor]:
    assert targets.attention is not None
    assert targets.rows is not None
    return targets.attention, targets.rows


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_what_enters_timms_own_softmax(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, prefix, class_token = KINDS[name]
    model = built(name)
    images = images_for(model)
    features, full = timm_says(model, images, 2, monkeypatch)
    assert full.shape == (2, HEADS, prefix + L, prefix + L)
    logits = full[:, :, :1] if class_token else full[:, :, prefix:].mean(dim=2, keepdim=True)
    scores = logits[..., prefix:].mean(dim=1)[:, 0]
    for k in (0, 3, "all", None):
        base = frozen(copy.deepcopy(model), k=k)
        assert (base.num_prefix, base.has_class_token) == (prefix, class_token)
        targets = base(images)
        torch.testing.assert_close(targets.features, features.float(), rtol=0, atol=1e-4)
        assert base.spec("patch").num_rows == (0 if targets.attention is None else targets.attention.shape[2])
        if k is None:
            assert targets.attention is None
            assert targets.rows is None
            continue
        attention, rows = attention_of(targets)
        expected_rows = torch.arange(L).expand(2, -1) if k == "all" else scores.topk(k, dim=1).indices
        assert torch.equal(rows, expected_rows)
        assert attention.dtype == torch.float32
        expected = picked(full, rows, prefix, class_token).float()
        assert expected.std() > 0.1  # else anything near zero would do
        torch.testing.assert_close(attention, expected, rtol=0, atol=1e-4)


def test_row_zero_without_a_class_token_is_the_logits_of_the_mean_query(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = built("no class token")
    images = images_for(model)
    seen: list[Tensor] = []
    model.blocks[-1].attn.qkv.register_forward_hook(lambda _m, _i, out: seen.append(out))
    attention, _ = attention_of(frozen(model)(images))
    query, key, _ = seen[0].reshape(2, L, 3, HEADS, WIDTH // HEADS).unbind(2)
    expected = torch.einsum("bhd,blhd->bhl", query.mean(dim=1), key) / (WIDTH // HEADS) ** 0.5
    torch.testing.assert_close(attention[:, :, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("last_layers", [1, 2, DEPTH])
def test_features_are_the_mean_of_the_last_blocks(last_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("registers")
    images = images_for(model)
    features, full = timm_says(model, images, last_layers, monkeypatch)
    targets = frozen(model, last_layers=last_layers)(images)
    torch.testing.assert_close(targets.features, features.float(), rtol=0, atol=1e-4)
    # the attention is the last block's, however many blocks the features are of
    attention, rows = attention_of(targets)
    torch.testing.assert_close(attention, picked(full, rows, 5, True).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("last_layers", [0, -1, DEPTH + 1])
def test_blocks_that_are_not_there_are_refused(last_layers: int) -> None:
    with pytest.raises(ConfigError, match=rf"last {last_layers} blocks.*\n.*from 1 to {DEPTH}"):
        frozen(built("patch 8"), last_layers=last_layers)


def test_more_rows_than_patches_are_refused() -> None:
    model = built("patch 8")
    assert frozen(model, k=L)(images_for(model)).rows.shape == (2, L)
    with pytest.raises(ConfigError, match=f"{L + 1} attention rows from {L} patches"):
        frozen(model, k=L + 1)


def test_rows_are_those_of_its_own_logits_and_a_smaller_k_is_a_prefix() -> None:
    model = built("patch 8")
    images = images_for(model, batch=8)
    attention, rows = attention_of(frozen(model, k=9)(images))
    own = attention[:, :, 0].mean(dim=1).topk(9, dim=1, sorted=True).indices
    assert torch.equal(rows, own)
    fewer, fewer_rows = attention_of(frozen(model, k=4)(images))
    assert torch.equal(fewer_rows, rows[:, :4])
    torch.testing.assert_close(fewer, attention[:, :, :5], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["patch 8", "query and key norm", "beit", "dinov3", "no class token"])
def test_bfloat16_stays_near_float32(name: str) -> None:
    model = built(name)
    images = images_for(model, batch=4)
    base = frozen(model, k="all")
    exact = base(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = base(images)
        _, rows = attention_of(frozen(model, k=5)(images))
    attention, _ = attention_of(rough)
    assert exact.attention is not None
    assert rough.features.dtype == attention.dtype == torch.float32
    for near, true in ((rough.features, exact.features), (attention, exact.attention)):
        assert 0 < (near - true).std() < 0.03 * true.std()
    # the last product is float32: rounded to bfloat16 its scores would tie, and ties decide rows
    assert not torch.equal(attention, attention.bfloat16().float())
    assert torch.equal(rows, attention[:, :, 0].mean(dim=1).topk(5, dim=1).indices)


class WeightCasts(TorchDispatchMode):
    """Counts casts of a model's own matrices and kernels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places = {p.data_ptr() for p in model.parameters() if p.ndim in (2, 4)}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].data_ptr() in self.places
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_cast_once_and_every_bit_stays(name: str) -> None:
    """Autocast alone casts each of them again in every forward."""
    compute = Compute(torch.device("cpu"), "bfloat16")
    plain, prepared = frozen(built(name)), frozen(built(name)).prepare(compute)
    images = images_for(plain.model, 3)
    with compute.autocast(), WeightCasts(plain.model) as before:
        expected = plain(images)
    with WeightCasts(prepared.model) as after:
        found = prepared(images)
    for one, other in zip(attention_of(expected), attention_of(found), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(expected.features, found.features)
    assert before.count >= 4 * DEPTH
    assert after.count == 0
    kept = [m for m in prepared.modules() if isinstance(m, nn.LayerNorm | RmsNorm)]
    assert kept
    assert all(p.dtype == torch.float32 for m in kept for p in m.parameters())


def test_base_is_frozen_and_stays_in_evaluation_mode() -> None:
    model = randomized(vit(proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5))
    images = images_for(model).requires_grad_()
    base = frozen(model.train())
    before = base(images)
    around = nn.ModuleList([base]).train()
    assert around.training
    assert not any(module.training for module in base.modules())
    after = base(images)
    assert torch.equal(after.features, before.features)
    assert torch.equal(attention_of(after)[0], attention_of(before)[0])
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not after.features.requires_grad
    assert not attention_of(after)[0].requires_grad


def test_nothing_stays_hooked_even_after_an_error() -> None:
    model: Any = built("patch 8")
    images = images_for(model)
    base = frozen(model)
    before = base(images)
    with pytest.raises(RuntimeError):
        base(images[:, :1])
    for block in model.blocks:
        assert not block._forward_hooks
        assert "forward" not in vars(block.attn)
    assert torch.equal(base(images).features, before.features)
    assert base.num_calls == 3


def test_fused_attention_switched_off_by_the_environment_is_switched_on() -> None:
    model: Any = built("patch 8")
    images = images_for(model)
    expected, _ = attention_of(frozen(copy.deepcopy(model))(images))
    for block in model.blocks:
        block.attn.fused_attn = False
    made, _ = attention_of(frozen(model)(images))
    assert torch.equal(made, expected)


def test_images_of_another_size_are_refused() -> None:
    base = frozen(built("dynamic image size"))
    with pytest.raises(ConfigError, match="takes 32 pixels"):
        base(torch.zeros(1, 3, 40, 40))


def test_spec_says_what_the_targets_are() -> None:
    model = built("registers")
    spec = frozen(model, k=3).spec("patch")
    assert spec.to_json() == {
        "grid": GRID,
        "channels": WIDTH,
        "num_heads": HEADS,
        "k": 3,
        "normalization": "patch",
        "columns": None,
    }
    assert frozen(model, k=None).spec("none").num_heads == 0


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), "SwinTransformer"),
    "resnet": (lambda: timm.create_model("test_resnet"), "ResNet"),
    "naflex": (lambda: timm.create_model("naflexvit_base_patch16_gap", depth=1), "NaFlexVit"),
    "hybrid": (lambda: timm.create_model("vit_tiny_r_s16_p8_224", depth=1), "HybridEmbed"),
    "parallel scaling": (vit(block_fn=ParallelScalingBlock), "ParallelScalingBlock"),
    "parallel things": (vit(block_fn=ParallelThingsBlock), "ParallelThingsBlock"),
    "non-square grid": (
        lambda: VisionTransformer((32, 48), 8, embed_dim=WIDTH, depth=1, num_heads=HEADS),
        "4 x 6 patches",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    make, named = REFUSED[name]
    model = make()
    with pytest.raises(ConfigError, match=named):
        check_supported(model)
    with pytest.raises(ConfigError, match=named):
        frozen(model)


def test_attention_that_is_not_one_product_is_refused_but_its_features_are_not() -> None:
    model = randomized(kind(VisionTransformer, attn_layer="diff", embed_dim=48, num_heads=3))
    images = images_for(model)
    with pytest.raises(ConfigError, match=r"2 attention calls.*\n.*\n?.*--k none"):
        frozen(model)(images)
    assert frozen(model, k=None)(images).features.shape == (2, L, WIDTH)


# Loading. timm's own test models are small enough to be saved and read: test_vit has a 10 x 10 grid of 16.


def tiny(name: str = "test_vit", seed: int = 0, **args: Any) -> Any:
    return randomized(partial(timm.create_model, name, num_classes=0, **args), seed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "base.pth"
    torch.save({"model": tiny().state_dict()}, path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, nothing cached, and whoever tries to connect fails at once instead of hanging."""

    def refuse(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_timm_name_with_a_weight_file_loads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base("timm:test_vit", file, grid=10, k=4)
    model = tiny()
    images = images_for(model)
    features, full = timm_says(model, images, 2, monkeypatch)
    targets = base(images)
    torch.testing.assert_close(targets.features, features.float(), rtol=0, atol=1e-4)
    attention, rows = attention_of(targets)
    torch.testing.assert_close(attention, picked(full, rows, 1, True).float(), rtol=0, atol=1e-4)
    config = timm.models.get_pretrained_cfg("test_vit")
    assert config is not None
    assert (base.mean, base.std) == (config.mean, config.std)
    assert base.identity == {
        "architecture": "test_vit",
        "model_args": {},
        "weights_sha256": sha256_of_state(model.state_dict()),
        "mean": list(config.mean),
        "std": list(config.std),
    }


def test_position_embedding_is_resampled_and_the_identity_is_not_changed_by_it(file: Path) -> None:
    small, native = load_base("timm:test_vit", file, grid=4), load_base("timm:test_vit", file, grid=10)
    assert (small.input_size, native.input_size) == (64, 160)
    given = tiny().pos_embed
    expected = resample_abs_pos_embed(given, new_size=[4, 4], old_size=[10, 10])
    made: Any = small.model.pos_embed
    torch.testing.assert_close(made, expected)
    assert torch.equal(native.model.pos_embed, given)  # type: ignore[arg-type]
    assert small.identity == native.identity
    assert small(torch.zeros(1, 3, 64, 64)).features.shape == (1, 16, 64)


def test_the_same_weights_have_one_identity_in_every_file(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "base.safetensors"
    save_file(tiny().state_dict(), other)
    changed = tmp_path / "changed.pth"
    torch.save(tiny(seed=1).state_dict(), changed)
    digest = load_base("timm:test_vit", file).identity["weights_sha256"]
    assert load_base("timm:test_vit", other).identity["weights_sha256"] == digest
    assert load_base("timm:test_vit", changed).identity["weights_sha256"] != digest


def test_rows_of_a_base_are_the_recipes_unless_said_otherwise(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_base("timm:test_vit", file).k == 15
    assert load_base("timm:test_vit", file, k=None).k is None
    assert load_base("timm:test_vit", file, k="all", last_layers=3).last_layers == 3
    recipe = load_module.BASES["ibot"]
    monkeypatch.setitem(
        BASES, "ibot", type(recipe)(timm_name="test_vit", hub=False, official_file="", release="ibot", k=9)
    )
    base = load_base("ibot", file)
    assert (base.k, base.name, base.mean, base.std) == (9, "ibot", IMAGENET_MEAN, IMAGENET_STD)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    for other in (tiny("test_vit3"), tiny(patch_size=8), tiny(depth=5), tiny(depth=7), tiny(reg_tokens=2)):
        torch.save(other.state_dict(), path)
        with pytest.raises(WeightsError, match=r"do not fit VisionTransformer|102 do not form a grid"):
            load_base("timm:test_vit", path, grid=10)


def test_weights_with_a_tensor_missing_are_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    path = tmp_path / "missing.pth"
    for name in ("blocks.3.attn.proj.bias", "norm.weight", "cls_token"):
        torch.save({key: value for key, value in state.items() if key != name}, path)
        with pytest.raises(WeightsError, match=f"missing: 1: {re.escape(name)}\n"):
            load_base("timm:test_vit", path)


def test_relative_positions_load_on_their_own_grid(tmp_path: Path) -> None:
    args = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    model = tiny("beit_base_patch16_224", **args)
    folder = exported(tmp_path / "beit", {"architecture": "beit_base_patch16_224", "model_args": args}, model)
    base = load_base(str(folder), grid=14, k=3)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = attention_of(frozen(model, k=3)(images))
    made = attention_of(base(images))
    assert torch.equal(made[0], expected[0])
    assert torch.equal(made[1], expected[1])
    with pytest.raises(WeightsError, match="relative_position_bias_table"):
        load_base(str(folder), grid=7)


def exported(folder: Path, config: dict[str, Any], model: nn.Module | None) -> Path:
    folder.mkdir()
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64]}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": cfg} | config))
    if model is not None:
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


SHAPE = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8}


def export_folder(tmp_path: Path, model: Any) -> Path:
    args = SHAPE | {"img_size": 32, "num_classes": 0}
    return exported(tmp_path / "out", {"architecture": "vit_tiny_patch16_224", "model_args": args}, model)


def test_an_export_is_a_base(tmp_path: Path) -> None:
    model = tiny("vit_tiny_patch16_224", img_size=32, **SHAPE)
    folder = export_folder(tmp_path, model)
    assert native_grid(str(folder)) == 4
    base = load_base(str(folder), grid=4, k=3)
    images = images_for(model)
    expected = frozen(model, k=3)(images)
    assert torch.equal(base(images).features, expected.features)
    assert torch.equal(attention_of(base(images))[0], attention_of(expected)[0])
    assert (base.mean, base.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert base.identity["model_args"] == SHAPE  # the size of the input is no part of a base's identity
    assert load_base(str(folder), grid=6).input_size == 48


def test_an_export_takes_other_weights_of_its_shape(tmp_path: Path) -> None:
    folder = export_folder(tmp_path, tiny("vit_tiny_patch16_224", img_size=32, **SHAPE))
    other = tiny("vit_tiny_patch16_224", seed=1, img_size=32, **SHAPE)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    base = load_base(str(folder), tmp_path / "other.pth", grid=4)
    assert base.identity["weights_sha256"] == sha256_of_state(other.state_dict())


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_base(str(tmp_path))
    (tmp_path / "config.json").write_text('{"num_classes": 3}')
    with pytest.raises(WeightsError, match="neither an architecture of timm nor a model_type"):
        load_base(str(tmp_path))


def test_an_export_without_its_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no such weight file(.|\n)*model\.safetensors"):
        load_base(str(export_folder(tmp_path, None)), grid=4)


def bare(width: int, edge: int, *names: str, cls_token: bool = True) -> dict[str, Tensor]:
    """The few tensors of a weight file that tell its architecture."""
    state = {
        "patch_embed.proj.weight": torch.zeros(width, 3, edge, edge),
        "blocks.0.norm1.weight": torch.ones(width),
        **{name: torch.ones(1, 4, width) for name in names},
    }
    return state | ({"cls_token": torch.zeros(1, 1, width)} if cls_token else {})


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (bare(192, 16), "vit_tiny_patch16_224"),
        (bare(384, 8), "vit_small_patch8_224"),
        (bare(768, 16), "vit_base_patch16_224"),
        (bare(768, 32), "vit_base_patch32_224"),
        (bare(1024, 16), "vit_large_patch16_224"),
        (bare(1280, 14), "vit_huge_patch14_224"),
        (bare(768, 14, "blocks.0.ls1.gamma"), "vit_base_patch14_dinov2"),
        (bare(1024, 14, "blocks.0.ls1.gamma", "reg_token"), "vit_large_patch14_reg4_dinov2"),
        (bare(100, 16), None),
        (bare(768, 11), None),
        (bare(768, 16, cls_token=False), None),
        ({"blocks.0.norm1.weight": torch.ones(768)}, None),
        # MoCo v3's small model has 12 heads, which no shape in the file tells: see test_releases
        ({f"module.base_encoder.{name}": value for name, value in bare(384, 16).items()}, "vit_small_patch16_224"),
        ({f"module.base_encoder.{name}": value for name, value in bare(768, 16).items()}, "vit_base_patch16_224"),
    ],
)
def test_the_architecture_of_a_bare_file_is_inferred_or_refused(
    state: dict[str, Tensor], expected: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "bare.pth"
    torch.save(state, path)
    if expected is None:
        with pytest.raises(WeightsError, match=r"--base timm:NAME --base-weights FILE"):
            find_source(str(path), None)
        return
    source = find_source(str(path), None)
    assert (source.timm_name, source.weights) == (expected, path)
    assert (source.mean, source.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert timm.is_model(source.timm_name)


def test_a_bare_file_loads(tmp_path: Path) -> None:
    model = tiny("vit_tiny_patch16_224")
    path = tmp_path / "bare.pth"
    torch.save(model.state_dict(), path)
    base = load_base(str(path), grid=14)
    assert base.identity["weights_sha256"] == sha256_of_state(model.state_dict())
    assert torch.equal(base.model.pos_embed, model.pos_embed)  # type: ignore[arg-type]
    assert base.num_heads == 3
    with pytest.raises(ConfigError, match="takes no --base-weights"):
        load_base(str(path), path)


def test_a_file_whose_width_misleads_is_refused_not_half_loaded(tmp_path: Path) -> None:
    path = tmp_path / "shallow.pth"
    torch.save(tiny("vit_tiny_patch16_224", depth=2).state_dict(), path)
    with pytest.raises(WeightsError, match=r"missing: 120: blocks\.2"):
        load_base(str(path))


@pytest.mark.parametrize("name", [name for name, recipe in BASES.items() if not recipe.hub])
def test_a_base_that_timm_does_not_host_names_its_official_file(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load_base(name)
    assert BASES[name].official_file in caught.value.todo
    assert "--base-weights" in caught.value.todo


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "says"),
    [("dino_small", BASES["dino_small"].official_file), ("timm:test_vit", "the weights of test_vit")],
)
def test_offline_the_error_names_the_file_to_fetch(name: str, says: str) -> None:
    with pytest.raises(WeightsError, match="could not be had from timm's hub") as caught:
        load_base(name)
    assert "AssertionError" not in caught.value.what
    assert says in caught.value.todo
    assert "--base-weights" in caught.value.todo


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_r_s16_p8_224"])
def test_a_class_that_is_refused_is_refused_before_its_weights_are_fetched(name: str) -> None:
    with pytest.raises(ConfigError, match="is not supported"):
        load_base(f"timm:{name}")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("mea", "mae"),
        ("dinov2_bas", "dinov2_base"),
        ("dinov3_bas", "dinov3_base"),
        ("dino_v3_base", "dinov3_base"),
        ("DINOv3-S", "dinov3_small"),
        ("dinov3_vitl16", "dinov3_large"),
        ("dino_smal", "dino_small"),
        ("eva02_bas", "eva02_base"),
        ("timm:vit_base_patch16_244", "vit_base_patch16_224"),
        ("timm:vit_bas_patch14_dinov2", "vit_base_patch14_dinov2"),
        ("timm:vit_bas_patch16_dinov3", "vit_base_patch16_dinov3"),
        ("vit_bas_patch16_dinov3", "timm:vit_base_patch16_dinov3"),
    ],
)
def test_an_unknown_base_names_the_nearest_of_its_generation(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"did you mean [^)]*\b{near}\b") as caught:
        load_base(name)
    (proposed,) = re.findall(r"did you mean ([^?]*)\?", caught.value.what)
    assert {tuple(re.findall(r"v\d", word)) for word in proposed.split(", ")} == {tuple(re.findall(r"v\d", near))}


@pytest.mark.parametrize("name", ["dinov4_base", "siglip_base", "moco", "dinov1_small"])
def test_no_other_generation_stands_in(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown base") as caught:
        load_base(name)
    assert "did you mean" not in caught.value.what


def test_a_name_of_timms_is_offered_as_one() -> None:
    for name in ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2", "eva02_base_patch14_224"):
        with pytest.raises(ConfigError, match="a name of timm's") as caught:
            load_base(name)
        assert caught.value.todo == f"--base timm:{name}"


@pytest.mark.parametrize("name", ["dinov3_convnext_tiny", "convnext_tiny_dinov3"])
def test_a_convnext_is_no_base_and_is_told_why(name: str) -> None:
    with pytest.raises(ConfigError, match=r"ConvNeXt cannot be a base.*no tokens and no attention"):
        load_base(name)


def test_an_unknown_timm_tag_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"knows no model 'vit_base_patch16_224\.nope'"):
        load_base("timm:vit_base_patch16_224.nope")


@pytest.mark.parametrize("name", BASES)
def test_every_known_base_exists_in_timm(name: str) -> None:
    recipe = BASES[name]
    architecture, _, tag = recipe.timm_name.partition(".")
    assert timm.is_model(architecture)
    if recipe.hub:
        assert tag in {n.partition(".")[2] for n in timm.list_pretrained(architecture)}
        source = find_source(name, None)
        assert len(source.mean) == len(source.std) == 3
    assert recipe.official_file.startswith("https://")
    assert recipe.k >= 0
    assert recipe.tau > 0


def test_a_random_model_is_its_seeds_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = random_model("timm:test_vit", grid=4, seed=1)
    assert torch.equal(torch.rand(3), expected)
    again, other = random_model("timm:test_vit", grid=4, seed=1), random_model("timm:test_vit", grid=4, seed=2)
    pairs = [(first.model.state_dict()[n], again.model.state_dict()[n]) for n in first.model.state_dict()]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.model.pos_embed, other.model.pos_embed)  # type: ignore[arg-type]
    assert first.identity == again.identity != other.identity
    assert first.k is None
    assert first.input_size == 64


def test_native_grid_is_the_architectures() -> None:
    assert native_grid("timm:test_vit") == 10
    with pytest.raises(ConfigError, match="ResNet"):
        native_grid("timm:test_resnet")
