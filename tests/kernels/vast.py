"""Tensors with offsets beyond 2^31 elements, on machines that haven't the memory."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

FAR = 2**30 + 16  # elements: as a stride it fits 32 bits, and twice that doesn't


def sparse(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [count]. On a CPU they take memory only where something is written."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


def far_apart(rows: Tensor) -> Tensor:
    """A copy of rows [3, width] that lie ``FAR`` apart."""
    assert len(rows) == 3
    apart = sparse(2 * FAR + rows.shape[1], rows.dtype, rows.device).as_strided(rows.shape, (FAR, 1))
    return apart.copy_(rows)
