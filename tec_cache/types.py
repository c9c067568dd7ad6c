"""The plain data that both halves of the program pass around."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Colours = tuple[float, float, float]
"""A number for each of red, green and blue."""

Normalization = Literal["patch", "feature", "none"]
Rows = int | Literal["all"] | None


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What a set of targets consists of; everything that a student's heads need to know."""

    grid: int
    """Patch tokens per column (and per row, unless `columns` says otherwise)."""
    channels: int
    """C, width of the feature target."""
    num_heads: int
    """H, heads of the attention target; 0 where there is none."""
    k: Rows
    """Rows of attention besides the class token's: a number, "all" for all patches in their order, or None for no
    attention target at all."""
    normalization: Normalization
    """How the features were normalized: over the patches of a view, over the channels of a token, or not at all."""
    columns: int | None = None
    """Patch tokens per row if that differs from `grid`; None for a square grid."""
    class_token: bool = False
    """Whether there is a class-token target, as wide as the features."""

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of patch tokens; token r * columns + c lies in row r, column c."""
        return self.grid, self.columns or self.grid

    @property
    def num_tokens(self) -> int:
        """L, the number of patch tokens."""
        rows, columns = self.grid_shape
        return rows * columns

    @property
    def num_rows(self) -> int:
        """k + 1 stored rows of attention, 0 where there is no attention target."""
        if self.k is None:
            return 0
        return 1 + (self.num_tokens if self.k == "all" else self.k)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; `class_token` only if it is true, since older sets do not have it."""
        values = asdict(self)
        return values if self.class_token else {n: value for n, value in values.items() if n != "class_token"}


@dataclass(frozen=True)
class Targets:
    """What the base says about a batch of views, whether it comes from a cache or from the base itself."""

    features: torch.Tensor
    """(B, L, C): raw as the base gives them, or normalized by `targets.normalize_targets` or a decoder."""
    attention: torch.Tensor | None = None
    """(B, H, k+1, L): logits before the softmax, scaled by the base; from a cache they are known up to a constant per
    row. Row 0 is the class token's. None if the attention target is left out."""
    rows: torch.Tensor | None = None
    """(B, k) int64: numbers of the patches that attention rows 1 to k belong to, by descending score; patches are
    counted from zero, without the class token."""
    class_token: torch.Tensor | None = None
    """(B, C) float: the output of the base's last block at its class token, or the mean over its patches if it has
    none; raw or normalized like the features. None if it was not asked for."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """Return the same targets on another device."""

        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=non_blocking)

        features = self.features.to(device, non_blocking=non_blocking)
        return Targets(features, move(self.attention), move(self.rows), move(self.class_token))
