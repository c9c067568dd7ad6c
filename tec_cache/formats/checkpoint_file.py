"""A checkpoint as torch.save writes it, for libraries that read no safetensors."""

from __future__ import annotations

import io
from typing import Any

import torch


def checkpoint_bytes(content: dict[str, Any]) -> bytes:
    """Return the bytes of a checkpoint of tensors and plain values; the same for the same content."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()
