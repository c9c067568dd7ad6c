"""What verifying a cache can find, in words a user can act on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tec_cache.cache.layout import Unit
from tec_cache.cache.sealed import OTHER_RELEASE, OtherFormat
from tec_cache.errors import CacheError

DROP = "the same tec-cache verify with --repair drops it, then the same tec-cache extract makes it again"

AGAIN = "run the same tec-cache extract again, it goes on where it stopped"
INDEX = "tec-cache index CACHE makes it again; until then the records are read"
RESTORE = "restore it from a copy; nothing else is wrong with the records"
REMAKE = "restore it from a copy; or remove it and run the very extract that made it: same settings, same file"
REFIT = (
    "restore it from a copy; without one the targets of this set are lost: the same extract with --overwrite makes "
    "them again, tec-cache rm removes them"
)

ALONE = "nothing reads it and nothing removes it; take it away if nobody needs it"

MISSING = ("missing",)
NOTES = ("leftover", "unknown", "index")


@dataclass(frozen=True)
class Finding:
    """Something wrong, missing or left over.

    kind: manifest, codec, record, payload, foreign (a unit that the source does not have), unreadable (the disk or
    the network, not the content), base and targets (what the base says of a sample); missing (not made yet);
    leftover, unknown and index (one that does not fit the records), which are notes.
    """

    kind: str
    where: str
    """File, by its name within the cache."""
    unit: str
    what: str
    todo: str
    drop: tuple[str, ...] = ()
    """What repairing removes, in this order; empty where it can do nothing."""

    @property
    def level(self) -> str:
        """damage, missing or note."""
        return "missing" if self.kind in MISSING else "note" if self.kind in NOTES else "damage"

    def to_json(self) -> dict[str, str]:
        """Return what users are told, and the level."""
        values = asdict(self)
        del values["drop"]
        return values | {"level": self.level}


def unreadable(where: str, unit: Unit | str, error: OSError, record: str) -> Finding:
    """Say that a file could not be read: no reason to drop anything while a network may be down."""
    todo = f"check the disk or network and verify again; if it stays so, remove {record} and run the same extract"
    return Finding("unreadable", where, str(unit), f"cannot be read: {error.strerror or error}", todo)


def damaged_record(error: CacheError, name: str, unit: Unit | str) -> Finding:
    """Turn a failed reading of a record into a finding."""
    cause = error.__cause__
    if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
        return unreadable(name, unit, cause, name)
    if isinstance(cause, OtherFormat):
        return Finding("record", name, str(unit), error.what, OTHER_RELEASE)
    return Finding("record", name, str(unit), error.what, DROP, (name,))
