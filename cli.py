"""The table of commands. Parsing and printing live here, the work in `pipelines`."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import click

from tec_cache import __version__
from tec_cache.config import ExtractConfig, ProbeConfig, TrainConfig, read_toml
from tec_cache.errors import ConfigError, TecCacheError, nearest

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


def options_of(config: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make an option of every field of a config dataclass, with its documentation as help."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for item in reversed(dataclasses.fields(config)):
            if item.name in ("input", "model"):
                continue  # the argument of the command
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


def settings(config: type, values: dict[str, Any], file: str | None) -> Any:
    """Fill a config: defaults, then the TOML file, then what was given on the command line."""
    ctx = click.get_current_context()
    given = {
        name: value
        for name, value in values.items()
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    if "student_args" in given:
        given["student_args"] = dict(_name_and_value(text) for text in given["student_args"])
    stored = read_toml(file, config) if file else {}
    if "student_args" in stored and "student_args" in given:
        given["student_args"] = stored["student_args"] | given["student_args"]
    return config(**(stored | given))


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
    summary = run_extract(config, dry_run=dry_run, overwrite=overwrite, quiet=quiet or as_json, ranks=ranks)
    if ranks.world_size == 1 and not dry_run:
        require_finished(summary)
    if ranks.main:
        show(as_json, summary.to_json(), _extract_text(summary, dry_run, config, ranks.world_size))


def _extract_text(summary: Any, dry_run: bool, config: Any, world_size: int) -> str:
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
    elif summary.target:
        lines.append(f"targets      {summary.target}: at most {human_bytes(summary.most_bytes_per_target)} per view")
    if summary.first_row not in ("", "class token"):
        lines.append(f"row 0        {summary.first_row}")
    if summary.skipped:
        lines.append(f"left out     {len(summary.skipped)}:")
        lines += [f"  {shard} {key}: {reason}" for shard, key, reason in summary.skipped[:10]]
        if len(summary.skipped) > 10:
            lines.append("  ... all of them with --json")
    lines.append(f"free disk    {human_bytes(summary.free_disk)}")
    if dry_run:
        more = " and those of the unread shards" if summary.shards_left else ""
        lines.append(f"to do        {summary.missing} units{more}")
        return "\n".join([*lines, "dry run: nothing was written"])
    seconds = human_seconds(summary.seconds)
    who = "this run    " if world_size == 1 else "this rank   "
    lines.append(f"{who} {summary.views_made:,} crops, {summary.targets_made:,} targets in {seconds}")
    if summary.missing and world_size > 1:
        lines.append(f"other ranks  {summary.missing} units are still theirs to finish")
    if config.views_only:
        lines.append(f"next         tec-cache extract --cache {config.cache} --base mae")
    else:
        target = f" --target {summary.target}" if summary.num_targets > 1 else ""
        lines.append(f"next         tec-cache train --cache {config.cache}{target} --out RUN")
    return "\n".join(lines)


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
@click.argument("cache", type=click.Path(exists=True, file_okay=False))
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
            f"targets      {name}: base {target['base']}, {target['codec']}, {target['normalization']}, "
            f"k {'none' if target['k'] is None else target['k']}, {human_bytes(target['bytes_per_view'])} per view, "
            f"{target['missing_units']} units missing"
        )
    show(as_json, found, "\n".join(lines))


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
    if isinstance(error, TecCacheError):
        return error
    if isinstance(error, OSError):
        todo = "check the disk and its permissions; what is finished is kept, the same command goes on"
        return TecCacheError(f"{error.strerror or error}", where=str(error.filename or ""), todo=todo)
    todo = "this is a bug in tec-cache: please report it with the output of --debug"
    return TecCacheError(f"{type(error).__name__}: {error}", todo=todo)


if __name__ == "__main__":
    main()
