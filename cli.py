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

from pipelines import texts
from tec_cache import __version__
from tec_cache.config import ExtractConfig, PlanConfig, ProbeConfig, TrainConfig, read_toml
from tec_cache.errors import CacheError, ConfigError, StorageError, TecCacheError, nearest
from tec_cache.urls import scrubbed, without_secrets

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
        show(as_json, summary.to_json(), texts.extract_text(summary, dry_run, config, alone))


@cli.command()
@click.argument("input", required=False)
@options_of(ExtractConfig, without=("part", "views_only"))
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
        show(as_json, summary.to_json(), texts.fit_text(summary, command_line().replace(" fit ", " extract ", 1)))


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
    show(as_json, found.to_json(), texts.plan_text(found))
    if found.fits is False:
        raise SystemExit(StorageError.exit_code)


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
      tec-cache train --cache s3://BUCKET/CACHE --stage /scratch/tec --stage-bytes 200GB --out runs/vit-b
      torchrun --nproc-per-node 8 --no-python tec-cache train --cache CACHE --out runs/vit-b
    """
    config = settings(TrainConfig, values, file)
    from pipelines.train import train as run_train
    from tec_cache.distributed import Ranks, under_torchrun

    ranks = Ranks.from_environment()
    summary = run_train(config, overwrite=overwrite, dry_run=dry_run, quiet=quiet or as_json, ranks=ranks)
    if not ranks.main:
        return
    show(as_json, summary.to_json(), texts.train_text(summary, dry_run, command_line()))
    # torchrun takes any other code than 0 for a failure, and would start the run again that was asked to stop
    if not dry_run and not summary.finished and not under_torchrun():
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
    show(as_json, summary.to_json(), texts.probe_text(summary, config.neighbours))


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

    found = run_info(cache)
    show(as_json, found, texts.info_text(found))


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
    show(as_json, verdict.to_json(), texts.verify_text(verdict, options["full"]))
    if not verdict.clean:
        raise SystemExit(CacheError.exit_code)


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

    summary = run_pack(cache, out, targets=targets, num_views=views, quiet=quiet or as_json)
    show(as_json, summary.to_json(), texts.pack_text(summary))


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
    show(as_json, summary.to_json(), texts.unpack_text(summary))


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

    summary = run_merge(out, parts, quiet=quiet or as_json)
    show(as_json, summary.to_json(), texts.merge_text(summary))


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

    summary = run_remove(cache, target=target, views=views, dry_run=dry_run)
    show(as_json, summary.to_json(), texts.rm_text(summary, dry_run))


def command_line() -> str:
    """Return the command that this process was called with, for 'go on with'."""
    # without --overwrite, which would begin from zero again
    command = ["tec-cache", *(without_secrets(word, marked=True) for word in sys.argv[1:] if word != "--overwrite")]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        nodes, restarts = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        launch = ["torchrun"]
        if nodes != "1":  # a worker is not told where its job's nodes meet
            launch += ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT"]
        launch += ["--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
        launch += ["--max-restarts", restarts] if restarts != "0" else []
        command = [*launch, "--no-python", *command]
    return shlex.join(command)


def fail(error: TecCacheError) -> int:
    """Print an error as text or as the one JSON object (rank 0's), and tell torchrun; return its exit code."""
    from tec_cache.distributed import tell_torchrun

    tell_torchrun(str(error))
    if isinstance(error, Interrupted) and os.environ.get("RANK", "0") != "0":
        return error.exit_code  # all ranks are; one says so
    if "--json" in sys.argv[1:] and os.environ.get("RANK", "0") == "0":
        found = {"what": error.what, "where": error.where, "todo": error.todo, "exit_code": error.exit_code}
        click.echo(json.dumps({"error": found}))
    else:
        click.echo(f"error: {error}", err=True)
    return error.exit_code


_TIME_LIMIT = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before a job's time is up."""


def _interrupt(number: int, frame: Any) -> None:
    """End like Ctrl-C: what is finished is kept, and the command that goes on is printed.

    Once: a scheduler signals every process of a job, and torchrun passes on its own, while this one is on its way out.
    """
    for each in _TIME_LIMIT:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


class Interrupted(TecCacheError):
    """Ctrl-C, SIGTERM or SIGUSR1."""

    exit_code = EXIT_INTERRUPTED


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 bad usage or settings, 3 cache incomplete or corrupt, 130 interrupted.
    """
    for number in _TIME_LIMIT:
        signal.signal(number, _interrupt)
    # OpenMP's threads wait by spinning: beside the loader's threads, or neighbours, that is many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = 0
    try:
        code = cli.main(prog_name="tec-cache", standalone_mode=False) or 0
    except click.UsageError as error:
        if "--json" in sys.argv[1:]:
            code = fail(ConfigError(scrubbed(error.format_message(), *sys.argv[1:])))
        else:
            click.UsageError(scrubbed(error.format_message(), *sys.argv[1:]), error.ctx).show()
            if "unexpected extra argument" in error.format_message():
                click.echo(
                    "Hint: quote a pattern such as 'shards/*.tar'; repeat --student-arg for each NAME=VALUE", err=True
                )
            code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = fail(Interrupted("interrupted: what is finished is kept", todo=f"go on with\n  {command_line()}"))
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            click.echo(scrubbed(traceback.format_exc(), *sys.argv[1:]), err=True, nl=False)
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
    return TecCacheError(scrubbed(f"{type(error).__name__}: {error}", *sys.argv[1:]), todo=todo)


if __name__ == "__main__":
    main()
