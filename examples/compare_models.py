"""Base and new model side by side with timm alone: features of the same photos, kNN, and how far they agree.

    python examples/compare_models.py photos held-out vit_base_patch16_224.mae local-dir:vit-b-tec

An export needs nothing of this project once it is written: timm loads it as it loads any other model.
"""

# %% The models, and the photos in one folder for each class
import argparse

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from tec_cache.probe.knn import knn_accuracy

parser = argparse.ArgumentParser(description="Compare frozen features of models that timm loads.")
parser.add_argument("train", help="folder CLASS/NAME.jpg: photos that vote")
parser.add_argument("test", help="folder CLASS/NAME.jpg: photos that are classified, of the same classes")
parser.add_argument("models", nargs="+", help="names as timm takes them; an export is local-dir:FOLDER")
parser.add_argument("--neighbours", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
options = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# %% Features
@torch.inference_mode()
def features(name: str, folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of the patch tokens of each photo, (N, C), and the labels, (N,)."""
    model = timm.create_model(name, pretrained=True, num_classes=0).to(device).eval()
    # Size, mean and deviation are the model's own: two models may want different pixels of the same photo.
    photos = ImageFolder(folder, timm.data.create_transform(**timm.data.resolve_model_data_config(model)))
    pairs = [(model.forward_features(x.to(device)), y) for x, y in DataLoader(photos, options.batch_size)]
    # Patches, not the class token: no loss of an MAE ever asked anything of its class token.
    means = [tokens[:, model.num_prefix_tokens :].mean(dim=1) for tokens, _ in pairs]
    return torch.cat(means).float(), torch.cat([y for _, y in pairs])


# %% k nearest neighbours
# Nothing is trained, so no setting of a probe can favour one of the models.
found = {}
accuracy = {}
for name in options.models:
    (train, train_labels), (test, test_labels) = features(name, options.train), features(name, options.test)
    accuracy[name] = knn_accuracy(train, train_labels, test, test_labels, k=options.neighbours)
    found[name] = (F.normalize(test) @ F.normalize(train).T).topk(min(options.neighbours, len(train))).indices
    print(f"{name}: {train.shape[1]} channels, kNN {accuracy[name]:.2%}")

# %% Do they find the same neighbours?
# Two models of equal accuracy can still see photos differently; a low share says that they do.
first, *others = options.models
for name in others:
    same = [len(set(a) & set(b)) / len(a) for a, b in zip(found[first].tolist(), found[name].tolist(), strict=True)]
    print(f"{first} and {name} share {sum(same) / len(same):.0%} of a photo's nearest neighbours")
