"""From the cache to the device: an order that depends on (seed, epoch) alone, read block by block.

Threads do the reading: JPEG decoding, decompression and file access all release the interpreter's lock. Codes stay
as they are stored and pixels stay uint8 until they are on the device.
"""

from tec_cache.loader.batch import Batch
from tec_cache.loader.loader import Loader
from tec_cache.loader.order import EpochOrder

__all__ = ["Batch", "EpochOrder", "Loader"]
