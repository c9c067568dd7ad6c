"""The example of detection trains on an export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.detect import LEVELS, Pyramid, detector, drawn, train
from tests.small_exports import random_export, timm_model


def test_drawn_boxes_hold_their_masks() -> None:
    for photo, target in drawn(6, 64):
        assert photo.shape == (3, 64, 64)
        assert 0 <= photo.min() < photo.max() <= 1
        for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
            left, top, right, bottom = box
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0


def test_the_pyramid_has_four_strides(tmp_path: Path) -> None:
    encoder = timm_model(random_export(tmp_path / "e"), img_size=64)
    levels = Pyramid(encoder, 16)(torch.zeros(1, 3, 64, 64))
    assert {name: tuple(value.shape) for name, value in levels.items()} == {
        name: (1, 16, side, side) for name, side in zip(LEVELS, (32, 16, 8, 4), strict=True)
    }


@pytest.mark.slow
def test_a_few_steps_of_mask_r_cnn_lower_the_loss_and_it_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = random_export(tmp_path / "e", size=32)
    before = timm_model(folder, img_size=64).state_dict()
    few = {"rpn_post_nms_top_n_train": 60, "box_batch_size_per_image": 32}
    model = detector(str(folder), classes=2, size=64, out_channels=32, **few)
    assert torch.equal(model.backbone.encoder.pos_embed, before["pos_embed"])
    pairs = drawn(4, 64)
    losses = list(train(model, pairs, steps=20, batch=2, lr=1e-3))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses
    assert not torch.equal(model.backbone.encoder.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])
    with torch.no_grad():
        (answer,) = model.eval()([pairs[0][0]])
    assert {"boxes", "labels", "scores", "masks"} <= set(answer)
