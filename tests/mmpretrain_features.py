"""What mmpretrain makes of a converted model: run by the Python that has it, with nothing of this project.

Arguments: the folder, a file of images (N, 3, H, W) as torch.save writes it, and the file for the answers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from mmpretrain import get_model

folder = Path(sys.argv[1])
images = torch.load(sys.argv[2], weights_only=True)
model = get_model(Config.fromfile(str(folder / "config.py"))).eval()
load_checkpoint(model, str(folder / "model.pth"), map_location="cpu", strict=True)
with torch.no_grad():
    answers = {"features": model.backbone(images)[-1].contiguous()}
    if model.with_head:
        answers["logits"] = model(images)
torch.save(answers, sys.argv[3])
