"""Source shards: tars of photos read one sample at a time, or a folder treated as if it were shards.

A damaged shard never ends quietly: a corrupt header, a cut file and a missing end marker are all told from
a proper end, because neither tarfile nor webdataset does so by itself.
"""

from __future__ import annotations

import gzip
import lzma
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from tec_cache.cache.record import hash_keys
from tec_cache.errors import SourceError, StorageError, TecCacheError, nearest
from tec_cache.rng import key64, permutation

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm"})
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
FOLDER_SHARD = 1024
"""Photos per shard when a folder is cut into shards."""


@dataclass(frozen=True)
class Photo:
    """One sample of a source shard: its key, the bytes of its image, its label where there is one.

    `problem` says why it cannot be used; then `data` is empty. A photo with a problem still has its place.
    """

    key: str
    data: bytes
    label: int | None
    problem: str = ""


@dataclass(frozen=True)
class Shard(ABC):
    """A source shard: its name is part of every sample's identity, so it holds no folder of one machine."""

    name: str
    size: int
    """Bytes of the tar, or number of photos of a part of a folder."""

    @abstractmethod
    def photos(self) -> Iterator[Photo]:
        """Yield the photos in order; raise SourceError at the point where the shard is damaged."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Where it is, for messages."""

    def identity(self) -> dict[str, Any]:
        """What the identity of a cache says of this shard; a tar's size is in the record of its reading."""
        return {"name": self.name}


@dataclass(frozen=True)
class TarShard(Shard):
    """A tar (or tar.gz) of photos in WebDataset's layout."""

    url: str

    @property
    def place(self) -> str:
        """The URL."""
        return self.url

    def photos(self) -> Iterator[Photo]:
        """Yield the photos in order.

        The sample just before a damage is left out: nobody can say whether its label, for one, is lost.
        """
        group: list[tuple[str, bytes]] = []
        current: str | None = None
        seen: set[str] = set()
        for name, data in _members(self.url):
            stem, _ = base_plus_ext(name)
            if stem != current and group:
                yield from _samples(group, seen)
                group = []
            current = stem
            group.append((name, data))
        if not group:
            raise SourceError("the shard holds no photos", where=self.url, todo="leave it out")
        yield from _samples(group, seen)


@dataclass(frozen=True)
class FolderShard(Shard):
    """A part of a folder of photos; labels are the numbers of the class folders in sorted order."""

    root: Path
    files: tuple[tuple[str, int | None], ...]

    @property
    def place(self) -> str:
        """The folder."""
        return f"{self.root} (part {self.name})"

    def identity(self) -> dict[str, Any]:
        """Name and the hash of the photos' names, which decide what is in it."""
        return super().identity() | {"files_sha256": hash_keys(_text(key) for key, _ in self.files)}

    def photos(self) -> Iterator[Photo]:
        """Yield the photos in the order of the seeded permutation."""
        for key, label in self.files:
            try:
                yield Photo(_text(key), (self.root / key).read_bytes(), label)
            except OSError as error:
                yield Photo(_text(key), b"", label, f"cannot be read: {error.strerror}")


def find_shards(source: str, *, seed: int = 0) -> list[Shard]:
    """Return the shards of an input.

    source: a folder of photos (`CLASS/NAME.jpg` or flat), a folder of tars, or a pattern of tars with braces
    (`train-{000000..001280}.tar`) or globs (`train-*.tar`), local or a URL that fsspec knows.
    seed: order in which a folder of photos is cut into shards.
    """
    path = Path(source)
    if path.is_dir():
        tars = sorted(str(p) for p in path.iterdir() if p.name.lower().endswith(SHARD_SUFFIXES))
        return _tar_shards(tars, source) if tars else _folder_shards(path, seed)
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
        shards.append(TarShard(name, int(size or 0), url))
    return shards


def _folder_shards(root: Path, seed: int) -> list[Shard]:
    """Cut a folder of photos into shards by a seeded permutation, so that no shard holds one class only."""
    files = sorted(
        p.relative_to(root).as_posix()
        for p in root.rglob("*")
        if p.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and p.is_file()
    )
    if not files:
        raise SourceError(
            "the folder holds neither photos nor tars",
            where=str(root),
            todo="give a folder of CLASS/NAME.jpg, or a pattern such as 'shards/*.tar'",
        )
    classes = folder_classes(str(root)) or []
    numbers = {name: i for i, name in enumerate(classes)}
    order = permutation(key64("folder", seed, len(files)), len(files))
    labelled = [(files[i], numbers.get(files[i].split("/")[0]) if "/" in files[i] else None) for i in order]
    parts = [tuple(labelled[i : i + FOLDER_SHARD]) for i in range(0, len(labelled), FOLDER_SHARD)]
    return [FolderShard(f"folder-{i:06d}", len(part), root, part) for i, part in enumerate(parts)]


def folder_classes(source: str) -> list[str] | None:
    """Return the class folders of a folder of photos, in the order of their labels; None for shards."""
    root = Path(source)
    if not root.is_dir() or any(p.name.lower().endswith(SHARD_SUFFIXES) for p in root.iterdir()):
        return None
    return sorted(p.name for p in root.iterdir() if p.is_dir())


class _StrictHeader(tarfile.TarInfo):
    """Turns what tarfile treats as a quiet end (a bad header, no end marker) into an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _StrictHeader:
        try:
            return super().fromtarfile(tar)  # type: ignore[return-value]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # two blocks of zeros: the proper end
        except tarfile.HeaderError as error:
            kind = (
                "cut in the middle" if "Empty" in type(error).__name__ or "Trunc" in type(error).__name__ else "corrupt"
            )
            raise tarfile.ReadError(f"{kind} at byte {tar.offset}: {error}") from error  # type: ignore[attr-defined]


def _members(url: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the regular files of a tar, or raise SourceError."""
    broken = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
    todo = "make the shard again, or --on-error skip to use what comes before the damage"
    try:
        with fsspec.open(url, "rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as tar:
                for info in tar:
                    if not info.isfile():
                        continue
                    data = tar.extractfile(info).read()  # type: ignore[union-attr]
                    if len(data) != info.size:
                        raise tarfile.ReadError(f"cut in the middle of {info.name}")
                    yield _text(info.name), data
                # a hole of zeros reads like the end of the archive; behind the true end there are only zeros
                while rest := tar.fileobj.read(1 << 20):  # type: ignore[union-attr]
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("its end marker comes too early")
    except broken as error:
        raise SourceError(f"damaged shard: {error}", where=url, todo=todo) from error
    except TecCacheError:
        raise
    except Exception as error:
        # a disk or a network that fails says nothing of the shard: it must not be recorded as its damage
        todo = "check the disk or the network; what is finished is kept, the same command goes on"
        raise StorageError(
            f"the shard cannot be read: {type(error).__name__}: {error}", where=url, todo=todo
        ) from error


def _text(name: str) -> str:
    """Return a file name that can be encoded: bytes that are not UTF-8 become \\udcff and the like."""
    return name.encode("utf-8", "backslashreplace").decode()


def _samples(group: list[tuple[str, bytes]], seen: set[str]) -> Iterator[Photo]:
    """Turn the members that share a WebDataset key into photos.

    WebDataset ends the key at the first dot, so `n01.5_x.jpg` and `n01.6_y.jpg` share a key and neither has a
    field `jpg`. Such members are told apart by their last dot instead; where a plain image field exists
    (`000.jpg` beside `000.seg.png`), the others are side data and are left alone. A field that comes twice
    begins a second sample under the same key.
    """
    samples: list[tuple[str, dict[str, bytes]]] = []

    def place(key: str, field: str, data: bytes) -> None:
        if not samples or samples[-1][0] != key or field in samples[-1][1]:
            samples.append((key, {}))
        samples[-1][1][field] = data

    plain = [(*base_plus_ext(name), data) for name, data in group]
    has_image = any(ext and ext.lower() in IMAGE_SUFFIXES for _, ext, _ in plain)
    dotted = any(ext and ext.lower().rpartition(".")[2] in IMAGE_SUFFIXES for _, ext, _ in plain)
    for (stem, ext, data), (name, _) in zip(plain, group, strict=True):
        if has_image or not dotted:
            place(stem or name, (ext or "").lower(), data)
        else:
            key, _, last = name.rpartition(".")
            place(key, last.lower(), data)
    for key, fields in samples:
        yield _photo(key, fields, seen)


def _photo(key: str, fields: dict[str, bytes], seen: set[str]) -> Photo:
    """Check one sample and make a photo of it."""
    images = [field for field in fields if field in IMAGE_SUFFIXES]
    label: Any = fields.get("cls")
    problem = ""
    if label is not None:
        try:
            label = int(label.decode().strip())
        except (UnicodeDecodeError, ValueError):
            problem, label = f"its label {label[:20]!r} is not a number", None
    if key in seen:
        problem = "its key appears twice in the shard"
    elif not images:
        problem = f"no image among its fields ({', '.join(sorted(fields)) or 'none'})"
    elif len(images) > 1:
        problem = f"more than one image ({', '.join(sorted(images))})"
    seen.add(key)
    return Photo(key, b"" if problem else fields[images[0]], label, problem)
