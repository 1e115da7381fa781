"""The one place that asks whether there is a GPU."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """cuda where torch sees one, else cpu."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def collective_backend() -> str:
    """Name of the torch.distributed backend for :func:`default_device`."""
    return "nccl" if default_device().type == "cuda" else "gloo"
