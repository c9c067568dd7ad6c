"""How good stored targets are to be, a name or two numbers; and whether they are, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tec_cache.codec import CODECS
from tec_cache.errors import ConfigError, nearest
from tec_cache.printable import counted

OF_TWO_ERRORS = "transform"
"""The codec of a quality that is two numbers."""

LIMITS = {"mse": (0.003, 0.3), "kl": (0.001, 0.2)}
"""Errors that can be asked for: below, `exact` is hardly larger; above, targets are noise."""

BEYOND = 1.15
"""Measured errors that are so many times the asked ones are pointed out; below, it is chance."""


@dataclass(frozen=True)
class Quality:
    """A codec and the errors that are asked of it; None for one that needs no fit."""

    codec: str
    mse: float | None = None
    kl: float | None = None

    @classmethod
    def parse(cls, text: str) -> Quality:
        """Read a name, or 'MSE,KL'. Raises ConfigError for anything else."""
        named = qualities()
        if text in named:
            return named[text]
        parts = text.split(",")
        try:
            mse, kl = (float(part) for part in parts)
        except ValueError:
            raise ConfigError(
                f"--quality {text} is no known quality{nearest(text, named)}",
                todo=f"choose one of: {', '.join(named)}; or give two errors, for instance --quality 0.05,0.04",
            ) from None
        for name, value in (("mse", mse), ("kl", kl)):
            low, high = LIMITS[name]
            if not low <= value <= high:
                raise ConfigError(
                    f"--quality {text}: {name} {value}", todo=f"give {name} from {low} to {high}, or exact"
                )
        return cls(OF_TWO_ERRORS, mse, kl)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Quality:
        """Read what an identity holds."""
        return cls(values["name"], values.get("mse"), values.get("kl"))

    @property
    def fitted(self) -> bool:
        """Whether the codec is fitted to targets; half precision needs no fit."""
        return CODECS[self.codec].fit is not None

    @property
    def asked(self) -> dict[str, float]:
        """The asked errors by name; none for a codec that needs no fit."""
        return {n: v for n, v in (("mse", self.mse), ("kl", self.kl)) if v is not None}

    def to_json(self, fit_views: int) -> dict[str, Any]:
        """Return what the identity of a target set says of its codec."""
        if not self.fitted:
            return {"name": self.codec}
        return {"name": self.codec, "mse": self.mse, "kl": self.kl, "fit_views": fit_views}

    def __str__(self) -> str:
        """Return the name, or the two numbers."""
        return next((name for name, quality in qualities().items() if quality == self), f"{self.mse},{self.kl}")


def qualities() -> dict[str, Quality]:
    """Return the qualities that have a name, in the order of the codecs."""
    return {
        name: Quality(codec, *errors) for codec, making in CODECS.items() for name, errors in making.qualities.items()
    }


def errors_text(errors: dict[str, float], asked: dict[str, float], checked: int) -> str:
    """Say the measured errors of stored targets, and whether they are beyond what was asked for.

    checked: views they were measured on.
    """
    if not errors:
        return ""
    kl = f", KL {errors['kl']:.2g} nats" if "kl" in errors else ""
    views = counted(checked, "view")
    text = f": relative MSE {errors['mse']:.2g}{kl}, measured on {views} that the codec has not seen"
    if any(errors.get(name, 0.0) > BEYOND * value for name, value in asked.items()):
        wish = " and ".join(f"{value:g}" for value in asked.values())
        text += f"\n             MORE THAN ASKED ({wish}): the sample was too small;"
        text += " more photos, a larger --fit-views, or --quality exact"
    return text
