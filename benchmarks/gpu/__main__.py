#!/usr/bin/env python3
"""All that one GPU is to answer, in commands that continue one another; nothing is fetched from anywhere.

    python -m benchmarks.gpu --out results --minutes 9      again and again, until it says that all is done
    python -m benchmarks.gpu --list                         the parts, their minutes, and what they answer
    python -m benchmarks.gpu --out results --only loader    one part; --again measures it a second time
    python -m benchmarks.gpu --tables results/gpu.json      the tables, as markdown
    python -m benchmarks.gpu --out tiny --config tiny       all of it on a CPU, too small to mean anything

Each part runs in a process of its own. What it found, or how it failed, is in results/gpu.json as soon as it ends, and
is not done again; photos, bases with random weights and caches are made once and stay in results/work.
A part is begun where its estimated minutes are left, or where it is the first of its command, and ended with the
command's time: the first one has then failed, another one is begun again by the next command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks.gpu.data import Data
from benchmarks.gpu.parts import parts_of
from benchmarks.gpu.results import FILE, Results, tables
from benchmarks.gpu.running import run_parts
from benchmarks.gpu.sizes import SIZES
from benchmarks.machine import facts


def main(argv: list[str] | None = None) -> int:
    """Run what is missing; return 1 where a part has failed, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of results and data")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this command")
    parser.add_argument("--config", choices=sorted(SIZES), default="gpu")
    parser.add_argument("--only", metavar="PART", action="append", help="this part; may be given several times")
    parser.add_argument("--again", action="store_true", help="measure again what has failed, and what --only names")
    parser.add_argument("--list", action="store_true", help="print the parts")
    parser.add_argument("--tables", metavar="FILE", type=Path, help="print the tables of a file of results")
    args = parser.parse_args(argv)
    size = SIZES[args.config]
    parts = parts_of(size)
    if args.tables:
        print(tables(json.loads(args.tables.read_text())))
        return 0
    if args.list:
        for part in parts:
            print(f"{part.name:24s} {part.minutes:4.1f} min  {part.question}")
        print(f"{'all':24s} {sum(part.minutes for part in parts):4.1f} min")
        return 0
    if unknown := set(args.only or ()) - {part.name for part in parts}:
        parser.error(f"no part {', '.join(sorted(unknown))}; --list names them")
    wanted = [part for part in parts if not args.only or part.name in args.only]
    results = Results.opened(args.out / FILE, facts(size.device) | {"config": size.name})
    anew = {name for name, found in results.parts.items() if args.again and (args.only or "failed" in found)}
    missing = [part for part in wanted if part.name not in results.parts or part.name in anew]
    left = run_parts(missing, Data(args.out / "work", size), results, time.monotonic() + 60 * args.minutes, print)
    failed = [part.name for part in wanted if "failed" in results.parts.get(part.name, {})]
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    print(f"left for the same command again: {', '.join(left)}" if left else f"all is done: {results.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
