"""Two bases over the same crops: train on each alone and on both, and compare the three new models.

    python examples/several_bases.py CACHE --base mae --base ibot --train photos --test held-out --out runs/two

CACHE holds crops already, for instance those of first_cache.py. Each base adds its targets and no further crops.
"""

# %% The bases and the photos to judge on
import argparse
from pathlib import Path

import tec_cache
from pipelines.export import export
from pipelines.extract import extract
from pipelines.probe import probe
from pipelines.train import train

parser = argparse.ArgumentParser(description="Train on one base, on another, and on both; probe all three.")
parser.add_argument("cache", help="folder of a cache that has crops")
parser.add_argument("--base", action="append", required=True, help="give it twice: name, weight file or export")
parser.add_argument("--train", required=True, help="labelled photos that the probes learn from")
parser.add_argument("--test", required=True, help="labelled photos that they are judged on")
parser.add_argument("--out", type=Path, required=True, help="folder of the runs and exports")
parser.add_argument("--student", default="vit_small_patch16_224", help="plain vision transformer of timm")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=256)
options = parser.parse_args()

# %% A target set for each base
# No photos are given: the stored crops are what both bases see, so the sets belong to the same pixels.
sets = [str(extract(tec_cache.ExtractConfig(cache=options.cache, base=b), quiet=False).target) for b in options.base]
print("target sets:", ", ".join(sets))

# %% Three trainings that differ in nothing but their targets
# Of several sets each has a decoder head and encoder adapters of its own, and "NAME:WEIGHT" would weigh its losses.
# Every run can be stopped: the same cell goes on at its last checkpoint.
choices = {name: (name,) for name in sets} | {"both": tuple(sets)}
for name, targets in choices.items():
    config = tec_cache.TrainConfig(
        cache=options.cache,
        out=str(options.out / name),
        target=targets,
        student=options.student,
        epochs=options.epochs,
        batch_size=options.batch_size,
    )
    train(config, quiet=False)

# %% Exports and probes
# Loss values of different targets cannot be compared; frozen features on the same photos can. Differences of a few
# points mean little with one seed and few photos, and fine-tuning (tec-cache finetune) is what counts in the end.
scores = {}
for name in choices:
    folder = export(options.out / name, options.out / f"{name}-export", overwrite=True)
    scores[name] = probe(tec_cache.ProbeConfig(model=str(folder), train=options.train, test=options.test))
    print(f"{name:16} kNN {scores[name].knn:.1%}  linear {scores[name].linear:.1%}")
