"""A trained student as a folder that timm loads: the encoder, with the input adapter folded in.

OUT/config.json is the export: it is written last, names the hashes of the weights, and goes before any of them is
replaced. So whatever a kill leaves is the old export, the new one, or a folder that timm and this program refuse.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tec_cache.documents import MOST_BYTES
from tec_cache.errors import TecCacheError, listed
from tec_cache.kinds import ADAPTERS_FILE, CARD_FILE, EXPORT_FILE, WEIGHTS_FILE
from tec_cache.model_card import model_card, run_metadata
from tec_cache.recipes import IMAGENET_MEAN, IMAGENET_STD
from tec_cache.store.files import draft_of, drafts_of, hash_file, make_folder, sync_file, sync_folder
from tec_cache.store.local import read_regular
from tec_cache.student.model import Student
from tec_cache.weights.writing import weights_bytes

INPUT_ADAPTER, ENCODER_ADAPTERS = "input_adapter.", "encoder_adapters."
"""How the names in ADAPTERS_FILE begin."""
OF_SET = "encoder_adapters/"
"""The same, before a target set's name and a dot, where several sets have encoder adapters of their own."""
CLASS_TOKEN = INPUT_ADAPTER + "class_token"

_NAMED = {WEIGHTS_FILE: "model_sha256", ADAPTERS_FILE: "adapters_sha256", CARD_FILE: "card_sha256"}
"""Files whose hashes config.json names, and as what."""


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors whose names begin so, by the rest of these; None where there are none."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)} or None


def export_state(student: Student) -> dict[str, torch.Tensor]:
    """Return the encoder's weights under timm's names, CPU float32.

    T' = MLP(T) does not depend on the image, so it simply replaces the class token. It is computed on the CPU, so that
    it is the same to the bit wherever the student lies. Raises TecCacheError for a weight that is not finite, as T' may
    be although all others are.
    """
    state = _plain(student.encoder)
    if student.input_adapter is not None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            state["cls_token"] = copy.deepcopy(student.input_adapter).cpu()(state["cls_token"]).contiguous()
    return _finite(state, "the exported model")


def adapters_state(student: Student) -> dict[str, torch.Tensor]:
    """Return what fine-tuning takes beside the encoder, CPU float32; empty for a student without adapters.

    input_adapter.class_token: T (1, 1, C), as it was before MLP(T) replaced it. input_adapter.NAME: that MLP.
    encoder_adapters.NAME: what makes Z_e; where each of several target sets has its own, encoder_adapters/SET.NAME.
    Raises TecCacheError for a weight that is not finite.
    """
    state: dict[str, torch.Tensor] = {}
    if student.input_adapter is not None:
        state[CLASS_TOKEN] = student.encoder.cls_token.detach().cpu().float().contiguous()
        state |= {INPUT_ADAPTER + name: value for name, value in _plain(student.input_adapter).items()}
    own = len(student.encoder_adapters) > 1
    for goal, module in zip(student.goals, student.encoder_adapters, strict=False):
        part = f"{OF_SET}{goal}." if own else ENCODER_ADAPTERS
        state |= {part + name: value for name, value in _plain(module).items()}
    return _finite(state, "the exported adapters")


def _finite(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    for name, value in state.items():
        if not value.isfinite().all():
            raise TecCacheError(
                f"{name} of {what} is not finite", todo="export an earlier checkpoint with --checkpoint"
            )
    return state


def _plain(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().float().contiguous() for name, value in model.state_dict().items()}


def write_export(
    student: Student,
    out: Path,
    *,
    config: dict[str, Any],
    encoder_name: str,
    model_args: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Write model.safetensors and config.json (timm's local-dir layout), and the adapters beside them.

    config: how the run was made, kept in config.json under "tec_cache" for whoever asks later; the weights' hashes
    join it. overwrite: replace an export that is there. Raises TecCacheError where OUT holds anything else.
    """
    encoder: Any = student.encoder
    description = describe(
        encoder_name,
        model_args,
        size=int(encoder.patch_embed.img_size[0]),
        width=encoder.embed_dim,
        statistics=(IMAGENET_MEAN, IMAGENET_STD),
    )
    write_model(out, export_state(student), adapters_state(student), description, config, overwrite=overwrite)


def write_model(
    out: Path,
    state: dict[str, torch.Tensor],
    adapters: dict[str, torch.Tensor],
    description: dict[str, Any],
    made: dict[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write a model's weights, its adapters where it has any, its card, and config.json: the last, with all hashes.

    state, adapters: CPU float32. description: of `describe`. made: kept under "tec_cache"; what of it tells the run is
    in the weight files' metadata too. Raises TecCacheError where OUT holds anything else than an export that may be
    replaced.
    """
    require_free(out, overwrite=overwrite)
    metadata = run_metadata(made)
    files = {WEIGHTS_FILE: weights_bytes(state, metadata)}
    if adapters:
        files[ADAPTERS_FILE] = weights_bytes(adapters, metadata)
    of_model = {"model_sha256": hashlib.sha256(files[WEIGHTS_FILE]).hexdigest()}
    files[CARD_FILE] = model_card(description, made | of_model).encode()
    hashes = {of: hashlib.sha256(files[name]).hexdigest() if name in files else None for name, of in _NAMED.items()}
    whole = description | {"tec_cache": made | hashes}
    files[EXPORT_FILE] = json.dumps(whole, indent=2).encode() + b"\n"
    with _alone(out):
        require_free(out, overwrite=overwrite)
        _replace(out, files)


def describe(
    architecture: str,
    model_args: dict[str, Any],
    *,
    size: int,
    width: int,
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]],
    pool: str = "token",
    num_classes: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return what timm and transformers read in config.json.

    size: pixels per side; width: of a token; statistics: mean and deviation of the pixels; names: of the classes.
    num_classes stands beside model_args, not in them: transformers passes its own number with them.
    """
    labels = {} if names is None else {"label_names": list(names)}
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": width,
        "global_pool": pool,
        "model_args": model_args | {"img_size": size},
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": list(statistics[0]),
            "std": list(statistics[1]),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "unspecified",
            **labels,
        },
        **labels,
    }


def require_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds an export, unless it may be replaced, and one that holds anything else."""
    foreign = [name for name in _names(out) if not _is_ours(out, name)]
    if foreign:
        raise TecCacheError(
            f"this folder holds something that is no export of tec-cache: {listed(foreign)}",
            where=str(out),
            todo="name another OUT; what lies here can only be removed by you",
        )
    if (out / EXPORT_FILE).exists() and not overwrite:
        raise TecCacheError("there is an export here already", where=str(out), todo="name another OUT, or --overwrite")


def _names(out: Path) -> list[str]:
    """List what lies in a folder, and in its folder of adapters, by names relative to it."""
    adapters = (out / ADAPTERS_FILE).parent
    entries = sorted(out.iterdir()) if out.is_dir() else []
    inside = sorted(adapters.iterdir()) if adapters.is_dir() else []
    return [str(p.relative_to(out)) for p in (*(p for p in entries if not (p == adapters and p.is_dir())), *inside)]


def _is_ours(out: Path, name: str) -> bool:
    """Say whether this program provably wrote a file: by a draft's exact name, or by a hash that a config.json names.

    That may be one that a killed export had put away, or had not put in place yet: both bear a draft's name.
    """
    path = out / name
    if not path.is_file():
        return False
    if name == EXPORT_FILE:
        return bool(_named_hashes(path))
    if name in _NAMED:
        configs = (out / EXPORT_FILE, *_drafts(out, EXPORT_FILE))
        return hash_file(path) in set().union(*map(_named_hashes, configs))
    return any(path in _drafts(out, of) for of in (EXPORT_FILE, *_NAMED))


def _named_hashes(config: Path) -> set[str]:
    """Return the hashes of files that a config.json of ours names, none for a file that is something else.

    Exports of earlier versions have no card.
    """
    try:
        made = json.loads(read_regular(config, MOST_BYTES))["tec_cache"]
        return {made["model_sha256"], made["adapters_sha256"], made.get("card_sha256")} - {None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _drafts(out: Path, name: str) -> list[Path]:
    """List the files beside `name` that bear the name of a draft of it."""
    pattern, folder = drafts_of(re.escape(Path(name).name)), (out / name).parent
    return [p for p in folder.iterdir() if pattern.fullmatch(p.name)] if folder.is_dir() else []


def _replace(out: Path, files: dict[str, bytes]) -> None:
    """Put files, the last of them config.json, in the place of an export.

    At every moment each other file is named by some config.json, in place or as a draft: the old ones go last.
    """
    for left in [draft for name in _NAMED for draft in _drafts(out, name)]:
        left.unlink()
    outdated = _drafts(out, EXPORT_FILE)
    drafts = _write_drafts(out, files)
    if (out / EXPORT_FILE).exists():
        outdated.append(draft_of(out / EXPORT_FILE))
        os.replace(out / EXPORT_FILE, outdated[-1])
        sync_folder(out)
    adapters = (out / ADAPTERS_FILE).parent
    if ADAPTERS_FILE not in files and adapters.is_dir():
        (out / ADAPTERS_FILE).unlink(missing_ok=True)
        adapters.rmdir()
    for name, draft in drafts.items():
        os.replace(draft, out / name)
        sync_folder(draft.parent)
    for config in outdated:
        config.unlink()


def _write_drafts(out: Path, files: dict[str, bytes]) -> dict[str, Path]:
    """Write files durably under names of drafts, all of them or none."""
    drafts = {name: draft_of(out / name) for name in files}
    try:
        for name, draft in drafts.items():
            make_folder(draft.parent)
            draft.write_bytes(files[name])
            sync_file(draft)
            sync_folder(draft.parent)
    except OSError:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
        raise
    return drafts


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep other exports from the folder for the length of the block."""
    handle = os.open(make_folder(out), os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise TecCacheError("another export is writing here", where=str(out), todo="wait until it is done") from error
    finally:
        os.close(handle)
