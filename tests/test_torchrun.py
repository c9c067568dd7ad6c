"""Several processes, started as people start them: the same numbers, and nothing lost when one of them ends."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tec_cache.cache.lock
import tec_cache.distributed
import tec_cache.rendezvous
from pipelines.extract import extract
from pipelines.train import train
from tec_cache.cache.layout import Unit
from tec_cache.cache.opening import open_cache
from tec_cache.config import TrainConfig
from tec_cache.distributed import Ranks, patient_group, process_group
from tec_cache.errors import TecCacheError
from tec_cache.loader import Loader
from tec_cache.rendezvous import fresh_store
from tec_cache.run.layout import checkpoints
from tec_cache.run.metrics import read_metrics
from tec_cache.run.stopping import stop_requested
from tests.conftest import files_below, last_checkpoint, payload_of, tiny_config, tiny_training, write_shards
from tests.failing import MESSAGE
from tests.launch import LAUNCH, Job, environment, options, torchrun

STEPS = 150
"""Three to an epoch: long enough for a signal to come in the middle."""

SUMMED = 2e-6
"""Relative, of gradients and losses: two halves of a batch are added in another order than the whole, which is worth a
few units of float32's last place (1.2e-7). Measured: 2.4e-7."""

STEPPED = 5e-5
"""Relative, of weights after some steps: AdamW divides each gradient by its own size, so that entries which are
nothing but rounding move as far as all others. Measured after 6 steps: 4e-6, and 2.3e-5 with several target sets."""


def training(cache: Path, run: Path, **changes: Any) -> TrainConfig:
    return tiny_training(cache, run, **({"epochs": 60, "steps": STEPS} | changes))


def train_words(cache: Path, run: Path, **changes: Any) -> list[str]:
    return ["--no-python", "tec-cache", "train", *options(training(cache, run, **changes)), "--quiet"]


def losses(run: Path) -> np.ndarray:
    """Every logged loss, after a look that each step was logged once."""
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([[line["loss"], line["feature"], line["attention"]] for line in lines])


def weights(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = last_checkpoint(run)["model"]
    return state


def step_of(run: Path) -> int:
    found = checkpoints(run)
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def assert_same_run(run: Path, other: Path) -> None:
    assert np.array_equal(losses(run), losses(other))
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not [p.name for p in (run / "checkpoints").iterdir() if p.suffix != ".pt"], "a draft was left"


@pytest.fixture(scope="module")
def undisturbed(made_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    job = torchrun(run.parent / "log", 2, *train_words(made_cache, run))
    assert job.process.returncode == 0, job.err
    assert len(losses(run)) == STEPS
    return run


def test_one_command_line_for_both_stages(made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """As the README writes it: the installed script is found, all ranks end with 0, nothing is said twice."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    extraction = ("--no-python", "tec-cache", "extract", *options(tiny_config(shards, cache, tiny_base)))
    first = torchrun(tmp_path / "first", 2, *extraction, launch=())
    steps = ("--no-python", "tec-cache", "train", *options(training(cache, run, steps=8)))
    second = torchrun(tmp_path / "second", 2, *steps, launch=())
    for job, beginning in ((first, "cache "), (second, "run ")):
        assert job.process.returncode == 0, job.err
        assert job.out.startswith(beginning)
        said = Counter(line for line in (job.out + job.err).splitlines() if line.strip())
        assert not [line for line, times in said.items() if times > 1]
    one, two = files_below(made_cache), files_below(cache)
    assert one == two
    assert len(one) > 50
    again = torchrun(tmp_path / "again", 2, *steps, "--json", "--quiet", launch=())
    assert json.loads(again.out)["steps"] == 8, "one object in all"
    assert again.err == ""


def test_half_the_batch_in_each_of_two_processes_gives_the_gradient_of_one(made_cache: Path, tmp_path: Path) -> None:
    """Also in micro-batches, of which only the last one's gradients travel."""
    recorded = "tests.recorded"

    def steps(name: str, processes: int, **changes: Any) -> list[list[dict[str, Any]]]:
        words = [str(tmp_path / f"{name}-gradients"), "train"]
        words += [*options(training(made_cache, tmp_path / name, steps=6, **changes)), "--quiet"]
        if processes == 1:
            subprocess.run([sys.executable, "-m", recorded, *words], check=True, env=environment(), capture_output=True)
        else:
            job = torchrun(tmp_path / f"{name}-log", processes, "-m", recorded, *words)
            assert job.process.returncode == 0, job.err
        return [torch.load(tmp_path / f"{name}-gradients" / f"rank-{r}.pt") for r in range(processes)]

    (one,) = steps("one", 1)
    for name, changes in (("two", {}), ("accumulated", {"micro_batch": 4})):
        ranks = steps(name, 2, **changes)
        assert [len(rank) for rank in ranks] == [6, 6]
        for ours, theirs, alone in zip(*ranks, one, strict=True):
            assert torch.equal(ours["gradient"], theirs["gradient"]), "the ranks step together"
            difference = (ours["gradient"] - alone["gradient"]).norm() / alone["gradient"].norm()
            assert difference < SUMMED, name
            assert ours["sent"] == theirs["sent"] == alone["gradient"].numel(), "each number once a step"
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "one"), rtol=SUMMED)
        expected = weights(tmp_path / "one")
        moved = torch.cat([(w - expected[n]).flatten() for n, w in weights(tmp_path / name).items()])
        size = torch.cat([w.flatten() for w in expected.values()])
        assert moved.norm() < STEPPED * size.norm()


def test_several_sets_in_two_processes_give_the_losses_and_weights_of_one(
    made_cache: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """Also with weights that follow the gradients' norms, which the ranks measure each on its own views."""
    cache = Path(shutil.copytree(made_cache, tmp_path / "cache"))
    extract(tiny_config(None, cache, tiny_base, name="other", k="2", last_layers=1, class_target=True))
    changes: dict[str, Any] = {"target": ("tiny", "other:3"), "balance": "norm", "steps": 6, "epochs": 4}
    changes |= {"warmup_epochs": 0}
    train(tiny_training(cache, tmp_path / "one", **changes))
    words = [
        "--no-python",
        "tec-cache",
        "train",
        *options(tiny_training(cache, tmp_path / "two", **changes)),
        "--quiet",
    ]
    job = torchrun(tmp_path / "log", 2, *words)
    assert job.process.returncode == 0, job.err
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    timed = {"images_per_second", "waited", "seconds"}
    for ours, theirs in zip(two, one, strict=True):
        assert {"tiny/gradient", "other/weight", "other/class"} <= ours.keys()
        for name in theirs.keys() - timed:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    expected = weights(tmp_path / "one")
    moved = torch.cat([(w - expected[n]).flatten() for n, w in weights(tmp_path / "two").items()])
    assert moved.norm() < STEPPED * torch.cat([w.flatten() for w in expected.values()]).norm()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_after_a_kill_torchrun_goes_on_from_the_last_checkpoint(
    rank: int, undisturbed: Path, made_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch = (*LAUNCH, "--max-restarts", "1")
    with Job(tmp_path / "log", 2, *train_words(made_cache, run), launch=launch) as job:
        job.wait_until(lambda: step_of(run) >= 6, "two checkpoints are there")
        os.kill(job.ranks(restart=0)[rank], signal.SIGKILL)
        job.wait_until(lambda: len(job.ranks(restart=1)) == 2, "both ranks are started again")
        assert job.end() == 0, job.err
    assert "bug in tec-cache" not in job.err
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_two_nodes_go_on_after_a_kill_on_one_of_them(undisturbed: Path, made_cache: Path, tmp_path: Path) -> None:
    """Two torchruns that meet at one address, as docs/scaling.md starts them. Each counts its restarts by itself."""
    run = tmp_path / "run"
    with socket.create_server(("localhost", 0)) as probe:
        meeting = f"localhost:{probe.getsockname()[1]}"
    launch = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", meeting, "--rdzv-id", "7")
    words = train_words(made_cache, run)
    with (
        Job(tmp_path / "a", 1, *words, launch=(*launch, "--max-restarts", "3")) as first,
        Job(tmp_path / "b", 1, *words, launch=(*launch, "--max-restarts", "3")) as second,
    ):
        first.wait_until(lambda: step_of(run) >= 6, "two checkpoints are there")
        (pid,) = second.ranks().values()
        os.kill(pid, signal.SIGKILL)
        assert (first.end(), second.end()) == (0, 0), first.err + second.err
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_without_restarts_a_kill_ends_the_job_and_the_same_command_goes_on(
    undisturbed: Path, made_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with Job(tmp_path / "log", 2, *train_words(made_cache, run)) as job:
        job.wait_until(lambda: step_of(run) >= 6, "two checkpoints are there")
        os.kill(job.ranks()[1], signal.SIGKILL)
        assert job.end() == 1
    cause = job.err.split("Root Cause")[1]
    assert "rank      : 1 " in cause
    assert "SIGKILL" in cause
    # what a kill in the middle of writing leaves
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14')
    (run / "checkpoints" / ".step-000000099.pt.0123456789ab.tmp").write_bytes(b"half")
    again = torchrun(tmp_path / "again", 2, *train_words(made_cache, run))
    assert again.process.returncode == 0, again.err
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_the_error_of_one_rank_ends_the_job_and_stands_in_torchruns_summary(made_cache: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(made_cache, tmp_path / "cache"))
    payload = payload_of(open_cache(cache), Unit(0, 1, 0))
    data = bytearray(payload.read_bytes())
    data[data.index(b"\xff\xd8") + 99] ^= 1  # in the first crop: one block of one unit, which one rank reads
    payload.write_bytes(data)
    job = torchrun(tmp_path / "log", 2, *train_words(cache, tmp_path / "run"))
    assert job.process.returncode == 1
    assert "to do: tec-cache verify" in job.err
    cause = job.err.split("Root Cause")[1]
    assert "exitcode  : 3 " in cause
    assert payload.name in cause
    assert "bug in tec-cache" not in job.err


@pytest.mark.parametrize(
    ("whom", "code"),
    [
        ("torchrun", 1),
        *(pytest.param(whom, code, marks=pytest.mark.slow) for whom, code in (("one rank", 0), ("every process", 1))),
    ],
)
def test_a_signal_leaves_a_checkpoint_and_the_command_that_goes_on(
    whom: str, code: int, undisturbed: Path, made_cache: Path, tmp_path: Path
) -> None:
    """A restart is allowed and must not happen. torchrun ends with 1 wherever it is signalled itself."""
    run = tmp_path / "run"
    launch = (*LAUNCH, "--max-restarts", "1")
    with Job(tmp_path / "log", 2, *train_words(made_cache, run, save_every=1e6), launch=launch) as job:
        job.wait_until(lambda: (run / "metrics.jsonl").exists() and len(read_lines(run)) > 4, "it trains")
        ranks = job.ranks()
        everybody = [job.process.pid, *ranks.values()]
        for pid in {"torchrun": everybody[:1], "one rank": [ranks[1]], "every process": everybody}[whom]:
            os.kill(pid, signal.SIGTERM)
        assert job.end() == code, job.err
    reached = step_of(run)
    assert 4 < reached < STEPS
    assert len(losses(run)) == reached, "nothing was trained after it, nothing was started again"
    assert job.out.count("interrupted: the checkpoint is kept; go on with") == 1
    go_on = shlex.split(job.out.splitlines()[-1])
    assert go_on[:5] == ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1"]
    with Job(tmp_path / "again", 2, *go_on[go_on.index("--no-python") :]) as again:
        assert again.end() == 0, again.err
    assert_same_run(run, undisturbed)


def read_lines(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def test_a_checkpoint_of_one_number_of_processes_goes_on_with_another(
    undisturbed: Path, made_cache: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(training(made_cache, run, steps=10))
    job = torchrun(tmp_path / "log", 2, *train_words(made_cache, run, steps=20))
    assert job.process.returncode == 0, job.err
    train(training(made_cache, run, steps=30))
    train(training(made_cache, tmp_path / "alone", steps=30))
    assert np.array_equal(losses(run)[:10], losses(tmp_path / "alone")[:10])
    for other in (tmp_path / "alone", undisturbed):
        np.testing.assert_allclose(losses(run), losses(other)[:30], rtol=STEPPED)


def test_only_a_second_ctrl_c_ends_a_training_at_once() -> None:
    """A scheduler signals a process twice, itself and through torchrun; a person who presses twice will not wait."""
    with stop_requested(Ranks()) as request:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
            assert request.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


HOLDER = """
import sys
from pathlib import Path
from tec_cache.cache.lock import writing
from tec_cache.distributed import Ranks
run, late = Path(sys.argv[1]), Path(sys.argv[2])
with writing(run, "this run", Ranks()):
    print("held", flush=True)
    sys.stdin.readline()
    late.rename(run / "checkpoints" / late.name)
    (run / "checkpoints" / "step-000000003.pt").unlink()
"""


def test_a_job_waits_for_the_last_checkpoint_of_the_one_before_it(
    made_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job before holds the run's folder for a moment, writes a checkpoint and removes the oldest."""
    run, late = tmp_path / "run", tmp_path / "step-000000006.pt"
    train(training(made_cache, run, steps=6))
    (run / "checkpoints" / late.name).rename(late)
    command = [sys.executable, "-c", HOLDER, str(run), str(late)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(tec_cache.cache.lock, "RUN_PATIENCE", 0.0)
            with pytest.raises(TecCacheError, match="another job is writing this run"):
                train(training(made_cache, run, steps=9))
        threading.Timer(0.5, lambda: holder.stdin.write("\n") and holder.stdin.flush()).start()
        summary = train(training(made_cache, run, steps=9))
    assert (summary.steps, summary.finished) == (9, True)
    assert len(losses(run)) == 9
    assert [p.stem for p in checkpoints(run)] == ["step-000000006", "step-000000009"]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_fails_in_a_step_ends_the_job_with_its_own_message(
    rank: int, made_cache: Path, tmp_path: Path
) -> None:
    """The other one waits in an all-reduce, and the group, were anybody to leave it, would never let go."""
    run = tmp_path / "run"
    job = torchrun(tmp_path / "log", 2, "-m", "tests.failing", str(rank), "5", *train_words(made_cache, run)[2:])
    assert job.process.returncode == 1
    cause = job.err.split("Root Cause")[1]
    assert f"rank      : {rank} " in cause
    assert MESSAGE in cause
    assert f"error: ValueError: {MESSAGE}" in job.err.split("Root Cause")[0]
    again = torchrun(tmp_path / "again", 2, *train_words(made_cache, run, steps=6))
    assert again.process.returncode == 0, again.err
    assert len(losses(run)) == 6, "the run's folder is free, and what was finished is kept"


def test_an_error_is_one_json_object_also_where_the_process_leaves_at_once(made_cache: Path, tmp_path: Path) -> None:
    words = train_words(made_cache, tmp_path / "run")[2:]
    job = torchrun(tmp_path / "log", 2, "-m", "tests.failing", "0", "5", *words, "--json")
    assert job.process.returncode == 1
    assert MESSAGE in json.loads(job.out)["error"]["what"]


@pytest.mark.parametrize(("device", "backend"), [("cuda", "nccl"), ("cuda:1", "nccl"), ("cpu", "gloo")])
def test_gpus_talk_over_nccl_and_only_a_good_end_leaves_the_group(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_: iter([(store, 0, 2)]))
    monkeypatch.setattr(tec_cache.distributed, "fresh_store", lambda *_: store)
    joined = torch.device(device) if backend == "nccl" else None
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda name, device_id=None, **_: chosen.append((name, device_id)),
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: chosen.append("closed"))
    with process_group(Ranks(0, 0, 2), torch.device(device)):
        pass
    assert chosen == [(backend, joined), "closed"]
    for error in (ValueError, KeyboardInterrupt, SystemExit, TecCacheError):
        chosen.clear()
        with pytest.raises(error), process_group(Ranks(0, 0, 2), torch.device(device)):
            raise error("in the middle")
        assert chosen == [(backend, joined)]


def test_processes_that_do_not_reach_each_other_say_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:144] no error, connect [127.0.1.1]: Connection refused\nmore")

    monkeypatch.setattr(torch.distributed, "new_group", refused)
    with pytest.raises(TecCacheError, match=r"do not reach each other over gloo: .*Connection refused") as error:
        patient_group(Ranks(0, 0, 2))
    assert "GLOO_SOCKET_IFNAME" in error.value.todo


def test_ranks_that_are_started_again_do_not_read_what_the_killed_ones_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps one store for all attempts; here one of them ends when only rank 2 has begun."""
    store = torch.distributed.HashStore()

    def attempt(ranks: list[int]) -> None:
        with ThreadPoolExecutor(len(ranks)) as pool:
            found = list(pool.map(lambda rank: fresh_store(store, rank, 3), ranks))
        assert not any(part.check(["address"]) for part in found), "of an earlier attempt"
        found[0].set("address", "here")
        assert all(part.check(["address"]) for part in found), "one store for all"

    attempt([0, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(tec_cache.rendezvous, "PATIENCE", 0.0)
        for rank, missing in ((2, "rank 0 has not begun"), (0, r"ranks \[1, 2\] have not begun")):
            with pytest.raises(TecCacheError, match=missing):
                fresh_store(store, rank, 3)
    attempt([2, 1, 0])


def test_extraction_goes_on_after_a_kill_to_the_same_bytes(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    words = ("--no-python", "tec-cache", "extract", *options(tiny_config(shards, cache, tiny_base)), "--quiet")
    with Job(tmp_path / "log", 2, *words, launch=(*LAUNCH, "--max-restarts", "1")) as job:
        job.wait_until(lambda: list(cache.glob("records/views/*/*")), "the first unit is committed")
        os.kill(job.ranks(restart=0)[1], signal.SIGKILL)
        job.wait_until(lambda: len(job.ranks(restart=1)) == 2, "both ranks are started again")
        assert job.end() == 0, job.err
    assert files_below(cache) == files_below(made_cache)


@pytest.mark.slow
def test_a_broken_photo_ends_an_extraction_with_its_error_and_the_same_command_goes_on(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    photos, cache = Path(shutil.copytree(shards, tmp_path / "photos")), tmp_path / "cache"
    whole = (photos / "shard-000001.tar").read_bytes()
    broken = bytearray(whole)
    broken[512:900] = bytes(388)  # the first photo's data
    (photos / "shard-000001.tar").write_bytes(broken)
    words = ("--no-python", "tec-cache", "extract", *options(tiny_config(photos, cache, tiny_base)), "--quiet")
    job = torchrun(tmp_path / "log", 2, *words)
    assert job.process.returncode == 1
    cause = job.err.split("Root Cause")[1]
    assert "photo 'p00040'" in cause
    assert "shard-000001.tar" in cause
    (photos / "shard-000001.tar").write_bytes(whole)
    again = torchrun(tmp_path / "again", 2, *words)
    assert again.process.returncode == 0, again.err
    mended, fresh = comparable_files(cache), comparable_files(made_cache)
    assert mended.keys() == fresh.keys()
    assert [name for name in fresh if mended[name] != fresh[name]] == []


def comparable_files(cache: Path) -> dict[str, Any]:
    """Return what two caches of different identities have in common, as when one was begun with a broken shard.

    Documents, indices and the attributes of zips name the identity; so a zip has another hash in its name as well.
    """
    found: dict[str, Any] = {}
    for name, data in files_below(cache).items():
        if name.endswith(".zip"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                arrays = {member: archive.read(member) for member in archive.namelist() if member != "zarr.json"}
            found[name.rsplit(".", 2)[0]] = arrays
        else:
            found[name] = b"" if name.endswith((".json", ".idx")) else data
    return found


def ranks_that_fitted(folder: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in folder.glob("*"))


def test_one_rank_fits_the_codec_for_all(coded_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = ("extract", *options(tiny_config(shards, cache, tiny_base, quality="default")), "--quiet")
    job = torchrun(tmp_path / "log", 3, "-m", "tests.fits", str(tmp_path / "fits"), "0", *words)
    assert job.process.returncode == 0, job.err
    assert ranks_that_fitted(tmp_path / "fits") == ["rank-0"]
    assert files_below(cache) == files_below(coded_cache)


def test_a_kill_in_the_middle_of_the_fit_loses_nothing(
    coded_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """torchrun ends the rank that waits, and the same command goes on; nobody waits for the dead."""
    cache, fits = tmp_path / "cache", tmp_path / "fits"
    words = ("extract", *options(tiny_config(shards, cache, tiny_base, quality="default")), "--quiet")
    with Job(tmp_path / "log", 2, "-m", "tests.fits", str(fits), "60", *words) as job:
        job.wait_until(lambda: ranks_that_fitted(fits), "a rank fits")
        os.kill(job.ranks()[0], signal.SIGKILL)
        assert job.end() != 0
    assert not list(cache.glob("targets/*/codec*"))
    again = torchrun(tmp_path / "again", 2, "-m", "tests.fits", str(fits), "0", *words)
    assert again.process.returncode == 0, again.err
    assert ranks_that_fitted(fits) == ["rank-0", "rank-0"]
    assert files_below(cache) == files_below(coded_cache)


@pytest.mark.slow
def test_a_signalled_extraction_says_once_how_to_go_on(shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    """All processes at once, and torchrun passes its own on: each rank is signalled twice."""
    cache = tmp_path / "cache"
    words = ("--no-python", "tec-cache", "extract", *options(tiny_config(shards, cache, tiny_base)), "--quiet")
    with Job(tmp_path / "log", 2, *words, launch=(*LAUNCH, "--max-restarts", "1")) as job:
        job.wait_until(lambda: list(cache.glob("records/views/*/*")), "the first unit is committed")
        for pid in [job.process.pid, *job.ranks().values()]:
            os.kill(pid, signal.SIGTERM)
        assert job.end() == 1
    assert job.err.count("interrupted: what is finished is kept") == 1
    assert "KeyboardInterrupt" not in job.err
    assert "torchrun --nproc-per-node 2 --max-restarts 1 --no-python tec-cache extract" in job.err


@pytest.mark.parametrize(
    ("counts", "batch", "world_size", "workers"),
    [([40, 24, 33], 33, 3, 1), ([7], 6, 6, 4), ([17, 1], 5, 5, 2), ([16, 16, 1], 14, 7, 3), ([33], 32, 2, 1)],
)
def test_all_ranks_get_equally_many_batches(
    counts: list[int], batch: int, world_size: int, workers: int, tiny_base: Path, tmp_path: Path
) -> None:
    """Units that no number of ranks divides, ranks without a whole unit, and other workers on each rank."""
    photos = write_shards(tmp_path / "photos", counts)
    extract(tiny_config(photos, tmp_path / "cache", tiny_base))
    cache = open_cache(tmp_path / "cache")

    def batches(rank: int, ranks: int, threads: int) -> list[list[int]]:
        loader = Loader(
            cache, cache["tiny"], batch_size=batch, pixel_sizes=(32,), rank=rank, world_size=ranks, workers=threads
        )
        assert loader.steps_per_epoch == sum(counts) // batch
        return [[int(key) for key in b.sample_keys] for b in loader.batches(0, 3 * loader.steps_per_epoch)]

    alone = batches(0, 1, 1)
    ranks = [batches(rank, world_size, workers + rank % 2) for rank in range(world_size)]
    for whole, *shares in zip(alone, *ranks, strict=True):
        assert {len(keys) for keys in shares} == {batch // world_size}
        assert [key for keys in shares for key in keys] == whole


@pytest.mark.slow
def test_three_processes_with_uneven_units_end_together(made_cache: Path, tmp_path: Path) -> None:
    """A tail of 97 mod 33 views is left out in every epoch, and no rank waits for another."""
    words = train_words(made_cache, tmp_path / "run", steps=7, epochs=10, batch_size=33, workers=3)
    begin = time.monotonic()
    job = torchrun(tmp_path / "log", 3, *words)
    assert job.process.returncode == 0, job.err
    assert time.monotonic() - begin < 240, "gloo's own limit is 30 minutes"
    assert len(losses(tmp_path / "run")) == 7
