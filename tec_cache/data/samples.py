"""From the members of a tar to photos: which of them are one sample, and what of it is its image and its label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from webdataset.tariterators import base_plus_ext

from tec_cache.data.photos import IMAGE_SUFFIXES, Photo


def samples(group: list[tuple[str, bytes]], seen: set[str]) -> Iterator[Photo]:
    """Turn the members that share a WebDataset key into photos.

    WebDataset ends the key at the first dot, so `n01.5_x.jpg` and `n01.6_y.jpg` share a key and neither has a
    field `jpg`. Such members are told apart by their last dot instead; where a plain image field exists
    (`000.jpg` beside `000.seg.png`), the others are side data and are left alone. A field that comes twice
    begins a second sample under the same key.
    """
    found: list[tuple[str, dict[str, bytes]]] = []

    def place(key: str, field: str, data: bytes) -> None:
        if not found or found[-1][0] != key or field in found[-1][1]:
            found.append((key, {}))
        found[-1][1][field] = data

    plain = [(*base_plus_ext(name), data) for name, data in group]
    has_image = any(ext and ext.lower() in IMAGE_SUFFIXES for _, ext, _ in plain)
    dotted = any(ext and ext.lower().rpartition(".")[2] in IMAGE_SUFFIXES for _, ext, _ in plain)
    for (stem, ext, data), (name, _) in zip(plain, group, strict=True):
        if has_image or not dotted:
            place(stem or name, (ext or "").lower(), data)
        else:
            key, _, last = name.rpartition(".")
            place(key, last.lower(), data)
    for key, fields in found:
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
