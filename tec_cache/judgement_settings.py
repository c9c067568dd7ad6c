"""What a pretraining is told of its periodic judgement: how often, and on which photos. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tec_cache.errors import ConfigError
from tec_cache.fields import Names, check_positive, check_range, setting


@dataclass(frozen=True, kw_only=True)
class JudgementSettings:
    """The probes of the encoder as it is, every few epochs."""

    TITLE: ClassVar[str] = "Periodic judgement"

    probe_every: int | None = setting(
        None, "Epochs between two probes of the encoder; the last step is always judged; 0: none.  [default: no probes]"
    )
    probe_train: str | None = setting(
        None, "Labelled photos that the probes learn from, as for extract, or a cache folder.", names=Names.LABELLED
    )
    probe_test: str | None = setting(
        None, "Labelled photos that the probes are judged on, or a cache folder.", names=Names.LABELLED
    )
    probe_limit: int | None = setting(None, "Use only the first N photos of each of the two.  [default: all]")
    probe_neighbours: int = setting(20, "Neighbours that vote for a photo's class.")

    def check_judgement(self) -> None:
        """Refuse a judgement of which a part is missing."""
        check_positive(self, "probe_limit", "probe_neighbours")
        check_range(self, 0, "probe_every")
        places = {"--probe-train": self.probe_train, "--probe-test": self.probe_test}
        asked = {"--probe-every": self.probe_every} | places
        missing = [option for option, value in asked.items() if not value]
        if missing and len(missing) < len(asked):
            raise ConfigError(
                f"a periodic judgement without {' and '.join(missing)}",
                todo="give all three: --probe-every N --probe-train SHARDS --probe-test SHARDS",
            )
