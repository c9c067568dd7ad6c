"""The line above every figure: device, versions, command."""

from __future__ import annotations

import platform
import shlex
import sys

import timm
import torch

from tec_cache import __version__
from tec_cache.device import available_cores


def describe(device: str) -> str:
    """Return what a figure was measured on and how, in two lines."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    versions = f"tec-cache {__version__}, torch {torch.__version__}, timm {timm.__version__}"
    python = f"Python {platform.python_version()}"
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return f"{name}, {available_cores()} cores, {versions}, {python}\n{command}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
