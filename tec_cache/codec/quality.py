"""How good stored targets are to be: a name or two numbers, and what a target set's identity keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tec_cache.errors import ConfigError, nearest

QUALITIES = {"exact": None, "high": (0.02, 0.01), "default": (0.04, 0.03), "small": (0.10, 0.08)}
"""Name -> relative mean squared error of the features, KL divergence of the attention rows in nats at tau 1."""

LIMITS = {"mse": (0.003, 0.3), "kl": (0.001, 0.2)}
"""Errors that can be asked for: below, `exact` is hardly larger; above, targets are noise."""


@dataclass(frozen=True)
class Quality:
    """Asked errors; both None for exact (half precision)."""

    mse: float | None
    kl: float | None

    @classmethod
    def parse(cls, text: str) -> Quality:
        """Read a name, or 'MSE,KL'. Raises ConfigError for anything else."""
        if text in QUALITIES:
            return cls(*(QUALITIES[text] or (None, None)))
        parts = text.split(",")
        try:
            mse, kl = (float(part) for part in parts)
        except ValueError:
            raise ConfigError(
                f"--quality {text}{nearest(text, QUALITIES)}",
                todo=f"choose one of: {', '.join(QUALITIES)}; or give two errors, for instance --quality 0.05,0.04",
            ) from None
        for name, value in (("mse", mse), ("kl", kl)):
            low, high = LIMITS[name]
            if not low <= value <= high:
                raise ConfigError(
                    f"--quality {text}: {name} {value}", todo=f"give {name} from {low} to {high}, or exact"
                )
        return cls(mse, kl)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Quality:
        """Read what an identity holds."""
        return cls(values.get("mse"), values.get("kl"))

    @property
    def exact(self) -> bool:
        """Whether half precision is asked for, which needs no fit."""
        return self.mse is None

    @property
    def asked(self) -> dict[str, float]:
        """The asked errors by name; none for exact."""
        return {n: v for n, v in (("mse", self.mse), ("kl", self.kl)) if v is not None}

    def to_json(self, fit_views: int) -> dict[str, Any]:
        """Return what the identity of a target set says of its codec."""
        if self.exact:
            return {"name": "exact"}
        return {"name": "transform", "mse": self.mse, "kl": self.kl, "fit_views": fit_views}

    def __str__(self) -> str:
        """Return the name, or the two numbers."""
        names: dict[Any, str] = {value or (None, None): name for name, value in QUALITIES.items()}
        return names.get((self.mse, self.kl), f"{self.mse},{self.kl}")
