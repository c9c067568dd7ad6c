"""Words that a shell completes: commands, options, choices, files and folders, bases, target sets of a cache.

Everything comes from what the options declare (`tec_cache.fields`), and from names in local folders: nothing is opened
that takes long, and nothing of it ever fails or prints a message.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import click
from click.shell_completion import CompletionItem, shell_complete

from tec_cache.cache import layout
from tec_cache.fields import Names
from tec_cache.kinds import EXPORT_FILE, ROUNDS_FILE, RUN_FILE, WEIGHTS_FILE
from tec_cache.paths import expanded
from tec_cache.recipes import BASES

VARIABLE = "_TEC_CACHE_COMPLETE"
"""Environment variable by which a shell asks, as click names it."""
MOST_ENTRIES = 10_000
"""Entries of a folder that are looked at."""
PLAIN = re.compile(r"~?[\w./+@%=,-]*")
"""A name that no shell reads as anything else; all others are left to the shell, which quotes them."""

Accepts = Callable[[Path], bool]
"""Says whether a file or folder is what an option takes."""


def answer(cli: click.Command, name: str) -> int | None:
    """Print what a shell asks for, and return the exit code; None where no shell asks."""
    instruction = os.environ.get(VARIABLE)
    if not instruction:
        return None
    try:
        return shell_complete(cli, {}, name, VARIABLE, instruction)
    except Exception:  # nothing is said in the middle of somebody's typing
        return 1


def completion_of(
    names: Names | None, words: Iterable[str] = ()
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]:
    """Return what completes the value of an option or argument: some words, and the names of what it takes."""
    known = [CompletionItem(word) for word in words]

    def complete(ctx: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem[str]]:
        given = ctx.params.get(parameter.name or "") if parameter.multiple else None
        try:
            found = [*known, *_named(names, ctx, given or ())]
            fitting = [item for item in found if item.value.startswith(typed)]
            return fitting or ([] if names in (None, Names.TARGET) else _places(names, typed))
        except ValueError:  # what was typed cannot be a path
            return []

    return complete


def _named(names: Names | None, ctx: click.Context, given: Iterable[str]) -> Iterator[CompletionItem[str]]:
    """Yield the bases and target sets that a value may name, without those that were given already."""
    there = {text.rpartition(":")[0] or text for text in given}
    of_cache = target_sets(ctx) if names in (Names.TARGET, Names.BASE_OR_TARGET) else []
    yield from (CompletionItem(name, help="target set") for name in of_cache if name not in there)
    for name, recipe in BASES.items() if names in (Names.BASE, Names.BASE_OR_TARGET) else ():
        if name not in there and name not in of_cache:
            yield CompletionItem(name, help=recipe.timm_name)


def target_sets(ctx: click.Context) -> list[str]:
    """Return the names of the target sets of the cache that the command line names; of none behind a URL."""
    place = _cache(ctx)
    if not place or ("://" in place and not place.startswith("file://")):
        return []
    root = Path(place.removeprefix("file://"))
    names = [entry.name for entry in _entries(root / layout.TARGETS) if layout.is_set_name(entry.name)]
    return sorted(name for name in names if (root / layout.target_manifest(name)).is_file())


def _cache(ctx: click.Context) -> str | None:
    """Return the cache of a command line: an option, an argument, or a line of its TOML file."""
    given = ctx.params.get("cache")
    if given:
        return expanded(str(given))
    arguments = [p.name for p in ctx.command.params if isinstance(p, click.Argument)]
    if "cache" in arguments:  # click reads no argument while the option before the cursor has no value yet
        place = arguments.index("cache")
        return expanded(ctx.args[place]) if place < len(ctx.args) else None
    file = ctx.params.get("file")
    if not file or Path(file).suffix != ".toml":
        return None
    try:
        cache = tomllib.loads(Path(file).read_text()).get("cache")
        return expanded(cache) if isinstance(cache, str) else None
    except (OSError, ValueError):
        return None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, MOST_ENTRIES))
    except OSError:
        return []


def _has(*names: str) -> Accepts:
    return lambda path: any((path / name).is_file() for name in names)


def _ends(*endings: str) -> Accepts:
    return lambda path: path.name.endswith(endings) and path.is_file()


def _is_export(path: Path) -> bool:
    return (path / EXPORT_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


_CACHE = _has(layout.MANIFEST, layout.PACK)
_RUN = _has(RUN_FILE, ROUNDS_FILE)
_TARS = _ends(".tar", ".tar.gz", ".tgz", ".parquet")
_WEIGHTS = _ends(".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar")

ACCEPTS: dict[Names, Accepts] = {
    Names.SETTINGS: lambda path: _ends(".toml")(path) or (path.name == RUN_FILE and path.is_file()),
    Names.PHOTOS: _TARS,
    Names.LABELLED: lambda path: _TARS(path) or _CACHE(path),
    Names.CACHE: _CACHE,
    Names.RUN: _RUN,
    Names.EXPORT: _is_export,
    Names.START: lambda path: _RUN(path) or _is_export(path),
    Names.OURS: lambda path: _CACHE(path) or _RUN(path) or _is_export(path),
    Names.WEIGHTS: _WEIGHTS,
    Names.BASE: lambda path: _WEIGHTS(path) or _is_export(path),
    Names.BASE_OR_TARGET: lambda path: _WEIGHTS(path) or _is_export(path),
}
"""What is offered by itself where there is some."""
FOLDERS = (Names.FOLDER, Names.CACHE, Names.RUN, Names.EXPORT, Names.START, Names.OURS)
"""What is always a folder."""


def _places(names: Names, typed: str) -> list[CompletionItem[str]]:
    """Offer the files or folders of a kind that begin as typed; else let the shell complete all files or folders.

    The shell does so too where a folder leads on to others, or a name must be quoted: it adds the slash or the quotes.
    """
    shells = [CompletionItem(typed, type="dir" if names in FOLDERS else "file")]
    accepts = ACCEPTS.get(names)
    if accepts is None or "://" in typed:
        return shells
    head, slash, start = typed.rpartition("/")
    folder = Path(expanded(head + slash))
    fitting, leads_on = [], False
    for entry in _entries(folder):
        if entry.name.startswith(start) and (start or not entry.name.startswith(".")):
            if accepts(folder / entry.name):
                fitting.append(head + slash + entry.name)
            else:
                leads_on |= entry.is_dir()
    if leads_on or not fitting or not all(map(PLAIN.fullmatch, fitting)):
        return shells
    return [CompletionItem(path) for path in sorted(fitting)]
