"""Options and arguments of commands: from the fields of a config, each given once, with ~ for the home folder."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from pipelines.terminal.completion import completion_of
from tec_cache.conditions import require_used
from tec_cache.config import read_toml
from tec_cache.errors import ConfigError
from tec_cache.fields import Names
from tec_cache.paths import expanded


class Grouped(click.Command):
    """A command whose help lists its options by the component that they set."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each component, in the order in which they come, and the command's own at the end."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):  # arguments stand in the text above
                sections.setdefault(getattr(parameter, "section", ""), []).append(record)
        own = sections.pop("", [])
        for title, records in [*sections.items(), ("Options", own)]:
            with formatter.section(title):
                formatter.write_dl(records)


class Once(click.Option):
    """An option that takes one value, and so may be given once: the last of several would win without a word.

    section: title of the part of the help in which it stands; empty for the command's own. names, words: what its
    value names, and some of its values, for shells to complete.
    """

    def __init__(
        self, *args: Any, section: str = "", names: Names | None = None, words: Iterable[str] = (), **kwargs: Any
    ) -> None:
        if names is not None or words:
            kwargs["shell_complete"] = completion_of(names, words)
        super().__init__(*args, **kwargs)
        self.section = section

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser keep every value."""
        if self.is_flag or self.multiple or self.count:
            super().add_to_parser(parser, ctx)
        else:
            parser.add_option(obj=self, opts=self.opts, dest=self.name, action="append", nargs=self.nargs)

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> Any:
        """Return the one value, or fail with all of them."""
        values = opts.get(self.name or "")
        if isinstance(values, list) and not self.multiple:
            if len(values) > 1 and not ctx.resilient_parsing:
                texts = [" ".join(v) if isinstance(v, tuple) else v for v in values]
                shown = " and ".join(text for text in texts if isinstance(text, str))
                often = "twice" if len(values) == 2 else f"{len(values)} times"
                raise click.UsageError(f"{self.opts[0]} was given {often} ({shown}): give it once", ctx)
            opts = {**opts, self.name or "": values[-1]}
        return super().consume_value(ctx, opts)


option = functools.partial(click.option, cls=Once)
"""Every option of every command is made by this."""


def argument(name: str, names: Names | None = None, **kwargs: Any) -> Callable[[Any], Any]:
    """Make an argument of a command; names: what its value names, for shells to complete."""
    return click.argument(name, shell_complete=completion_of(names), **kwargs)


class Place(click.ParamType):
    """A path or URL that need not exist."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Expand ~; an empty path would be the current folder."""
        if value == "":
            self.fail("a path is empty", param, ctx)
        return expanded(value)


class ExistingPlace(click.Path):
    """A local path that must exist."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Expand ~ first."""
        return super().convert(expanded(value), param, ctx)


def options_of(config: type, without: Iterable[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make an option of every field of a config dataclass, with its documentation as help.

    Those of one component stand together, the config's own first.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for item, section in reversed(_by_component(config)):
            if item.name in ("input", "model", *without):
                continue  # the argument of the command, or no option of it
            help_text, kind = item.metadata["help"], str(item.type)
            flag = "--" + item.name.replace("_", "-")
            default = item.default if item.default is not dataclasses.MISSING else None
            shown = isinstance(default, int | float | str) and not isinstance(default, bool) and default != ""
            text = f"{help_text}  [default: {default}]" if shown else help_text
            text += "  [required]" if item.metadata["required"] else ""
            choices = item.metadata["choices"]
            metavar = f"[{'|'.join(choices)}]" if choices else None
            shells = {"names": item.metadata["names"], "words": choices or item.metadata["words"]}
            own = functools.partial(option, help=text, section=section, **shells)
            made = functools.partial(own, flag, item.name, default=None, metavar=metavar)
            if kind == "bool":
                function = own(flag, item.name, is_flag=True)(function)
            elif kind == "tuple[str, ...]":
                function = own(flag, item.name, multiple=True, metavar="NAME")(function)
            elif kind.startswith("tuple"):
                function = made(type=float, nargs=kind.count("float"))(function)
            elif kind.startswith("dict"):
                function = own(flag.removesuffix("s"), item.name, multiple=True, metavar="NAME=VALUE")(function)
            else:
                types = {"int": int, "float": float, "str": str}
                function = made(type=types[kind.split(" ")[0]])(function)
        return function

    return decorate


def _by_component(config: type) -> list[tuple[dataclasses.Field[Any], str]]:
    """Return the fields of a config with the titles of the components that first declare them."""
    components = [part for part in config.__mro__ if "TITLE" in vars(part)]
    of = {name: part for part in components for name in vars(part).get("__annotations__", {})}
    found = [(field, of[field.name]) for field in dataclasses.fields(config) if field.name in of]
    found.sort(key=lambda item: components.index(item[1]))
    plain = [(field, "") for field in dataclasses.fields(config) if field.name not in of]
    return [*((field, str(vars(part)["TITLE"])) for field, part in found), *plain]


def settings_file(text: str) -> Callable[[Any], Any]:
    """Make the option that names a file of settings; text: its help."""
    kind = ExistingPlace(exists=True, dir_okay=False)
    return option("--config", "file", type=kind, names=Names.SETTINGS, help=text)


def common(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has."""
    for made in (
        option("--debug", is_flag=True, help="Show the traceback of an error."),
        option("--quiet", is_flag=True, help="Print no progress."),
        option("--json", "as_json", is_flag=True, help="Print exactly one JSON object."),
    ):
        function = made(function)
    return function


def loop_options(config: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of a program of the training loop: its settings, and how it begins."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        function = common(function)
        for made in (
            option("--overwrite", is_flag=True, help="Replace a run that was made with other settings."),
            option("--dry-run", is_flag=True, help="Check everything and say what would happen; write nothing."),
            settings_file("TOML file of settings, or the run.json of a run."),
        ):
            function = made(function)
        return options_of(config)(function)

    return decorate


def settings(
    config: type,
    values: dict[str, Any],
    file: str | None,
    *,
    fixed: Mapping[str, Any] | None = None,
    without: Iterable[str] = (),
    options: Mapping[str, str] | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Any:
    """Fill a config: defaults, then the TOML file, then what was given on the command line, then what is fixed.

    begun: the settings of a run that goes on, which the file and the command line may change. without: settings that
    the command does not have, and so no file may set. options: spellings that differ from the settings' names.
    Raises ConfigError, also for what was given and is not used.
    """
    given = given_options(values)
    tables = [f.name for f in dataclasses.fields(config) if str(f.type).startswith("dict") and f.name in given]
    for name in tables:
        given[name] = by_name(given[name], "--" + name.replace("_", "-").removesuffix("s"))
    stored = read_settings(file, config) if file else {}
    foreign = sorted(set(stored) & set(without))
    if foreign:
        raise ConfigError(f"this command has no setting {', '.join(foreign)}", where=str(file), todo="leave it out")
    before = dict(begun or {})
    for name in tables:
        given[name] = {**before.get(name, {}), **stored.get(name, {}), **given[name]}
    made = config(**(before | stored | given | dict(fixed or {})))
    require_used(made, [f.name for f in dataclasses.fields(config) if f.name in stored or f.name in given], options)
    return made


TASKS = {"TrainConfig": "pretrain", "FinetuneConfig": "classify", "SegmentConfig": "segment"}
"""Config of a program of the training loop -> the task of its runs."""
OF_ONE_RUN = ("out", "steps")
"""Settings of a run that another one does not take over."""


def read_settings(file: str, config: type) -> dict[str, Any]:
    """Read settings from a TOML file, or from the run.json of a run of the same program: what it was told.

    Raises ConfigError for what cannot be read or is no setting, TecCacheError for a run of another program.
    """
    if Path(file).suffix != ".json":
        return read_toml(file, config)
    if config.__name__ not in TASKS:
        raise ConfigError("this command reads no run.json", where=file, todo="give a TOML file of settings")
    from tec_cache.run.settings import load_settings

    told = load_settings(Path(file).parent, TASKS[config.__name__])["config"]
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name not in OF_ONE_RUN}
    return {
        name: values[name] for name, default in defaults.items() if name in values and values[name] not in (default, {})
    }


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return what was given on the command line, without defaults."""
    source = click.get_current_context().get_parameter_source
    return {n: value for n, value in values.items() if source(n) == click.core.ParameterSource.COMMANDLINE}


def by_name(texts: Iterable[str], flag: str) -> dict[str, Any]:
    """Read NAME=VALUE of an option, each name once; a value is JSON where it can be, else a string."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{flag} {text}", todo="give NAME=VALUE, for instance patch_size=8")
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            read = value
        if name in found:
            raise ConfigError(f"{flag} {name} was given twice: {found[name]} and {read}", todo="give it once")
        found[name] = read
    return found
