"""What `benchmarks.gain` asks: its configurations, its arms, and the models and judgements that they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

SIZE = 32
"""Pixels of a crop, per side."""
PIXELS, NEW, ROUNDS, UNTRAINED = "pixels", "new", "rounds", "untrained"
"""The kinds of models: masked autoencoder, new model of one, rounds, and what all begin with."""
VALID, TEST = "valid", "test"
"""The parts that models are judged on."""

ARMS = {
    "D": "the base alone: a masked autoencoder, E epochs",
    "C": "a new model from D's targets: random weights, E epochs",
    "B": "rounds: E/2 epochs of pixels, then three rounds of E/2, each from the targets of the one before, with its "
    "weights continued",
    "A": "the base trained for as many image passes as C with its base, and as B: a masked autoencoder, 2 E epochs, "
    "one schedule",
}
QUESTIONS = {
    "better than its base": (("C", "D"), ("B", "D")),
    "better than the same computing spent on the base": (("C", "A"), ("B", "A")),
}
CHOICE = (
    "E, where the configuration does not name it, is the first of the curve's epochs, its own first and last left out, "
    "after which twice as many gain less than `flat` points of fine-tuned accuracy on the validation part, mean over "
    "the curve's seeds; where there is none, the last but one, and the curve has then not flattened."
)


@dataclass(frozen=True, kw_only=True)
class Gain:
    """One configuration. Everything in it decides what comes out."""

    photos: int | None
    """Photos to learn from, the first of the shards; None: all but the validation part."""
    valid: int
    """Photos of the validation part: the last of the shards to learn from."""
    judged: int | None
    """Test photos, the first of theirs; None: all."""
    views: int
    """Stored crops of a photo; every arm learns from them."""
    patch: int
    width: int
    depth: int
    """Of the encoder: a multiple of 3, as the encoder adapters want it."""
    heads: int
    """Of encoder and decoder; the decoder is as wide as the encoder."""
    decoder_depth: int
    epochs: int
    """Of the curve's first point."""
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    at: int | None = None
    """E as a multiple, settled beforehand, so that arms need not wait for the curve; None: see CHOICE."""
    flat: float = 1.0
    """Points of accuracy: see CHOICE."""
    curve_seeds: int = 1
    seeds: int = 3
    batch_size: int = 64
    base_lr: float = 1.5e-3
    tune_epochs: int = 30
    tune_batch: int = 64
    tune_lr: float = 1e-3
    tenth_epochs: int = 100
    """Of fine-tuning on a tenth of the labels."""
    rounds: int = 4
    more_views: tuple[int, ...] = ()
    """Arm C again with so many of the stored views, to see what few views cost."""

    @classmethod
    def read(cls, values: dict[str, Any]) -> Gain:
        """Read what was written as JSON."""
        read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**read)

    def curve(self) -> list[int]:
        """Return the epochs of the base's curve."""
        return [self.epochs * multiple for multiple in self.multiples]


CPU = Gain(
    photos=1000, valid=5000, judged=None, views=8, patch=8, width=64, depth=6, heads=4, decoder_depth=1, epochs=24,
)  # fmt: skip
GPU = Gain(
    photos=5000, valid=5000, judged=None, views=8, patch=4, width=128, depth=6, heads=4, decoder_depth=1, epochs=20,
    at=8, batch_size=256, tune_batch=128,
)  # fmt: skip
ALL = Gain(
    photos=None, valid=5000, judged=None, views=8, patch=4, width=192, depth=12, heads=3, decoder_depth=2, epochs=8,
    at=8, batch_size=512, tune_batch=256,
)  # fmt: skip
CONFIGS = {"cpu": CPU, "gpu": GPU, "gpu-all": ALL}


class Model(NamedTuple):
    """One model to be made."""

    kind: str
    epochs: int
    seed: int
    views: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.kind}-{self.epochs}-views{self.views}-seed{self.seed}"

    @classmethod
    def named(cls, name: str) -> Model:
        """Read a name again."""
        kind, epochs, views, seed = name.split("-")
        return cls(kind, int(epochs), int(seed.removeprefix("seed")), int(views.removeprefix("views")))


class Job(NamedTuple):
    """Something to be done in a process of its own: a model made, or judged on one part."""

    model: Model
    what: str
    """make, valid or test."""

    @property
    def name(self) -> str:
        """Name of its result."""
        return f"{self.model.name}.{self.what}"

    def needs(self, config: Gain) -> list[Job]:
        """Return the jobs that must be done before."""
        model = self.model
        if self.what != "make" and model.kind != UNTRAINED:
            return [Job(model, "make")]
        return [Job(base_of(model, config), "make")] if model.kind in (NEW, UNTRAINED) else []


def base_of(model: Model, config: Gain) -> Model:
    """Return the masked autoencoder that a new model learns from, or whose shape an untrained one has."""
    return Model(PIXELS, model.epochs, model.seed, config.views)


def curve_jobs(config: Gain) -> list[Job]:
    """Return the jobs of the base's own curve, the longest first; none looks at a test photo."""
    models = [
        Model(PIXELS, epochs, seed, config.views)
        for epochs in reversed(config.curve())
        for seed in range(1, config.curve_seeds + 1)
    ]
    return [Job(model, what) for model in models for what in ("make", VALID)]


def chosen_epochs(config: Gain, valid: dict[int, float]) -> tuple[int, bool]:
    """Return E, and whether the curve had flattened there: see CHOICE. valid: epochs -> accuracy, 0 to 1."""
    curve = config.curve()
    if config.at is not None:
        epochs = config.epochs * config.at
        return epochs, 100 * (valid[2 * epochs] - valid[epochs]) < config.flat
    for epochs, twice in pairwise(curve):
        if 100 * (valid[twice] - valid[epochs]) < config.flat and epochs > curve[0]:
            return epochs, True
    return curve[-2], False


def arm(config: Gain, name: str, epochs: int, seed: int) -> Model:
    """Return the model of an arm."""
    made = {
        "untrained": (UNTRAINED, epochs),
        "D": (PIXELS, epochs),
        "C": (NEW, epochs),
        "B": (ROUNDS, epochs // 2),
        "A": (PIXELS, 2 * epochs),
    }
    kind, made_epochs = made[name]
    return Model(kind, made_epochs, seed, config.views)


def fewer_views(config: Gain, epochs: int, seed: int) -> Iterator[tuple[int, Model]]:
    """Yield arm C with other numbers of views."""
    for views in config.more_views:
        yield views, arm(config, "C", epochs, seed)._replace(views=views)


def arm_jobs(config: Gain, epochs: int) -> list[Job]:
    """Return the jobs of all arms, those first that take longest."""
    seeds = range(1, config.seeds + 1)
    models = [arm(config, name, epochs, seed) for name in ("B", "D", "A", "C", "untrained") for seed in seeds]
    models += [model for seed in seeds for _, model in fewer_views(config, epochs, seed)]
    makes = [Job(model, "make") for model in models if model.kind != UNTRAINED]
    return makes + [Job(model, TEST) for model in models]
