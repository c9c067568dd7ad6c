"""One photo of a cache as pictures: where the base looks, and its decoded features as colours.

    pip install '.[report]'
    python examples/draw_attention.py CACHE --out pictures

The pictures show what a student learns from: what is drawn is what a training reads.
"""

# %% Which photo
import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import tec_cache
from tec_cache import draw

parser = argparse.ArgumentParser(description="Draw the stored targets of one photo of a cache.")
parser.add_argument("cache", help="folder or URL of a cache, or of a pack")
parser.add_argument("--key", help="the photo, as first_cache.py prints it  [default: the first one]")
parser.add_argument("--target", help="target set  [default: the first one]")
parser.add_argument("--patches", type=int, default=3, help="patches whose attention is drawn beside the class token's")
parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder of the pictures")
options = parser.parse_args()
options.out.mkdir(parents=True, exist_ok=True)

# %% Find it
# Nothing runs the base here: crop and targets are read from the cache, so this needs neither weights nor a GPU.
cache = tec_cache.open_cache(options.cache)
stored = cache[options.target or cache.target_names[0]]
sample = cache.find(options.key or cache.views_record(cache.view_units[0]).keys[0])
photo, targets = sample.pixels(), sample.targets(stored.name)
print(f"{sample.name.key} of {sample.name.shard}, label {sample.label}, as {stored.name} sees it")

# %% Attention
# Row 0 is the class token's. The others belong to the k patches with the highest scores, best first; their numbers are
# in `targets.rows`. The logits are known up to a constant per row, which the softmax removes.
maps = {"class token": draw.attention_maps(targets, stored.spec.grid_shape)[0]}
if targets.rows is not None:
    for row, patch in enumerate(targets.rows[0, : options.patches].tolist(), start=1):
        maps[f"patch {patch}"] = targets.attention[0, :, row].softmax(-1).unflatten(-1, stored.spec.grid_shape)
draw.attention_figure(photo, maps).savefig(options.out / "attention.png", dpi=150)

# %% Features
# The three directions in which the patches differ most become red, green and blue: patches of one colour are alike to
# the base. Nearest-neighbour scaling keeps one square for each patch.
colours = Image.fromarray(draw.component_colours(targets.features, stored.spec.grid_shape)[0])
height, width = photo.shape[:2]
beside = np.concatenate([photo, np.asarray(colours.resize((width, height), Image.Resampling.NEAREST))], axis=1)
Image.fromarray(beside).save(options.out / "features.png")
print("drawn:", options.out / "attention.png", options.out / "features.png")
