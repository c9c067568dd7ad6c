"""What an input is: a folder of photos, a folder of tars, a pattern or a URL of tars; and the shards that it holds."""

from __future__ import annotations

from collections.abc import Sequence

from tec_cache.data.folders import folder_shards
from tec_cache.data.photos import Shard
from tec_cache.data.places import existing_folder, tar_shards, tars_in


def find_shards(source: str, *, seed: int = 0) -> Sequence[Shard]:
    """Return the shards of an input.

    source: a folder of photos (`CLASS/NAME.jpg` or flat), a folder of tars, or a pattern of tars with braces
    (`train-{000000..001280}.tar`) or globs (`train-*.tar`), local or a URL that fsspec knows (`data.places`).
    seed: order in which a folder of photos is cut into shards.
    """
    folder = existing_folder(source)
    if folder is None:
        return tar_shards(source)
    return tars_in(folder) or folder_shards(folder, seed)
