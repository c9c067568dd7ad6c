"""How alike the tokens of a view are: what a normalization does to a target (figure 6 of the paper)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize


def token_similarity(features: Tensor) -> npt.NDArray[np.float64]:
    """Return the cosine between every two tokens of each view: (B * L (L - 1) / 2,) float64, from -1 to 1.

    features: (B, L, C) of any floating type. Pairs are in the order (0, 1), (0, 2), ..., (1, 2), ..., view by view.
    """
    directions = normalize(features.detach().cpu().double(), dim=-1, eps=1e-30)
    cosines = directions @ directions.transpose(1, 2)
    first, second = torch.triu_indices(features.shape[1], features.shape[1], offset=1)
    found: npt.NDArray[np.float64] = cosines[:, first, second].clamp(-1, 1).flatten().numpy()
    return found
