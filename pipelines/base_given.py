"""What a command's settings say of its base."""

from __future__ import annotations

from tec_cache.base.source import Given
from tec_cache.config import ExtractConfig, ProbeConfig, TrainConfig


def given_by(config: ExtractConfig | TrainConfig | ProbeConfig) -> Given:
    """Return the pixel statistics and arguments that were given. Raises ConfigError for any that cannot be meant."""
    return Given.of(config.mean, config.std, config.base_args)
