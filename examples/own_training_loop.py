"""A training loop of your own over a cache: any model, any loss, and targets that cost no base.

    python examples/own_training_loop.py CACHE --student vit_small_patch16_224 --steps 1000

It distils features in the plainest way: the student sees the whole view, and a linear layer predicts each patch's
feature. What `tec-cache train` does beyond that (masks, adapters, decoder, attention) is in `tec_cache.create_student`.
"""

# %% What to train
import argparse

import timm
import torch
import torch.nn.functional as F
from torch import nn

import tec_cache
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD

parser = argparse.ArgumentParser(description="Distil the features of a cache into a model of timm.")
parser.add_argument("cache", help="folder or URL of a cache, or of a pack")
parser.add_argument("--target", help="target set  [default: the first one]")
parser.add_argument("--student", default="vit_small_patch16_224", help="a vision transformer of timm")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
parser.add_argument("--out", default="student.pt", help="file of the trained weights")
options = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)

# %% A student with one token for each target
# Student and base need the same grid, not the same patch: a base with patches of 14 pixels can teach one of 16, because
# the loader resizes the stored crop to what the student wants.
cache = tec_cache.open_cache(options.cache)
stored = cache[options.target or cache.target_names[0]]
patch = timm.create_model(options.student, num_classes=0).patch_embed.patch_size[0]
size = patch * stored.spec.grid
student = timm.create_model(options.student, num_classes=0, img_size=size).to(device)
head = nn.Linear(student.embed_dim, stored.spec.channels).to(device)

# %% Optimizer and batches
# The loader's threads read ahead while a step runs. Its order is a function of seed and epoch alone, so a loop that
# stopped at step s goes on with `batches(s, ...)` and sees what it would have seen.
optimizer = torch.optim.AdamW([*student.parameters(), *head.parameters()], lr=options.lr, weight_decay=0.05)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
loader = tec_cache.Loader(cache, stored, batch_size=options.batch_size, pixel_sizes=(size,), workers=2)

# %% The loop
# Codes travel to the device and are decoded there: they are a small part of the bytes that the features would be.
losses = []
for step, batch in enumerate(loader.batches(0, options.steps)):
    batch = batch.to(device)
    targets = stored.decode(batch.codes[stored.name])
    tokens = student.forward_features(batch.images(size, IMAGENET_MEAN, IMAGENET_STD))[:, student.num_prefix_tokens :]
    loss = F.smooth_l1_loss(head(tokens), targets.features)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
    if step % 20 == 0 or step + 1 == options.steps:
        print(f"step {step + 1} of {options.steps}: loss {loss.item():.4f}", flush=True)

# %% Keep the student; its head has done its work
torch.save(student.state_dict(), options.out)
print(f"{options.out}: timm.create_model({options.student!r}, num_classes=0, img_size={size}).load_state_dict(...)")
