"""A run's folder: what lies there is the run's, or is refused, and is never removed; run.json is checked when read."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.export import export
from pipelines.terminal.texts import train_text
from pipelines.train import train
from tec_cache.distributed import Ranks
from tec_cache.errors import ConfigError, IdentityError, TecCacheError
from tec_cache.run.beginning import begin_run
from tec_cache.run.folder import begun_run, foreign_files
from tec_cache.run.layout import checkpoints
from tec_cache.run.metrics import read_metrics
from tec_cache.run.settings import load_settings, run_identity
from tests import forked
from tests.conftest import files_below, tiny_training
from tests.faults import Step, Watch
from tests.test_crash import CRASHED, in_child

OTHER_BOARD = "tensorboard/events.out.tfevents.1700000000.host.123.0"


@pytest.fixture(scope="module")
def made_run(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "r"
    train(tiny_training(made_cache, run, steps=6))
    return run


def add(folder: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"mine: " + name.encode())
    return files_below(folder)


@pytest.mark.parametrize(
    "names",
    [("checkpoints/best.ckpt",), ("checkpoints/step-000000007.pt",), (OTHER_BOARD,), ("metrics.jsonl",),
     ("notes.txt",), ("model.safetensors", "config.json"), (".hidden",), ("run.json.bak",), (".run.json.tmp",),
     ("checkpoints/a", "metrics.jsonl", OTHER_BOARD, "tensorboard/b")],
)  # fmt: skip
def test_a_folder_that_holds_no_run_is_refused_and_left_as_it_is(
    made_cache: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    run = tmp_path / "r"
    before = add(run, names)
    for more in ({}, {"overwrite": True}, {"dry_run": True}):
        with pytest.raises(TecCacheError, match="no run of tec-cache") as error:
            train(tiny_training(made_cache, run, steps=1), **more)
        assert names[0].split("/")[0] in error.value.what
        assert error.value.where == str(run)
    assert files_below(run) == before


def test_an_empty_folder_and_what_a_kill_left_of_the_very_first_file_are_no_obstacle(
    made_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    add(run, (".run.json.0123456789ab.tmp", ".lock"))
    assert train(tiny_training(made_cache, run, steps=1)).finished


FOREIGN = (
    "checkpoints/best.pt",
    "checkpoints/step-7.pt",
    "checkpoints/.step-000000009.pt.tmp",
    OTHER_BOARD,
    "tensorboard/plots/a.png",
    "notes.txt",
    "export/model.safetensors",
)


def test_overwrite_removes_what_the_run_wrote_and_names_what_it_keeps(
    made_cache: Path, made_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    old = files_below(run)
    mine = {name: data for name, data in add(run, FOREIGN).items() if name in FOREIGN}
    add(run, ("checkpoints/.step-000000009.pt.0123456789ab.tmp", ".metrics.jsonl.0123456789ab.tmp"))
    summary = train(tiny_training(made_cache, run, steps=2, seed=5), overwrite=True)
    found = files_below(run)
    assert {name: found.pop(name) for name in mine} == mine
    assert [name for name in old if name in found] == [".lock", "metrics.jsonl", "run.json"]
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert [p.name for p in checkpoints(run)] == ["step-000000002.pt"]
    assert not [name for name in found if name.endswith(".tmp")]
    named = {"checkpoints/best.pt", "checkpoints/step-7.pt", "checkpoints/.step-000000009.pt.tmp", OTHER_BOARD,
             "tensorboard/plots", "notes.txt", "export"}  # fmt: skip
    assert set(summary.foreign) == named
    assert f"kept         what is not this run's, {len(named)}: " in train_text(summary, False, "")


def test_a_run_that_goes_on_keeps_and_names_them_too(made_cache: Path, made_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    add(run, FOREIGN)
    before = {name: data for name, data in files_below(run).items() if name in FOREIGN}
    summary = train(tiny_training(made_cache, run, steps=9))
    assert {name: data for name, data in files_below(run).items() if name in FOREIGN} == before
    assert "notes.txt" in summary.foreign
    assert train(tiny_training(made_cache, tmp_path / "r2", steps=1)).foreign == []


def test_other_settings_are_refused_before_the_first_checkpoint_too(
    made_cache: Path, made_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    shutil.rmtree(run / "checkpoints")
    before = files_below(run)
    with pytest.raises(IdentityError, match=r"config\.seed: stored 0, asked 1"):
        train(tiny_training(made_cache, run, steps=1, seed=1))
    assert files_below(run) == before
    assert train(tiny_training(made_cache, run, steps=2)).steps == 2
    assert [line["step"] for line in read_metrics(run)] == [1, 2], "it began anew"


def crash_everywhere(run: Path, folder: Path) -> None:
    """Replace a run by one of other settings, die before each step, and look at what is left."""
    old = load_settings(run)
    new = old | {"config": old["config"] | {"seed": 9}}
    out = folder / "out"
    mine = ("notes.txt", "checkpoints/best.pt", OTHER_BOARD)

    def begin() -> None:
        with ExitStack() as lock:
            begin_run(out, new, overwrite=True, ranks=Ranks(), lock=lock)

    def steps() -> None:
        found: list[Step] = []
        Watch(out, found.append)
        begin()
        (folder / "steps.json").write_text(json.dumps(found))

    def crash(number: int) -> None:
        left = iter(range(number))
        Watch(out, lambda step: os._exit(CRASHED) if next(left, None) is None else None)
        begin()

    def look() -> None:
        begun = begun_run(out, "pretrain")
        assert begun in (old, new)
        assert [p.name for p in checkpoints(out)] in (
            ["step-000000003.pt", "step-000000006.pt"],
            ["step-000000003.pt"],
            [],
        )
        if checkpoints(out):
            assert begun == old
            assert (out / "metrics.jsonl").exists()
        assert {name for name in files_below(out) if name in mine} == set(mine)

    def again() -> None:
        begin()
        assert load_settings(out) == new
        assert not checkpoints(out)
        assert set(foreign_files(out, run_identity(new))) == set(mine)

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(run, out)
        add(out, mine)

    fresh()
    assert in_child(steps) == 0
    count = len(json.loads((folder / "steps.json").read_text()))
    for number in range(count):
        fresh()
        assert in_child(lambda n=number: crash(n)) == CRASHED  # type: ignore[misc]
        assert in_child(look) == 0, number
        assert in_child(again) == 0, number
    (folder / "count").write_text(str(count))


def test_a_kill_at_any_step_of_an_overwrite_leaves_the_old_run_or_the_new_one(made_run: Path, tmp_path: Path) -> None:
    job = forked.start(crash_everywhere, made_run, tmp_path)
    job.join()
    assert job.exitcode == 0
    assert int((tmp_path / "count").read_text()) >= 8


def attempts(made_cache: Path, run: Path, out: Path) -> list[Any]:
    return [
        lambda: train(tiny_training(made_cache, run, steps=7)),
        lambda: train(tiny_training(made_cache, run, steps=7), overwrite=True),
        lambda: export(run, out),
    ]


def damaged(text: str, path: tuple[str | int, ...], value: Any) -> bytes:
    document = json.loads(text)
    inner = document
    for name in path[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("path", "value"),
    [(("config",), None), (("config",), []), (("config", "epochs"), "10"), (("config", "epochs"), -1),
     (("config", "epochs"), ...), (("config", "unheard_of"), 1), (("config", "mask_ratio"), "x"),
     (("config", "student"), 5), (("config", "adapters"), "some"), (("config", "betas"), {}),
     (("targets",), "tiny"), (("targets",), []), (("targets",), {}), (("targets", 0), 5),
     (("targets", 0, "weight"), "x"),
     (("targets", 0, "goal"), ...), (("targets", 0, "spec"), ...), (("targets", 0, "spec", "grid"), "4"),
     (("targets", 0, "spec", "grid"), -4), (("targets", 0, "spec", "grid"), 10**6),
     (("targets", 0, "spec", "channels"), 2**40),
     (("targets", 0, "spec", "k"), "most"), (("targets", 0, "tau"), "warm"), (("targets", 0, "kind"), "guessed"),
     (("targets", 0, "name"), ...), (("cache",), 5), (("num_views",), "2"), (("groups",), [[0]]), (("groups",), "all"),
     (("mean",), [0.5]), (("mean",), ["a", "b", "c"]), (("extra",), 1), (("total_steps",), ...)],
)  # fmt: skip
def test_settings_of_a_wrong_type_are_damage(
    made_cache: Path, made_run: Path, tmp_path: Path, path: tuple[str | int, ...], value: Any
) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    (run / "run.json").write_bytes(damaged((run / "run.json").read_text(), path, value))
    before = files_below(run)
    for attempt in attempts(made_cache, run, tmp_path / "out"):
        with pytest.raises(TecCacheError, match=r"run\.json is damaged") as error:
            attempt()
        assert error.value.where == str(run / "run.json")
        assert "\n" not in error.value.what
    assert files_below(run) == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"5", b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b'{"a": NaN}', b"1e999"],
)
def test_what_is_no_settings_at_all_is_damage(made_cache: Path, tmp_path: Path, content: bytes) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "run.json").write_bytes(content)
    for attempt in attempts(made_cache, run, tmp_path / "out"):
        with pytest.raises(TecCacheError, match=r"run\.json is damaged"):
            attempt()


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@settings(derandomize=True, max_examples=150, deadline=None)
@given(data=st.data())
def test_any_field_may_hold_anything(made_run: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Read as settings or refused in three lines; never another exception."""
    document = json.loads((made_run / "run.json").read_text())
    name = data.draw(st.sampled_from(sorted(document)))
    path: tuple[str, ...] = (name,)
    if isinstance(document[name], dict):
        path = (name, data.draw(st.sampled_from(sorted(document[name]))))
    folder = tmp_path_factory.mktemp("any")
    text = (made_run / "run.json").read_text()
    (folder / "run.json").write_bytes(damaged(text, path, data.draw(values)))
    try:
        run_identity(load_settings(folder))
    except TecCacheError as error:
        assert error.todo  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "value"),
    [("checkpoint_path", "evil.pth"), ("pretrained_cfg", {"file": "evil.pth"}), ("pretrained_cfg_overlay", {}),
     ("depth", 10**9), ("embed_dim", "48"), ("block_fn", "os.system")],
)  # fmt: skip
def test_a_strangers_run_cannot_make_timm_open_a_file(
    made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("touch EXECUTED",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    (run / "run.json").write_bytes(damaged((run / "run.json").read_text(), ("config", "student_args", name), value))
    with pytest.raises(ConfigError, match=name) as error:
        export(run, tmp_path / "out")
    assert error.value.where == str(run / "run.json")
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("decoder_depth", 10**9), ("decoder_width", 2**40), ("decoder_heads", 999)]
)
def test_a_decoder_that_no_machine_holds_is_refused(made_run: Path, tmp_path: Path, name: str, value: int) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    (run / "run.json").write_bytes(damaged((run / "run.json").read_text(), ("config", name), value))
    with pytest.raises(ConfigError, match="is not a whole number"):
        export(run, tmp_path / "out")


def test_a_student_larger_than_its_weights_is_refused_before_it_is_allocated(
    made_cache: Path, made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run.json may claim 5 thousand million weights beside a checkpoint of some kilobytes."""
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    large = {"embed_dim": 6144, "depth": 12, "num_heads": 48, "patch_size": 8}
    (run / "run.json").write_bytes(damaged((run / "run.json").read_text(), ("config", "student_args"), large))
    identity = run_identity(load_settings(run))
    import torch

    path = checkpoints(run)[-1]
    torch.save(torch.load(path, weights_only=True) | {"run": identity}, path)
    with pytest.raises(TecCacheError, match="the model lacks"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("line", [b'{"step": 4, "lo', b"\xff\xff", b"\0" * 64, b"[" * 10**5, b'{"step": 1e999}', b"4"])
def test_a_line_of_metrics_that_a_kill_spoiled_is_cut_off(
    made_cache: Path, made_run: Path, tmp_path: Path, line: bytes
) -> None:
    run = Path(shutil.copytree(made_run, tmp_path / "r"))
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(line)
    train(tiny_training(made_cache, run, steps=7))
    assert [found["step"] for found in read_metrics(run)] == list(range(1, 8))
