"""The calls of all rounds as commands, for whoever wants to see them first, or to make them by hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pipelines.chaining.chain import Chain, round_name
from pipelines.chaining.journal import Journal
from pipelines.describing.command_words import option_words
from tec_cache.printable import shell_words


def commands_left(chain: Chain, journal: Journal) -> list[str]:
    """Return the commands that are left to do, in their order."""
    removed = {one.number for one in journal.rounds if one.removed}
    found = []
    for number in range(chain.config.rounds):
        calls = {
            "extract": [["extract", *_options(chain.extraction(number))]] if number else [],
            "train": [["train", *_options(chain.training(number))]],
            "export": [["export", str(chain.run(number)), str(chain.export(number))]],
            "rm": [
                ["rm", chain.config.train.cache, "--target", chain.set_name(old)]
                for old in chain.too_old(number)
                if old not in removed
            ],
        }
        removed |= set(chain.too_old(number))
        left = [words for name, several in calls.items() for words in several if _is_left(journal, number, name)]
        found += [shell_words(["tec-cache", *words]) for words in left]
    return found


def _is_left(journal: Journal, number: int, name: str) -> bool:
    return f"{round_name(number)} {name}" not in journal.done


def _options(config: Any) -> list[str]:
    return option_words(type(config), asdict(config))
