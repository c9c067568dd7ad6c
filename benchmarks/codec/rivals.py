"""What one could store targets with instead of the transform codec: known schemes, each at its most sensible setting.

Every scheme takes values to fit on and values to code, with views first, and gives bytes per view and the decoded
values. What a scheme compresses is cut into blocks of rows and laid out channel by channel, as ours is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numcodecs import Blosc
from numcodecs.bitround import BitRound

from tec_cache.cache.layout import BLOCK_ROWS

Array = npt.NDArray[np.float32]
Error = Callable[[Array], float]


class Coded(NamedTuple):
    """What a scheme made of the values that it was given."""

    scheme: str
    num_bytes: float
    """Per view."""
    decoded: Array
    matched: str
    """What was held equal to ours: "error", "bytes", or nothing."""


def rivals(fit: Array, values: Array, *, error: Error, asked: float, num_bytes: float) -> Iterator[Coded]:
    """Code values (N, tokens or rows, vector) with every scheme that is installed.

    error: measures decoded values; asked: the error that adjustable schemes are set to, from below;
    num_bytes: what ours takes per view, which the product and residual quantizers are set to.
    """
    for bits in (8, 4):
        yield absmax(values, bits)
    yield bit_rounding(values, error, asked)
    step = matching_step(values, error, asked)
    levels = np.rint(values / step).astype(np.int16)
    decoded = levels.astype(np.float32) * np.float32(step)
    yield Coded("uniform step, zstd", blosc_bytes(folded(levels)), decoded, "error")
    if find_spec("pcodec"):
        yield Coded("uniform step, pcodec", pco_bytes(levels), decoded, "error")
    if find_spec("faiss"):
        yield product_quantizer(fit, values, num_bytes)
        yield residual_quantizer(fit, values, num_bytes)


def absmax(values: Array, bits: int) -> Coded:
    """Scale each view and channel by its largest magnitude; the scale is half precision, two 4-bit codes a byte."""
    largest = 2 ** (bits - 1) - 1
    scale = (np.abs(values).max(axis=1, keepdims=True) / largest).astype(np.float16).astype(np.float32)
    codes = np.rint(values / np.maximum(scale, 1e-12)).clip(-largest, largest).astype(np.int8)
    stored = codes if bits == 8 else ((codes[..., ::2] & 15) << 4 | (codes[..., 1::2] & 15)).astype(np.int8)
    size = blosc_bytes(stored) + blosc_bytes(scale.astype(np.float16))
    return Coded(f"int{bits} absmax", size, codes * scale, "")


def bit_rounding(values: Array, error: Error, asked: float) -> Coded:
    """Keep so many mantissa bits of half precision as the error needs, then zstd."""
    half = values.astype(np.float16)
    for bits in range(1, 11):
        rounded = half if bits == 10 else BitRound(keepbits=bits).decode(BitRound(keepbits=bits).encode(half))
        decoded = np.asarray(rounded).view(np.float16).reshape(values.shape)
        if error(decoded.astype(np.float32)) <= asked:
            break
    return Coded(f"bit rounding to {bits}, zstd", blosc_bytes(decoded), decoded.astype(np.float32), "error")


def matching_step(values: Array, error: Error, asked: float) -> float:
    """Find the largest step of a uniform quantizer whose error is not above the asked one."""
    fine, coarse = 1e-3, 32.0
    for _ in range(16):
        step = (fine * coarse) ** 0.5
        within = error(np.rint(values / step).astype(np.float32) * np.float32(step)) <= asked
        fine, coarse = (step, coarse) if within else (fine, step)
    return fine


def folded(levels: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    """Fold the sign into the lowest bit, so that a bit shuffle finds empty planes."""
    unsigned = (levels << 1) ^ (levels >> 15)
    return unsigned.astype(np.uint8 if unsigned.max() < 256 else np.uint16)


def blosc_bytes(array: npt.NDArray[np.generic]) -> float:
    """Bytes per view of (N, tokens, vector), a block of views at a time, channels outermost and bits shuffled."""
    codec = Blosc("zstd", clevel=7, shuffle=Blosc.BITSHUFFLE, blocksize=131_072)
    return _blocks(array, lambda block: len(codec.encode(block)))


def pco_bytes(levels: npt.NDArray[np.int16]) -> float:
    """The same with pcodec, whose numbers have 16 bits at least."""
    from pcodec import ChunkConfig, standalone

    return _blocks(levels, lambda block: len(standalone.simple_compress(block.ravel(), ChunkConfig())))


def _blocks(array: npt.NDArray[np.generic], size: Callable[[npt.NDArray[np.generic]], int]) -> float:
    blocks = (array[i : i + BLOCK_ROWS] for i in range(0, len(array), BLOCK_ROWS))
    return sum(size(np.ascontiguousarray(block.transpose(2, 1, 0))) for block in blocks) / len(array)


def product_quantizer(fit: Array, values: Array, num_bytes: float) -> Coded:
    """Cut each vector into equal parts with 256 words each, as many parts as divide it and take no fewer bytes."""
    import faiss

    width = values.shape[2]
    parts = min(m for m in range(1, width + 1) if width % m == 0 and m * values.shape[1] >= min(num_bytes, 1e9))
    quantizer = faiss.ProductQuantizer(width, parts, 8)
    quantizer.cp.niter = 10
    quantizer.train(_vectors(fit, 65_536))
    return _quantized(f"FAISS PQ {parts} x 8 bits", quantizer, values)


def residual_quantizer(fit: Array, values: Array, num_bytes: float) -> Coded:
    """Add up words of 256 each, as many as take no fewer bytes; greedy, because a beam takes hours on a CPU."""
    import faiss

    words = -int(-num_bytes // values.shape[1])
    quantizer = faiss.ResidualQuantizer(values.shape[2], words, 8)
    quantizer.max_beam_size = 1
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.cp.niter = 5
    quantizer.train(_vectors(fit, 16_384))
    return _quantized(f"FAISS RQ {words} x 8 bits", quantizer, values)


def _quantized(scheme: str, quantizer: object, values: Array) -> Coded:
    vectors = np.ascontiguousarray(values.reshape(-1, values.shape[2]))
    codes = quantizer.compute_codes(vectors)  # type: ignore[attr-defined]
    decoded = quantizer.decode(codes).reshape(values.shape)  # type: ignore[attr-defined]
    return Coded(scheme, codes.size / len(values), decoded, "bytes")


def _vectors(fit: Array, most: int) -> Array:
    vectors = fit.reshape(-1, fit.shape[2])
    return np.ascontiguousarray(vectors[:: max(1, len(vectors) // most)][:most])
