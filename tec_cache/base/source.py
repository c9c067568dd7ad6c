"""What a base's name, its folder or its file says of it before any weight is loaded into a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tec_cache.base import folders
from tec_cache.base.statistics import colours, config_of, pixel_statistics, three
from tec_cache.errors import ConfigError, WeightsError, nearest
from tec_cache.model_args import BASE_ARGS, check_model_args
from tec_cache.recipes import BASES, BaseRecipe, of_generation, unknown_base
from tec_cache.types import Colours
from tec_cache.weights.files import Weights, read_weights
from tec_cache.weights.releases import IMAGENET, RELEASES, release_of_tag


@dataclass(frozen=True)
class Given:
    """What a user says of a base that its name and files do not, or not rightly."""

    mean: Colours | None = None
    std: Colours | None = None
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the architecture, of `model_args.BASE_ARGS`."""

    def to_json(self) -> dict[str, Any]:
        """Return what was given as plain values."""
        values = {"mean": self.mean and list(self.mean), "std": self.std and list(self.std), "args": self.args}
        return {name: value for name, value in values.items() if value}

    @classmethod
    def of(cls, mean: Any, std: Any, args: Any) -> Given:
        """Check what a user says, each part or None. Raises ConfigError."""
        checked = check_model_args(args or {}, "--base-arg", BASE_ARGS)
        foreign = sorted(set(checked) & set(folders.NOT_OF_A_BASE))
        if foreign:
            raise ConfigError(f"--base-arg {foreign[0]}: the input follows from --grid, and a base has no head")
        statistics: list[Colours | None] = []
        for name, values in (("mean", mean), ("std", std)):
            try:
                statistics.append(None if values is None else three(values, name, "", positive=name == "std"))
            except WeightsError as error:
                raise ConfigError(f"--{name}: {error.what}", todo="give R G B, of pixels from 0 to 1") from error
        return cls(statistics[0], statistics[1], checked)

    @classmethod
    def from_json(cls, values: Any) -> Given:
        """Return what `to_json` wrote; nothing at all for None."""
        values = values if isinstance(values, dict) else {}
        return cls.of(values.get("mean"), values.get("std"), values.get("args"))

    def over(self, other: Given) -> Given:
        """Return this, with what it leaves open taken from `other`."""
        return Given(self.mean or other.mean, self.std or other.std, self.args or other.args)


@dataclass(frozen=True)
class Source:
    """Where a base comes from, before anything is loaded."""

    timm_name: str
    """Architecture, with the tag of weights in timm's hub where there is one."""
    model_args: dict[str, Any]
    weights: Path | None
    """A local file; None where timm's hub has the weights."""
    mean: Colours
    std: Colours
    origin: str
    """Who says so of mean and deviation."""
    firm: bool
    """Whether they were stated for these weights, or only for others of the same architecture."""
    release: str | None = None
    """Release of the weights that were named."""
    says: str = ""
    """Who gave `model_args`, where they are not the architecture's own."""
    notes: tuple[str, ...] = ()
    model_sha256: str | None = None
    """Of the weight file's bytes, where the configuration beside it names them."""
    native_pixels: int | None = None
    """Edge of the images that it was trained on, where that is stated."""
    read: Weights | None = None
    """The weights, where they had to be read to know the rest."""

    @property
    def architecture(self) -> str:
        """timm's name without tag."""
        return self.timm_name.partition(".")[0]


def find_source(name: str, weights: str | Path | None) -> Source:
    """Resolve a base's name to an architecture, pixel statistics and a place of weights.

    Raises ConfigError for names that nobody knows, WeightsError for folders and files that do not say enough.
    """
    file = Path(weights) if weights is not None else None
    if name in BASES:
        return _known(BASES[name], file)
    if name.startswith("timm:"):
        return _named(name.removeprefix("timm:"), file)
    path = Path(name)
    if path.is_dir():
        found = folders.read_folder(path)
        mean, std = found.statistics or pixel_statistics(found.timm_name)
        own = file is None
        return Source(
            found.timm_name,
            found.model_args,
            found.weights if file is None else file,
            mean,
            std,
            found.origin if found.statistics else f"timm's {found.timm_name}, for the folder does not say",
            firm=found.statistics is not None,
            release=found.release,
            says=found.says,
            model_sha256=found.model_sha256 if own else None,
            native_pixels=found.native_pixels,
        )
    if path.is_file():
        return _bare_file(path, file)
    raise _no_such_base(name)


def _no_such_base(name: str) -> ConfigError:
    """Return the error for a name that nobody knows, or that lacks what says that it is timm's."""
    import timm

    architecture = name.partition(".")[0]
    if "/" not in name and timm.is_model(architecture):
        return ConfigError(
            f"unknown base {name!r}: it is a name of timm's, which is given with timm: before it",
            todo=f"--base timm:{name}",
        )
    if "/" not in name and "_patch" in name:
        near = nearest(f"timm:{architecture}", (f"timm:{one}" for one in of_generation(name, timm.list_models())))
        return ConfigError(f"unknown base {name!r}{near}", todo="--base timm:NAME; see timm.list_models('vit*')")
    return unknown_base(name)


def _known(recipe: BaseRecipe, file: Path | None) -> Source:
    """Resolve a base with a name of its own: pixel statistics are its release's, or timm's where that has several."""
    import timm

    architecture, release = recipe.timm_name.partition(".")[0], RELEASES[recipe.release]
    if not timm.is_model(architecture):
        raise ConfigError(
            f"timm {timm.__version__} has no {architecture}", where=recipe.timm_name, todo="pip install --upgrade timm"
        )
    mean, std = release.statistics or pixel_statistics(recipe.timm_name)
    origin = f"{release.title}'s" if release.statistics else f"timm's {recipe.timm_name}"
    notes = (_RADIO,) if recipe.release == "radio" else ()
    return Source(recipe.timm_name, {}, file, mean, std, origin, firm=True, release=recipe.release, notes=notes)


_RADIO = "timm keeps positions for 32 x 32 patches of RADIO's 128 x 128: other grids are interpolated from those"


def _named(timm_name: str, file: Path | None) -> Source:
    """Resolve a name of timm's; only its own architectures, for a place may bring arguments of anybody's."""
    scheme, colon, place = timm_name.partition(":")
    if colon:
        local = scheme in ("local-dir", "local_dir")
        what = f"timm:{scheme}: is read by this program itself" if local else f"{scheme}: is not read"
        folder = place if local else "FOLDER"
        todo = f"give the folder: --base {folder}" + ("" if local else ", with its files downloaded beforehand")
        raise ConfigError(what, where=f"timm:{timm_name}", todo=todo)
    config = config_of(timm_name)
    mean, std = colours(config.mean), colours(config.std)
    architecture, _, tag = timm_name.partition(".")
    exact = bool(tag) or file is None
    default = getattr(config, "tag", None)
    which = timm_name if tag or not default else f"{timm_name} ({default})"
    notes = tuple(str(note) for note in config.notes or ()) if exact else ()
    release = release_of_tag(tag or str(default or "")) if exact else None
    if any("quickgelu" in note.lower() for note in notes) and "quickgelu" not in architecture:
        # timm has these weights under two classes and says in its notes that this one is not theirs
        native = architecture.replace("_clip_", "_clip_quickgelu_")
        said = f"taken as timm:{native}, because timm's notes say so"
        return Source(
            _with_tag(native, tag or default), {}, file, mean, std, f"timm's {which}", True, release,
            notes=(*notes, said),
        )  # fmt: skip
    return Source(timm_name, {}, file, mean, std, f"timm's {which}", exact, release, notes=notes)


def _with_tag(architecture: str, tag: str | None) -> str:
    return f"{architecture}.{tag}" if tag else architecture


# A weight file alone does not say how many heads it has; these are the widths of the field's plain ViTs.
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}


def _bare_file(path: Path, weights: Path | None) -> Source:
    """Guess the architecture of a bare weight file from its shapes, or refuse."""
    if weights is not None:
        raise ConfigError(
            "a base that is itself a file takes no --base-weights",
            where=str(path),
            todo="name the architecture: --base timm:NAME --base-weights FILE",
        )
    read = read_weights(path)
    state = read.state
    patch = state.get("patch_embed.proj.weight")
    size = _SIZES.get(int(patch.shape[0])) if patch is not None and patch.ndim == 4 else None
    if patch is None or size is None or "cls_token" not in state:
        raise WeightsError(
            "the architecture cannot be told from this file alone",
            where=str(path),
            todo="name it: --base timm:NAME --base-weights FILE",
        )
    import timm

    timm_name = _guess(read, size, int(patch.shape[-1]))
    if not timm.is_model(timm_name):
        raise WeightsError(
            f"no plain vision transformer of width {patch.shape[0]} and patch {patch.shape[-1]} is known",
            where=str(path),
            todo="name it: --base timm:NAME --base-weights FILE",
        )
    mean, std = IMAGENET
    origin = "ImageNet's by default, for the file does not say"
    return Source(timm_name, {}, path, mean, std, origin, firm=False, read=read)


def _guess(read: Weights, size: str, patch: int) -> str:
    """Return timm's name of the plain ViT of a size, with what the file's names add."""
    state = read.state
    if "blocks.0.gamma_1" in state and read.release == "dinov3":
        plus = "_plus" if "blocks.0.mlp.fc1_g.weight" in state else ""
        biases = "_qkvb" if "blocks.0.attn.q_bias" in state else ""
        return f"vit_{size}{plus}_patch{patch}_dinov3{biases}"
    if "blocks.0.ls1.gamma" in state:
        registers = "reg4_" if "reg_token" in state else ""
        return f"vit_{size}_patch14_{registers}dinov2"
    if "norm_pre.weight" in state:
        return f"vit_{size}_patch{patch}_clip_224"
    return f"vit_{size}_patch{patch}_224"


def default_name(base: str) -> str:
    """Name a target set after its base: a known name, timm's name, or the last part of a path."""
    if base.startswith("timm:"):
        return base.removeprefix("timm:")
    return Path(base).stem if Path(base).is_file() else Path(base).name or base
