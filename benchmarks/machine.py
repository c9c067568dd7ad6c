"""The line above every figure: device, versions, command."""

from __future__ import annotations

import platform
import shlex
import sys

import timm
import torch

from tec_cache import __version__
from tec_cache.device import available_cores, device_notes


def describe(device: str) -> str:
    """Return what a figure was measured on and how, in two lines."""
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return f"{', '.join(facts(device).values())}\n{command}"


def facts(device: str) -> dict[str, str]:
    """Return what a figure depends on beside the command: the machine, and the versions of what computed it."""
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else _processor()
    named = {"device": name, "cores": f"{available_cores()} cores", "tec-cache": f"tec-cache {__version__}"}
    named |= {"torch": f"torch {torch.__version__}", "timm": f"timm {timm.__version__}"}
    return named | {"python": f"Python {platform.python_version()}"} | (device_versions() if cuda else {})


def device_versions() -> dict[str, str]:
    """Return the versions of a GPU's libraries."""
    notes = device_notes(torch.device("cuda"))
    return {name: f"{name} {notes[name]}" for name in ("cuda", "cudnn")}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
