"""An export, or a converted model, to the hub of models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tec_cache.documents import read_document
from tec_cache.errors import ConfigError, TecCacheError, listed
from tec_cache.kinds import ADAPTERS_FILE, CARD_FILE, EXPORT_FILE, WEIGHTS_FILE
from tec_cache.store.files import hash_file
from tec_cache.store.whole_folder import MANIFEST, manifest_of


@dataclass(frozen=True)
class PushSummary:
    """What was pushed."""

    name: str
    url: str
    files: list[str]
    commit: str
    """The hub's name of this state of the model."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def push(folder: str | Path, name: str, *, private: bool = False, revision: str | None = None) -> PushSummary:
    """Push an export, or a folder that `convert` wrote, to NAME (OWNER/MODEL) on the hub, all files in one commit.

    The model is made where there is none. private: make it visible to its owner alone; revision: a branch, which must
    exist. The token and the hub's address are huggingface_hub's own (`hf auth login`, HF_TOKEN, HF_ENDPOINT). Raises
    ConfigError where huggingface_hub is missing or the name cannot be one, TecCacheError for a folder that is neither,
    that was changed, or that the hub does not take.
    """
    folder = Path(folder)
    files = files_of(folder)
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ConfigError("huggingface_hub is not installed", todo="pip install 'tec-cache[hub]'") from error
    api = HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, revision=revision, commit_message="tec-cache push"
        )
    except HFValidationError as error:
        raise ConfigError(f"the hub allows no such name: {name}", todo="give OWNER/MODEL") from error
    except Exception as error:  # its own, and those of its web client, which differ between its versions
        reason = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
        raise TecCacheError(
            f"the hub did not take it: {reason}",
            where=name,
            todo="log in with a token that may write there (hf auth login, or HF_TOKEN), and try again",
        ) from error
    return PushSummary(name, f"{api.endpoint}/{name}", files, str(done.oid))


def files_of(folder: Path) -> list[str]:
    """List the files of an export or a converted model, once each has the hash that it was written with.

    Raises TecCacheError for a folder that is neither, or that lacks or has changed a file. Others are not pushed.
    """
    manifest = manifest_of(folder)
    if isinstance(manifest.get("files"), dict):
        return _checked(folder, {str(n): str(h) for n, h in manifest["files"].items()}, [MANIFEST], "convert")
    file = folder / EXPORT_FILE
    made = read_document(file).get("tec_cache") if file.is_file() else None
    if not isinstance(made, dict):
        raise TecCacheError(
            "this is neither an export nor a converted model",
            where=str(folder),
            todo="give a folder that tec-cache export or tec-cache convert made",
        )
    hashes = {WEIGHTS_FILE: "model_sha256", ADAPTERS_FILE: "adapters_sha256", CARD_FILE: "card_sha256"}
    stated = {name: str(made[of]) for name, of in hashes.items() if made.get(of) is not None}
    return _checked(folder, stated, [EXPORT_FILE], "export")


def _checked(folder: Path, stated: dict[str, str], others: Iterable[str], program: str) -> list[str]:
    """Return the names of all files. A card is meant to be written on, so it may have changed."""
    odd = [
        name
        for name, expected in stated.items()
        if not (folder / name).is_file() or (name != CARD_FILE and hash_file(folder / name) != expected)
    ]
    if odd:
        raise TecCacheError(
            f"files are missing, or not as they were written: {listed(odd)}",
            where=str(folder),
            todo=f"run tec-cache {program} again",
        )
    return sorted([*stated, *others])
