"""What `tec-cache info` says to people, for each kind of thing."""

from __future__ import annotations

from typing import Any

from pipelines.terminal.rounds_texts import rounds_info_text
from pipelines.terminal.texts import info_text
from tec_cache.printable import block, counted, shell_words
from tec_cache.progress import human_seconds


def text_of(found: dict[str, Any]) -> str:
    """Say what was found, by its "kind"."""
    texts = {"run": run_text, "export": export_text, "rounds": rounds_info_text}
    return texts.get(found["kind"], info_text)(found)


def run_text(found: dict[str, Any]) -> str:
    """Say how far a run is."""
    config = found["config"]
    if found["task"] == "pretrain":
        what = [
            f"student      {_model(config.get('student'), config.get('student_args'))}",
            f"targets      {_targets(found['targets'])}; {counted(found['num_views'], 'view')} of the cache "
            f"{config.get('cache')}  ({found['cache_fingerprint'][:12]})",
        ]
    else:
        what = [
            f"model        {config.get('model')}: {found['model'].get('architecture')}, tuned {config.get('tune')}"
            f"{_how(found)}, recipe {found['recipe']}",
            f"photos       {config.get('train')}; {counted(found['num_classes'], 'class')}",
        ]
    lines = [
        f"run          {found['run']}",
        *what,
        f"settings     batch {config.get('batch_size')}, {_epochs(config.get('epochs'))}, seed {config.get('seed')}; "
        "all of them with --json",
        f"steps        {_steps(found)}",
    ]
    losses = {n: v for n, v in found["logged"].items() if n in ("loss", "feature", "attention")}
    if losses:
        values = ", ".join(f"{name} {value:.4f}" for name, value in losses.items())
        lines.append(f"losses       {values}  (step {found['logged'].get('step', 0):,})")
    lines += _scores(found["logged"])
    lines += _speed(found)
    if found["finished"]:
        lines.append(f"next         {shell_words(['tec-cache', 'export', found['run']])} OUT")
    else:
        lines += ["to go on, unless it is running", f"  {found['go_on']}"]
    return block(lines)


def _steps(found: dict[str, Any]) -> str:
    """Say how far a run is, and from where it would go on."""
    step, total = found["step"], found["total_steps"]
    if found["finished"]:
        return f"{step:,} of {total:,}: finished"
    logged = max(step, int(found["logged"].get("step", 0)))
    if logged > step:
        return f"{logged:,} of {total:,} logged; last checkpoint: {f'step {step:,}' if step else 'none yet'}"
    return f"{step:,} of {total:,}: {'not finished' if step else 'no checkpoint yet'}"


def _speed(found: dict[str, Any]) -> list[str]:
    """Say how fast a run was when it last logged, when that was, and how long the rest takes."""
    lines = []
    if "images_per_second" in found:
        minute = ""
        if "minute_images_per_second" in found:
            minute = f", {found['minute_images_per_second']:,.1f} over the last minute"
        lines.append(f"speed        {found['images_per_second']:,.1f} images/s at the last line{minute}; "
                     f"{found['waited']:.1%} of the time waiting for the loader")  # fmt: skip
    if not found["finished"]:
        left, ago = found.get("seconds_left"), found["logged_seconds_ago"]
        if left is not None:
            lines.append(f"time left    {human_seconds(left)} at that speed, judging not counted")
        if ago is not None:
            lines.append(f"last line    {human_seconds(ago)} ago")
    return lines


def _how(found: dict[str, Any]) -> str:
    """Say what a tuning has beside its model and recipe."""
    return f" by the rule {found['rule']}" if "rule" in found else f", head {found['config'].get('head')}"


def export_text(found: dict[str, Any]) -> str:
    """Say what an exported model is."""
    lines = [
        f"export       {found['export']}",
        f"model        {_model(found['architecture'], found['model_args'])}, "
        f"{counted(found['parameters'], 'parameter')}",
        f"tensors      SHA-256 {found['weights_sha256']}  (of names and values; README.md has the file's)",
        f"pixels       mean {found['mean']}, std {found['std']}",
        f"made from    step {found['step']:,} of run {found['run']}",
        *_made_from(found),
        _next_of(found),
    ]
    return block(lines)


def _next_of(found: dict[str, Any]) -> str:
    """Say what an export is for."""
    if found["task"] == "pretrain":
        words = shell_words(["tec-cache", "finetune", found["export"]])
        return f"next         {words} --train PHOTOS --test PHOTOS --out RUN"
    return f"next         timm.create_model('local-dir:{found['export']}', pretrained=True)"


def _made_from(found: dict[str, Any]) -> list[str]:
    """Say what an export learned from."""
    if found["task"] == "pretrain":
        cache = f"cache {found['cache']}  ({found['cache_fingerprint'][:12]})"
        return [f"targets      {_targets(found['targets'])}; {cache}"]
    photos = f"photos       {found['train']}; {counted(found['num_classes'], 'class')}, recipe {found['recipe']}"
    return [photos, *_scores(found["scores"])]


def _scores(values: dict[str, float]) -> list[str]:
    """Say how a model did on the photos that it was judged on."""
    if "probe_knn" in values:
        return [f"judged       kNN {values['probe_knn']:.2%}, linear {values['probe_linear']:.2%}"]
    if "test_miou" in values:
        right = f"pixels {values['test_pixel_accuracy']:.2%} right, classes {values['test_mean_accuracy']:.2%}"
        return [f"judged       mIoU {values['test_miou']:.2%}, {right}"]
    if "test_top1" not in values:
        return []
    fifth = f", top-5 {values['test_top5']:.2%}" if "test_top5" in values else ""
    return [f"judged       top-1 {values['test_top1']:.2%}{fifth}, loss {values['test_loss']:.4f}"]


def _model(name: Any, arguments: Any) -> str:
    """Write an architecture and what was changed of it."""
    changes = arguments.items() if isinstance(arguments, dict) else ()
    changed = ", ".join(f"{name} {value}" for name, value in changes)
    return f"{name} ({changed})" if changed else f"{name}"


def _targets(targets: list[dict[str, Any]]) -> str:
    """Say what a run learns from."""
    found = []
    for of in targets:
        base = of.get("base")
        text = {
            "cached": f"target set {of.get('name')}",
            "online": f"the base in the loop, {base.get('architecture') if isinstance(base, dict) else base}",
            "pixels": "pixels",
        }.get(str(of.get("kind")), "unknown targets")
        found.append(f"{text} (weight {of['weight']:g})" if len(targets) > 1 else text)
    return ", ".join(found)


def _epochs(number: Any) -> str:
    """Write the epochs of a run.json, whatever stands there."""
    return counted(number, "epoch") if isinstance(number, int) else f"{number} epochs"
