"""One stateless random generator for crop boxes, orders and masks.

Every random number of the project is a pure function of a 64-bit key and a counter, so it does
not depend on how many ranks or workers ask, in which order, or on the stream of a library's
generator (numpy and torch do not promise theirs across versions). The mixing function is
splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), keys are made by BLAKE2b.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key64(*parts: str | int) -> int:
    """Return the 64-bit key of a tuple of names and numbers; ("a", "bc") and ("ab", "c") differ."""
    digest = blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def bits(keys: npt.NDArray[np.uint64] | int, count: int) -> npt.NDArray[np.uint64]:
    """Return `count` random 64-bit words per key: shape keys.shape + (count,), uint64."""
    keys = np.asarray(keys, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = keys[..., None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return z ^ (z >> np.uint64(31))


def uniform(keys: npt.NDArray[np.uint64] | int, count: int) -> npt.NDArray[np.float64]:
    """Return `count` numbers in [0, 1) per key: shape keys.shape + (count,), float64."""
    return (bits(keys, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: int, count: int) -> npt.NDArray[np.int64]:
    """Return a random order of range(count), int64."""
    return np.argsort(bits(key, count), kind="stable")
