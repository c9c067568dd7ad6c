"""What `tec-cache report` says to people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tec_cache.printable import block
from tec_cache.progress import human_bytes

if TYPE_CHECKING:
    from pipelines.report import ReportSummary


def report_text(summary: ReportSummary) -> str:
    """Say what was written, and what could not be shown."""
    lines = [
        f"report       {summary.out}  ({human_bytes(summary.bytes)})",
        f"shows        {', '.join(summary.sections)}",
    ]
    lines += [f"not shown    {what}" for what in summary.problems]
    return block([*lines, "next         open it in any browser; it needs nothing else"])
