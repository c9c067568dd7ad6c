"""Two ranks on one card: do their gradients equal one's? nccl first, which may refuse two ranks of one device."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.agreement import agreement, taken
from benchmarks.gpu.data import Data
from benchmarks.gpu.sizes import Size
from tec_cache.student.model import create_student
from tec_cache.types import Targets, TargetSpec

RANKS, ROWS = 2, 8


def two_ranks(data: Data) -> list[dict[str, Any]]:
    """Try every backend that may do; return the agreement of the gradients, or what it says."""
    rows, size = [], data.size
    for backend in ("nccl", "gloo") if size.device == "cuda" else ("gloo",):
        with TemporaryDirectory() as folder:
            try:
                spawn(_rank, (backend, size, folder), nprocs=RANKS)
                rows.append({"backend": backend} | json.loads(Path(folder, "result.json").read_text()))
            except Exception as error:
                said = [line for line in str(error).splitlines() if line.strip()]
                rows.append({"backend": backend, "failed": " ".join(said[-3:])})
    return rows


def _rank(rank: int, backend: str, size: Size, folder: str) -> None:
    device = torch.device("cuda:0" if size.device == "cuda" else "cpu")
    chosen = size.models[size.main]
    width = int(chosen.args.get("embed_dim", 768))
    spec = TargetSpec(grid=size.grid, channels=width, num_heads=width // 16, k=3, normalization="patch")
    student = create_student(chosen.architecture, targets=spec, model_args=dict(chosen.args), **size.student).to(device)
    images, targets, noise = _example(spec, size.size, device)
    alone = taken(student, _losses(student, images, targets, noise))
    join: dict[str, Any] = {"rank": rank, "world_size": RANKS, "init_method": f"file://{folder}/store"}
    dist.init_process_group(backend, timeout=timedelta(seconds=60), **join)
    own = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    assert targets.attention is not None
    assert targets.rows is not None
    part = Targets(targets.features[own], targets.attention[own], targets.rows[own])
    wrapped = DistributedDataParallel(student)
    together = taken(student, _losses(wrapped, images[own], part, noise[own]))
    if rank == 0:
        found = agreement(alone, together)
        lines = {"gradient cosine": found.cosine, "lowest cosine of a parameter": found.lowest[1]}
        norms = [torch.cat([g.flatten() for g in step.gradients.values()]).norm().item() for step in (together, alone)]
        Path(folder, "result.json").write_text(json.dumps(lines | {"norm / norm of one": norms[0] / norms[1]}))
    dist.barrier()
    dist.destroy_process_group()


def _losses(model: torch.nn.Module, images: torch.Tensor, targets: Targets, noise: torch.Tensor) -> dict[str, Any]:
    losses = model(images, targets, noise=noise)
    return {"loss": losses["feature"] + losses["attention"]}


def _example(spec: TargetSpec, edge: int, device: torch.device) -> tuple[torch.Tensor, Targets, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens, rows = spec.num_tokens, spec.num_rows
    chosen = torch.rand(ROWS, tokens, generator=g).argsort(dim=1)[:, : rows - 1]
    logits = torch.randn(ROWS, spec.num_heads, rows, tokens, generator=g)
    targets = Targets(torch.randn(ROWS, tokens, spec.channels, generator=g), logits, chosen)
    images, noise = torch.randn(ROWS, 3, edge, edge, generator=g), torch.rand(ROWS, tokens, generator=g)
    return images.to(device), targets.to(device), noise.to(device)
