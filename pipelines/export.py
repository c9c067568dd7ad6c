"""From a run to a folder that timm loads, and that `--base` takes for the next round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tec_cache.errors import TecCacheError
from tec_cache.run.checkpoint import checkpoints, load_checkpoint, load_settings
from tec_cache.run.export import write_export
from tec_cache.student.model import Student, create_student
from tec_cache.types import TargetSpec


def export(run: str | Path, out: str | Path, *, checkpoint: str | Path | None = None, overwrite: bool = False) -> Path:
    """Write OUT/model.safetensors and OUT/config.json from a run's last checkpoint (or a named one).

    The encoder adapters, which light tuning reads, are written beside them. Raises TecCacheError.
    """
    run, out = Path(run), Path(out)
    settings = load_settings(run)
    found = checkpoints(run)
    path = Path(checkpoint) if checkpoint else found[-1] if found else None
    if path is None:
        raise TecCacheError("the run has no checkpoint yet", where=str(run), todo="train it further")
    if (out / "config.json").exists() and not overwrite:
        raise TecCacheError("there is an export here already", where=str(out), todo="name another OUT, or --overwrite")
    student = student_of_run(settings)
    state = load_checkpoint(path)
    student.load_state_dict(state["student"], strict=True)
    config: dict[str, Any] = settings["config"]
    try:
        write_export(
            student,
            out,
            config={"settings": settings, "step": state["step"]},
            encoder_name=config["student"],
            model_args=config["student_args"],
        )
    except OSError as error:
        raise TecCacheError(
            f"the export cannot be written: {error.strerror}", where=str(out), todo="choose another OUT"
        ) from error
    return out


def student_of_run(settings: dict[str, Any]) -> Student:
    """Build the student of a run, without its weights."""
    config, targets = settings["config"], settings["targets"]
    return create_student(
        config["student"],
        targets=TargetSpec(**targets["spec"]),
        model_args=config["student_args"],
        adapters=config["adapters"],
        mask_ratio=config["mask_ratio"],
        tau=targets["tau"],
        decoder_depth=config["decoder_depth"],
        decoder_width=config["decoder_width"],
        decoder_heads=config["decoder_heads"],
    )
