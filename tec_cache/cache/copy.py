"""From one cache to another, byte for byte: payloads are hashed on the way, records come last."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from tec_cache.cache import layout
from tec_cache.cache.identity import require_same
from tec_cache.cache.manifest import read_manifest
from tec_cache.cache.ranges import unreadable
from tec_cache.cache.reader import Cache
from tec_cache.cache.record import MEND, Payload, SourceRecord
from tec_cache.errors import CacheError, IdentityError
from tec_cache.store import Store

PIECE = 16 * 2**20
"""Bytes that are copied at a time."""


def require_name(payload: Payload, name: str, where: str) -> None:
    """Raise CacheError unless a payload has the name that the layout gives it; where: the record that names it."""
    if payload.name != name:
        raise CacheError(f"it names {payload.name[:200]!r}, and not {name}", where=where, todo=MEND)


def copy_payload(source: Store, out: Store, payload: Payload, name: str) -> None:
    """Copy a payload to the name that the layout gives it.

    Raises CacheError, and leaves nothing, where its bytes, or its name, are not those that were recorded.
    """
    require_name(payload, name, f"{source.url}, record of {name}")
    with out.draft() as draft:
        with draft.open("wb") as stream:
            for piece in checked_pieces(source, payload):
                stream.write(piece)
        out.put(draft, name)


def checked_pieces(source: Store, payload: Payload, todo: str = MEND) -> Iterator[bytes]:
    """Read a payload in pieces: a large file need not fit into memory.

    Raises CacheError, at the latest after the last piece, where its bytes are not those that were recorded.
    """
    digest, done, where = hashlib.sha256(), 0, source.place(payload.name)
    size = source.size(payload.name)
    if size != payload.size:
        found = "it is gone" if size is None else f"{size:,} bytes instead of {payload.size:,}"
        raise CacheError(f"a damaged payload: {found}", where=where, todo=todo)
    while done < payload.size:
        try:
            (piece,) = source.read_ranges(payload.name, [(done, min(PIECE, payload.size - done))])
        except OSError as error:
            raise unreadable("bytes", where, error, todo) from error
        if not piece:
            break
        digest.update(piece)
        done += len(piece)
        yield piece
    if digest.hexdigest() != payload.sha256:
        raise CacheError("a damaged payload: its SHA-256 is another", where=where, todo=todo)


def copy_manifest(source: Store, out: Store, name: str, *, what: str, todo: str) -> None:
    """Copy cache.json or target.json, or check that the one that is there has the same identity."""
    if out.size(name) is None:
        read_manifest(source, name)  # damage is not passed on
        out.create(name, source.read(name))
    stored, asked = read_manifest(out, name), read_manifest(source, name)
    require_same(stored["identity"], asked["identity"], what=what, where=out.place(name), todo=todo)


def copy_codec(source: Cache, out: Store, name: str) -> None:
    """Copy how a target set is coded, or check that it is coded so. Raises IdentityError for other parameters."""
    record = source[name].codec_record
    if out.size(layout.codec_record(name)) is None:
        if record.payload is not None:
            copy_payload(source.store, out, record.payload, layout.codec_payload(name, record.payload.sha256))
        record.create(out, layout.codec_record(name))
    require_codec(type(record).read(out, layout.codec_record(name)).payload, record.payload, name, source.store.url)


def require_codec(stored: Payload | None, asked: Payload | None, name: str, where: str) -> None:
    """Raise IdentityError unless two codecs of a target set have the same parameters."""
    if stored != asked:
        raise IdentityError(
            f"target set {name!r} was fitted apart: its codec has other parameters "
            f"({_short(asked)} here, {_short(stored)} there)",
            where=where,
            todo="run tec-cache fit once, copy its cache.json and targets/"
            f"{name}/{{target.json,codec*}} into each folder, then extract",
        )


def copy_source_record(source: Store, out: Store, shard: int) -> None:
    """Copy the record that a source shard was read to its end, or check that both say the same."""
    name = layout.source_record(shard)
    if source.size(name) is None:
        return
    record = SourceRecord.read(source, name)
    require_same_source(record.create(out, name), record, out.place(name))


def require_same_source(stored: SourceRecord, asked: SourceRecord, where: str) -> None:
    """Raise IdentityError naming what differs between two readings of a source shard."""
    require_same(
        stored.values() | {"passed_over": {}},  # a file beside the photos changes none of them
        asked.values() | {"passed_over": {}},
        what=f"source shard {asked.shard}",
        where=where,
        todo="the shard was another one, or was damaged, on one of the machines: make that part again",
    )


def _short(payload: Payload | None) -> str:
    return payload.sha256[:12] if payload else "none"
