#!/usr/bin/env python3
"""How long a cache of 1,000, 10,000 and 100,000 units takes to open, and what that takes in memory and requests.

    python -m benchmarks.loader.opening                     on the local disk
    python -m benchmarks.loader.opening --s3 --units 1000 10000

Each unit has a record of its own, as an extraction writes it; of the records 32 rows, one block, so that a disk holds
100,000 of them. Payloads are links to the same two files (on S3: the same bytes), which no opening reads. Every figure
is of a fresh process, after its imports: once with the index, once by the records, as without one. Calls of it: what
the store is asked for, to open it + for the first batch, read ahead + by `tec-cache info`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.loader.memory import make_cache, write_base
from benchmarks.machine import describe
from pipelines.index import index
from tec_cache.cache import layout
from tec_cache.cache.layout import Unit
from tec_cache.cache.manifest import manifest_body
from tec_cache.cache.opening import open_cache
from tec_cache.cache.record import AskedRecord, ContentRecord
from tec_cache.cache.sealed import seal
from tec_cache.store import Store, open_store
from tec_cache.store.files import make_folder
from tests.s3_server import S3Server, s3_server

ROWS = 32
PER_SHARD = 80
"""Units of a source shard: one group in 80 views, as eight views of 10 groups would be."""

TITLES = " units     by         seconds to open   to the first batch   tec-cache info   memory   calls of it   requests"

MEASURE = """
import json, sys, time
import torch
from pipelines.info import info
from tec_cache.cache.opening import open_cache
from tec_cache.loader import Loader
from tec_cache.store.local import LocalStore
from tec_cache.store.remote import RemoteStore
import tec_cache.cache.index.reading, tec_cache.pack.reader, numcodecs.blosc, zarr, fsspec

calls = [0]

def counted(method):
    def call(*args):
        calls[0] += 1
        return method(*args)
    return call

for kind in (LocalStore, RemoteStore):
    for name in ("size", "read", "read_ranges", "names"):
        setattr(kind, name, counted(getattr(kind, name)))

def resident(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

imported, begin = resident("VmRSS"), time.perf_counter()
cache = open_cache(sys.argv[1])
targets = cache["t"]
loader = Loader(cache, targets, batch_size=64, pixel_sizes=(cache.size,), workers=2)
opened, at_open = time.perf_counter() - begin, calls[0]
batches = loader.batches(0, 2)
next(batches)
first = time.perf_counter() - begin
peak = resident("VmHWM")
batches.close()
begin, at_first = time.perf_counter(), calls[0]
info(sys.argv[1])
print(json.dumps({"opened": opened, "first": first, "memory": peak - imported, "info": time.perf_counter() - begin,
                  "calls": [at_open, at_first - at_open, calls[0] - at_first]}))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="+", default=(1_000, 10_000, 100_000))
    parser.add_argument("--s3", action="store_true", help="behind a local S3 server, and count its requests")
    parser.add_argument("--records", type=int, default=10_000, help="most units that are opened by their records too")
    args = parser.parse_args()
    print(describe("cpu"))
    print("\n" + TITLES)
    with tempfile.TemporaryDirectory() as name, places(args.s3, Path(name)) as (place, server):
        folder = Path(name)
        write_base(folder / "base")
        seed = make_cache(folder / "seed", ROWS, folder / "base")
        for units in args.units:
            url = place(units)
            make_units(seed, url, units)
            begin = time.perf_counter()
            made = index(url)
            print(f"{units:8,d}  (index made in {time.perf_counter() - begin:.1f} s, {made.bytes / 1e6:.1f} MB)")
            report(units, "index", url, server)
            if units <= args.records:
                store = open_store(url)
                for file in store.names(layout.INDEX):
                    store.remove(file)
                report(units, "records", url, server)
            if server is None:
                shutil.rmtree(url)


@contextmanager
def places(s3: bool, folder: Path) -> Iterator[tuple[object, S3Server | None]]:
    """Give a function that names a place for a cache, and the server behind it, if there is one."""
    if not s3:
        yield lambda units: str(folder / str(units)), None
        return
    with s3_server(folder) as server:
        server.create_bucket("opening")
        os.environ |= server.environment
        yield lambda units: f"s3://opening/{units}", server


def make_units(seed: Path, url: str, count: int) -> None:
    """Write a finished cache of `count` units whose records all say what the one unit of `seed` says."""
    cache, shards = open_cache(seed), [f"shard-{number:06d}" for number in range(-(-count // PER_SHARD))]
    views = count // len(shards)
    store, unit = open_store(url), Unit(0, 0, 0)
    identity = cache.identity | {"source": {"limit": None, "shards": [{"name": name} for name in shards]}}
    body = manifest_body(identity, {})
    target = cache["t"]
    target_identity = target.identity | {"cache": body["fingerprint"]}
    put(store, layout.MANIFEST, seal("cache", without_format(body), indent=1))
    about = manifest_body(target_identity, target.manifest["notes"])
    put(store, layout.target_manifest("t"), seal("target", without_format(about), indent=1))
    codec = replace(target.codec_record, identity=about["fingerprint"])
    codec.create(store, layout.codec_record("t"))
    source, record, coded = cache.source_record(0), cache.views_record(unit), target.record(unit)
    assert source is not None
    assert record.payload is not None
    assert coded.payload is not None
    sources = [replace(source, shard=name) for name in shards]
    tar, archive = (cache.store.read(payload.name) for payload in (record.payload, coded.payload))
    if store.folder is not None:
        for name, data in (("shared.tar", tar), ("shared.zip", archive)):
            (store.folder / name).write_bytes(data)

    def write(number: int) -> None:
        made = Unit(number // views, 0, number % views)
        tar_name = layout.views_payload(made, record.payload.sha256)
        zip_name = layout.target_payload("t", made, coded.payload.sha256)
        own = replace(record, unit=str(made), identity=body["fingerprint"],
                      payload=replace(record.payload, name=tar_name))  # fmt: skip
        theirs = replace(coded, unit=str(made), identity=about["fingerprint"],
                         payload=replace(coded.payload, name=zip_name))  # fmt: skip
        link(store, tar_name, "shared.tar", tar)
        link(store, zip_name, "shared.zip", archive)
        put(store, layout.views_record(made), own.to_bytes())
        put(store, layout.target_record("t", made), theirs.to_bytes())

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(views * len(shards))))
        list(pool.map(lambda n: put(store, layout.source_record(n), sources[n].to_bytes()), range(len(shards))))
    for view in range(views):
        put(store, layout.asked_record(view), AskedRecord(identity=body["fingerprint"], view=view).to_bytes())
    content = ContentRecord(identity=body["fingerprint"], source_sha256=[of.sha256 for of in sources])
    put(store, layout.CONTENT_RECORD, content.to_bytes())


def without_format(body: dict[str, object]) -> dict[str, object]:
    """Return a manifest's body as it is sealed."""
    return {name: value for name, value in body.items() if name != "format"}


def put(store: Store, name: str, data: bytes) -> None:
    """Write a file without the care of a commit: nothing here has to survive."""
    if store.folder is None:
        store.create(name, data)
        return
    path = store.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def link(store: Store, name: str, shared: str, data: bytes) -> None:
    """Give a payload a name: a link to a shared file, or its own bytes."""
    if store.folder is None:
        store.create(name, data)
        return
    path = store.folder / name
    make_folder(path.parent)
    path.symlink_to(store.folder / shared)


def report(units: int, by: str, url: str, server: S3Server | None) -> None:
    """Measure in a fresh process and print a line."""
    run = [sys.executable, "-c", MEASURE, url]
    requests = ""
    if server is None:
        found = subprocess.run(run, check=True, capture_output=True, text=True)
    else:
        with server.requests() as seen:
            found = subprocess.run(run, check=True, capture_output=True, text=True)
        requests = f"{len(seen):,}"
    figures = json.loads(found.stdout)
    print(
        f"{units:8,d}  {by:9s} {figures['opened']:16.2f}   {figures['first']:18.2f}   {figures['info']:14.2f}"
        f"   {figures['memory'] / 1e6:4.0f} MB   {' + '.join(map(str, figures['calls'])):>15s}   {requests:>8s}",
        flush=True,
    )


if __name__ == "__main__":
    main()
