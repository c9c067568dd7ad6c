"""What a weight file holds, read without running anything that it contains."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tec_cache.errors import WeightsError
from tec_cache.paths import encodable

RELEASES = (
    "give a release of MAE, DINO, iBOT, MoCo v3, DINOv2, DINOv3, CLIP or TEC, a file of the transformers library, "
    "or one with timm's names"
)
"""The remedy where a file holds no encoder that is known."""

INDEX = ".index.json"
"""How the name of an index of weights in several files ends, as transformers writes it."""
MOST_INDEX_BYTES = 64 * 1024 * 1024
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.(safetensors|bin)")


def load_content(path: Path) -> dict[Any, Any]:
    """Return what a weight file, or an index of several, holds as a dict.

    Only tensors, plain containers and a few inert stand-ins are built. Raises WeightsError for a file that is
    missing, damaged, or would run code.
    """
    where = str(path)
    if path.is_dir():
        raise WeightsError(
            "a folder is not a weight file: which of its files holds the weights would be a guess",
            where=where,
            todo="give the .pth, .pt, .bin or .safetensors file inside it; or the folder itself as --base",
        )
    if not path.is_file():
        raise WeightsError("no such weight file", where=where, todo="check the path; nothing is downloaded")
    if path.name.endswith(INDEX):
        return _load_shards(path)
    # Everything is caught: a damaged file can fail anywhere inside the readers, with any exception.
    try:
        if path.suffix == ".safetensors":
            with encodable(path) as name:
                content: Any = load_file(name, device="cpu")
        else:
            with torch.serialization.safe_globals(_SAFE_GLOBALS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _unreadable(error, where) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"the file holds a {type(content).__name__}, not a dict of tensors", where=where, todo=RELEASES
        )
    return dict(content)


def _unreadable(error: Exception, where: str) -> WeightsError:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return WeightsError(
            f"refused to unpickle {refused[1]}: a weight file may not run code",
            where=where,
            todo="if you trust the file, load it elsewhere and save only its tensors as .safetensors",
        )
    if "TorchScript" in str(error):
        return WeightsError(
            "a TorchScript program, which holds code beside its weights (OpenAI publishes CLIP so)",
            where=where,
            todo="if you trust it, save torch.jit.load(FILE).state_dict() as .safetensors and give that",
        )
    # torch wraps the unpickler's reason in advice to switch its safety off, which is not ours to pass on.
    inner = error.__context__ or error
    reason = " ".join([f"{type(inner).__name__}:", *str(inner).splitlines()[:1]])[:200]
    return WeightsError(
        f"not a checkpoint that can be read, or a truncated one ({reason})",
        where=where,
        todo="compare size and checksum with the release and fetch it again; or save it as .safetensors",
    )


def read_json(path: Path, most_bytes: int = MOST_INDEX_BYTES) -> dict[str, Any]:
    """Read a JSON object that somebody else wrote. Raises WeightsError for anything else, or too much of it."""
    where = str(path)
    try:
        if path.stat().st_size > most_bytes:
            what = f"{path.stat().st_size:,} bytes are no configuration: at most {most_bytes:,} are read"
            raise WeightsError(what, where=where)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise WeightsError(f"cannot be read: {reason}", where=where, todo="fetch it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"holds a {type(value).__name__}, not an object", where=where, todo="fetch it again")
    return value


def _load_shards(index: Path) -> dict[Any, Any]:
    """Join the files that an index names; each must lie beside it, and hold the tensors that it is said to."""
    where, names = str(index), read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError("an index without weight_map", where=where, todo="fetch it again")
    content: dict[Any, Any] = {}
    for file in sorted({str(file) for file in names.values()}):
        if not _SHARD.fullmatch(file):
            raise WeightsError(
                f"the index names {file!r}, which is not a file beside it", where=where, todo="do not trust this folder"
            )
        part = load_content(index.parent / file)
        twice = sorted(str(name) for name in part if name in content)
        if twice:
            raise WeightsError(f"{twice[0]!r} is in two files", where=where, todo="fetch them again")
        content |= part
    lost = sorted(str(name) for name in names if name not in content)
    if lost:
        raise WeightsError(f"{lost[0]!r} is in none of the files of the index", where=where, todo="fetch them again")
    return content


def _stand_in(module: str, name: str) -> type:
    """Return a class that torch's unpickler takes for `module.name` and that does nothing.

    Checkpoints keep NumPy scalars in their options (a best accuracy, a learning rate). Nothing here
    reads those, so no NumPy code has to run for them, and one list serves NumPy 1 and 2 alike.
    torch 2.5 looks at `__name__`, later versions at `__qualname__`.
    """

    def ignore(self: object, *args: object) -> None:
        pass

    body = {"__module__": module, "__qualname__": name, "__init__": ignore, "__setstate__": ignore}
    return type(name, (), body)


_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    _stand_in("numpy", "dtype"),
    _stand_in("numpy.core.multiarray", "scalar"),
    _stand_in("numpy._core.multiarray", "scalar"),
]
