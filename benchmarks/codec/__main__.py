#!/usr/bin/env python3
"""Bytes per view against error: the transform codec at its qualities beside what else one could store.

    python -m benchmarks.codec 'photos-*.tar' WEIGHTS --base timm:vit_small_patch14_dinov2.lvd142m
    python -m benchmarks.codec 'photos-*.tar' WEIGHTS --plot codec.png --markdown

All shards but the last are fitted on, the last is measured: three random views of each photo, cut, coded as JPEG and
decoded as a cache has them. Ours are bytes of a file as a cache holds it, row indices and Zarr's metadata included; the
codec's parameters, which are stored once, are named beside. The others are the compressed bytes alone, with 15
bytes of row indices. Errors: relative mean squared error of the normalized features and KL divergence of the
attention rows in nats. "error" in the last column: set to ours at the default quality, from below; "bytes": set to
take no fewer bytes than it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from safetensors.torch import save_file

from benchmarks.codec.rivals import Array, rivals
from benchmarks.codec.times import measure_times
from benchmarks.machine import describe
from tec_cache.base.load import load_base
from tec_cache.base.model import FrozenBase
from tec_cache.cache.blocks import write_zip
from tec_cache.cache.pixels import JpegSettings, decode_crop, resize
from tec_cache.codec import Codec
from tec_cache.codec.errors import row_divergence, target_errors
from tec_cache.codec.fit import fit_transform
from tec_cache.codec.fp16 import Float16Codec
from tec_cache.codec.transform import TransformCodec, from_channels, to_channels
from tec_cache.data.photos import Shard
from tec_cache.data.source import open_source
from tec_cache.data.views import ViewPlan, cut_photo
from tec_cache.targets import normalize_targets
from tec_cache.types import Targets, TargetSpec

QUALITIES = {"small": (0.10, 0.08), "default": (0.04, 0.03), "high": (0.02, 0.01)}
VIEWS = 3
"""Random views of each photo."""
BATCH = 16


class Line(NamedTuple):
    """One line of the table; bytes are per view."""

    scheme: str
    features: float
    attention: float
    total: float
    mse: float
    kl: float
    kl_soft: float
    """At tau 1.8, the highest that students use."""
    matched: str


def main() -> None:
    """Measure and print one table, and the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="two shards of photos or more")
    parser.add_argument("weights", help="weight file of the base")
    parser.add_argument("--base", default="timm:vit_small_patch14_dinov2.lvd142m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", help="write a picture of bytes against error to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe("cpu"))
    base = load_base(args.base, args.weights, grid=14, k=15)
    shards = open_source(args.data).shards
    images = [views_of(shard, base) for shard in shards]
    spec = base.spec("patch")
    fit, held = (targets_of(base, torch.cat(part)) for part in (images[:-1], images[-1:]))
    print(f"\n{args.base}: fitted on {len(fit.features)} views of {len(shards) - 1} shards, ", end="")
    print(f"measured on {len(held.features)} of {shards[-1].name}")

    codecs = {name: fit_transform(fit, spec, mse=q[0], kl=q[1]) for name, q in QUALITIES.items()}
    times = [measure_times(args.base, base, codecs["default"], held, images[-1])]
    times.append(_vit_base(torch.cat(images), args.threads))
    columns = "base", "forward ms", "encode ms", "compress ms", "of the forward", "read ms", "decode ms", "all B", "MSE"
    _table(columns, times, args.markdown)
    print("forward, encode, compress: batches of 16 with all threads but blosc's, which is one; read (decompress and")
    print("transpose a block of 32 views) and decode: on one core. Per view.")
    print()

    lines = [_stored(name, codec, held, spec) for name, codec in codecs.items()]
    lines.append(_stored("exact (fp16)", Float16Codec(), held, spec))
    lines.extend(_rivals(fit, held, spec, lines[list(codecs).index("default")]))
    columns = "scheme", "features B", "attention B", "all B", "rel. MSE", "KL", "KL tau 1.8", "matched"
    _table(columns, [_cells(line) for line in lines], args.markdown)
    parameters = ", ".join(f"{name} {len(codec.to_bytes()):,} B" for name, codec in codecs.items())
    print(f"parameters, once for all views: {parameters}")
    if args.plot:
        _plot(lines, args.plot)


def views_of(shard: Shard, base: FrozenBase) -> torch.Tensor:
    """Cut the views of a shard's photos as a cache does, view by view: (N, 3, S, S) as the base takes them."""
    plan, jpeg = ViewPlan(), JpegSettings()
    crops = [cut_photo(photo, shard.name, plan, range(VIEWS), jpeg).jpegs for photo in shard.photos()]
    pixels = [resize(decode_crop(crop[i]), base.input_size) for i in range(VIEWS) for crop in crops if crop]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (base.mean, base.std))
    return (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std


def targets_of(base: FrozenBase, images: torch.Tensor) -> Targets:
    """Return the normalized targets of views (N, 3, S, S)."""
    parts = [normalize_targets(base(part), "patch") for part in images.split(BATCH)]
    features, attention, rows = (torch.cat([getattr(p, n) for p in parts]) for n in ("features", "attention", "rows"))
    return Targets(features, attention, rows)


def file_bytes(codec: Codec, targets: Targets, spec: TargetSpec) -> tuple[int, dict[str, int]]:
    """Write encoded targets as a cache does: bytes of the file, and of each array's blocks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unit.zip"
        blocks = write_zip(path, codec.encode(targets, spec), codec.arrays(spec))
        return path.stat().st_size, {name: sum(b[1] for b in found) for name, found in blocks.items()}


def _stored(name: str, codec: Codec, held: Targets, spec: TargetSpec) -> Line:
    """Measure a codec of ours from a file that was really written."""
    count = len(held.features)
    total, arrays = file_bytes(codec, held, spec)
    stored = {n: torch.from_numpy(a) for n, a in codec.encode(held, spec).items()}
    decoded = codec.decode(stored, spec)
    errors = target_errors(held, decoded)
    soft = target_errors(held, decoded, tau=1.8).kl
    label = f"ours, {name}" if isinstance(codec, TransformCodec) else name
    sizes = arrays["features"] / count, arrays["attention"] / count, total / count
    return Line(label, *sizes, errors.mse, errors.kl or 0.0, soft or 0.0, "")


def _rivals(fit: Targets, held: Targets, spec: TargetSpec, ours: Line) -> Iterator[Line]:
    """Code features and attention with each other scheme, at ours' errors or bytes."""
    energy = float(held.features.double().square().sum())
    assert fit.attention is not None
    assert held.attention is not None
    exact, logits = held.features.numpy(), held.attention
    count = len(exact)

    def mse(decoded: Array) -> float:
        return float(np.square(exact - decoded).sum(dtype=np.float64) / energy)

    def kl(decoded: Array, tau: float = 1.0) -> float:
        return float(row_divergence(logits, from_channels(torch.from_numpy(decoded), spec), tau).mean())

    channels = [to_channels(x, spec).contiguous().numpy() for x in (fit.attention, logits)]
    features = rivals(fit.features.numpy(), exact, error=mse, asked=ours.mse, num_bytes=ours.features)
    attention = rivals(channels[0], channels[1], error=kl, asked=ours.kl, num_bytes=ours.attention)
    for f, a in zip(features, attention, strict=True):
        total = f.num_bytes + a.num_bytes + held.rows.numpy().size / count  # type: ignore[union-attr]
        name = f.scheme if f.scheme == a.scheme else f"{f.scheme} / {a.scheme}"
        soft = kl(a.decoded, 1.8)
        yield Line(name, f.num_bytes, a.num_bytes, total, mse(f.decoded), kl(a.decoded), soft, f.matched)


def _vit_base(images: torch.Tensor, threads: int) -> list[str]:
    """Times and size for ViT-B, whose random weights give no natural targets: its errors mean nothing elsewhere."""
    name = "vit_base_patch16_224"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.safetensors"
        save_file(timm.create_model(name, num_classes=0).state_dict(), path)
        base = load_base(f"timm:{name}", path, grid=14, k=15)
    views = torch.nn.functional.interpolate(images[:: max(1, len(images) // 160)], size=base.input_size)
    held, rest = views[-32:], views[:-32]
    codec = fit_transform(targets_of(base, rest), base.spec("patch"), mse=0.04, kl=0.03)
    torch.set_num_threads(threads)
    return measure_times(f"{name}, random weights", base, codec, targets_of(base, held), held)


def _cells(line: Line) -> list[str]:
    sizes = [f"{x:,.0f}" for x in (line.features, line.attention, line.total)]
    return [line.scheme, *sizes, *(f"{x:.4f}" for x in (line.mse, line.kl, line.kl_soft)), line.matched]


def _table(columns: tuple[str, ...], rows: list[list[str]], markdown: bool) -> None:
    """Print aligned columns; as Markdown with bars between them."""
    widths = [max(len(row[i]) for row in [list(columns), *rows]) for i in range(len(columns))]
    ruler = ["-" * width for width in widths]
    for row in [list(columns), *([ruler] if markdown else []), *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        print("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells))


def _plot(lines: list[Line], path: str) -> None:
    """Draw bytes against error, features left and attention right; ours joined by a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    parts = (axes[0], "features", "mse", "relative MSE"), (axes[1], "attention", "kl", "KL (nats)")
    for axis, what, error, label in parts:
        ours = [line for line in lines if line.scheme.startswith("ours")]
        axis.plot([getattr(x, what) for x in ours], [getattr(x, error) for x in ours], "o-", label="transform codec")
        for line in lines:
            if line not in ours:
                axis.plot(getattr(line, what), max(getattr(line, error), 1e-6), "s", label=line.scheme)
        axis.set(xscale="log", yscale="log", xlabel=f"bytes per view, {what}", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
