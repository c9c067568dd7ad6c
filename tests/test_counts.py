"""Numbers of things in English: one view, and not 1 views, wherever a count is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cli
from tec_cache.printable import are, counted, have, plural
from tec_cache.progress import Progress
from tests.conftest import tiny_config, write_shards

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "view", "0 views"), (1, "view", "1 view"), (2, "view", "2 views"), (1, "class", "1 class"),
     (12345, "broken photo", "12,345 broken photos"), (2, "class", "2 classes"), (3, "entry", "3 entries"),
     (2, "patch", "2 patches"), (2, "hash", "2 hashes"), (2, "epoch", "2 epochs")],
)  # fmt: skip
def test_counts(number: int, noun: str, text: str) -> None:
    assert counted(number, noun) == text


def test_words_beside_counts() -> None:
    assert [plural(n, "epoch") for n in (0.5, 1.0, 1.5)] == ["epochs", "epoch", "epochs"]
    assert [(are(n), have(n)) for n in (0, 1, 2)] == [("are", "have"), ("is", "has"), ("are", "have")]


def test_progress_of_one_item(capsys: pytest.CaptureFixture[str]) -> None:
    for total in (1, 2):
        with Progress("pack", total=total, noun="unit") as progress:
            progress.advance(1)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("pack: 1/1 unit, ")
    assert second.startswith("pack: 1/2 units, ")


NOUNS = (
    "shards|views|units|epochs|photos|images|rows|classes|tars|samples|blocks|sets|targets|calls|crops|masks|records"
    "|payloads|files|heads|others"
)
WRITTEN = re.compile(rf"\{{[^{{}}]+\}} (?:broken |damaged |source |target )?(?:{NOUNS})\b")
"""A number with a plural behind it, in an f-string."""


def test_no_count_has_a_plural_of_its_own() -> None:
    """Whoever prints a count uses `counted`; what is left has a number that is never 1."""
    left = [
        f"{path.name}: {match[0]}"
        for path in [ROOT / "cli.py", *(ROOT / "pipelines").rglob("*.py"), *(ROOT / "tec_cache").rglob("*.py")]
        for match in WRITTEN.finditer(path.read_text())
    ]
    assert sorted(set(left)) == sorted(NEVER_ONE)


NEVER_ONE = [
    "demo.py: {speed['cached']:,.0f} images",  # a second, as below
    "texts.py: {summary.images_per_second:,.1f} images",
    "tuning_texts.py: {summary.images_per_second:,.1f} images",
    "info_texts.py: {found['images_per_second']:,.1f} images",
    "texts.py: {epochs:,.1f} epochs",  # 1.0 epochs
    "info_texts.py: {number} epochs",  # no number
    "caches.py: {len(units):,} units",  # more than are looked at
    "make_views.py: {before} others",  # no number
    "label_counts.py: {have(counts.classes)} photos",
    "passed_over.py: {suffix} files",
    "tiff_photos.py: {name} samples",
    "reader.py: {batch_size} photos",  # below 1
    "finding.py: {len(found)} shards",  # several
    "model.py: {len(states)} target sets",
    "recipes.py: {len(targets)} target sets",
    "ledger.py: {len(facts)} units",
    "micro_batches.py: {masks} masks",
    "samples.py: {LONGEST_RUN:,} files",
]
"""The program's numbers with a plural behind them, and what reads like one."""


def test_a_cache_of_one_of_each(tiny_base: Path, tmp_path: Path) -> None:
    from pipelines.extract import extract

    photos, cache = write_shards(tmp_path / "photos", [1]), str(tmp_path / "c")
    config: Any = tiny_config(photos, cache, tiny_base, views=1, quality="exact")
    extract(config)
    runner = CliRunner()
    calls = [["info", cache], ["verify", cache, "--full"], ["index", cache], ["pack", cache, str(tmp_path / "p")],
             ["rm", cache, "--target", "tiny", "--dry-run"], ["merge", str(tmp_path / "m"), cache],
             ["extract", str(photos), "--cache", cache, "--name", "tiny", "--dry-run"],
             ["unpack", str(tmp_path / "p"), str(tmp_path / "u")]]  # fmt: skip
    for words in calls:
        ran = runner.invoke(cli.cli, words)
        assert ran.exit_code == 0, ran.output
        assert re.findall(rf"(?<![\d.,/])1 (?:(?!of )[a-z]+ )?(?:{NOUNS})\b", ran.output) == [], ran.output
