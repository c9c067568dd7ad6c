"""From what the base computed to what the student learns: pure functions, no state.

Equations are those of the paper (Gao et al., Sci Sin Inform 2025, 55: 326-342; arXiv 2210.11016);
where the paper and the authors' released program differ, the program is followed, because the published
checkpoints came from it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from tec_cache.errors import ConfigError
from tec_cache.printable import are, counted
from tec_cache.types import Normalization, Rows, Targets

EPS = 1e-6


def normalize_features(features: torch.Tensor, how: Normalization) -> torch.Tensor:
    """Normalize a feature target (B, L, C) in float32.

    "patch" (eq. 2): per view and channel over the L patch tokens, (y - mean) / sqrt(var + 1e-6) with
    the unbiased variance, so |value| <= (L - 1) / sqrt(L). "feature": the same per token over the channels.
    "none": unchanged.
    """
    features = features.float()
    if how == "none":
        return features
    if how not in ("patch", "feature"):
        raise ConfigError(f"unknown normalization {how!r}", todo="choose one of: patch, feature, none")
    dim = 1 if how == "patch" else 2
    if features.shape[dim] < 2:
        raise ConfigError(
            f"a {how} normalization over {features.shape[dim]} value has no variance",
            todo="use a grid of at least 2 x 2 patches, or --normalization none",
        )
    var, mean = torch.var_mean(features, dim=dim, keepdim=True, unbiased=True)
    return (features - mean) / (var + EPS).sqrt()


def select_rows(scores: torch.Tensor, k: Rows) -> torch.Tensor:
    """Choose the patches whose attention rows are targets.

    scores: (B, L), the class token's logits against the patches, averaged over heads. Returns (B, k) int64:
    the k highest by descending score, ties to the lower patch number (so that one machine gives one
    answer); all patches in their order when k is "all".
    """
    batch, num_tokens = scores.shape
    if k == "all":
        return torch.arange(num_tokens, device=scores.device).expand(batch, -1)
    if k is None or k < 0 or k > num_tokens:
        raise ConfigError(f"cannot choose k = {k} of {num_tokens} patches", todo=f"give 0 <= k <= {num_tokens}")
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    num_prefix: int,
    has_class_token: bool,
    k: Rows,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the chosen attention rows of one layer from its queries and keys.

    query, key: (B, H, N, D) as they enter the product (after norms and rotary embedding), N = prefix tokens
    + L patches. bias: what is added before the softmax, broadcastable to (B, H, N, N). Row 0 is the class
    token's; where there is none, the mean of all patch rows. Keys are the patches only.
    Returns logits (B, H, k+1, L) float32 and rows (B, k) int64.
    """
    patch_keys = key[:, :, num_prefix:].float().transpose(-2, -1)
    num_tokens = patch_keys.shape[-1]
    if bias is not None:
        bias = bias.float().expand(query.shape[0], query.shape[1], query.shape[2], -1)[..., num_prefix:]

    if has_class_token:
        first_query = query[:, :, :1].float()
        first_bias = None if bias is None else bias[:, :, :1]
    else:
        first_query = query[:, :, num_prefix:].float().mean(dim=2, keepdim=True)
        first_bias = None if bias is None else bias[:, :, num_prefix:].mean(dim=2, keepdim=True)
    first = _scores(first_query, patch_keys, scale)
    if first_bias is not None:
        first = first + first_bias

    rows = select_rows(first.mean(dim=1)[:, 0], k)
    if rows.shape[1] == 0:
        return first, rows
    index = (rows + num_prefix)[:, None, :, None].expand(-1, query.shape[1], -1, -1)
    chosen = query.gather(2, index.expand(-1, -1, -1, query.shape[-1])).float()
    logits = _scores(chosen, patch_keys, scale)
    if bias is not None:
        logits = logits + bias.gather(2, index.expand(-1, -1, -1, num_tokens))
    return torch.cat([first, logits], dim=2), rows


def _scores(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Multiply in float32 even under the caller's autocast: in bfloat16 many scores tie, and rows change."""
    with torch.autocast(query.device.type, enabled=False):
        return query @ keys * scale


def normalize_targets(targets: Targets, how: Normalization) -> Targets:
    """Return the targets with features (B, L, C) and class tokens (B, C) normalized, float32; attention as it is.

    A view has one class token, so there is nothing to normalize it over but its own channels, whatever is done to the
    patches; with "none" it stays raw as well.
    """
    token = targets.class_token
    if token is not None:
        token = normalize_features(token[:, None], "none" if how == "none" else "feature")[:, 0]
    return Targets(normalize_features(targets.features, how), targets.attention, targets.rows, token)


def narrow_rows(targets: Targets, k: Rows) -> Targets:
    """Keep the first k rows after the class token's: a smaller k is a prefix of a larger one.

    k = None drops the attention target. Asking for more rows than there are is a ConfigError.
    """
    if k is None:
        return Targets(targets.features, class_token=targets.class_token)
    if targets.attention is None or targets.rows is None:
        raise ConfigError("these targets hold no attention rows", todo="train with --k none")
    have = targets.rows.shape[1]
    want = have if k == "all" else k
    if want > have or (k == "all" and have != targets.features.shape[1]):
        raise ConfigError(
            f"k = {k} was asked for, {counted(have, 'row')} {are(have)} stored", todo=f"train with --k {have} or less"
        )
    return replace(targets, attention=targets.attention[:, :, : want + 1], rows=targets.rows[:, :want])


def pixel_targets(pixels: torch.Tensor, grid: int) -> Targets:
    """Make the targets of a masked autoencoder, the round zero that needs no base.

    pixels: (B, 3, S, S) normalized with the student's mean and deviation, S = grid * p. Features are the
    pixels of each patch, (B, L, p * p * 3) in the order row, column, colour, normalized per patch over its
    values (unbiased variance, eps 1e-6, as MAE does). No attention target.
    """
    batch, colours, size, _ = pixels.shape
    p = size // grid
    patches = pixels.float().reshape(batch, colours, grid, p, grid, p)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, p * p * colours)
    return Targets(normalize_features(patches, "feature"))


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return half-precision and bfloat16 values as float32, float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def target_distribution(logits: torch.Tensor, tau: float) -> torch.Tensor:
    """Turn target logits (..., L) into probabilities over the L patch keys: softmax(logits / tau).

    tau divides the target's logits only, never the student's.
    """
    return F.softmax(widened(logits) / tau, dim=-1)
