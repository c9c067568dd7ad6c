"""Pictures as data of the page: plots as SVG that follows the page's colours, photos as JPEG, few colours as PNG."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUALITY = 82
"""Of a photo's JPEG: about 8 KB for 224 pixels."""
_INK, _FAINT = "#010203", "#040506"
"""Colours that stand for the page's own in a plot until it is written: no line has them."""
_THEME = (
    "<style>:root{--ink:#1d2126;--faint:#c3c9cf}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e4e7ea;--faint:#49515a}}</style>"
)
# text stays text, in the reader's fonts: half of the bytes, and sharp at any size; ids from a fixed salt
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tec-cache",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.parse_math": False,
    "axes.formatter.useoffset": False,
}


def plotting() -> Any:
    """Return the context in which the report's plots are made; matplotlib's own settings come back after it."""
    import matplotlib

    return matplotlib.rc_context(_SETTINGS)


def svg(figure: Figure) -> str:
    """Return a plot as data: the same figure gives the same bytes. Call it within `plotting`."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    whole = stream.getvalue().replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
    start = whole.index("<svg")
    opened = whole.index(">", start) + 1
    return _data("image/svg+xml", (whole[start:opened] + _THEME + whole[opened:]).encode())


def jpeg(pixels: npt.NDArray[np.uint8]) -> str:
    """Return a photo (H, W, 3) as data."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return _data("image/jpeg", stream.getvalue())


def png(pixels: npt.NDArray[np.uint8], scale: int = 1) -> str:
    """Return a picture (H, W, 3) of few colours as data, each pixel as a square of `scale` pixels."""
    stream = io.BytesIO()
    large = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    Image.fromarray(large).save(stream, "PNG", optimize=True)
    return _data("image/png", stream.getvalue())


def shrunk(pixels: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Return a picture no larger than so many pixels on its longer side."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
