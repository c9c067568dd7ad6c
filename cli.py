"""The table of commands. Parsing and printing live here, the work in `pipelines`."""

from __future__ import annotations

import sys

from pipelines.terminal import signals, streams

if signals.is_program(__name__):  # before anything that takes a moment to import
    signals.begin()
    streams.open_missing()

# isort: split
import dataclasses
import functools
import json
import os
import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import click

from pipelines.terminal import completion, info_texts, leaving_texts, report_texts, texts, tuning_texts
from pipelines.terminal.continuing import continued_settings
from pipelines.terminal.options import (
    ExistingPlace,
    Grouped,
    Place,
    argument,
    by_name,
    common,
    given_options,
    loop_options,
    option,
    options_of,
    settings,
    settings_file,
)
from pipelines.terminal.rounds_texts import rounds_text
from tec_cache import __version__
from tec_cache.conditions import require_used
from tec_cache.config import ExtractConfig, PlanConfig, ProbeConfig, TrainConfig
from tec_cache.errors import CacheError, ConfigError, StorageError, TecCacheError, nearest
from tec_cache.fields import DEVICES, Names
from tec_cache.finetune.config import FinetuneConfig
from tec_cache.formats import FORMATS
from tec_cache.memory import is_out_of_memory, out_of_memory
from tec_cache.printable import block, counted, printable, shell_words
from tec_cache.rounds_config import FIRST, NOT_OF_ROUNDS, OF_TARGETS, RoundsConfig
from tec_cache.segment.config import SegmentConfig
from tec_cache.urls import scrubbed, without_secrets

SECTIONS = {
    "Make a cache": ("plan", "extract", "fit"),
    "Train": ("train", "rounds", "export"),
    "Judge": ("probe", "finetune", "segment", "report"),
    "Share": ("convert", "push"),
    "Look after a cache": ("info", "verify", "index", "pack", "unpack", "merge", "rm"),
}
"""The commands in the order of work."""
WIDEST = 100
"""Columns of a line of the help, at most."""
WHOLE = 200
"""Characters of a command's first line: none is cut off."""


class Commands(click.Group):
    """A group that lists its commands in the order of work, and names the nearest one for a mistyped one."""

    command_class = Grouped

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of work."""
        return [name for names in SECTIONS.values() for name in names]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each step of the work, with the first line of each command's help."""
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(WHOLE)) for name in names])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find the command, or fail with the nearest names."""
        unknown = args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-")
        if unknown and not ctx.resilient_parsing:
            raise click.UsageError(f"no such command {args[0]!r}{nearest(args[0], self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; click would take some of its errors for a Ctrl-C or a closed standard output."""
        try:
            return super().invoke(ctx)
        except (OSError, EOFError) as error:
            raise explained(error) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST})
@click.version_option(__version__, prog_name="tec-cache")
def cli() -> None:
    """Train a better ViT from a self-supervised one, and pay for the base model once.

    \b
    Example:
      tec-cache extract 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae
      tec-cache train --cache CACHE --out runs/first
      tec-cache export runs/first vit-b-tec
    """


def show(as_json: bool, result: dict[str, Any], text: str) -> None:
    """Print a result for people or for programs."""
    print(json.dumps(result) if as_json else text)


@cli.command()
@argument("input", Names.PHOTOS, required=False)
@options_of(ExtractConfig)
@settings_file("TOML file of settings.")
@option("--dry-run", is_flag=True, help="Say what would happen; write nothing.")
@option("--overwrite", is_flag=True, help="Replace what was made with other settings.")
@common
def extract(
    file: str | None, dry_run: bool, overwrite: bool, as_json: bool, quiet: bool, debug: bool, **values: Any
) -> None:
    """Stage one: cut views from photos, run the base over them once, write both to a cache.

    INPUT is a pattern of WebDataset tars or parquet files (quote it), a folder of them, a URL that fsspec knows
    (hf://, s3://), or a folder CLASS/NAME.jpg. Without it, targets are added for the crops that a cache already
    holds. An interrupted extraction goes on with the same command.

    Known bases: mae, mae_large, mae_huge, dino, dino_small, dinov2_small, dinov2_base, dinov2_large,
    dinov2_giant (each also with _reg), dinov3_small, dinov3_base, dinov3_large, clip_base, clip_large,
    siglip2_base, siglip2_large, eva02_small, eva02_base, eva02_large, radio_base, radio_large, ibot,
    ibot_large, mocov3; timm:NAME; a weight file; a folder (an export, one of timm's hub, one of the
    transformers library). What no file says is printed and can be set.

    \b
    Example:
      tec-cache extract 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae
      tec-cache extract --cache CACHE --base dinov2_small
      torchrun --nproc-per-node 8 --no-python tec-cache extract '*.tar' --cache CACHE --base mae
    """
    config = settings(ExtractConfig, values, file)
    from pipelines.extract import extract as run_extract
    from pipelines.extraction.extract_summary import require_finished
    from tec_cache.distributed import Ranks

    ranks = Ranks.from_environment()
    alone = ranks.world_size == 1 and config.part is None
    summary = run_extract(config, dry_run=dry_run, overwrite=overwrite, quiet=quiet or as_json, ranks=ranks)
    if alone and not dry_run:
        require_finished(summary)
    if ranks.main:
        show(as_json, summary.to_json(), texts.extract_text(summary, dry_run, config, alone))


@cli.command()
@argument("input", Names.PHOTOS, required=False)
@options_of(ExtractConfig, without=("part", "views_only"))
@settings_file("TOML file of settings.")
@option("--overwrite", is_flag=True, help="Replace what was made with other settings.")
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
    config = settings(ExtractConfig, values, file, without=("part", "views_only"))
    from pipelines.extract import extract as run_extract
    from tec_cache.distributed import Ranks

    ranks = Ranks.from_environment()
    summary = run_extract(config, overwrite=overwrite, fit_only=True, quiet=quiet or as_json, ranks=ranks)
    if ranks.main:
        show(as_json, summary.to_json(), texts.fit_text(summary, command_line().replace(" fit ", " extract ", 1)))


# what a plan asks of a training; device, precision and threads are the extraction's
_PLANNED = ("student", "student_args", "adapters", "decoder_depth", "decoder_width", "decoder_heads", "mask_ratio",
            "epochs", "batch_size", "micro_batch")  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@cli.command()
@argument("input", Names.PHOTOS, required=False)
@options_of(ExtractConfig, without=("batch_size", "part"))
@option("--base-batch-size", type=int, help="Views per batch of the base: extract's --batch-size.  [default: 64]")
@options_of(TrainConfig, without={f.name for f in dataclasses.fields(TrainConfig)} - set(_PLANNED))
@options_of(PlanConfig, without=("extract", "train"))
@settings_file("TOML file of extract's settings.")
@common
def plan(file: str | None, as_json: bool, quiet: bool, debug: bool, **values: Any) -> None:
    """Say what an extraction will take, before it is paid for: disk, hours, FLOP; and when it has paid for itself.

    Runs every stage of extract and train on a sample of your photos, on this machine and the cache's disk; nothing of
    it stays. That takes about --seconds, or longer where the base is slow: how long is said before it begins. With a
    cache of the same settings, what is left of it is planned. Hours are those of one process. Exits with 1 where the
    disk is too small.

    \b
    Example:
      tec-cache plan 'imagenet/train-{000000..001280}.tar' --cache CACHE --base mae
      tec-cache plan 'photos-*.tar' --cache CACHE --base dinov2_small --images 1281167 --epochs 100
    """
    given = given_options(values)
    fields = {f.name for f in dataclasses.fields(ExtractConfig)} - {"batch_size"}
    extract_config = settings(ExtractConfig, {n: v for n, v in values.items() if n in fields}, file, without=("part",))
    if "base_batch_size" in given:
        require_used(extract_config, ["batch_size"], {"batch_size": "--base-batch-size"})
        extract_config = dataclasses.replace(extract_config, batch_size=given["base_batch_size"])
    resolved = {
        "cache": extract_config.cache,
        "out": "(none)",
        "device": extract_config.device,
        "precision": extract_config.precision or "auto",
        "threads": extract_config.threads,
    }
    train_config = settings(TrainConfig, {name: values[name] for name in _PLANNED}, None, fixed=resolved)
    own = {name: given[name] for name in ("images", "seconds") if name in given}
    config = PlanConfig(extract=extract_config, train=train_config, **own)
    trained = [name for name in _PLANNED if name in given]
    options = {"train": ", ".join("--student-arg" if n == "student_args" else _flag(n) for n in trained)}
    require_used(config, [*own, *(["train"] if trained else [])], options)
    from pipelines.plan import plan as run_plan

    found = run_plan(config, quiet=quiet or as_json)
    show(as_json, found.to_json(), texts.plan_text(found))
    if found.fits is False:
        raise SystemExit(StorageError.exit_code)


def _run_loop(
    program: Callable[..., Any],
    config: Any,
    text: Callable[[Any, bool, str], str],
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a program of the training loop, say what it did, and end with the code of how it ended."""
    from tec_cache.distributed import Ranks, under_torchrun

    ranks = Ranks.from_environment()
    summary = program(config, overwrite=overwrite, dry_run=dry_run, quiet=quiet or as_json, ranks=ranks)
    if not ranks.main:
        return
    show(as_json, summary.to_json(), text(summary, dry_run, command_line()))
    # torchrun takes any other code than 0 for a failure, and would start the run again that was asked to stop
    if not dry_run and not summary.finished and not under_torchrun():
        raise SystemExit(signals.EXIT_INTERRUPTED)


@cli.command()
@loop_options(TrainConfig)
@option("--extend", is_flag=True, help="Go on with a run of another number of epochs, under the schedule of --epochs.")
def train(
    file: str | None,
    dry_run: bool,
    overwrite: bool,
    extend: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **values: Any,
) -> None:
    """Stage two: train a new ViT from the crops and targets of a cache.

    Learns from a target set (--target), from the base in the loop (--online), or from pixels (--pixels: a masked
    autoencoder). Defaults are the paper's recipe. An interrupted run goes on with the same command.

    A finished run is lengthened by more --epochs and --extend: from there on it follows the longer schedule, whose
    learning rate is not yet down, so it jumps. --init FOLDER starts from an export or another run.

    \b
    Example:
      tec-cache train --cache CACHE --out runs/vit-b --batch-size 4096 --micro-batch 256
      tec-cache train --cache CACHE --out runs/small --student vit_small_patch16_224 --epochs 100
      tec-cache train --cache CACHE --out RUN --probe-every 5 --probe-train CACHE --probe-test val.tar
      tec-cache train --cache CACHE --out runs/vit-b --epochs 400 --extend
      tec-cache train --cache CACHE --out runs/second --init runs/vit-b
      tec-cache train --cache s3://BUCKET/CACHE --stage /scratch --stage-bytes 200GB --out runs/vit-b
      torchrun --nproc-per-node 8 --no-python tec-cache train --cache CACHE --out runs/vit-b
    """
    config = continued_settings(TrainConfig, values, file, overwrite=overwrite, quiet=quiet or as_json)
    from pipelines.train import train as run_train

    run_train = functools.partial(run_train, extend=extend)
    _run_loop(run_train, config, texts.train_text, overwrite, dry_run, as_json, quiet)


# each round decides these itself, or says them of its targets
_NOT_OF_ROUNDS = (*NOT_OF_ROUNDS, *FIRST)


@cli.command()
@options_of(RoundsConfig, without=("train", "extract"))
@options_of(ExtractConfig, without={f.name for f in dataclasses.fields(ExtractConfig)} - set(OF_TARGETS))
@option("--base-batch-size", type=int, help="Views per batch of the base: extract's --batch-size.  [default: 64]")
@options_of(TrainConfig, without=_NOT_OF_ROUNDS)
@settings_file("TOML file of train's settings.")
@option("--dry-run", is_flag=True, help="Say what would happen, with disk and hours; write nothing.")
@common
def rounds(file: str | None, dry_run: bool, as_json: bool, quiet: bool, debug: bool, **values: Any) -> None:
    """Train round after round: each new model is the base of the next one, over the same stored crops.

    Round 0 learns from a target set of the cache, or from pixels. Each next round exports the model before it,
    extracts that model's targets (no photos are read), and trains anew on those: --epochs and all other settings of a
    training hold for every round. --k, --quality and their like are of the targets between two rounds. Goes on where
    it was stopped with the same command; --rounds may be raised. OUT/rounds.json says what came of each round.

    \b
    Example:
      tec-cache rounds --cache CACHE --out chain --rounds 3 --epochs 300 --dry-run
      tec-cache rounds --cache CACHE --out chain --rounds 3 --epochs 300 --target mae
      tec-cache rounds --cache CACHE --out small --rounds 4 --epochs 100 --pixels --start previous
    """
    own = {f.name for f in dataclasses.fields(RoundsConfig)} - {"train", "extract"}
    train_names = {f.name for f in dataclasses.fields(TrainConfig)} - set(_NOT_OF_ROUNDS)
    trained = {name: value for name, value in values.items() if name in train_names}
    train_config = settings(TrainConfig, trained, file, without=_NOT_OF_ROUNDS)
    given = given_options(values)
    extracted = {name: given[name] for name in OF_TARGETS if name in given}
    if "base_batch_size" in given:
        extracted["batch_size"] = given["base_batch_size"]
    chosen: dict[str, Any] = {"precision": None if train_config.precision == "auto" else train_config.precision}
    chosen |= {name: getattr(train_config, name) for name in ("cache", "device", "threads", "workers")}
    extract_config = ExtractConfig(**chosen, **extracted)
    require_used(extract_config, extracted, {"batch_size": "--base-batch-size"})
    config = RoundsConfig(
        train=train_config, extract=extract_config, **{name: value for name, value in given.items() if name in own}
    )
    made = {"--base-batch-size" if name == "batch_size" else _flag(name) for name in extracted}
    require_used(
        config,
        [*(name for name in given if name in own), *(["extract"] if made else [])],
        {"extract": ", ".join(sorted(made))},
    )
    if "seconds" in given and not dry_run:
        raise ConfigError("not used: --seconds; only a dry run measures", todo="add --dry-run, or leave it out")
    from pipelines.rounds import rounds as run_rounds

    summary = run_rounds(config, dry_run=dry_run, quiet=quiet or as_json)
    show(as_json, summary.to_json(), rounds_text(summary, dry_run, command_line()))
    if dry_run and summary.estimate and summary.estimate["fits"] is False:
        raise SystemExit(StorageError.exit_code)
    if not dry_run and not summary.finished:
        raise SystemExit(signals.EXIT_INTERRUPTED)


@cli.command()
@argument("model", Names.BASE)
@loop_options(FinetuneConfig)
def finetune(
    file: str | None, dry_run: bool, overwrite: bool, as_json: bool, quiet: bool, debug: bool, **values: Any
) -> None:
    """Fine-tune a model on labelled photos and judge it: the number that the paper reports.

    MODEL is an exported folder, a base name, timm:NAME, a weight file, or random:NAME (untrained): the same program
    judges the base and the new model. --tune trains all of it, the head alone, or the adapters. What the recipe says
    can be changed by options; choose them on a part of --train (--select 0.1), not on --test. An interrupted run goes
    on with the same command.

    \b
    Recipes: mae-b-300, mae-b-800, ibot-b-300, ibot-b-800, mae-l-300, small, linear, light.

    \b
    Example:
      tec-cache finetune vit-b-tec --train 'train/*.tar' --test 'val/*.tar' --out runs/tuned
      tec-cache finetune mae --base-lr 1e-3 --train 'train/*.tar' --select 0.1 --out runs/choose
      tec-cache finetune vit-b-tec --tune head --train 'train/*.tar' --test 'val/*.tar' --out probe
    """
    config = continued_settings(FinetuneConfig, values, file, overwrite=overwrite, quiet=quiet or as_json)
    from pipelines.finetune import finetune as run_finetune

    _run_loop(run_finetune, config, tuning_texts.finetune_text, overwrite, dry_run, as_json, quiet)


@cli.command()
@argument("model", Names.BASE)
@loop_options(SegmentConfig)
def segment(
    file: str | None, dry_run: bool, overwrite: bool, as_json: bool, quiet: bool, debug: bool, **values: Any
) -> None:
    """Train a model to say the class of each pixel, and judge it by intersection over union.

    MODEL is what it is for finetune. The mask of KEY.jpg is KEY.seg.png beside it, in tars as in folders: grey or with
    a palette, a number for each class, or ImageNet-S's code (R + 256 G). Of a finished run the same command judges the
    last model again; with --save-predictions it writes its masks, and pictures of them.

    \b
    Recipes: imagenet-s, imagenet-s-ft, ade20k, small.

    \b
    Example:
      tec-cache segment vit-b-tec --train 'train/*.tar' --test 'val/*.tar' --out runs/masks
      tec-cache segment vit-b-tec --recipe ade20k --train train.tar --test val.tar --out runs/ade
      tec-cache segment vit-b-tec --train train.tar --test val.tar --out masks --save-predictions seen
    """
    config = continued_settings(SegmentConfig, values, file, overwrite=overwrite, quiet=quiet or as_json)
    from pipelines.segment import segment as run_segment

    _run_loop(run_segment, config, tuning_texts.segment_text, overwrite, dry_run, as_json, quiet)


@cli.command()
@argument("run", Names.RUN, type=ExistingPlace(exists=True, file_okay=False))
@argument("out", Names.FOLDER, type=Place())
@option(
    "--checkpoint",
    type=ExistingPlace(exists=True, dir_okay=False),
    names=Names.FILE,
    help="Checkpoint to export.  [default: the last one]",
)
@option("--overwrite", is_flag=True, help="Replace an earlier export.")
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
    show(as_json, {"out": str(path)}, leaving_texts.export_text(path))


@cli.command()
@argument("export", Names.EXPORT, type=ExistingPlace(exists=True, file_okay=False))
@argument("out", Names.FOLDER, type=Place())
@option("--to", required=True, type=click.Choice(list(FORMATS)), help="Library to convert the model for.")
@option("--size", type=int, help="Pixels per side; positions are interpolated.  [default: the export's]")
@option("--overwrite", is_flag=True, help="Replace an earlier conversion.")
@common
def convert(
    export: str, out: str, to: str, size: int | None, overwrite: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Write an export as a folder of another library, with that library's configuration.

    Outputs stay the same; what the library has no place for is named, in the output and in OUT/README.md. detectron2
    and mmpretrain get a checkpoint and a config.py, transformers and timm what their from_pretrained reads.

    \b
    Example:
      tec-cache convert vit-b-tec vit-b-tec-hf --to transformers
      tec-cache convert vit-b-tec vit-b-tec-d2 --to detectron2
    """
    from pipelines.convert import convert as run_convert

    summary = run_convert(export, out, to=to, size=size, overwrite=overwrite)
    show(as_json, summary.to_json(), leaving_texts.convert_text(summary))


@cli.command()
@argument("export", Names.EXPORT, type=ExistingPlace(exists=True, file_okay=False))
@argument("name", metavar="HUB_NAME")
@option("--private", is_flag=True, help="Make a new model visible to its owner only.")
@option("--revision", help="Branch of the model to push to.  [default: main]")
@common
def push(export: str, name: str, private: bool, revision: str | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """Push an export, or a converted model, to HUB_NAME (OWNER/MODEL) on the hub of models.

    Read its README.md first: whether the licences of bases and photos allow it is yours to decide. Needs
    pip install 'tec-cache[hub]' and a token of the hub (hf auth login, or HF_TOKEN).

    \b
    Example:
      tec-cache push vit-b-tec OWNER/vit-b-tec --private
    """
    from pipelines.push import push as run_push

    summary = run_push(export, name, private=private, revision=revision)
    show(as_json, summary.to_json(), leaving_texts.push_text(summary))


@cli.command()
@argument("model", Names.BASE)
@options_of(ProbeConfig)
@settings_file("TOML file of settings.")
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
@argument("place", Names.OURS, type=Place())
@common
def info(place: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Say what PLACE is and holds: a cache, a pack, a run, an exported model, or rounds.

    Of a cache or pack: what is there and what is missing. Of a run: how far it is, and the command that goes on. Of
    an export: its architecture, the hash of its weights, and the run that it came from.

    \b
    Example:
      tec-cache info CACHE
      tec-cache info runs/vit-b
    """
    from pipelines.info import info as run_info

    found = run_info(place)
    show(as_json, found, info_texts.text_of(found))


@cli.command("report")
@argument("places", Names.OURS, nargs=-1, required=True, type=Place())
@option(
    "--out", type=Place(), names=Names.FILE, default="report.html", help="File of the page.  [default: report.html]"
)
@option(
    "--photos",
    type=Place(),
    names=Names.PHOTOS,
    help="Photos that models look at, as extract takes them.  [default: stored crops]",
)
@option(
    "--base",
    type=Place(),
    names=Names.BASE,
    help="Base model, drawn beside the new ones: what extract's --base takes.",
)
@option("--base-weights", type=Place(), names=Names.WEIGHTS, help="Weight file of the base.")
@option("--mean", type=float, nargs=3, help="Mean of the base's pixels, per channel.  [default: its release's]")
@option("--std", type=float, nargs=3, help="Standard deviation of those pixels.  [default: its release's]")
@option("--base-arg", "base_args", multiple=True, metavar="NAME=VALUE", help="Set what the base's weights do not tell.")
@option("--images", type=int, default=4, help="Photos to draw in each part.  [default: 4]")
@option("--limit", type=int, default=500, help="Photos to judge a tuned model on for its confusions."
        "  [default: 500]")  # fmt: skip
@option(
    "--device",
    words=DEVICES,
    default="auto",
    help="Where models run: auto, cpu, cuda or cuda:N.  [default: auto]",
)
@common
def report_page(
    places: tuple[str, ...], base_args: tuple[str, ...], as_json: bool, quiet: bool, debug: bool, **values: Any
) -> None:
    """Write one page to look at, of runs, caches and exports: curves, costs, attention, crops, confusions.

    PLACES are folders of train, finetune or segment, caches, packs and exports; several runs stand side by side. The
    page needs nothing but itself. What is unfinished or damaged is said on it. Fine-tuned models are judged anew on
    --photos with labels, segmenters on those with masks.

    \b
    Example:
      tec-cache report runs/vit-b runs/vit-b-pixels CACHE --out report.html
      tec-cache report runs/vit-b --base mae --photos 'imagenet/val-*.tar' --images 6
    """
    if "limit" in given_options(values) and values["photos"] is None:
        raise ConfigError("not used: --limit; models are judged on --photos only", todo="add --photos, or leave it out")
    from pipelines.report import ReportConfig
    from pipelines.report import report as run_report

    config = ReportConfig(places=places, base_args=by_name(base_args, "--base-arg"), **values)
    summary = run_report(config, quiet=quiet or as_json)
    show(as_json, summary.to_json(), report_texts.report_text(summary))


_OWN = "each set's own"  # --base without a name


@cli.command()
@argument("cache", Names.CACHE, type=Place(), required=False)
@option("--full", is_flag=True, help="Read every byte: the SHA-256 and the inside of every payload.")
@option(
    "--base",
    type=Place(),
    is_flag=False,
    flag_value=_OWN,
    names=Names.BASE_OR_TARGET,
    metavar="[NAME]",
    help="Run the base again on a sample of the stored crops: each target set's own, this one, or a set's by its name.",
)
@option("--repair", is_flag=True, help="Drop what is bad, so that extract makes it again.")
@option("--sample", type=int, help="With --base: views of each target set to run it on.  [default: 64]")
@option("--seed", type=int, help="With --base: seed of the choice of those views.  [default: 0]")
@option("--target", names=Names.TARGET, help="Run only this target set's base.  [default: all]")
@option(
    "--base-weights",
    type=Place(),
    names=Names.WEIGHTS,
    help="Weight file of the base; or its file or folder, where that was moved.",
)
@option("--mean", type=float, nargs=3, help="Mean of the base's pixels, per channel.  [default: the target set's]")
@option("--std", type=float, nargs=3, help="Standard deviation of those pixels.  [default: the target set's]")
@option("--base-arg", "base_args", multiple=True, metavar="NAME=VALUE", help="Set what the base's weights do not tell.")
@option("--device", words=DEVICES, help="Where the base runs: auto, cpu, cuda or cuda:N.  [default: auto]")
@common
def verify(cache: str | None, base: str | None, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Check a cache: records and sizes; with --full every byte; with --base what the base says of it.

    Exit code 0 if it is whole and sound, 3 with a list of what is wrong or missing. --repair drops what is bad,
    and the same extract then makes it again; an index that does not fit is made again at once.

    \b
    Example:
      tec-cache verify CACHE
      tec-cache verify CACHE --full --base
      tec-cache verify CACHE --base mae --base-weights mae_pretrain_vit_base.pth
      tec-cache verify CACHE --full --repair
    """
    from pipelines.verify import verify as run_verify

    if cache is None:  # `verify --base CACHE`: what follows is no base's name
        if base in (None, _OWN):
            raise click.UsageError("Missing argument 'CACHE'.", click.get_current_context())
        cache, base = base, _OWN
    options["base_args"] = by_name(options["base_args"], "--base-arg") or None
    verdict = run_verify(cache, base=True if base == _OWN else base or False, quiet=quiet or as_json, **options)
    show(as_json, verdict.to_json(), texts.verify_text(verdict, options["full"]))
    if not verdict.clean:
        raise SystemExit(CacheError.exit_code)


@cli.command()
@argument("cache", Names.CACHE, type=Place())
@common
def index(cache: str, as_json: bool, quiet: bool, debug: bool) -> None:
    """Make the index of CACHE anew: what its records say of all units, in one file for each kind.

    extract, pack, unpack, merge and rm do so by themselves when they end with a finished cache. A cache without an
    index, or with one that does not fit, is read by its records, which takes longer the larger it is.

    \b
    Example:
      tec-cache index CACHE
    """
    from pipelines.index import index as run_index

    summary = run_index(cache, quiet=quiet or as_json)
    show(as_json, summary.to_json(), texts.index_text(summary))


@cli.command()
@argument("cache", Names.CACHE, type=Place())
@argument("out", Names.FOLDER, type=Place())
@option(
    "--target",
    "targets",
    multiple=True,
    names=Names.TARGET,
    metavar="NAME",
    help="Target set to pack; may be repeated.  [default: all]",
)
@option("--views", type=int, help="Pack the first so many views.  [default: all]")
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
@argument("pack", Names.CACHE, type=Place())
@argument("cache", Names.CACHE, type=Place())
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
@argument("out", Names.FOLDER, type=Place())
@argument("parts", Names.CACHE, nargs=-1, required=True, type=Place())
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
@argument("cache", Names.CACHE, type=Place())
@option("--target", names=Names.TARGET, metavar="NAME", help="Target set to remove.")
@option("--views", type=int, help="Keep the first so many views; remove the others and the targets over them.")
@option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")
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

    summary = run_remove(cache, target=target, views=views, dry_run=dry_run, quiet=quiet or as_json)
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
    return shell_words(command)


class Interrupted(TecCacheError):
    """Ctrl-C, SIGTERM or SIGUSR1."""

    exit_code = signals.EXIT_INTERRUPTED

    def __init__(self) -> None:
        super().__init__("interrupted: what is finished is kept", todo="go on with", command=command_line())


def fail(error: TecCacheError) -> int:
    """Print an error, and tell torchrun; return its exit code."""
    from tec_cache.distributed import tell_torchrun

    tell_torchrun(str(error))
    descriptor, text = report(error)
    print(text, end="", file=sys.stdout if descriptor == 1 else sys.stderr)
    return error.exit_code


def report(error: TecCacheError) -> tuple[int, str]:
    """Return where an error is printed (1 or 2) and what: as text, or rank 0's as the one JSON object."""
    main = os.environ.get("RANK", "0") == "0"
    if isinstance(error, Interrupted) and not main:
        return 2, ""  # all ranks are; one says so
    if "--json" not in sys.argv[1:] or not main:
        return 2, f"error: {error}\n"
    what = "\n    ".join([error.what, *error.details])
    todo = f"{error.todo}\n  {error.command}" if error.command else error.todo
    parts = {"what": what, "where": error.where, "todo": todo, "exit_code": error.exit_code}
    return 1, json.dumps({"error": parts}) + "\n"


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 bad usage or settings, 3 cache incomplete or corrupt, 130 interrupted.
    """
    signals.working(lambda: report(Interrupted()))
    streams.make_tolerant()
    answered = completion.answer(cli, "tec-cache")
    if answered is not None:
        sys.exit(answered)
    warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
    # OpenMP's threads wait by spinning: beside the loader's threads, or neighbours, that is many times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = 0
    try:
        code = cli.main(prog_name="tec-cache", standalone_mode=False) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except click.UsageError as error:
        code = misused(error)
    except (click.Abort, KeyboardInterrupt):
        code = fail(Interrupted())
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            print(block(scrubbed(traceback.format_exc(), *sys.argv[1:]).splitlines()), file=sys.stderr)
        code = fail(explained(error))
    code = printed(code)
    # threads that decode may still be busy, and other ranks may wait for this one in what it will never join: after an
    # error nothing of them is wanted any more
    if code == signals.EXIT_INTERRUPTED or left_in_group():
        os._exit(code)
    signals.done(code)
    sys.exit(code)


def left_in_group() -> bool:
    """Say whether an error has ended a command in the middle of what several ranks do together."""
    from tec_cache.distributed import in_group

    return in_group()


def misused(error: click.UsageError) -> int:
    """Print a mistake in the command line; return its exit code."""
    what = scrubbed(error.format_message(), *sys.argv[1:])
    if "--json" in sys.argv[1:]:
        return fail(ConfigError(what))
    if error.ctx is not None and isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        print(error.ctx.get_help(), file=sys.stderr)
        return error.exit_code
    lines = []
    if error.ctx is not None:
        lines = [*error.ctx.get_usage().splitlines(), f"Try '{error.ctx.command_path} -h' for help.", ""]
    extra = re.fullmatch(r"Got unexpected extra arguments? \((.*)\)", what, flags=re.DOTALL)
    if extra is not None:
        words = extra[1].split()
        more = f", and {counted(len(words) - 3, 'other')}" if len(words) > 3 else ""
        what = f"unexpected: {' '.join(words[:3])}{more}"
    lines.append(f"Error: {what}")
    if extra is not None:
        takes = {name for parameter in error.ctx.command.params for name in parameter.opts} if error.ctx else set()
        student = "; repeat --student-arg for each NAME=VALUE" if "--student-arg" in takes else ""
        lines.append(f"Hint: quote a pattern such as 'shards/*.tar'{student}")
    print(block(lines), file=sys.stderr)
    return error.exit_code


def printed(code: int) -> int:
    """Return the exit code once everything is printed: 1 for a success of which that is impossible."""
    lost = streams.lost_output()
    if lost is None:
        return code
    if not streams.reader_left(lost):
        print(f"error: the output cannot be written: {lost.strerror}", file=sys.stderr, flush=True)
    return code or 1


def explained(error: Exception) -> TecCacheError:
    """Return an error as one that a user can act on."""
    if isinstance(error, StorageError):
        return StorageError(
            error.what, where=error.where, todo=error.todo, details=error.details, command=command_line()
        )
    if isinstance(error, TecCacheError):
        return error
    if isinstance(error, OSError):
        todo = "check the disk and its permissions; what is finished is kept, the same command goes on"
        return TecCacheError(f"{error.strerror or error}", where=str(error.filename or ""), todo=todo)
    if is_out_of_memory(error):
        todo = "use less of it at once: --micro-batch in a training, --batch-size elsewhere, or fewer --workers"
        return out_of_memory(error, "this command", todo=todo)
    todo = "this is a bug in tec-cache: please report it with the output of --debug"
    first, *more = scrubbed(str(error), *sys.argv[1:]).splitlines() or [""]
    return TecCacheError(f"{type(error).__name__}: {first}", details=more, todo=todo)


if __name__ == "__main__":
    main()
