"""A first cache: photos become crops and targets, and one batch of them is looked at.

    python examples/first_cache.py photos CACHE --base dinov2_small

The other examples read the cache that this one makes.
"""

# %% The places and the base
import argparse

import tec_cache
from pipelines.extract import extract
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD

parser = argparse.ArgumentParser(description="Extract a cache from photos and look at one batch of it.")
parser.add_argument("photos", help="folder of CLASS/NAME.jpg, or a pattern of WebDataset tars")
parser.add_argument("cache", help="folder of the cache; it is made, or continued if it exists")
parser.add_argument("--base", default="dinov2_small", help="name of a base, timm:NAME, a weight file, or an export")
parser.add_argument("--base-weights", help="weight file of the base  [default: from timm's hub]")
parser.add_argument("--views", type=int, default=2, help="stored crops of each photo")
parser.add_argument("--size", type=int, default=224, help="pixels per side of a stored crop")
parser.add_argument("--grid", type=int, default=14, help="patches per side that the base sees")
options = parser.parse_args()

# %% Extract
# The base runs once over every view, and never again in any training on this cache. An interrupted extraction goes on
# when this cell is run again with the same settings, and a finished one returns at once.
config = tec_cache.ExtractConfig(
    input=options.photos,
    cache=options.cache,
    base=options.base,
    base_weights=options.base_weights,
    views=options.views,
    size=options.size,
    grid=options.grid,
)
summary = extract(config, quiet=False)
print(f"{summary.photos} photos, {summary.views_made} crops and {summary.targets_made} targets made just now")
print(f"a view: {summary.bytes_per_crop / 1e3:.1f} KB of crop, {summary.bytes_per_target / 1e3:.1f} KB of targets")

# %% Open it
# A cache can hold the target sets of several bases; this example asks for the one that it has just made.
cache = tec_cache.open_cache(options.cache)
stored = cache[str(summary.target)]
print(stored.spec)

# %% Look at a batch
# An epoch reads one view of every photo, so step numbers run from 0 to steps_per_epoch - 1, and on into the next epoch.
# Targets arrive as they are stored; decoding them is a few matrix products, best done where the student runs.
loader = tec_cache.Loader(cache, stored, batch_size=8, pixel_sizes=(options.size,))
batch = next(loader.batches(0, 1))
images = batch.images(options.size, IMAGENET_MEAN, IMAGENET_STD)
targets = stored.decode(batch.codes[stored.name])
print("images  ", tuple(images.shape))
print("features", tuple(targets.features.shape), "views, patches, channels")
if targets.attention is not None:  # with k=none a set stores features alone
    print("attention", tuple(targets.attention.shape), "views, heads, rows, patches")
for (shard, key), label in zip(batch.names(cache), batch.labels.tolist(), strict=True):
    print(f"  {shard}  {key}  label {label}")

# %% Features are normalized over the patches of each view
# A channel that is large everywhere says nothing about a patch. Normalization takes it away, which the means show; they
# are not exactly zero because the codec is lossy.
print(f"largest mean of a channel over its patches: {targets.features.mean(dim=1).abs().max():.3f}")
