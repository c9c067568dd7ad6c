"""From a run to a folder that timm loads, and that `--base` takes for the next round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tec_cache.errors import TecCacheError
from tec_cache.run.checkpoint import checkpoints, load_checkpoint, require_weights
from tec_cache.run.export import require_free, write_export
from tec_cache.run.settings import load_settings, run_identity
from tec_cache.student.model import Student, create_student
from tec_cache.types import TargetSpec


def export(run: str | Path, out: str | Path, *, checkpoint: str | Path | None = None, overwrite: bool = False) -> Path:
    """Write OUT/model.safetensors and OUT/config.json from a run's last checkpoint (or a named one).

    The adapters, which fine-tuning can take up, are written to OUT/adapters: the class token before its MLP with that
    MLP, and the encoder adapters. overwrite: replace an export that is there; a folder that holds anything else is
    refused. Raises TecCacheError, also for weights that are not finite.
    """
    run, out = Path(run), Path(out)
    settings = load_settings(run, "pretrain")
    config: dict[str, Any] = settings["config"]
    try:
        require_free(out, overwrite=overwrite)
        student, step = trained_student(run, checkpoint)
        write_export(
            student,
            out,
            config={"settings": settings, "step": step},
            encoder_name=config["student"],
            model_args=config["student_args"],
            overwrite=overwrite,
        )
    except OSError as error:
        raise TecCacheError(
            f"the export cannot be written: {error.strerror}", where=str(out), todo="choose another OUT"
        ) from error
    return out


def trained_student(run: Path, checkpoint: str | Path | None = None) -> tuple[Student, int]:
    """Return a run's student as of its last checkpoint, or a named one of the run, and the step of that.

    Nothing is allocated for a student that the weights do not fit. Raises TecCacheError.
    """
    settings = load_settings(run, "pretrain")
    found = checkpoints(run)
    path = Path(checkpoint) if checkpoint else found[-1] if found else None
    if path is None:
        raise TecCacheError("the run has no checkpoint yet", where=str(run), todo="train it further")
    state = load_checkpoint(path, run_identity(settings))
    with torch.device("meta"):
        student = student_of_run(settings)
    require_weights(state["model"], student, path)
    student.load_state_dict(state["model"], strict=True, assign=True)
    return student, state["step"]


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
