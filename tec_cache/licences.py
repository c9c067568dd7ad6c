"""Under which licence the authors publish the weights of a base. Plain tables without torch.

A model that learned from a base's outputs may be bound by that licence; this program cannot decide it, so it says what
it knows where a model is handed on.
"""

from __future__ import annotations

from typing import NamedTuple

from tec_cache.recipes import BASES


class Licence(NamedTuple):
    """One licence."""

    name: str
    hub: str
    """As the hub abbreviates it in a card; "other" where it has no word for it."""


_APACHE, _MIT = Licence("Apache 2.0", "apache-2.0"), Licence("MIT", "mit")
_NONCOMMERCIAL = Licence("CC BY-NC 4.0 (no commercial use)", "cc-by-nc-4.0")
UNKNOWN = Licence("not known to tec-cache: ask where its weights come from", "other")

LICENCES: dict[str, Licence] = {
    "mae": _NONCOMMERCIAL,
    "mocov3": _NONCOMMERCIAL,
    "dino": _APACHE,
    "ibot": _APACHE,
    "dinov2": _APACHE,
    "dinov3": Licence("DINOv3 License (Meta)", "other"),
    "clip": _MIT,
    "siglip2": _APACHE,
    "eva02": _MIT,
    "radio": Licence("NVIDIA Open Model License", "other"),
}
"""Release of weights -> its licence, as of 2026; the authors' word counts.

Those of DINOv3, SigLIP 2, EVA-02 and RADIO are what timm's configurations state; CLIP's is that of OpenAI's repository,
where timm's say Apache 2.0.
"""


def licence_of(base: str) -> Licence:
    """Return the licence of a base by its name or timm's, that of its target set for one."""
    named = BASES.get(base) or next((one for one in BASES.values() if one.hub and one.timm_name == base), None)
    return LICENCES.get(named.release if named else base.partition("_")[0], UNKNOWN)
