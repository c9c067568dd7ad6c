"""Jobs as processes, several at once, until all are done or a command's time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.gain.jobs import Place
from benchmarks.gain.plan import Gain, Job

LAST_SECONDS = 60.0
"""In which a training that was told to stop writes its checkpoint."""
TAIL = 3000
"""Characters of a failed job's output that are shown."""


class Failed(Exception):
    """A job failed; its output is the message."""


def run_jobs(
    jobs: Sequence[Job], config: Gain, place: Place, at_once: int, deadline: float, say: Callable[[str], object]
) -> bool:
    """Do the jobs that have no result yet; return whether all have one.

    Each is begun as soon as what it needs is there, in the order given. At the deadline, of the monotonic clock, what
    runs is told to stop, and goes on when it is begun again. After a failure nothing new is begun. Raises Failed.
    """
    missing = [job for job in dict.fromkeys(jobs) if not place.result(job.name).exists()]
    running: dict[Job, subprocess.Popen[bytes]] = {}
    failure = ""
    total, begin = len(missing), time.monotonic()
    try:
        while (missing and not failure) or running:
            for job, process in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                del running[job]
                if code:
                    failure = failure or _failed(job, code, place)
                else:
                    done = total - len(missing) - len(running)
                    say(f"{time.monotonic() - begin:7.0f} s  {done:3d} of {total}  {job.name}")
            if time.monotonic() > deadline:
                _stop(running)
                return False
            ready = _ready(missing, config, place)
            if ready is not None and not failure and len(running) < at_once:
                missing.remove(ready)
                running[ready] = _begin(ready, place)
                continue
            time.sleep(0.1)
            if ready is None and missing and not running:
                raise Failed(f"{missing[0].name} waits for what nobody makes")
    finally:
        _stop(running)
    if failure:
        raise Failed(failure)
    return True


def _ready(missing: Sequence[Job], config: Gain, place: Place) -> Job | None:
    """Return the first job that waits for nothing."""
    for job in missing:
        if all(place.result(need.name).exists() for need in job.needs(config)):
            return job
    return None


def _begin(job: Job, place: Place) -> subprocess.Popen[bytes]:
    log = place.out / "logs" / f"{job.name}.txt"
    log.parent.mkdir(exist_ok=True)
    threads = str(place.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "benchmarks.gain.jobs", str(place.out), job.name]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)


def _failed(job: Job, code: int, place: Place) -> str:
    log = place.out / "logs" / f"{job.name}.txt"
    return f"{job.name} ended with {code}; {log} ends so:\n{log.read_text(errors='replace')[-TAIL:]}"


def _stop(running: dict[Job, subprocess.Popen[bytes]]) -> None:
    """Let trainings write their checkpoints, then end whatever is still there with all its processes."""
    for process in running.values():
        process.terminate()
    until = time.monotonic() + LAST_SECONDS
    for process in running.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, until - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    running.clear()
