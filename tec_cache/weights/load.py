"""A model filled with weights, all of them or none: never a layer left at random."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tec_cache.errors import WeightsError, listed


def load_strict(
    model: nn.Module, state: Mapping[str, Tensor], *, what: str, grid: tuple[int, int] | None = None
) -> None:
    """Copy `state` into `model` (created with `num_classes=0`), casting to the model's dtypes.

    Only `pos_embed` (1, tokens, C) is ever resampled, to `model.patch_embed.grid_size`: when the token
    counts differ, or when `grid`, the file's (rows, columns) and by default a square, says so. Names
    under `head.` that the model lacks are ignored. `what` names the weights in messages.

    Raises `WeightsError` for anything missing, of another shape, left over, or not finite; the model
    is then untouched.
    """
    given = fitted(model, state, what=what, grid=grid)
    own = model.state_dict()
    for name, value in given.items():
        # After the cast, so that a value too large for a half-precision model is found as well.
        if own[name].is_floating_point() and not torch.isfinite(value.to(own[name].dtype)).all():
            raise WeightsError(
                f"the weights of {what} hold NaN or infinite values in {name} (as {own[name].dtype})",
                where=what,
                todo="fetch the file again, or take an earlier checkpoint of a run that diverged",
            )
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


def fitted(
    model: nn.Module, state: Mapping[str, Tensor], *, what: str, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Return the tensors that `load_strict` copies, or raise its WeightsError for names and shapes.

    The model may be on the "meta" device: nothing is allocated for weights that do not fit.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = {name: value for name, value in state.items() if name in own or not name.startswith("head.")}
    if "pos_embed" in given and "pos_embed" in own:
        given["pos_embed"] = _fit_pos_embed(model, given["pos_embed"], own["pos_embed"], what, grid)
    misshaped = [
        f"{name} {tuple(given[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    faults = {
        "missing": [name for name in own if name not in given],
        "of the wrong shape": misshaped,
        "unexpected": [name for name in given if name not in own],
    }
    if any(faults.values()):
        raise WeightsError(
            f"the weights of {what} do not fit {type(model).__name__}",
            details=[line for fault, names in faults.items() if names for line in _lines(fault, names)],
            where=what,
            todo="choose the model these weights were trained as (width, depth, patch size, registers)",
        )
    return given


def _lines(fault: str, names: list[str], most: int = 8) -> list[str]:
    """Say a fault in lines that fit a terminal: the first names, and how many more there are."""
    if len(names) == 1:
        return [f"{fault}: 1: {names[0]}"]
    if any(" " in name for name in names):  # with their shapes: one a line
        more = [f"  ... and {len(names) - 4} more"] if len(names) > 4 else []
        return [f"{fault}: {len(names)}:", *(f"  {name}" for name in names[:4]), *more]
    text = f"{fault}: {listed(names, most)}"
    return textwrap.wrap(text, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _fit_pos_embed(model: nn.Module, given: Tensor, own: Tensor, what: str, grid: tuple[int, int] | None) -> Tensor:
    """Return `given` (1, tokens, C) resampled to the model's grid, or itself where the grids agree."""
    target = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if given.ndim != 3 or own.ndim != 3 or (given.shape[1] == own.shape[1] and grid in (None, target)):
        return given
    num_prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 1))
    num_patches = given.shape[1] - num_prefix
    side = math.isqrt(max(num_patches, 0))
    rows, columns = grid or (side, side)
    if target is None or num_patches < 1 or rows * columns != num_patches:
        raise WeightsError(
            f"the position embedding of {what} has {given.shape[1]} tokens, {num_prefix} of them no patches",
            details=[f"the other {num_patches} do not form a grid of {rows} x {columns} to resample to {target}"],
            where=what,
            todo="choose the model these weights were trained as (class token, registers), or give its grid",
        )
    prefix, patches = given[:, :num_prefix], given[:, num_prefix:].float()
    # timm's resample_abs_pos_embed, which up to 1.0.28 leaves 2 x 8 tokens as they are where 4 x 4 are wanted
    grids = patches.reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(grids, size=tuple(target), mode="bicubic", antialias=True)
    return torch.cat([prefix, resampled.permute(0, 2, 3, 1).flatten(1, 2).to(given.dtype)], dim=1)
