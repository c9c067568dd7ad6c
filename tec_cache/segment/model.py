"""A segmenter on a pretrained encoder: the encoder at any image size, and a head on its patch tokens."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tec_cache.errors import ConfigError
from tec_cache.finetune.classifier import EPS, LoadedEncoder
from tec_cache.rng import key64
from tec_cache.segment.recipes import Head
from tec_cache.segment.upernet import UperNetHead
from tec_cache.weights.load import load_strict

HEAD_STD = 2e-5
"""Deviation of the weights of a new 1 x 1 convolution."""
LOSS_SCALE = 2
"""Logits of the linear head per token and side, as they are compared with the mask."""
TAPS = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}
"""Depth -> blocks whose outputs UPerNet reads, as the published configurations have them."""


def taps(depth: int) -> tuple[int, ...]:
    """Return the four blocks that UPerNet reads: the published ones, else those at each quarter of the depth."""
    if depth < 4:
        raise ConfigError(f"upernet reads four blocks, the encoder has {depth}", todo="use --head linear")
    return TAPS.get(depth) or tuple(depth * (i + 1) // 4 - 1 for i in range(4))


class Segmenter(nn.Module):
    """Images (B, 3, H, W), normalized, with sides that the patch divides, to logits (B, num_classes, h, w).

    `vit` is timm's own module, its class token as it was folded. linear: the patch tokens after the encoder's final
    norm, a 1 x 1 convolution, and the logits scaled up by 2; the norm is the pretrained one where there is one.
    upernet: logits of a quarter of the image's size; in training the auxiliary ones are `auxiliary`'s.
    """

    def __init__(self, source: LoadedEncoder, vit: VisionTransformer, num_classes: int, head: Head, tune: str) -> None:
        super().__init__()
        self.mean, self.std, self.input_size = source.mean, source.std, source.input_size
        self.num_classes, self.kind, self.tune = num_classes, head, tune
        self.vit: Any = vit
        self.patch = int(vit.patch_embed.patch_size[0])
        self.head: nn.Module
        if head == "linear":
            self.head = nn.Conv2d(vit.embed_dim, num_classes, 1)
        else:
            self.taps = taps(len(vit.blocks))
            vit.norm = nn.Identity()  # no path leads through it
            self.head = UperNetHead(vit.embed_dim, num_classes)
        if tune == "head":
            vit.requires_grad_(False)
            self.train()

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode of what is trained; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.tune == "head":
            self.vit.eval()
        return self

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the encoder's outputs as pictures of tokens, (B, C, H / patch, W / patch)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.tune != "head"):
            if self.kind == "linear":
                rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
                tokens = self.vit.forward_features(images)[:, self.vit.num_prefix_tokens :]
                return [tokens.transpose(1, 2).unflatten(2, (rows, columns))]
            found: list[Tensor] = self.vit.forward_intermediates(
                images, indices=list(self.taps), norm=False, output_fmt="NCHW", intermediates_only=True
            )
            return found

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits; of UPerNet, in training, also those of its auxiliary head."""
        found = self.maps(images)
        if self.kind == "linear":
            return interpolate(self.head(found[0]), scale_factor=LOSS_SCALE, mode="bilinear")
        out: Tensor | tuple[Tensor, Tensor] = self.head(found)
        return out


def create_segmenter(
    source: LoadedEncoder,
    num_classes: int,
    *,
    head: Head = "linear",
    tune: str = "full",
    drop_path: float = 0.0,
    seed: int = 0,
) -> Segmenter:
    """Create a segmenter; every weight of it is loaded, or new and a function of `seed`.

    tune: full, or head: the encoder is frozen, its norm included. drop_path: highest chance of a block's being skipped.
    Leaves torch's generator as it was. Raises ConfigError for what cannot be meant.
    """
    if num_classes < 2:
        todo = "give masks of two classes or more; is --ignore the value that means that nothing is known?"
        raise ConfigError(f"the masks have {num_classes} class", todo=todo)
    if type(source.model) is not VisionTransformer or source.model.pos_embed is None:
        kind = type(source.model).__name__
        raise ConfigError(f"this model cannot be used: {kind}", todo="use a plain VisionTransformer with positions")
    if source.model.attn_pool is not None:
        raise ConfigError("this model cannot be used: it pools by attention", todo="use a plain VisionTransformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key64("segment", "head", seed) >> 1)
        model = Segmenter(source, _any_size(source, drop_path), num_classes, head, tune)
        classifier: Any = model.head if head == "linear" else model.head.classifier
        nn.init.normal_(classifier.weight, std=HEAD_STD)
        nn.init.zeros_(classifier.bias)
    return model


def _any_size(source: LoadedEncoder, drop_path: float) -> VisionTransformer:
    """Create the encoder without pooling and for images of any size, and fill it."""
    dropped = ("norm_eps", "global_pool", "fc_norm", "drop_path_rate", "dynamic_img_size", "num_classes", "final_norm")
    args = {name: value for name, value in source.model_args.items() if name not in dropped}
    vit: Any = timm.create_model(
        source.architecture,
        **args | {"img_size": source.input_size},
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        drop_path_rate=drop_path,
    )
    eps = {name: m.eps for name, m in source.model.named_modules() if hasattr(m, "eps")}
    for name, module in vit.named_modules():
        if hasattr(module, "eps"):
            module.eps = eps.get(name, EPS)
    # an encoder without a norm of tokens (it was fine-tuned with one of their mean, or below UPerNet) gets a new one
    new = {name: value for name, value in vit.state_dict().items() if name.startswith("norm.")}
    old = dict(source.model.state_dict())
    load_strict(vit, new | old, what=f"the segmenter on {source.architecture}")
    return vit  # type: ignore[no-any-return]
