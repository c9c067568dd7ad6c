"""The settings of fine-tuning, linear probing and light tuning by name, and which of them a model asks for.

Plain tables without torch. Sources: the paper's table of fine-tuning, MAE's and AdaptFormer's programs; what none of
them says is this project's choice and named as such in `source`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from tec_cache.config import wanted_sets
from tec_cache.errors import ConfigError, nearest
from tec_cache.printable import counted

Tune = Literal["full", "head", "input-adapter", "adapters"]
"""What is trained beside the head: everything, nothing, the input adapter, or that and the encoder adapters."""
Rule = Literal["mae", "tec"]
"""Whose rules decide what is open: see `model.create_classifier`."""
OptimizerName = Literal["adamw", "sgd", "lars"]

FEW_IMAGES = 50_000
"""Below, the paper's recipes, made for 1.28 million images, are not taken unasked."""


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe:
    """One way of training a classifier. The peak learning rate is base_lr * batch_size / 256 * a group's scale."""

    source: str
    """Who says so, and what of it nobody says."""
    epochs: int
    warmup_epochs: int
    base_lr: float
    min_lr: float = 1e-6
    """Where the cosine ends, before a group's scale multiplies it."""
    batch_size: int = 1024
    """Of all processes together; what does not fill the last batch of an epoch is dropped."""
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    momentum: float = 0.9
    """Of SGD and LARS."""
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    """Of the learning rate from a layer to the one below it."""
    drop_path: float = 0.1
    mixup: float = 0.8
    """Alpha; 0 for none. One of mixup and cutmix is drawn for each batch, evenly where both are open."""
    cutmix: float = 1.0
    smoothing: float = 0.1
    reprob: float = 0.25
    """Chance of erasing a box of an image, filled with noise for each pixel."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of the augmentation's policy."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, of the photo's; its aspect lies within `crop_ratio`. Bicubic."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    """Chance of a horizontal flip."""
    test_crop: float = 0.875
    """Edge of the centre crop that is judged, of the photo's shorter edge."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, which takes batches of an even size."""
        return self.mixup > 0 or self.cutmix > 0


_PAPER = FinetuneRecipe(
    source="the paper's fine-tuning table; betas and crops are MAE's program's",
    epochs=100,
    warmup_epochs=20,
    base_lr=5e-4,
    layer_decay=0.65,
)

_PLAIN: dict[str, Any] = {
    "weight_decay": 0.0,
    "min_lr": 0.0,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "smoothing": 0.0,
    "reprob": 0.0,
    "auto_augment": None,
}
"""What the recipes with a frozen encoder share: a random crop and a flip, no more."""

RECIPES: dict[str, FinetuneRecipe] = {
    "mae-b-300": _PAPER,
    "mae-b-800": replace(_PAPER, layer_decay=0.55),
    "ibot-b-300": replace(_PAPER, layer_decay=0.50, warmup_epochs=5),
    "ibot-b-800": replace(_PAPER, layer_decay=0.55, warmup_epochs=5),
    "mae-l-300": replace(_PAPER, epochs=50, base_lr=1e-3, warmup_epochs=5, min_lr=1e-5),
    "small": replace(
        _PAPER,
        source="this project's choice for a few thousand photos, not tuned: images are neither mixed nor erased, "
        "which pays over many epochs only",
        epochs=30,
        warmup_epochs=5,
        base_lr=1e-3,
        batch_size=64,
        mixup=0.0,
        cutmix=0.0,
        reprob=0.0,
    ),
    "linear": FinetuneRecipe(
        source="MAE's linear probe",
        epochs=90,
        warmup_epochs=10,
        base_lr=0.1,
        batch_size=16384,
        optimizer="lars",
        **_PLAIN,
    ),
    "light": FinetuneRecipe(
        source="AdaptFormer's program; the batch is that of full fine-tuning, this project's choice",
        epochs=100,
        warmup_epochs=20,
        base_lr=0.1,
        batch_size=1024,
        optimizer="sgd",
        **_PLAIN,
    ),
}


class Chosen(NamedTuple):
    """A recipe, and why it is this one."""

    name: str
    recipe: FinetuneRecipe
    why: str


def rule_for(tune: Tune, rule: Rule | None) -> Rule:
    """Return the rule that was asked for, or the one that a way of tuning has: `tec` for adapters, else `mae`.

    Raises ConfigError for names that are not known, and for MAE's rule where there are adapters to tune.
    """
    for value, known, name in ((tune, get_args(Tune), "tune"), (rule or "mae", get_args(Rule), "rule")):
        if value not in known:
            near = nearest(str(value), known)
            raise ConfigError(f"unknown {name} {value!r}{near}", todo=f"one of {', '.join(known)}")
    with_adapters = tune in ("input-adapter", "adapters")
    if with_adapters and rule == "mae":
        raise ConfigError(f"MAE's rule knows no adapters, and {tune} tunes them", todo="leave the rule out, or tec")
    return rule or ("tec" if with_adapters else "mae")


def named_recipe(name: str) -> FinetuneRecipe:
    """Return a recipe by name. Raises ConfigError."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}{nearest(name, RECIPES)}", todo=f"one of {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_for(tune: Tune, rule: Rule | None, made_of: Mapping[str, Any], *, num_images: int | None = None) -> Chosen:
    """Choose the recipe of a model, and say why.

    made_of: `LoadedEncoder.made_of`. num_images: labelled images to train on; None where nobody counted them.
    A frozen encoder decides by what is tuned. Full fine-tuning of fewer than FEW_IMAGES takes `small`; of more, or of
    nobody knows how many, the paper's for an export whose configuration names a base, a size and epochs that are in
    its table. Raises ConfigError where none of this holds: no recipe is the right one then, and none is guessed.
    """
    rule = rule_for(tune, rule)
    if tune == "head" and rule == "mae":
        return Chosen("linear", RECIPES["linear"], "MAE's linear probe: the head alone is trained, on the class token")
    if tune != "full":
        return Chosen("light", RECIPES["light"], f"light tuning: the encoder's blocks are frozen, {tune} is trained")
    if num_images is not None and num_images < FEW_IMAGES:
        why = f"{counted(num_images, 'image')}; the paper's recipes are made for 1.28 million"
        return Chosen("small", RECIPES["small"], why)
    try:
        name, why = _of_paper(made_of)
    except (KeyError, TypeError, ValueError, AttributeError):
        name, why = "", "its configuration does not say what it was trained on"
    if not name:
        raise ConfigError(
            f"no recipe of full fine-tuning goes with this model by itself: {why}",
            todo=f"choose one: {', '.join(name for name in RECIPES if name not in ('linear', 'light'))}",
        )
    return Chosen(name, RECIPES[name], why)


_SHAPE = ("embed_dim", "depth", "num_heads", "mlp_ratio")
_BETWEEN = 550
"""Epochs from which the recipe for 800 is the nearer one."""


def _of_paper(made_of: Mapping[str, Any]) -> tuple[str, str]:
    """Return the row of the paper's table that an export belongs to, "" for none, and why."""
    settings = (made_of.get("export") or {}).get("settings")
    if not settings:
        return "", "it is no export of this program, so nothing says what it was trained on"
    config, targets = settings["config"], settings["targets"]
    if len(targets) > 1:
        return "", f"the paper's table has no row for {len(targets)} target sets"
    base = next(iter(wanted_sets(config["online"]))) if targets[0]["kind"] == "online" else targets[0].get("name")
    student, epochs = str(config["student"]), int(config["epochs"])
    changed = [name for name in _SHAPE if name in config["student_args"]]
    size = next((size for size in ("base", "large") if student.startswith(f"vit_{size}_patch16_")), None)
    rows = {("mae", "base"): "mae-b", ("ibot", "base"): "ibot-b", ("mae_large", "large"): "mae-l"}
    row = rows.get((str(base), str(size)))
    said = f"{student} on targets named {base or targets[0]['kind']}, {counted(epochs, 'epoch')}"
    if row is None or changed:
        of = f", with another {changed[0]}" if changed else ""
        return "", f"the paper's table has no row for {said}{of}"
    nearer = 300 if row == "mae-l" or epochs < _BETWEEN else 800
    name = f"{row}-{nearer}"
    return name, said if epochs == nearer else f"{said}: the nearest row of the paper's table"
