"""Which setting is used when. One that was given and changes nothing is a mistake, and is refused.

Every field of every config has its line here: `ALWAYS`, or the conditions under which it is used. Only what the
settings say of each other is asked; what a cache or a machine makes of them is the programs' to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from tec_cache.codec.quality import Quality
from tec_cache.errors import ConfigError


class Condition(NamedTuple):
    """When a setting is used, and why it is not otherwise."""

    holds: Callable[[Any], bool]
    """Takes the config."""
    otherwise: str


Conditions = tuple[Condition, ...]

ALWAYS: Conditions = ()

_TARGETS = Condition(lambda c: not c.views_only, "--views-only makes no targets")
_NAMED = Condition(lambda c: bool(c.base or c.name), "no base was named")
_PHOTOS = Condition(lambda c: c.input is not None, "no photos were given")
_RANDOM_CROP = Condition(lambda c: c.crop != "center", "a centre crop is always the same")
_FITTED = Condition(lambda c: c.quality is None or Quality.parse(c.quality).fitted, "its quality needs no fit")
_CPU = Condition(lambda c: not c.device.startswith("cuda"), "they are a CPU's, and the device is a GPU")
_BASE = Condition(lambda c: not c.pixels, "pixels have no base")
_ATTENTION = Condition(lambda c: not c.pixels and c.k != "none", "there is no attention target")
_ATTENTION_LOSS = Condition(lambda c: c.attention_weight > 0, "the attention loss has the weight 0")
_CLASS_LOSS = Condition(lambda c: c.class_weight > 0, "the class-token loss has the weight 0")
_OWN_WEIGHTS = Condition(
    lambda c: bool(c.online) or c.init == "base", "the base is loaded for --online and --init base only"
)
_ONLINE = Condition(lambda c: bool(c.online), "the base runs with --online only; a target set has its own")
_SEVERAL = Condition(
    lambda c: len(c.target) > 1 or c.target == ("all",) or len(c.online) > 1, "there is one target set"
)
_FUSED = Condition(lambda c: c.adapters in ("both", "encoder"), "there are no encoder adapters")
_BLOCKS = Condition(lambda c: c.decoder_depth > 0, "a decoder of depth 0 has no blocks")
_STAGE = Condition(lambda c: c.stage is not None, "copies are made where --stage names a folder")
_PROBED = Condition(lambda c: bool(c.probe_every), "nothing is judged without --probe-every")
_TRAINED = Condition(lambda c: not c.model.startswith("random:"), "a random model has none")
_ADAPTERS = Condition(
    lambda c: c.tune in ("input-adapter", "adapters") or c.rule == "tec", "there are no adapters in this tuning"
)
_WHOLE = Condition(lambda c: c.tune == "full", "the encoder's blocks are frozen")
_MOMENTUM = Condition(lambda c: c.optimizer != "adamw", "AdamW has betas instead")
_ADAMW = Condition(lambda c: c.optimizer in (None, "adamw"), "they are AdamW's")
_PLANNED_PHOTOS = Condition(lambda c: c.extract.input is not None, "no photos were given")
_ROUNDS = Condition(lambda c: c.rounds > 1, "a single round makes no target set")
_NEXT_ROUND = Condition(lambda c: c.rounds > 1, "a single round has no next one")
_PLANNED_TRAINING = Condition(lambda c: bool(c.extract.base or c.extract.name), "without a base no training is planned")

_TUNING: dict[str, Conditions] = {
    "model": ALWAYS,
    "weights": (_TRAINED,),
    "mean": ALWAYS,
    "std": ALWAYS,
    "base_args": ALWAYS,
    "grid": ALWAYS,
    "train": ALWAYS,
    "test": ALWAYS,
    "select": ALWAYS,
    "classes": ALWAYS,
    "on_error": ALWAYS,
    "judge_every": ALWAYS,
    "tune": ALWAYS,
    "recipe": ALWAYS,
    "layer_decay": (_WHOLE,),
    "drop_path": (_WHOLE,),
    "out": ALWAYS,
    "steps": ALWAYS,
    "seed": ALWAYS,
    "log_every": ALWAYS,
    "save_every": ALWAYS,
    "save_minutes": ALWAYS,
    "epochs": ALWAYS,
    "warmup_epochs": ALWAYS,
    "batch_size": ALWAYS,
    "micro_batch": ALWAYS,
    "base_lr": ALWAYS,
    "min_lr": ALWAYS,
    "schedule": ALWAYS,
    "weight_decay": ALWAYS,
    "clip_grad": ALWAYS,
    "device": ALWAYS,
    "precision": ALWAYS,
    "threads": (_CPU,),
    "workers": ALWAYS,
    "compile": ALWAYS,
    "checkpointing": ALWAYS,
}
"""What the programs that tune an encoder have in common."""

USED: dict[str, dict[str, Conditions]] = {
    "ExtractConfig": {
        "input": ALWAYS,
        "cache": ALWAYS,
        "base": (_TARGETS,),
        "base_weights": (_TARGETS,),
        "mean": (_TARGETS, _NAMED),
        "std": (_TARGETS, _NAMED),
        "base_args": (_TARGETS, _NAMED),
        "name": (_TARGETS,),
        "views_only": ALWAYS,
        # how the views are cut: compared with the cache where no photos are given
        "views": ALWAYS,
        "size": ALWAYS,
        "grid": ALWAYS,
        "crop": ALWAYS,
        "scale": (_RANDOM_CROP,),
        "flip": (_RANDOM_CROP,),
        "seed": ALWAYS,  # also of the order in which a folder is cut into shards
        "jpeg_quality": ALWAYS,
        "jpeg_subsampling": ALWAYS,
        "group_size": ALWAYS,
        "limit": (_PHOTOS,),
        "classes": (_PHOTOS,),
        "label_field": (_PHOTOS,),
        "k": (_TARGETS,),
        "class_target": (_TARGETS,),
        "normalization": (_TARGETS,),
        "last_layers": (_TARGETS,),
        "quality": (_TARGETS,),
        "fit_views": (_TARGETS, _FITTED),
        "batch_size": (_TARGETS,),
        "threads": (_TARGETS, _CPU),
        "precision": (_TARGETS,),
        "device": (_TARGETS,),
        "workers": ALWAYS,  # they decode stored crops too
        "on_error": (_PHOTOS,),
        "part": ALWAYS,
    },
    "TrainConfig": {
        "cache": ALWAYS,
        "out": ALWAYS,
        # one of these three, or none
        "target": ALWAYS,
        "online": ALWAYS,
        "pixels": ALWAYS,
        "base_weights": (_BASE, _OWN_WEIGHTS),
        "mean": (_BASE, _ONLINE),
        "std": (_BASE, _ONLINE),
        "base_args": (_BASE, _ONLINE),
        "student": ALWAYS,
        "student_args": ALWAYS,
        "adapters": ALWAYS,
        "adapters_shared": (_FUSED, _SEVERAL),
        "init": ALWAYS,
        "decoder_depth": ALWAYS,
        "decoder_width": ALWAYS,
        "decoder_heads": (_BLOCKS,),
        "mask_ratio": ALWAYS,
        "tau": (_ATTENTION, _ATTENTION_LOSS),
        "k": (_BASE,),
        "class_target": (_ONLINE, _CLASS_LOSS),
        # compared with the target set where there is one
        "normalization": (_BASE,),
        "last_layers": (_BASE,),
        "feature_weight": ALWAYS,
        "attention_weight": (_ATTENTION,),
        "class_weight": (_BASE,),
        "balance": (_SEVERAL,),
        "partial": ALWAYS,
        "views": ALWAYS,
        "epochs": ALWAYS,
        "steps": ALWAYS,
        "warmup_epochs": ALWAYS,
        "batch_size": ALWAYS,
        "micro_batch": ALWAYS,
        "masks_per_view": ALWAYS,
        "shuffle_buffer": ALWAYS,
        "base_lr": ALWAYS,
        "min_lr": ALWAYS,
        "schedule": ALWAYS,
        "weight_decay": ALWAYS,
        "beta1": ALWAYS,
        "beta2": ALWAYS,
        "clip_grad": ALWAYS,
        "seed": ALWAYS,
        "device": ALWAYS,
        "precision": ALWAYS,
        "threads": (_CPU,),
        "workers": ALWAYS,
        "compile": ALWAYS,
        "checkpointing": ALWAYS,
        "stage": ALWAYS,
        "stage_bytes": (_STAGE,),
        "on_error": ALWAYS,
        "log_every": ALWAYS,
        "save_every": ALWAYS,
        "save_minutes": ALWAYS,
        # all of these three, or none
        "probe_every": ALWAYS,
        "probe_train": ALWAYS,
        "probe_test": ALWAYS,
        "probe_limit": (_PROBED,),
        "probe_neighbours": (_PROBED,),
    },
    "FinetuneConfig": {
        **_TUNING,
        "label_field": ALWAYS,
        "rule": ALWAYS,
        "adapters_from": (_ADAPTERS,),
        "mixup": ALWAYS,
        "cutmix": ALWAYS,
        "smoothing": ALWAYS,
        "auto_augment": ALWAYS,
        "reprob": ALWAYS,
        "crop_scale": ALWAYS,
        "crop_ratio": ALWAYS,
        "flip": ALWAYS,
        "optimizer": ALWAYS,
        "momentum": (_MOMENTUM,),
        "beta1": (_ADAMW,),
        "beta2": (_ADAMW,),
    },
    "SegmentConfig": {
        **_TUNING,
        "ignore": ALWAYS,
        "head": ALWAYS,
        "crop_scale": ALWAYS,
        "jitter": ALWAYS,
        "colour": ALWAYS,
        "grey": ALWAYS,
        "blur": ALWAYS,
        "save_predictions": ALWAYS,
        "beta1": ALWAYS,
        "beta2": ALWAYS,
    },
    "ProbeConfig": {
        "model": ALWAYS,
        "train": ALWAYS,
        "test": ALWAYS,
        "weights": (_TRAINED,),
        "mean": ALWAYS,
        "std": ALWAYS,
        "base_args": ALWAYS,
        "grid": ALWAYS,
        "pool": ALWAYS,
        "neighbours": ALWAYS,
        "batch_size": ALWAYS,
        "limit": ALWAYS,
        "l2": ALWAYS,
        "device": ALWAYS,
        "precision": ALWAYS,
        "workers": ALWAYS,
        "on_error": ALWAYS,
    },
    "RoundsConfig": {
        "train": ALWAYS,
        "extract": (_ROUNDS,),
        # one of these two, or none where the cache has one target set
        "target": ALWAYS,
        "pixels": ALWAYS,
        "rounds": ALWAYS,
        "start": (_NEXT_ROUND,),
        "keep": (_ROUNDS,),
        "name": (_ROUNDS,),
        "seconds": ALWAYS,
    },
    "PlanConfig": {
        "extract": ALWAYS,
        "train": (_PLANNED_TRAINING,),
        "images": (_PLANNED_PHOTOS,),
        "seconds": ALWAYS,
    },
}
"""Config -> field -> all that must hold for it to be used."""


def is_used(config: Any, name: str) -> bool:
    """Say whether a config uses a setting."""
    return all(condition.holds(config) for condition in USED[type(config).__name__][name])


def require_used(config: Any, given: Iterable[str], options: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError naming every setting among `given` that this config does not use, and why.

    options: how a setting is spelled where that is not --its-name.
    """
    conditions = USED[type(config).__name__]
    unused: dict[str, str] = {}
    for name in given:
        failed = next((c for c in conditions[name] if not c.holds(config)), None)
        if failed is not None:
            unused[(options or {}).get(name) or "--" + name.replace("_", "-")] = failed.otherwise
    if not unused:
        return
    todo = "leave it out" if len(unused) == 1 else "leave them out"
    if len(set(unused.values())) == 1:
        raise ConfigError(f"not used: {', '.join(unused)}; {next(iter(unused.values()))}", todo=todo)
    raise ConfigError("not used:", details=[f"{option}: {why}" for option, why in unused.items()], todo=todo)
