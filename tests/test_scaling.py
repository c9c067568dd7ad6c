"""Job scripts of examples/ that work, and the table of docs/scaling.md, which a command made."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scaling
from tec_cache.run.layout import checkpoints
from tec_cache.run.metrics import read_metrics
from tests.conftest import files_below, tiny_config, tiny_training
from tests.launch import SCRIPTS, TIMEOUT, environment, options

ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "scaling.md").read_text()
EXTRACTION, TRAINING = ((ROOT / "examples" / f"slurm-{stage}.sh").read_text() for stage in ("extract", "train"))


def test_the_table_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (command,) = re.findall(r"`python -m benchmarks\.(scaling[^`]*)`", DOC)
    monkeypatch.setattr("sys.argv", shlex.split(command))
    scaling.main()
    (table,) = re.findall(r"<!-- scaling -->\n(.*)<!-- /scaling -->", DOC, flags=re.DOTALL)
    assert capsys.readouterr().out == table


def test_figures_follow_from_their_inputs() -> None:
    rates = scaling.Rates(load=1000.0, image_seconds=0.002, target_seconds=0.0005, base=500.0, step=400.0)
    on_gpus = scaling.Case("", 1_000_000, 4, 10, "ViT-S/14", 2, 8, 64, rates, scaling.PUBLISHED)
    found = {name: figure.value for name, figure in scaling.figures(on_gpus).items()}
    assert found == pytest.approx(
        {
            "stored views": 4e6,
            "bytes of a view": 31.915,
            "disk": 4e6 * 31_915 / 1e12,
            "stage one: images": 4e6 * 0.002 / 128 / 3600,
            "stage one: compressing": 4e6 * 0.0005 / 128 / 3600,
            "stage one: base": 4e6 / (500 * 16) / 3600,
            "stage one": 4e6 / (500 * 16) / 3600,
            "stage one: written": 500 * 16 * 31_915 / 1e6,
            "training: views": 6400,
            "training: read, a node": 3200 * 31_915 / 1e6,
            "training: cores for a device": 0.4,
            "training: an epoch": 1e6 / 6400 / 3600,
            "training: all epochs": 1e7 / 6400 / 3600,
        }
    )
    on_cores = scaling.Case("", 1_000_000, 4, 10, "ViT-S/14", 1, 1, 2, rates, scaling.MEASURED)
    assert scaling.figures(on_cores)["stage one"].value == pytest.approx((4e6 * 0.0025 / 2 + 4e6 / 500) / 3600)
    slow = replace(rates, target_seconds=0.05)
    bound = scaling.figures(replace(on_gpus, rates=slow))["stage one"].value
    assert bound == pytest.approx(4e6 * 0.052 / 128 / 3600), "the cores are slower than the base"
    unknown = scaling.Case(
        "", 1, 1, 1, "ViT-S/14", 1, 1, 2, scaling.Rates(None, None, None, None, None), scaling.MEASURED
    )
    assert str(scaling.figures(unknown)["training: an epoch"]) == "not measured"
    a100 = scaling.published_rates(None, None, None)
    both = 1 / (1 / a100.base + 1 / a100.step)
    assert scaling.IMAGENET * 300 / (8 * both) / 3600 == pytest.approx(25), "the published hours come out again"


def beyond(script: str, config: object) -> list[str]:
    """Return the options of a config that a job's script does not give itself: each may be given once."""
    words, kept = options(config), list[str]()
    given = set(re.findall(r"(?<= )--[a-z-]+(?= )", script.partition("tec-cache ")[2]))
    while words:
        word = words.pop(0)
        if word in given:
            words.pop(0)
        else:
            kept.append(word)
    return kept


class Slurm:
    """Stand-ins for SLURM's commands on one machine: what they were asked for, and the job script's environment."""

    def __init__(self, folder: Path, script: str, **variables: object) -> None:
        folder.mkdir()
        for name, value in variables.items():
            script, changed = re.subn(rf"(?m)^{name}=.*$", f"{name}={shlex.quote(str(value))}", script)
            assert changed == 1
        self.folder, self.script, self.requeues = folder, folder / "job.sh", folder / "requeues"
        self.script.write_text(script)
        self.step = folder / "step"
        self.stand_in("scontrol", f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {self.requeues}; fi')
        signal_all = (
            "import os, sys; from tests.launch import children\n"
            "parent = int(open(sys.argv[1]).read())\n"
            "for pid in (parent, *children(parent)): os.kill(pid, 15)"
        )
        self.stand_in("scancel", f"exec {sys.executable} -c {shlex.quote(signal_all)} {self.step}")

    def stand_in(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def run(self, *, stop_when: Callable[[], bool] | None = None, **variables: str) -> int:
        """Run the job; once the condition holds, signal the script alone, as `--signal=B:TERM` does."""
        env = environment() | variables
        env["PATH"] = f"{self.folder}{os.pathsep}{env['PATH']}"
        with subprocess.Popen(["bash", str(self.script)], env=env, cwd=ROOT) as job:
            end = time.monotonic() + TIMEOUT
            while stop_when is not None and not stop_when():
                assert job.poll() is None
                assert time.monotonic() < end
                time.sleep(0.01)
            if stop_when is not None:
                job.send_signal(signal.SIGTERM)
            return job.wait(TIMEOUT)


@pytest.mark.slow
def test_the_training_job_is_requeued_at_its_limit_until_it_is_done(made_cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_training(made_cache, run, epochs=60, steps=150, micro_batch=8)
    slurm = Slurm(tmp_path / "slurm", TRAINING, cache=made_cache, run=run)
    slurm.stand_in("srun", f'echo $$ > {slurm.step}; exec "$@" {shlex.join(beyond(TRAINING, config))}')
    variables = {"SLURM_JOB_ID": free_job_id(), "SLURM_JOB_NODELIST": "node", "SLURM_NNODES": "1"}
    variables["SLURM_GPUS_ON_NODE"] = "2"

    def begun() -> bool:
        return (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 4

    assert slurm.run(stop_when=begun, **variables) == 1, "torchrun was signalled itself"
    assert slurm.requeues.read_text() == f"requeue {variables['SLURM_JOB_ID']}\n"
    reached = int(checkpoints(run)[-1].stem.removeprefix("step-"))
    assert 4 < reached < 150
    assert slurm.run(**variables, SLURM_RESTART_COUNT="1") == 0
    assert slurm.requeues.read_text().count("requeue") == 1
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 151))


def free_job_id() -> str:
    """An id from which the script makes a port that nobody uses."""
    for number in range(os.getpid() % 10_000, 10_000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20_000 + number)):
                return str(number)
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_the_parts_of_the_extraction_job_make_the_cache(
    made_cache: Path, shards: Path, tiny_base: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    script = EXTRACTION.replace("--base mae", f"--base {tiny_base}")
    slurm = Slurm(tmp_path / "slurm", script, parts=2, photos=shards, cache=cache)
    own = [word for word in beyond(script, tiny_config(shards, cache, tiny_base)) if word != str(shards)]
    slurm.stand_in("tec-cache", f'exec {SCRIPTS / "tec-cache"} "$@" {shlex.join(own)}')
    code = slurm.run(
        stop_when=lambda: bool(list(cache.glob("records/views/*/*"))), SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="7"
    )
    assert code == 130
    assert slurm.requeues.read_text() == "requeue 7\n"
    for task in ("0", "1"):
        assert slurm.run(SLURM_ARRAY_TASK_ID=task, SLURM_JOB_ID="7") == 0
    assert slurm.requeues.read_text() == "requeue 7\n"
    assert files_below(cache) == files_below(made_cache)
