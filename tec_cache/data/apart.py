"""Photos and labels that lie apart in a shard, which no reader that takes one sample at a time can see in time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from tec_cache.data.samples import Sample
from tec_cache.errors import LayoutError, SourceError, listed

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def refuse_apart(every: Iterable[Sample], label_fields: Collection[str], place: str) -> None:
    """Go through the names of a whole shard.

    every: its samples; they need no bytes, and raise LayoutError themselves where one key's members lie apart.
    label_fields: fields that are nothing but labels. Raises LayoutError where a photo and its label lie in different
    folders, and where the shard holds tars and no photos.
    """
    unlabelled: dict[str, str] = {}
    lonely: list[tuple[str, str]] = []
    photos, tars = 0, []
    try:
        for sample in every:
            base = PurePosixPath(sample.key).name
            labels = [member.name for name, member in sample.fields.items() if name in label_fields]
            if sample.image is not None:
                photos += 1
                if not labels:
                    unlabelled[base] = sample.image.name
            else:
                lonely += [(base, name) for name in labels]
                tars += [m.name for m in sample.fields.values() if m.name.lower().endswith(TAR_SUFFIXES)]
    except SourceError:
        pass  # damage: whoever reads the photos will come to it, and say so
    if tars and not photos:
        raise LayoutError(
            f"the shard holds tars, not photos ({listed(tars, 3)})",
            where=place,
            todo="unpack it once, then each tar in it into a folder of its name: those folders are the classes",
        )
    for base, name in lonely:
        if base in unlabelled:
            raise LayoutError(
                f"{unlabelled[base]!r} and {name!r} lie in different folders, which makes them two samples: "
                "the photo would lose its label",
                where=place,
                todo="pack each label beside its photo, under the same folder and name",
            )
