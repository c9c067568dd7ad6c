"""Nothing lost: killed at any step of any commit and started again, an extraction ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import pipelines.extraction.make_targets
import pipelines.extraction.prepare_targets
from pipelines.extract import extract
from tec_cache.cache.opening import open_cache
from tec_cache.config import ExtractConfig
from tec_cache.errors import StorageError
from tec_cache.store.files import hash_file
from tests import forked
from tests.conftest import files_below, tiny_config, write_shards
from tests.faults import Step, Watch, refused

KINDS = {"cache.json", "asked record", "views payload", "views record", "source record", "content record",
         "target.json", "codec record", "targets payload", "targets record"}  # fmt: skip
CRASHED = 77

MOST_ALIKE = 3
"""Crashes at steps of one kind: every folder that is made, the first unit's commit, the second's."""


def small(folder: Path, cache: Path, base: Path, quality: str) -> ExtractConfig:
    """Three photos in two units of views and two of targets: every kind of commit, and one of each a second time."""
    fit = {} if quality == "exact" else {"fit_views": 4}
    return tiny_config(folder, cache, base, views=1, group_size=2, quality=quality, workers=1, **fit)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("few"), [3])


def content(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_below(cache).items() if name != ".lock"}


def check_what_is_committed(folder: Path) -> int:
    """Read everything that has a record, as training and verification would; return the number of records."""
    if not (folder / "cache.json").exists():
        assert not (folder / "records").exists()
        return 0
    cache, count = open_cache(folder), 0
    for unit in cache.view_units:
        record = cache.views_record(unit)
        assert record.payload is not None
        assert hash_file(folder / record.payload.name) == record.payload.sha256
        assert len(cache.read_crops(record, range(len(record.keys)))) == len(record.keys)
        count += 1
    for shard in cache.groups:
        assert cache.groups[shard] == 2
        count += 1
    for name in cache.target_names:
        target = cache[name]
        for unit in target.units:
            targets = target.record(unit)
            assert targets.payload is not None
            assert hash_file(folder / targets.payload.name) == targets.payload.sha256
            assert all(len(values) == targets.count for values in target.read_unit(targets).values())
            count += 1
        if target.units:
            target.codec  # noqa: B018
    return count


def in_child(work: Callable[[], object]) -> int:
    """Run in a copy of this process; return its exit code. No cleanup code runs where it ends."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def all_steps(config: ExtractConfig, out: Path) -> list[Step]:
    """Extract undisturbed; return the steps."""

    def work() -> None:
        steps: list[Step] = []
        Watch(Path(config.cache), steps.append)
        extract(config)
        out.write_text(json.dumps(steps))

    assert in_child(work) == 0
    return [Step(*step) for step in json.loads(out.read_text())]


def crash(config: ExtractConfig, kind: tuple[str, str], number: int) -> None:
    """Extract; die before the `number`-th step of a (phase, action). What was to be synced there is lost in part."""
    left = iter(range(1, number))

    def step(step: Step) -> None:
        if (step.phase, step.action) == kind and next(left, None) is None:
            path = Path(config.cache) / step.path
            if step.action == "sync" and path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            os._exit(CRASHED)

    Watch(Path(config.cache), step)
    extract(config)


def crash_everywhere(photos: Path, base: Path, quality: str, folder: Path, every: int) -> None:
    """Crash before every `every`-th step, check, go on, compare; leave a report in the folder."""
    pipelines.extraction.make_targets.WRITERS = (
        1  # two may both make a folder, or only one of them: the steps would differ
    )
    # one base and one way to load it: once, before any process is forked
    loaded = pipelines.extraction.prepare_targets.load_base(str(base), None, grid=4, last_layers=2, k=3)  # type: ignore[attr-defined]
    pipelines.extraction.prepare_targets.load_base = lambda *_, **__: loaded  # type: ignore[attr-defined]
    steps = all_steps(small(photos, folder / "whole", base, quality), folder / "steps.json")
    whole, cache = content(folder / "whole"), folder / "crashed"
    config, found = small(photos, cache, base, quality), Counter[str]()

    def check_and_go_on() -> None:
        check_what_is_committed(cache)
        extract(config)
        assert content(cache) == whole
        assert not list((cache / ".drafts").glob("*"))

    seen = Counter[tuple[str, str]]()
    for number, step in enumerate(steps):
        kind = step.phase, step.action
        seen[kind] += 1
        if number % every or seen[kind] > MOST_ALIKE:
            continue
        shutil.rmtree(cache, ignore_errors=True)
        assert in_child(lambda k=kind, n=seen[kind]: crash(config, k, n)) == CRASHED, step  # type: ignore[misc]
        assert in_child(check_and_go_on) == 0, f"crashed before {step}"
        found[step.phase] += 1
    (folder / "report.json").write_text(json.dumps(found))
    print(len(steps), found, resource.getrusage(resource.RUSAGE_CHILDREN))


@pytest.mark.parametrize(
    ("quality", "every"), [pytest.param("default", 1, marks=pytest.mark.slow), ("default", 5), ("exact", 5)]
)
def test_a_crash_at_any_step_of_any_commit_loses_nothing(
    photos: Path, tiny_base: Path, tmp_path: Path, quality: str, every: int
) -> None:
    job = forked.start(crash_everywhere, photos, tiny_base, quality, tmp_path, every)
    job.join()
    assert job.exitcode == 0
    report = json.loads((tmp_path / "report.json").read_text())
    if every == 1:
        assert set(report) >= KINDS | {"codec payload"}


def ordered(photos: Path, base: Path, quality: str, folder: Path) -> None:
    all_steps(small(photos, folder / "cache", base, quality), folder / "steps.json")


def test_what_a_power_cut_may_lose_is_never_what_a_record_stands_for(
    photos: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """A file is synced before it gets its name, and its folder before the next record."""
    job = forked.start(ordered, photos, tiny_base, "default", tmp_path)
    job.join()
    steps = [Step(*step) for step in json.loads((tmp_path / "steps.json").read_text())]
    named = sum(named_in_order([s for s in steps if s.thread == thread], str(tmp_path / "cache"))
                for thread in {step.thread for step in steps})  # fmt: skip
    assert named == len(content(tmp_path / "cache"))


def named_in_order(steps: list[Step], root: str) -> int:
    """Check the steps of one thread, which does all of a commit; return how many files it named."""
    synced: set[str] = set()
    folders: set[str] = set()
    named = 0
    for step in steps:
        if step.action == "sync":
            synced.add(step.path)
            folders.discard(step.path)
        elif step.action == "open":
            synced.discard(step.path)
        elif step.action in ("rename", "link"):
            assert step.source in synced, step
            if step.path.endswith(".json"):
                assert not folders, (step, folders)
            folders.add(os.path.dirname(step.path) or root)
            named += 1
        elif step.action == "mkdir" and step.path != root:
            folders.add(os.path.dirname(step.path) or root)
    assert not folders
    return named


def refuse_everywhere(photos: Path, base: Path, folder: Path, code: int) -> None:
    """Refuse every kind of commit once, at each of its steps that write; leave the messages in the folder."""
    steps = all_steps(small(photos, folder / "whole", base, "exact"), folder / "steps.json")
    whole, cache = content(folder / "whole"), folder / "refused"
    config, messages = small(photos, cache, base, "exact"), {}
    wanted = list(dict.fromkeys((s.phase, s.action) for s in steps if s.action in ("open", "sync", "rename", "link")))

    def refuse(phase: str, action: str) -> None:
        def when(step: Step) -> bool:
            return (step.phase, step.action) == (phase, action)

        with refused(OSError(code, os.strerror(code)), cache, when):
            with pytest.raises(StorageError) as error:
                extract(config)
        (folder / "message").write_text(str(error.value))
        check_what_is_committed(cache)

    def go_on() -> None:
        extract(config)
        assert content(cache) == whole

    for number, (phase, action) in enumerate(wanted):
        shutil.rmtree(cache, ignore_errors=True)
        assert in_child(lambda p=phase, a=action: refuse(p, a)) == 0, (phase, action)  # type: ignore[misc]
        messages[f"{phase}, {action}"] = (folder / "message").read_text()
        if number % 4 == 0:
            assert in_child(go_on) == 0, (phase, action)
    (folder / "messages.json").write_text(json.dumps(messages))


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, *(pytest.param(code, marks=pytest.mark.slow) for code in (errno.EROFS, errno.EIO))]
)
def test_a_disk_that_refuses_any_write_stops_the_run_and_spoils_nothing(
    photos: Path, tiny_base: Path, tmp_path: Path, code: int
) -> None:
    job = forked.start(refuse_everywhere, photos, tiny_base, tmp_path, code)
    job.join()
    assert job.exitcode == 0
    messages = json.loads((tmp_path / "messages.json").read_text())
    assert len(messages) >= 16
    for where, text in messages.items():
        lines = text.splitlines()
        assert len(lines) == 3, (where, text)
        assert "what is committed stays valid" in lines[2], (where, text)
        if code == errno.ENOSPC:
            stage = where.split()[0] if where.split()[0] in ("views", "targets") else ""
            assert f"more are needed for the {stage}" in lines[0] if stage else "needed" in lines[0], (where, text)
            assert "are free" in lines[0], (where, text)
