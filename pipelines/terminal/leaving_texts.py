"""What the commands say by which a model leaves: export, convert, push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tec_cache.kinds import CARD_FILE
from tec_cache.printable import block, shell_words

if TYPE_CHECKING:
    from pipelines.convert import ConvertSummary
    from pipelines.push import PushSummary


def export_text(out: Path) -> str:
    """Say where a model is, and how timm loads it."""
    return block(
        [
            f"export       {out}",
            f"card         {out / CARD_FILE}",
            f"next         timm.create_model('local-dir:{out}', pretrained=True)",
        ]
    )


def convert_text(summary: ConvertSummary) -> str:
    """Say what was written, what could not be, and how the library loads it."""
    from pipelines.convert import grouped

    lines = [
        f"converted    {summary.out}  ({summary.to}, {summary.size} x {summary.size} pixels)",
        f"files        {', '.join(summary.files)}",
    ]
    lines += [f"changed      {what}" for what in summary.changed]
    lines += [f"left out     {name}: {why}" for name, why in grouped(summary.left_out).items()]
    first, *rest = summary.usage.splitlines()
    return block([*lines, f"next         {first}", *(f"             {line}" for line in rest)])


def push_text(summary: PushSummary) -> str:
    """Say what lies where."""
    return block(
        [
            f"pushed       {summary.url}  ({summary.commit[:12]})",
            f"files        {', '.join(summary.files)}",
            f"next         {shell_words(['hf', 'download', summary.name])}",
        ]
    )
