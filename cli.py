"""The table of commands. Parsing and printing live here, the work in `pipelines`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import click

from tec_cache import __version__
from tec_cache.config import ExtractConfig, PlanConfig, ProbeConfig, TrainConfig, read_toml
from tec_cache.errors import CacheError, ConfigError, StorageError, TecCacheError, nearest

EXIT_INTERRUPTED = 130


class Commands(click.Group):
    """A group that names the nearest command for a mistyped one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command, or fail with the nearest names."""
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(f"no such command {args[0]!r}{nearest(args[0], self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="tec-cache")
def cli() -> None:
    """Train a better ViT from a self-supervised one, and pay for the base model once.

    \b
    Example:
      tec-cache extract 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae
      tec-cache train --cache CACHE --out runs/first
      tec-cache export runs/first vit-b-tec
    """


def options_of(config: type, without: Iterable[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make an option of every field of a config dataclass, with its documentation as help."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for item in reversed(dataclasses.fields(config)):
            if item.name in ("input", "model", *without):
                continue  # the argument of the command, or no option of it
            help_text, kind = item.metadata["help"], str(item.type)
            flag = "--" + item.name.replace("_", "-")
            default = item.default if item.default is not dataclasses.MISSING else None
            shown = isinstance(default, int | float | str) and not isinstance(default, bool) and default != ""
            text = f"{help_text}  [default: {default}]" if shown else help_text
            if kind == "bool":
                option = click.option(flag, item.name, is_flag=True, help=text)
            elif kind.startswith("tuple"):
                option = click.option(flag, item.name, type=float, nargs=2, default=None, help=text)
            elif kind.startswith("dict"):
                option = click.option("--student-arg", item.name, multiple=True, metavar="NAME=VALUE", help=text)
            else:
                types = {"int": int, "float": float, "str": str}
                option = click.option(flag, item.name, type=types[kind.split(" ")[0]], default=None, help=text)
            function = option(function)
        return function

    return decorate


def common(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has."""
    for option in (
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--quiet", is_flag=True, help="No progress."),
        click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object."),
    ):
        function = option(function)
    return function


def settings(config: type, values: dict[str, Any], file: str | None, **fixed: Any) -> Any:
    """Fill a config: defaults, then the TOML file, then what was given on the command line, then what is fixed."""
    given = given_options(values)
    if "student_args" in given:
        given["student_args"] = dict(_name_and_value(text) for text in given["student_args"])
    stored = read_toml(file, config) if file else {}
    if "student_args" in stored and "student_args" in given:
        given["student_args"] = stored["student_args"] | given["student_args"]
    return config(**(stored | given | fixed))


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return what was given on the command line, without defaults."""
    source = click.get_current_context().get_parameter_source
    return {n: value for n, value in values.items() if source(n) == click.core.ParameterSource.COMMANDLINE}


def _name_and_value(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value is JSON where it can be, else a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--student-arg {text}", todo="give NAME=VALUE, for instance patch_size=8")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def show(as_json: bool, result: dict[str, Any], text: str) -> None:
    """Print a result for people or for programs."""
    click.echo(json.dumps(result) if as_json else text)


@cli.command()
@click.argument("input", required=False)
@options_of(ExtractConfig)
@click.option("--config", "file", type=click.Path(exists=True, dir_okay=False), help="TOML file of settings.")
@click.option("--dry-run", is_flag=True, help="Say what would happen; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace what was made with other settings.")
@common
def extract(
    file: str | None, dry_run: bool, overwrite: bool, as_json: bool, quiet: bool, debug: bool, **values: Any
) -> None:
    """Stage one: cut views from photos, run the base over them once, write both to a cache.

    INPUT is a pattern of WebDataset tars (quote it), a folder of tars, a URL that fsspec knows, or a folder
    CLASS/NAME.jpg. Without it, targets are added for the crops that a cache already holds. An interrupted
    extraction goes on with the same command.

    Known bases: mae, mae_large, mae_huge, dino, dino_small, dinov2_small, dinov2_base, dinov2_large,
    dinov2_giant (each also with _reg), ibot, ibot_large, mocov3; timm:NAME; a weight file; an exported folder.

    \b
    Example:
      tec-cache extract 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae
      tec-cache extract --cache CACHE --base dinov2_small
      torchrun --nproc-per-node 8 --no-python tec-cache extract 'imagenet/*.tar' --cache CACHE --base mae
    """
    config = settings(ExtractConfig, values, file)
    from pipelines.extract import extract as run_extract
    from pipelines.extract_summary import require_finished
    from tec_cache.distributed import Ranks

    ranks = Ranks.from_environment()
    alone = ranks.world_size == 1 and config.part is None
    summary = run_extract(config, dry_run=dry_run, overwrite=overwrite, quiet=quiet or as_json, ranks=ranks)
    if alone and not dry_run:
        require_finished(summary)
    if ranks.main:
        show(as_json, summary.to_json(), _extract_text(summary, dry_run, config, alone))


def _extract_text(summary: Any, dry_run: bool, config: Any, alone: bool) -> str:
    from tec_cache.progress import human_bytes, human_seconds

    source = f", {human_bytes(summary.source_bytes)}" if summary.source_bytes else ""
    unread = f", {summary.shards_left} not read to the end yet" if summary.shards_left else ""
    lines = [
        f"cache        {summary.cache}  ({summary.fingerprint[:12]})",
        f"source       {summary.source_shards:,} shards{source}{unread}",
        f"views        {summary.num_views} of each photo; {summary.photos:,} photos in {summary.units:,} units so far",
    ]
    if summary.bytes_per_crop:
        lines.append(f"crops        {human_bytes(summary.bytes_per_crop)} per view")
    if summary.bytes_per_target:
        lines.append(f"targets      {summary.target}: {human_bytes(summary.bytes_per_target)} per view")
    elif summary.most_bytes_per_target:
        lines.append(f"targets      {summary.target}: at most {human_bytes(summary.most_bytes_per_target)} per view")
    if summary.target:
        lines.append(f"quality      {summary.quality}{_errors_text(summary.errors)}")
    if summary.first_row not in ("", "class token"):
        lines.append(f"row 0        {summary.first_row}")
    if summary.skipped:
        lines.append(f"left out     {len(summary.skipped)}:")
        lines += [f"  {shard} {key}: {reason}" for shard, key, reason in summary.skipped[:10]]
        if len(summary.skipped) > 10:
            lines.append("  ... all of them with --json")
    if summary.free_disk is not None:
        lines.append(f"free disk    {human_bytes(summary.free_disk)}")
    if dry_run:
        more = " and those of the unread shards" if summary.shards_left else ""
        lines.append(f"to do        {summary.missing} units{more}")
        return "\n".join([*lines, "dry run: nothing was written"])
    seconds = human_seconds(summary.seconds)
    who = "this run    " if alone else "this part   "
    lines.append(f"{who} {summary.views_made:,} crops, {summary.targets_made:,} targets in {seconds}")
    if summary.missing and not alone:
        lines.append(f"other parts  {summary.missing} units are still theirs to finish")
    if config.views_only:
        lines.append(f"next         tec-cache extract --cache {config.cache} --base mae")
    else:
        target = f" --target {summary.target}" if summary.num_targets > 1 else ""
        lines.append(f"next         tec-cache train --cache {config.cache}{target} --out RUN")
    return "\n".join(lines)


def _errors_text(errors: dict[str, float]) -> str:
    """Say the measured errors of stored targets."""
    if not errors:
        return ""
    kl = f", KL {errors['kl']:.2g} nats" if "kl" in errors else ""
    return f": relative MSE {errors['mse']:.2g}{kl}, measured on views that the codec has not seen"


@cli.command()
@click.argument("input", required=False)
@options_of(ExtractConfig)
@click.option("--config", "file", type=click.Path(exists=True, dir_okay=False), help="TOML file of settings.")
@click.option("--overwrite", is_flag=True, help="Replace what was made with other settings.")
@common
def fit(file: str | None, overwrite: bool, as_json: bool, quiet: bool, debug: bool, **values: Any) -> None:
    """Fit the codec of a target set, and nothing more.

    `extract` does so by itself. Fit beforehand to see the error and the size of the codec, or to extract into
    several folders that are merged afterwards: copy the fitted cache to each of them first.

    \b
    Example:
      tec-cache fit 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae --quality default
      tec-cache extract 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae --part 3/16
    """
    config = settings(ExtractConfig, values, file)
    from pipelines.extract import extract as run_extract
    from tec_cache.distributed import Ranks

    ranks = Ranks.from_environment()
    summary = run_extract(config, overwrite=overwrite, fit_only=True, quiet=quiet or as_json, ranks=ranks)
    if ranks.main:
        lines = [
            f"cache        {summary.cache}  ({summary.fingerprint[:12]})",
            f"quality      {summary.quality}{_errors_text(summary.errors)}",
            f"next         tec-cache extract{' INPUT' if config.input else ''} --cache {config.cache} "
            + (f"--base {config.base}" if config.base else f"--name {summary.target}"),
        ]
        show(as_json, summary.to_json(), "\n".join(lines))


# what a plan asks of a training; device, precision and threads are the extraction's
_PLANNED = ("student", "student_args", "adapters", "decoder_depth", "decoder_width", "decoder_heads", "mask_ratio",
            "epochs", "batch_size", "micro_batch")  # fmt: skip


@cli.command()
@click.argument("input", required=False)
@options_of(ExtractConfig, without=("batch_size", "part"))
@click.option("--base-batch-size", type=int, help="Views per batch of the base: extract's --batch-size.")
@options_of(TrainConfig, without={f.name for f in dataclasses.fields(TrainConfig)} - set(_PLANNED))
@options_of(PlanConfig, without=("extract", "train"))
@click.option("--config", "file", type=click.Path(exists=True, dir_okay=False), help="TOML file of extract's settings.")
@common
def plan(file: str | None, as_json: bool, quiet: bool, debug: bool, **values: Any) -> None:
    """Say what an extraction will take, before it is paid for: disk, hours, FLOP; and when it has paid for itself.

    Runs every stage of extract and train for a few seconds on a sample of your photos, on this machine and the
    cache's disk; nothing of it stays. With a cache of the same settings, what is left of it is planned. Hours are
    those of one process. Exits with 1 where the disk is too small.

    \b
    Example:
      tec-cache plan 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae
      tec-cache plan 'photos-*.tar' --cache CACHE --base dinov2_small --images 1281167 --epochs 100 --batch-size 1024
    """
    given = given_options(values)
    base_batch = {"batch_size": given["base_batch_size"]} if "base_batch_size" in given else {}
    fields = set(ExtractConfig.__dataclass_fields__) - {"batch_size"}
    extract_config = settings(ExtractConfig, {n: v for n, v in values.items() if n in fields}, file, **base_batch)
    train_config = settings(
        TrainConfig,
        {name: values[name] for name in _PLANNED},
        None,
        cache=extract_config.cache,
        out="(none)",
        device=extract_config.device,
        precision=extract_config.precision or "auto",
        threads=extract_config.threads,
    )
    from pipelines.plan import plan as run_plan

    config = PlanConfig(
        extract=extract_config,
        train=train_config,
        **{name: given[name] for name in ("images", "seconds") if name in given},
    )
    found = run_plan(config, quiet=quiet or as_json)
    show(as_json, found.to_json(), _plan_text(found))
    if found.fits is False:
        raise SystemExit(StorageError.exit_code)


def _plan_text(plan: Any) -> str:
    from tec_cache.progress import human_bytes, human_seconds

    amount, free = plan.amount, plan.free
    room = "" if free is None else f", {human_bytes(free)} are free: {'it fits' if plan.fits else 'IT DOES NOT FIT'}"
    about = "about " if amount.estimated else ""
    lines = [
        f"cache        {plan.cache}, {human_bytes(amount.bytes_there)} there already",
        f"photos       {about}{amount.photos:,}, {amount.num_views} views of each"
        + (" (part of the shards was counted, the rest is by their bytes)" if amount.estimated else ""),
        f"crops        {human_bytes(plan.views.written.num_bytes)} per view, measured; "
        f"{amount.crops_left:,} to write: {human_bytes(plan.bytes_crops)}",
    ]
    if plan.targets:
        lines.append(
            f"targets      {human_bytes(plan.bytes_per_target)} per view, measured on {plan.targets.views} "
            f"({plan.target}, quality {plan.quality}); {amount.targets_left:,} to write: "
            f"{human_bytes(plan.bytes_targets)}"
        )
    lines += [f"disk         {human_bytes(plan.bytes_needed)} are needed{room}", ""]
    lines += ["extraction   one stage after the other: what is left to do, at the measured rates"]
    rates = plan.rates
    for name, seconds in plan.seconds.items():
        mark = "  <- bottleneck" if name == plan.bottleneck else ""
        lines.append(f"  {name:<22} {human_seconds(seconds):>14} {rates.get(name, ''):>22}{mark}".rstrip())
    lines.append(f"  {'together':<22} {human_seconds(sum(plan.seconds.values())):>14}")
    if plan.training:
        lines += ["", *_plan_training_text(plan)]
    if plan.views.broken:
        lines += ["", f"broken       {len(plan.views.broken)} of {plan.views.sampled} photos that were looked at:"]
        lines += [f"  {text}" for text in plan.views.broken[:5]]
        lines.append("  extract stops at the first one; with --on-error skip it leaves them out")
    if plan.fits is False:
        lines += ["", "THE DISK IS TOO SMALL: use another --cache, fewer --views or a smaller --quality"]
    lines += ["", f"nothing was written; measured in {human_seconds(plan.measured_seconds)}"]
    return "\n".join(lines)


def _plan_training_text(plan: Any) -> list[str]:
    from tec_cache.progress import human_seconds

    training, flop, slowest = plan.training, plan.flop, plan.training.bottleneck(plan.batch_size)
    lines = [
        f"training     one epoch and {plan.epochs} epochs, at the rates measured on micro-batches of "
        f"{training.micro_batch}; what takes longest"
    ]
    for name, seconds in plan.epoch_seconds.items():
        run = human_seconds(seconds * plan.epochs)
        lines.append(f"  {name:<22} {human_seconds(seconds):>14} {run:>22}  <- {slowest[name]}")
    lines += [
        f"arithmetic   {training.base_macs / 1e9:.3g} GMAC per view in the base; "
        f"{training.step_macs / 3e9:.3g} x 3 GMAC per view in a training step",
        f"             extraction {flop['extraction']:.2e} FLOP; {plan.epochs} epochs cached "
        f"{flop['cached_run']:.2e}, online {flop['online_run']:.2e} ({flop['online_run'] / flop['cached_run']:.2f} "
        "times as many)",
    ]
    epochs = plan.break_even_epochs
    if epochs is None:
        lines.append("paid back    never in time: on this machine a cached epoch takes as long as one online")
    else:
        lines.append(
            f"paid back    after {epochs:,.1f} epochs: {epochs / plan.epochs:.2f} runs of {plan.epochs} epochs"
        )
    return lines


@cli.command()
@options_of(TrainConfig)
@click.option("--config", "file", type=click.Path(exists=True, dir_okay=False), help="TOML file of settings.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would happen; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a run that was made with other settings.")
@common
def train(
    file: str | None, dry_run: bool, overwrite: bool, as_json: bool, quiet: bool, debug: bool, **values: Any
) -> None:
    """Stage two: train a new ViT from the crops and targets of a cache.

    Learns from a target set (--target), from the base in the loop (--online), or from pixels (--pixels: a masked
    autoencoder). Defaults are the paper's recipe. An interrupted run goes on with the same command.

    \b
    Example:
      tec-cache train --cache CACHE --out runs/vit-b --batch-size 4096 --micro-batch 256
      tec-cache train --cache CACHE --out runs/small --student vit_small_patch16_224 --epochs 100
      torchrun --nproc-per-node 8 --no-python tec-cache train --cache CACHE --out runs/vit-b
    """
    config = settings(TrainConfig, values, file)
    from pipelines.train import train as run_train
    from tec_cache.distributed import Ranks
    from tec_cache.progress import human_seconds

    ranks = Ranks.from_environment()
    summary = run_train(config, overwrite=overwrite, dry_run=dry_run, quiet=quiet or as_json, ranks=ranks)
    if not ranks.main:
        return
    losses = ", ".join(f"{name} {value:.4f}" for name, value in summary.losses.items())
    lines = [
        f"run          {summary.run}",
        f"student      {summary.parameters:,} parameters, {summary.trained_parameters:,} trained",
        f"steps        {summary.steps:,} of {summary.total_steps:,}",
    ]
    if losses:
        lines.append(f"losses       {losses}")
    if dry_run:
        lines.append("dry run: nothing was written")
    else:
        if summary.images_per_second:
            lines.append(f"speed        {summary.images_per_second:,.1f} images/s in {human_seconds(summary.seconds)}")
        else:
            lines.append("nothing left to do: this run had reached its last step")
        if summary.damaged:
            lines.append(f"damaged      {len(summary.damaged)} blocks, other rows stood in for theirs:")
            lines += [f"  {place}" for place in summary.damaged[:10]]
        if summary.finished:
            lines.append(f"next         tec-cache export {summary.run} OUT")
        else:
            lines.append(f"interrupted: the checkpoint is kept; go on with\n  {command_line()}")
    show(as_json, summary.to_json(), "\n".join(lines))
    if not dry_run and not summary.finished:
        raise SystemExit(EXIT_INTERRUPTED)


@cli.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--checkpoint", type=click.Path(exists=True, dir_okay=False), help="Instead of the last one.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
@common
def export(
    run: str, out: str, checkpoint: str | None, overwrite: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Write a run's encoder as a folder that timm loads.

    The input adapter is folded into the class token. OUT is also a --base for the next round.

    \b
    Example:
      tec-cache export runs/vit-b vit-b-tec
      python -c "import timm; timm.create_model('local-dir:vit-b-tec', pretrained=True)"
    """
    from pipelines.export import export as run_export

    path = run_export(run, out, checkpoint=checkpoint, overwrite=overwrite)
    text = f"export       {path}\nnext         timm.create_model('local-dir:{path}', pretrained=True)"
    show(as_json, {"out": str(path)}, text)


@cli.command()
@click.argument("model")
@options_of(ProbeConfig)
@click.option("--config", "file", type=click.Path(exists=True, dir_okay=False), help="TOML file of settings.")
@common
def probe(file: str | None, as_json: bool, quiet: bool, debug: bool, **values: Any) -> None:
    """Judge a frozen model by nearest neighbours and a linear classifier.

    MODEL is an exported folder, a base name, timm:NAME, a weight file, or random:NAME (untrained).

    \b
    Example:
      tec-cache probe vit-b-tec --train 'train/*.tar' --test 'val/*.tar'
      tec-cache probe random:vit_base_patch16_224 --train CACHE --test 'val/*.tar'
    """
    config = settings(ProbeConfig, values, file)
    from pipelines.probe import probe as run_probe

    summary = run_probe(config, quiet=quiet or as_json)
    converged = "" if summary.linear_converged else "  (not converged: raise --l2)"
    lines = [
        f"model        {summary.model}",
        f"images       {summary.train_images:,} to learn from, {summary.test_images:,} to judge on, "
        f"{summary.classes} classes, {summary.skipped} left out",
        f"kNN          {summary.knn:.2%}  (k = {config.neighbours})",
        f"linear       {summary.linear:.2%}{converged}",
    ]
    show(as_json, summary.to_json(), "\n".join(lines))


@cli.command()
@click.argument("cache")
@common
def info(cache: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Say what a cache holds and what is missing.

    \b
    Example:
      tec-cache info CACHE
    """
    from pipelines.info import info as run_info
    from tec_cache.progress import human_bytes

    found = run_info(cache)
    photos = found["views"][0]["photos"] if found["views"] else 0
    lines = [
        f"cache        {found['cache']}  ({found['fingerprint'][:12]})",
        f"views        {photos:,} photos, {found['num_views']} views of {found['size']} pixels, "
        f"{human_bytes(sum(v['bytes'] for v in found['views']))}",
        f"left out     {found['skipped_photos']} photos",
        f"missing      {found['missing_units']} units of views"
        + (
            f", and all of {found['unread_shards']} source shards not read to the end" if found["unread_shards"] else ""
        ),
    ]
    for name, target in found["targets"].items():
        lines.append(
            f"targets      {name}: base {target['base']}, quality {target['quality']}, {target['normalization']}, "
            f"k {'none' if target['k'] is None else target['k']}, {human_bytes(target['bytes_per_view'])} per view"
        )
        lines.append(f"             {_errors_text(target['errors']).removeprefix(': ')}")
        lines.append(
            f"             {target['finished_units']} units finished, {target['missing_units']} missing; "
            f"{human_bytes(target['bytes'])}"
        )
    show(as_json, found, "\n".join(lines))


@cli.command()
@click.argument("cache")
@click.option("--full", is_flag=True, help="Every byte: SHA-256 and inside of every payload.")
@click.option("--base", is_flag=True, help="Run the base again on a sample of the stored crops.")
@click.option("--repair", is_flag=True, help="Drop what is bad, so that extract makes it again.")
@click.option("--sample", type=int, default=64, show_default=True, help="Views of each target set, for --base.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sample.")
@click.option("--target", help="Run only this target set's base.  [default: all]")
@click.option("--base-weights", help="Weight file of the base; or its file or folder, where that was moved.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@common
def verify(cache: str, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Check a cache: records and sizes; with --full every byte; with --base what the base says of it.

    Exit code 0 if it is whole and sound, 3 with a list of what is wrong or missing. --repair drops what is bad;
    the same extract then makes it again.

    \b
    Example:
      tec-cache verify CACHE
      tec-cache verify CACHE --full --base
      tec-cache verify CACHE --full --repair
    """
    from pipelines.verify import verify as run_verify

    verdict = run_verify(cache, quiet=quiet or as_json, **options)
    show(as_json, verdict.to_json(), _verify_text(verdict, options["full"]))
    if not verdict.clean:
        raise SystemExit(CacheError.exit_code)


def _verify_text(verdict: Any, full: bool, most: int = 20) -> str:
    from tec_cache.progress import human_bytes, human_seconds

    report, found = verdict.report, verdict.findings
    targets = "".join(f", {units:,} of {name}" for name, units in report.target_units.items())
    lines = [
        f"cache        {verdict.cache}",
        f"looked at    {report.files:,} records and manifests, {report.payloads:,} payloads "
        f"({human_bytes(report.num_bytes)}, {'every byte' if full else 'their sizes'}), "
        f"in {human_seconds(verdict.seconds)}",
        f"units        {report.view_units:,} of views{targets}",
    ]
    for base in verdict.base:
        if not base["views"]:
            lines.append(f"base         {base['target']}: nothing could be compared")
            continue
        figures = ", ".join(
            f"{name} {base['measured'][name]:.3g} (stated {base['stated'][name]:.3g})" for name in base["stated"]
        )
        rest = ", ".join(
            f"{name.replace('_', ' ')} {base['measured'][name]:.4f}"
            for name in ("cosine", "rows_alike")
            if name in base["measured"]
        )
        lines.append(f"base         {base['target']}: {figures}, {rest};")
        lines.append(f"             on {base['views']} views of {base['units']} units")
    if verdict.dropped or verdict.removed:
        lines.append(f"dropped      {len(verdict.dropped)} bad, {len(verdict.removed)} left over:")
        lines += [f"  {finding.where}: {finding.what}" for finding in verdict.dropped[:most]]
    lines += [f"{level:<12} {verdict.count(level)}" for level in ("damage", "missing", "note") if verdict.count(level)]
    todo = ""
    for finding in sorted(found, key=lambda f: ("damage", "missing", "note").index(f.level))[:most]:
        lines.append(f"  {finding.kind}: {finding.where}: {finding.what}")
        if finding.todo != todo:
            lines.append(f"    to do: {finding.todo}")
        todo = finding.todo
    if len(found) > most:
        lines.append(f"  ... and {len(found) - most} more (--json)")
    if verdict.clean:
        lines.append("nothing is wrong, nothing is missing")
    lines += [f"go on with   {command}" for command in verdict.next]
    return "\n".join(lines)


@cli.command()
@click.argument("cache")
@click.argument("out")
@click.option(
    "--target", "targets", multiple=True, metavar="NAME", help="Target set to pack; may be repeated.  [default: all]"
)
@click.option("--views", type=int, help="Pack the first so many views.  [default: all]")
@common
def pack(
    cache: str, out: str, targets: tuple[str, ...], views: int | None, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Write a finished cache as WebDataset tars to stream from or to share.

    Each sample of OUT/UNIT.HASH.tar has its crop, its class and its codes of every packed target set, with
    checksums; `train`, `probe` and `info` read OUT as they read the cache. CACHE and OUT are folders or URLs.

    \b
    Example:
      tec-cache pack CACHE PACK
      tec-cache pack CACHE s3://bucket/pack --target mae --views 2
      tec-cache train --cache s3://bucket/pack --out runs/streamed
    """
    from pipelines.pack import pack as run_pack
    from tec_cache.progress import human_bytes

    summary = run_pack(cache, out, targets=targets, num_views=views, quiet=quiet or as_json)
    lines = [
        f"pack         {summary.pack}  ({summary.fingerprint[:12]})",
        f"holds        {summary.samples:,} samples in {summary.units:,} tars, {summary.num_views} views, target sets: "
        f"{', '.join(summary.targets) or 'none'}",
        f"bytes        {human_bytes(summary.bytes)}, {human_bytes(summary.bytes_per_sample)} per sample "
        f"(the cache: {human_bytes(summary.cache_bytes)})",
    ]
    lines += [f"codes        {name}: {human_bytes(size)} per sample" for name, size in summary.codes.items()]
    lines += [
        f"this run     {summary.units_made:,} tars",
        f"next         tec-cache train --cache {summary.pack} --out RUN",
    ]
    show(as_json, summary.to_json(), "\n".join(lines))


@cli.command()
@click.argument("pack")
@click.argument("cache")
@common
def unpack(pack: str, cache: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Make the cache of a pack again, byte for byte, and check every byte of the pack.

    \b
    Example:
      tec-cache unpack PACK CACHE
    """
    from pipelines.unpack import unpack as run_unpack

    summary = run_unpack(pack, cache, quiet=quiet or as_json)
    lines = [
        f"cache        {summary.cache}  ({summary.fingerprint[:12]})",
        f"holds        {summary.num_views} views, target sets: {', '.join(summary.targets) or 'none'}; "
        f"{summary.units:,} units, {summary.units_made:,} of them made by this run",
    ]
    if summary.rewritten:
        lines.append(
            f"rewritten    {summary.rewritten:,} files hold the same values in other bytes than the original's: "
            "another release wrote those"
        )
    show(as_json, summary.to_json(), "\n".join(lines))


@cli.command()
@click.argument("out")
@click.argument("parts", nargs=-1, required=True)
@common
def merge(out: str, parts: tuple[str, ...], as_json: bool, quiet: bool, debug: bool) -> None:
    """Join caches that were made apart: copy into OUT what the PARTS hold beyond it.

    All must have the same photos and settings, and target sets with one and the same fitted codec: run
    `tec-cache fit` once and copy cache.json and targets/ into each part before it is extracted. OUT may be new or
    a cache; the parts stay as they are.

    \b
    Example:
      tec-cache merge CACHE part-0 part-1 s3://bucket/part-2
    """
    from pipelines.merge import merge as run_merge
    from tec_cache.progress import human_bytes

    summary = run_merge(out, parts, quiet=quiet or as_json)
    lines = [
        f"cache        {summary.out}  ({summary.fingerprint[:12]})",
        f"copied       {summary.views_copied:,} units of views, {summary.targets_copied:,} of targets, "
        f"{human_bytes(summary.bytes)}",
        f"kept         {summary.already_there:,} units that were there already",
    ]
    if summary.different:
        lines.append(f"different    {len(summary.different):,} units that were there otherwise, and stayed so:")
        lines += [f"  {name}" for name in summary.different[:10]]
        if len(summary.different) > 10:
            lines.append("  ... all of them with --json")
    show(as_json, summary.to_json(), "\n".join([*lines, f"next         tec-cache info {summary.out}"]))


@cli.command()
@click.argument("cache")
@click.option("--target", metavar="NAME", help="Remove this target set.")
@click.option("--views", type=int, help="Keep the first so many views; remove the others and the targets over them.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")
@common
def rm(
    cache: str, target: str | None, views: int | None, dry_run: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Remove a target set, or the later views, from a cache.

    \b
    Example:
      tec-cache rm CACHE --target dino --dry-run
      tec-cache rm CACHE --views 2
    """
    from pipelines.remove import remove as run_remove
    from tec_cache.progress import human_bytes

    summary = run_remove(cache, target=target, views=views, dry_run=dry_run)
    left = ", ".join(f"{name} ({units:,} units)" for name, units in summary.left_targets.items()) or "none"
    lines = [
        f"{'to remove' if dry_run else 'removed':<13}{summary.removed}: {summary.units:,} units, "
        f"{human_bytes(summary.bytes)}",
        f"left         {summary.left_views} views in {summary.left_units:,} units; target sets: {left}",
    ]
    if dry_run:
        lines.append("dry run: nothing was removed")
    show(as_json, summary.to_json(), "\n".join(lines))


def command_line() -> str:
    """Return the command that this process was called with, for 'go on with'."""
    # without --overwrite, which would begin from zero again
    command = ["tec-cache", *(word for word in sys.argv[1:] if word != "--overwrite")]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        command = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "--no-python", *command]
    return shlex.join(command)


def fail(error: TecCacheError) -> int:
    """Print an error as text or as the one JSON object (rank 0's); return its exit code."""
    if "--json" in sys.argv[1:] and os.environ.get("RANK", "0") == "0":
        found = {"what": error.what, "where": error.where, "todo": error.todo, "exit_code": error.exit_code}
        click.echo(json.dumps({"error": found}))
    else:
        click.echo(f"error: {error}", err=True)
    return error.exit_code


class Interrupted(TecCacheError):
    """Ctrl-C or SIGTERM."""

    exit_code = EXIT_INTERRUPTED


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 bad usage or settings, 3 cache incomplete or corrupt, 130 interrupted.
    """
    # a job's time limit ends like Ctrl-C: what is finished is kept, and the command that goes on is printed
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # OpenMP's threads wait by spinning: beside the loader's threads, or neighbours, that is many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = 0
    try:
        code = cli.main(prog_name="tec-cache", standalone_mode=False) or 0
    except click.UsageError as error:
        if "--json" in sys.argv[1:]:
            code = fail(ConfigError(error.format_message()))
        else:
            error.show()
            if "unexpected extra argument" in error.format_message():
                click.echo(
                    "Hint: quote a pattern such as 'shards/*.tar'; repeat --student-arg for each NAME=VALUE", err=True
                )
            code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = fail(Interrupted("interrupted: what is finished is kept", todo=f"go on with\n  {command_line()}"))
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        code = fail(explained(error))
    sys.stdout.flush()
    sys.stderr.flush()
    if code == EXIT_INTERRUPTED:
        # threads that decode may still be busy; nothing of theirs is wanted any more
        os._exit(code)
    sys.exit(code)


def explained(error: Exception) -> TecCacheError:
    """Return an error as one that a user can act on."""
    if isinstance(error, StorageError):
        return StorageError(error.what, where=error.where, todo=f"{error.todo}\n  {command_line()}")
    if isinstance(error, TecCacheError):
        return error
    if isinstance(error, OSError):
        todo = "check the disk and its permissions; what is finished is kept, the same command goes on"
        return TecCacheError(f"{error.strerror or error}", where=str(error.filename or ""), todo=todo)
    todo = "this is a bug in tec-cache: please report it with the output of --debug"
    return TecCacheError(f"{type(error).__name__}: {error}", todo=todo)


if __name__ == "__main__":
    main()
