"""Mean and deviation of pixels: three numbers, from timm's configurations or from a file."""

from __future__ import annotations

from typing import Any

from tec_cache.errors import ConfigError, WeightsError, nearest
from tec_cache.recipes import of_generation
from tec_cache.types import Colours


def config_of(timm_name: str) -> Any:
    """Return timm's configuration of a model's weights, or raise ConfigError with the nearest names."""
    import timm

    try:
        config = timm.models.get_pretrained_cfg(timm_name)
    except RuntimeError:
        config = None
    if config is None:
        near = nearest(timm_name, of_generation(timm_name, timm.list_models() + timm.list_models(pretrained=True)))
        raise ConfigError(
            f"timm {timm.__version__} knows no model {timm_name!r}{near}",
            todo="see timm.list_models('vit*')",
        )
    return config


def pixel_statistics(timm_name: str) -> tuple[Colours, Colours]:
    """Return the pixel mean and deviation that timm's configuration states for a model."""
    config = config_of(timm_name)
    return colours(config.mean), colours(config.std)


def colours(values: Any) -> Colours:
    """Return three numbers, one for each of red, green and blue."""
    red, green, blue = values
    return float(red), float(green), float(blue)


def three(values: Any, name: str, where: str, *, positive: bool = False) -> Colours:
    """Return three numbers of a file; a single one stands for all three. Raises WeightsError."""
    if type(values) in (int, float):
        values = [values] * 3
    fits = (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(type(v) in (int, float) and -1e3 < v < 1e3 and (v > 0 or not positive) for v in values)
    )
    if not fits:
        raise WeightsError(f"{name} = {str(values)[:80]} is not three numbers", where=where, todo="mend the file")
    red, green, blue = values
    return float(red), float(green), float(blue)
