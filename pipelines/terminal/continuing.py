"""A run goes on with its own settings: what a command leaves out is taken from run.json, and said."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.describing.command_words import option_words
from pipelines.terminal.options import given_options, read_settings, settings
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError
from tec_cache.judgement_settings import JudgementSettings
from tec_cache.kinds import RUN_FILE
from tec_cache.paths import expanded
from tec_cache.printable import printable, shell_words

OF_ONE_CALL = ("compile", "checkpointing", "micro_batch")
"""Flags that a command cannot take back but by leaving them out, and what a run finds again by itself."""
ONE_OF = ("target", "online", "pixels")
"""Ways to say what a run learns from."""
LEARNS = {"target": "from stored targets", "online": "from a base in the loop", "pixels": "from pixels"}


def continued_settings(config: type, values: dict[str, Any], file: str | None, *, overwrite: bool, quiet: bool) -> Any:
    """Fill the config of a program of the training loop; where --out holds its run, left-out settings are the run's.

    values: of the command's options. Says on standard error what was taken, unless quiet. Raises what `settings` does,
    and TecCacheError for a run of another program or one that learns from something else.
    """
    told = (read_settings(file, config) if file else {}) | given_options(values)
    taken = {} if overwrite else settings_of_run(config, told)
    made = settings(config, values, file, begun=taken)
    words = option_words(config, {name: value for name, value in taken.items() if name not in told})
    if words and not quiet and Ranks.from_environment().main:
        line = f"{made.out} goes on with its own settings where none were given: {shell_words(words)}"
        print(printable(line), file=sys.stderr, flush=True)
    return made


def settings_of_run(config: type, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that lies where `told` says --out; nothing where there is none."""
    out = told.get("out")
    if not out or not (Path(expanded(str(out))) / RUN_FILE).is_file():
        return {}
    stored = read_settings(str(Path(expanded(str(out))) / RUN_FILE), config)
    left = {*OF_ONE_CALL, "model"}
    asked = next((name for name in ONE_OF if told.get(name)), None)
    if asked is not None:
        before = "pixels" if stored.get("pixels") else "online" if stored.get("online") else "target"
        if asked != before:
            what = f"this run learns {LEARNS[before]}, and --{asked} was given"
            raise ConfigError(what, where=str(out), todo=f"leave out --{asked}, name another --out, or --overwrite")
        left |= set(ONE_OF)  # of the same kind: which ones is compared when the run goes on
    if told.get("probe_every") == 0:
        left |= {field.name for field in dataclasses.fields(JudgementSettings)}
    return {name: value for name, value in stored.items() if name not in left}
