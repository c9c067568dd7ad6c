"""Stored crops as a contact sheet, and stored targets as colours beside what the base says of the same crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipelines.reporting.html import Html, grid, heading, joined, paragraph, picture
from pipelines.reporting.images import jpeg, png, shrunk
from tec_cache.base.model import FrozenBase
from tec_cache.cache.identity import differences
from tec_cache.cache.layout import BLOCK_ROWS, Unit
from tec_cache.cache.pixels import decode_crop, resize
from tec_cache.cache.reader import Cache
from tec_cache.cache.target_set import TargetSet
from tec_cache.draw import Components
from tec_cache.pixels import normalized
from tec_cache.targets import normalize_features

MOST_VIEWS = 4
"""Views of a photo that are shown."""
SIDE = 160
"""Pixels of a crop on the sheet."""


@dataclass(frozen=True)
class Crop:
    """A stored crop and where it lies."""

    key: str
    unit: Unit
    row: int
    pixels: npt.NDArray[np.uint8]
    """(S, S, 3)."""

    @property
    def name(self) -> str:
        """Of a view of a photo."""
        return f"{self.key}, view {self.unit.view}"


def chosen_crops(cache: Cache, photos: int) -> list[Crop]:
    """Read all shown views of some photos, from units as far apart as there are; the same ones each time."""
    units = [unit for unit in cache.view_units if unit.view == 0]
    step = max(1, len(units) // max(1, photos))
    places: list[tuple[Unit, int]] = []
    for row in range(photos):  # one photo of each chosen unit, then the next of each
        places += [(unit, row) for unit in units[::step][:photos]]
    found: list[Crop] = []
    taken = 0
    for unit, row in places:
        if taken == photos:
            break
        if row >= len(cache.views_record(unit).keys):
            continue
        taken += 1
        for view in range(min(MOST_VIEWS, cache.num_views)):
            found += _crop(cache, unit._replace(view=view), row)
    return found


def _crop(cache: Cache, unit: Unit, row: int) -> list[Crop]:
    if unit not in cache.view_unit_set:
        return []
    record = cache.views_record(unit)
    (data,) = cache.read_crops(record, [row])
    return [Crop(record.keys[row], unit, row, decode_crop(data))]


def sheet_section(crops: Sequence[Crop]) -> Html:
    """Return the contact sheet: the views of one photo lie beside each other."""
    if not crops:
        return paragraph("It holds no crop yet.", kind="note")
    tiles = [picture(jpeg(shrunk(crop.pixels, SIDE)), f"stored crop of {crop.name}", crop.name) for crop in crops]
    return joined([heading(4, "Stored crops"), grid(tiles, "tiles")])


def decoded_section(target: TargetSet, crops: Sequence[Crop], base: FrozenBase | None) -> Html:
    """Show decoded features of some crops as colours, beside the exact ones where their base is there."""
    there = [crop for crop in crops if crop.unit in set(target.units)]
    title = heading(4, f"Targets {target.name}: features as colours")
    if not there:
        return joined([title, paragraph("No target of these crops is stored yet.", kind="note")])
    stored = torch.cat([decoded_features(target, crop) for crop in there])
    exact, said = None, "Give their base with --base to see the exact ones beside them."
    if base is not None:
        exact, said = exact_features(target, there, base), ""
        if exact is None:
            said = f"The base that was given, {base.name}, is not the one that made this set."
    components = Components.of(stored if exact is None else exact)
    shape = target.spec.grid_shape
    columns = [("decoded", components.colours(stored, shape))]
    if exact is not None:
        columns.insert(0, ("exact", components.colours(exact, shape)))
    sets = []
    for number, crop in enumerate(there):
        side = [picture(jpeg(shrunk(crop.pixels, SIDE)), f"stored crop of {crop.name}", crop.name)]
        for kind, pictures in columns:
            off = "" if exact is None or kind == "exact" else f", error {_error(exact[number], stored[number]):.3g}"
            alt = f"{kind} features of {crop.name} as colours, one square a patch{off}"
            side.append(picture(png(pictures[number], _scale(shape)), alt, f"{kind}{off}", kind="cells"))
        sets.append(grid(side, "side"))
    explained = (
        "Red, green and blue are the three principal components of these features, the same for all pictures here; "
        "one square is one patch. "
        + ("Error: squared error of the decoded features over the energy of the exact ones. " if exact is not None
           else "") + said
    )  # fmt: skip
    return joined([title, paragraph(explained, kind="note"), grid(sets, "sets")])


def _scale(shape: tuple[int, int]) -> int:
    return max(1, SIDE // max(shape))


def _error(exact: torch.Tensor, stored: torch.Tensor) -> float:
    return float((exact - stored).double().square().sum() / exact.double().square().sum().clamp(min=1e-30))


def decoded_features(target: TargetSet, crop: Crop) -> torch.Tensor:
    """Return the stored features of a crop, decoded: (1, L, C) float32."""
    record = target.record(crop.unit)
    block = target.read_block(record, crop.row // BLOCK_ROWS)
    row = crop.row % BLOCK_ROWS
    codes = {}
    for name, values in block.items():
        one = values[row : row + 1]
        codes[name] = torch.from_numpy((one.astype(np.int32) if one.dtype == np.uint16 else one).copy())
    return target.decode(codes).features.float()


def exact_features(target: TargetSet, crops: Sequence[Crop], base: FrozenBase) -> torch.Tensor | None:
    """Return what a base says of crops, normalized as the set is: (N, L, C); None if it is not the set's base."""
    identity = target.identity
    if (
        differences(identity["base"], base.identity)
        or base.input_size != identity["input_size"]
        or base.grid != target.spec.grid
    ):
        return None
    before, base.last_layers = base.last_layers, int(identity["last_layers"])
    try:
        found = base(pixels_of([resize(crop.pixels, base.input_size) for crop in crops], base)).features
    finally:
        base.last_layers = before
    return normalize_features(found, target.spec.normalization).cpu()


def pixels_of(pictures: Sequence[npt.NDArray[np.uint8]], model: FrozenBase) -> torch.Tensor:
    """Return pictures (S, S, 3) uint8 as a model takes them: (B, 3, S, S) float32, normalized, on its device."""
    device = next(model.parameters()).device
    images = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float()
    return normalized(images, model.mean, model.std)
