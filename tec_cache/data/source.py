"""What an input is: a folder of photos, a folder of tars, a pattern or a URL of tars; and the shards that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import fsspec
from webdataset.shardlists import expand_urls

from tec_cache.data.classes import find_labels
from tec_cache.data.folders import open_folder
from tec_cache.data.labels import Labels
from tec_cache.data.passed_over import HIDDEN, PassedOver, is_hidden
from tec_cache.data.photos import Shard
from tec_cache.data.tars import SHARD_SUFFIXES, TarShard
from tec_cache.errors import SourceError, StorageError, TecCacheError, nearest


@dataclass(frozen=True)
class Source:
    """The photos of an input, in shards, and what their labels mean."""

    shards: list[Shard]
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None where labels are numbers, or there are none."""
    label_field: str | None = None
    """Field of a tar's samples that holds the label; None: the usual ones (`tec_cache.data.labels`)."""
    passed_over: dict[str, int] = field(default_factory=dict)
    """Kind -> how many things beside the shards, or in a folder of photos, are no photos."""
    remarks: tuple[str, ...] = ()
    """What was assumed of it, for people."""

    def with_classes(self, classes: tuple[str, ...] | None) -> Source:
        """Return the same photos with labels that are numbers of these classes."""
        if classes is None:
            return self
        return replace(self, classes=classes, shards=[shard.with_classes(classes) for shard in self.shards])

    def with_labels(self, *, quiet: bool = True) -> Source:
        """Return the same photos with labels as `find_labels` finds them, where they are tars without a class list."""
        tars = [shard for shard in self.shards if isinstance(shard, TarShard)]
        if self.classes is not None or not tars:
            return self
        labels, remark = find_labels(tars, self.label_field, quiet=quiet)
        shards: list[Shard] = [replace(shard, labels=labels) for shard in tars]
        remarks = (*self.remarks, remark) if remark else self.remarks
        return replace(self, shards=shards, classes=labels.classes, label_field=labels.field, remarks=remarks)


def open_source(
    source: str, *, seed: int = 0, classes: tuple[str, ...] | None = None, label_field: str | None = None
) -> Source:
    """Find the photos of an input.

    source: a folder of photos (`CLASS/NAME.jpg` or flat), a folder of tars, or a pattern of tars with braces
    (`train-{000000..001280}.tar`) or globs (`train-*.tar`), local or a URL that fsspec knows.
    seed: order in which a folder of photos is cut into shards.
    classes: names in the order of their numbers; a folder's own class folders where there are none. Without them the
    labels of tars are taken for numbers: see `Source.with_labels`.
    label_field: of tars, where their labels are; None: the usual fields.
    """
    path = Path(source)
    if not path.is_dir():
        return _of_tars(_find_tars(source), label_field).with_classes(classes)
    tars, beside = [], PassedOver()
    for entry in sorted(path.iterdir()):
        if is_hidden(entry.name):
            beside.add(HIDDEN)
        elif entry.is_dir():
            beside.add("folders")
        elif entry.name.lower().endswith(SHARD_SUFFIXES):
            tars.append(str(entry))
        else:
            beside.add_file(entry.name)
    if tars:
        return replace(_of_tars(_tar_shards(tars, source), label_field), passed_over=beside.told()).with_classes(
            classes
        )
    folder = open_folder(path, seed)
    shards: list[Shard] = list(folder.shards)
    return Source(shards, folder.classes, None, folder.passed_over.told(), folder.remarks).with_classes(classes)


def _of_tars(tars: Sequence[TarShard], label_field: str | None) -> Source:
    """Return a source of tars whose labels are in a field."""
    return Source([replace(shard, labels=Labels(label_field)) for shard in tars], label_field=label_field)


def _find_tars(source: str) -> list[TarShard]:
    """Return the shards of a pattern or URL of tars."""
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
    hidden = is_hidden(PurePosixPath(pattern).name)  # then hidden ones are asked for
    found = [match for match in sorted(fs.glob(pattern)) if hidden or not is_hidden(PurePosixPath(match).name)]
    return [str(fs.unstrip_protocol(match)) if "://" in url else str(match) for match in found]


def _tar_shards(urls: list[str], source: str) -> list[TarShard]:
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
    shards: list[TarShard] = []
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
        shards.append(TarShard(name, int(size or 0), url))
    return shards
