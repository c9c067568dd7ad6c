"""From a run to a folder that timm loads, and that `--base` takes for the next round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tec_cache.errors import TecCacheError
from tec_cache.finetune.folder import as_timm
from tec_cache.run.checkpoint import load_checkpoint, require_weights
from tec_cache.run.export import describe, require_free, write_export, write_model
from tec_cache.run.layout import checkpoints, metrics_file
from tec_cache.run.metrics import read_metrics
from tec_cache.run.settings import load_settings, run_identity
from tec_cache.segment.folder import as_timm as segmenter_folder
from tec_cache.student.model import Goal, Student, create_student, student_options
from tec_cache.types import TargetSpec


def export(run: str | Path, out: str | Path, *, checkpoint: str | Path | None = None, overwrite: bool = False) -> Path:
    """Write OUT/model.safetensors, config.json and README.md from a run's last checkpoint (or a named one).

    The adapters, which fine-tuning can take up, are written to OUT/adapters: the class token before its MLP with that
    MLP, and the encoder adapters. overwrite: replace an export that is there; a folder that holds anything else is
    refused. Raises TecCacheError, also for weights that are not finite.
    """
    run, out = Path(run), Path(out)
    writers = {"pretrain": _export_student, "classify": _export_classifier, "segment": _export_segmenter}
    write = writers[load_settings(run)["task"]]
    try:
        require_free(out, overwrite=overwrite)
        write(run, out, checkpoint, overwrite)
    except OSError as error:
        raise TecCacheError(
            f"the export cannot be written: {error.strerror}", where=str(out), todo="choose another OUT"
        ) from error
    return out


def _export_student(run: Path, out: Path, checkpoint: str | Path | None, overwrite: bool) -> None:
    settings = load_settings(run, "pretrain")
    student, step = trained_student(run, checkpoint)
    write_export(
        student,
        out,
        config=_made(run, settings, step, "probe_"),
        encoder_name=settings["config"]["student"],
        model_args=settings["config"]["student_args"],
        overwrite=overwrite,
    )


def _export_classifier(run: Path, out: Path, checkpoint: str | Path | None, overwrite: bool) -> None:
    """Write a fine-tuned model with its head, the names of its classes, and the numbers that it reached."""
    settings = load_settings(run, "classify")
    path = last_checkpoint(run, checkpoint)
    state = load_checkpoint(path, run_identity(settings))
    made = settings["model"]
    folder = as_timm(settings, state["model"], path)
    description = describe(
        made["architecture"].partition(".")[0],
        made["model_args"] | folder.model_args,
        size=made["input_size"],
        width=folder.width,
        statistics=(tuple(made["mean"]), tuple(made["std"])),
        pool=folder.pool,
        num_classes=settings["num_classes"],
        names=settings["classes"],
    )
    kept = _made(run, settings, state["step"], "test_")
    write_model(out, folder.state, {}, description, kept, overwrite=overwrite)


def _export_segmenter(run: Path, out: Path, checkpoint: str | Path | None, overwrite: bool) -> None:
    """Write a segmenter's encoder, its head beside it, the names of its classes, and the numbers that it reached."""
    settings = load_settings(run, "segment")
    path = last_checkpoint(run, checkpoint)
    state = load_checkpoint(path, run_identity(settings))
    made = settings["model"]
    folder, head = segmenter_folder(settings, state["model"], path)
    description = describe(
        made["architecture"].partition(".")[0],
        made["model_args"] | folder.model_args,
        size=made["input_size"],
        width=folder.width,
        statistics=(tuple(made["mean"]), tuple(made["std"])),
    )
    kept = _made(run, settings, state["step"], "test_")
    write_model(out, folder.state, head, description, kept, overwrite=overwrite)


def _made(run: Path, settings: dict[str, Any], step: int, judged: str) -> dict[str, Any]:
    """Return how a model was made, and the last numbers that it reached: the metrics whose names begin so."""
    lines = read_metrics(run) if metrics_file(run).exists() else []
    reached = [{n: v for n, v in line.items() if n.startswith(judged)} | {"step": line["step"]} for line in lines]
    reached = [scores for scores in reached if len(scores) > 1 and scores["step"] <= step]
    last = reached[-1] if reached else None
    return {"settings": settings, "run": run_identity(settings), "step": step, "scores": last}


def last_checkpoint(run: Path, checkpoint: str | Path | None) -> Path:
    """Return the last checkpoint of a run, or the named one. Raises TecCacheError where there is none."""
    found = checkpoints(run)
    path = Path(checkpoint) if checkpoint else found[-1] if found else None
    if path is None:
        raise TecCacheError("the run has no checkpoint yet", where=str(run), todo="train it further")
    return path


def trained_student(run: Path, checkpoint: str | Path | None = None) -> tuple[Student, int]:
    """Return a run's student as of its last checkpoint, or a named one of the run, and the step of that.

    Nothing is allocated for a student that the weights do not fit. Raises TecCacheError.
    """
    settings = load_settings(run, "pretrain")
    path = last_checkpoint(run, checkpoint)
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
        targets={of["goal"]: Goal(spec=TargetSpec(**of["spec"]), tau=of["tau"]) for of in targets},
        model_args=config["student_args"],
        **student_options(config),
    )
