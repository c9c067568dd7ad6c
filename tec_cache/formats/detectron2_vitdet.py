"""detectron2's ViT as ViTDet uses it: windowed attention in most blocks, no class token, no final norm.

Relative positions are new in a detector and start at zero; the configuration asks for them, the checkpoint has none.
"""

from __future__ import annotations

from tec_cache.formats.checkpoint_file import checkpoint_bytes
from tec_cache.formats.format import Converted, Format, activation, adapters_left_out, plain, renamed
from tec_cache.formats.model import Model

_NAME = "detectron2"
_PREFIX = "backbone.net."
_KEPT = r"((?:patch_embed\.proj|blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12]))\..*)"
_NO_TOKEN = "ViTDet has patch tokens only"
_LEFT_OUT = {
    r"norm\..*": "ViTDet takes the last block's output as it is",
    r"fc_norm\..*": "a classifier's",
    r"head\..*": "a classifier's",
}
_WINDOW = 14
_PATCHES = 64
"""Patches per side of the images that a detector is trained on: 1,024 pixels in patches of 16."""
_USAGE = """from detectron2.config import LazyConfig
config = LazyConfig.load("FOLDER/config.py")  # .model, .train, .optimizer, .lr_multiplier; give it a .dataloader"""


def convert(model: Model) -> Converted:
    """Put timm's names below `backbone.net.`; drop what a detector has no use for, by name."""
    given = plain(model)
    activation(model, _NAME, {"gelu": "GELU"})
    state, left_out = renamed(given.state, ((_KEPT, rf"{_PREFIX}\1"),), _LEFT_OUT, model, _NAME)
    state[f"{_PREFIX}pos_embed"] = given.positions.contiguous()
    tokens = {"cls_token": given.class_token, "reg_token": given.registers}
    left_out |= {name: _NO_TOKEN for name, value in tokens.items() if value is not None}
    return Converted(
        files={"model.pth": checkpoint_bytes({"model": state}), "config.py": _config(model).encode()},
        left_out=left_out | adapters_left_out(model),
        changed=tuple(given.changed),
        usage=_USAGE,
    )


def global_blocks(depth: int) -> list[int]:
    """Return the blocks that see the whole image: the last of each quarter."""
    return sorted({(quarter + 1) * depth // 4 - 1 for quarter in range(4)} - {-1})


def _config(model: Model) -> str:
    """Return a LazyConfig of Mask R-CNN on this encoder, on top of detectron2's own of ViTDet."""
    size, everywhere = model.patch * _PATCHES, global_blocks(model.depth)
    windowed = [block for block in range(model.depth) if block not in everywhere]
    power = model.patch >= 4 and model.patch & (model.patch - 1) == 0
    remark = "" if power else (
        f"# SimpleFeaturePyramid wants strides that are powers of two, which patches of {model.patch} do not give:\n"
        "# take model.backbone.net alone, or export a model with another patch size.\n"
    )  # fmt: skip
    return f'''"""Mask R-CNN with a simple feature pyramid on an encoder from tec-cache: weights in model.pth."""

from functools import partial
from pathlib import Path

from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler

{remark}model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.pixel_mean = {[round(255 * value, 4) for value in model.mean]!r}
model.pixel_std = {[round(255 * value, 4) for value in model.std]!r}
model.input_format = "RGB"
model.backbone.square_pad = {size}
net = model.backbone.net
net.img_size = {size}
net.patch_size = {model.patch}
net.embed_dim = {model.width}
net.depth = {model.depth}
net.num_heads = {model.heads}
net.mlp_ratio = {model.hidden / model.width!r}
net.qkv_bias = {model.qkv_bias!r}
net.norm_layer = partial(nn.LayerNorm, eps={model.eps!r})
net.drop_path_rate = 0.1
net.window_size = {_WINDOW}
net.window_block_indexes = {windowed!r}  # {everywhere!r} see the whole image
net.use_rel_pos = True
net.pretrain_img_size = {model.size}
net.pretrain_use_cls_token = True  # the first row of pos_embed, which is passed over

# ViTDet's own schedule of 100 epochs: 184,375 steps of 64 images
train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.init_checkpoint = str(Path(__file__).with_name("model.pth"))
train.max_iter = 184375
optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers={model.depth}, lr_decay_rate=0.7)
optimizer.params.overrides = {{"pos_embed": {{"weight_decay": 0.0}}}}
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=train.max_iter
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)
'''


FORMAT = Format(_NAME, "a checkpoint and a LazyConfig of detectron2's ViTDet", convert)
