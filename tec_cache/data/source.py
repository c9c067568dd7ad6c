"""What an input is: a folder of photos, a folder of tars, a pattern or a URL of tars; and the shards that it holds."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import fsspec
from webdataset.shardlists import expand_urls

from tec_cache.data.folders import folder_shards
from tec_cache.data.photos import Shard, plain_text
from tec_cache.data.tars import SHARD_SUFFIXES, TarShard
from tec_cache.errors import SourceError, StorageError, TecCacheError, nearest


def find_shards(source: str, *, seed: int = 0) -> list[Shard]:
    """Return the shards of an input.

    source: a folder of photos (`CLASS/NAME.jpg` or flat), a folder of tars, or a pattern of tars with braces
    (`train-{000000..001280}.tar`) or globs (`train-*.tar`), local or a URL that fsspec knows.
    seed: order in which a folder of photos is cut into shards.
    """
    path = Path(source)
    if path.is_dir():
        tars = sorted(str(p) for p in path.iterdir() if p.name.lower().endswith(SHARD_SUFFIXES))
        return _tar_shards(tars, source) if tars else folder_shards(path, seed)
    try:
        urls = [match for url in expand_urls(source) for match in _glob(url)]
        return _tar_shards(urls, source)
    except ImportError as error:  # fsspec names the package that a kind of URL needs
        raise SourceError(f"{error}", where=source, todo="install that package into this environment") from error
    except TecCacheError:
        raise
    except Exception as error:  # network libraries have errors of their own: no credentials, no route
        what = f"the photos cannot be reached: {type(error).__name__}: {error}"
        raise StorageError(what, where=source, todo="check the address, the network and the credentials") from error


def _glob(url: str) -> list[str]:
    """Expand * and ? of one URL in sorted order; a plain URL is returned as it is."""
    if not any(c in url for c in "*?["):
        return [url]
    fs, pattern = fsspec.core.url_to_fs(url)
    return [str(fs.unstrip_protocol(match)) if "://" in url else str(match) for match in sorted(fs.glob(pattern))]


def _tar_shards(urls: list[str], source: str) -> list[Shard]:
    """Name the shards by their file names, or by their paths below the common folder where names repeat."""
    if not urls:
        raise SourceError("no shard matches", where=source, todo="check the pattern; quote it in the shell")
    if len(set(urls)) != len(urls):
        twice = next(url for url in urls if urls.count(url) > 1)
        raise SourceError("a shard is named twice", where=twice, todo="list every shard once")
    names = [PurePosixPath(url).name for url in urls]
    if len(set(names)) != len(names):
        parts = [PurePosixPath(url).parts for url in urls]
        common = 0
        while len({p[: common + 1] for p in parts}) == 1:
            common += 1
        names = ["/".join(p[common:]) for p in parts]
    shards: list[Shard] = []
    for name, url in zip(names, urls, strict=True):
        fs, path = fsspec.core.url_to_fs(url)
        try:
            size = fs.size(path)
        except (OSError, ValueError) as error:
            folder = str(PurePosixPath(path).parent)
            near = (
                nearest(name, [PurePosixPath(p).name for p in fs.ls(folder, detail=False)]) if fs.exists(folder) else ""
            )
            raise SourceError(f"there is no such shard{near}", where=url, todo="check the name") from error
        shards.append(TarShard(plain_text(name), int(size or 0), url))
    return shards
