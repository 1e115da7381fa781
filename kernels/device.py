"""The one place that asks whether there is a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def default_device() -> torch.device:
    """cuda where torch sees one, else cpu."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """A CPU's tensor on a device; on a GPU through pinned memory, without waiting for what the GPU is at."""
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def collective_backend() -> str:
    """Name of the torch.distributed backend for :func:`default_device`."""
    return "nccl" if default_device().type == "cuda" else "gloo"


def device_of_rank(rank: int) -> torch.device:
    """The device of process ``rank`` of several on this machine: a GPU each, or the CPU that they share.

    Raises ValueError where there are fewer GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if rank >= torch.cuda.device_count():
        raise ValueError(f"process {rank} has no GPU: there are {torch.cuda.device_count()}; start no more processes")
    return torch.device("cuda", rank)
