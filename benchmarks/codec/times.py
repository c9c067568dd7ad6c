"""What the transform codec costs, beside the base whose targets it stores."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tec_cache.base.model import FrozenBase
from tec_cache.cache.blocks import read_block, write_zip
from tec_cache.cache.layout import BLOCK_ROWS
from tec_cache.codec.errors import target_errors
from tec_cache.codec.transform import TransformCodec
from tec_cache.types import Targets

BATCH, ROUNDS = 16, 5


def measure_times(name: str, base: FrozenBase, codec: TransformCodec, held: Targets, images: torch.Tensor) -> list[str]:
    """Return a line: milliseconds per view of forward, encode, compress, read and decode; bytes and error."""
    spec, block = codec.spec, _part(held, BLOCK_ROWS)
    threads = torch.get_num_threads()
    arrays, specs = codec.encode(held, spec), codec.arrays(spec)
    tensors = {n: torch.from_numpy(a[:BLOCK_ROWS]) for n, a in arrays.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unit.zip"
        write = _median(lambda: write_zip(path, {n: a[:BLOCK_ROWS] for n, a in arrays.items()}, specs), BLOCK_ROWS)
        forward = _median(lambda: base(images[:BATCH]), BATCH)
        encode = _median(lambda: codec.encode(block, spec), BLOCK_ROWS)
        places = write_zip(path, arrays, specs)
        data = path.read_bytes()
        chunks = {n: data[b[0][0] : b[0][0] + b[0][1]] for n, b in places.items()}

    def read() -> None:
        for n, chunk in chunks.items():
            np.ascontiguousarray(read_block(chunk, specs[n]))

    torch.set_num_threads(1)
    reading = _median(read, BLOCK_ROWS)
    decoding = _median(lambda: codec.decode(tensors, spec), BLOCK_ROWS)
    torch.set_num_threads(threads)
    decoded = codec.decode({n: torch.from_numpy(a) for n, a in arrays.items()}, spec)
    mse = target_errors(held, decoded).mse
    share = (encode + write) / forward
    times = [forward, encode, write, reading, decoding]
    cells = [f"{1000 * t:.2f}" for t in times]
    return [name, *cells[:3], f"{share:.1%}", *cells[3:], f"{len(data) / len(held.features):,.0f}", f"{mse:.4f}"]


def _median(work: Callable[[], object], views: int) -> float:
    """Seconds per view: the median of some rounds after one to warm up."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) / views


def _part(targets: Targets, count: int) -> Targets:
    assert targets.attention is not None
    assert targets.rows is not None
    return Targets(targets.features[:count], targets.attention[:count], targets.rows[:count])
