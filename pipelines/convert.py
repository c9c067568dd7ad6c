"""From an export to a folder of another library: its names, its configuration, and a card."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tec_cache.errors import TecCacheError
from tec_cache.formats import format_named
from tec_cache.formats.model import read_model
from tec_cache.kinds import CARD_FILE
from tec_cache.model_card import bases_of, model_card
from tec_cache.store.whole_folder import MANIFEST, require_replaceable, write_whole_folder


@dataclass(frozen=True)
class ConvertSummary:
    """What was converted, and what could not be."""

    out: str
    to: str
    files: list[str]
    size: int
    """Pixels per side."""
    left_out: dict[str, str]
    """What the format has no place for -> why."""
    changed: list[str]
    usage: str
    """Python that loads it."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def convert(
    export: str | Path, out: str | Path, *, to: str, size: int | None = None, overwrite: bool = False
) -> ConvertSummary:
    """Write an export as a folder of the library `to`, of `tec_cache.formats.FORMATS`.

    size: pixels per side, to which the position embedding is interpolated; None for the export's own. overwrite:
    replace an earlier conversion; a folder that holds anything else is refused. Raises TecCacheError, also for a model
    that the library cannot hold.
    """
    export, out = Path(export), Path(out)
    chosen = format_named(to)
    require_replaceable(out, overwrite=overwrite)
    model = read_model(export, size)
    made = chosen.convert(model)
    notes = [f"as {chosen.title}, converted from timm's names", *made.changed]
    notes += [f"left out: `{name}` ({why})" for name, why in grouped(made.left_out).items()]
    description = {name: value for name, value in model.config.items() if name != "tec_cache"}
    card = model_card(description, model.made, usage=made.usage, library=to, notes=notes)
    files = made.files | {CARD_FILE: card.encode()}
    hashes = {name: model.made.get(name) for name in ("model_sha256", "run")}
    origin = {
        "converted_to": to,
        "from": hashes | {"bases": bases_of(model.made)},
        "left_out": made.left_out,
        "changed": list(made.changed),
    }
    try:
        write_whole_folder(out, files, origin, overwrite=overwrite)
    except OSError as error:
        raise TecCacheError(
            f"the folder cannot be written: {error.strerror}", where=str(out), todo="choose another OUT"
        ) from error
    usage = made.usage.replace("FOLDER", str(out))
    return ConvertSummary(str(out), to, [*files, MANIFEST], model.size, made.left_out, list(made.changed), usage)


def grouped(left_out: dict[str, str]) -> dict[str, str]:
    """Return what was left out with `norm.weight` and `norm.bias` as one `norm.*`."""
    every: dict[str, list[str]] = {}
    for name in left_out:
        every.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return {f"{of}.*" if names[0] != of else of: left_out[names[0]] for of, names in every.items()}
