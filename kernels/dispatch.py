"""Which implementation of an op runs: decided by where its first tensor lives.

A tensor on a GPU goes to the Triton kernels, one on the CPU to the C++ ops; both hand what they don't take to plain
torch. ``KERNELS=torch`` sends everything to plain torch, ``KERNELS=triton`` everything to Triton, on a CPU in its
interpreter (``TRITON_INTERPRET=1``); both are for tests, and for asking whose fault something is.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def forced() -> str | None:
    """What ``KERNELS`` says: torch, triton, or nothing. Asked once a process, so that trainer and engine agree.

    Raises ValueError for anything else.
    """
    choice = os.environ.get("KERNELS")
    if choice not in (None, "torch", "triton"):
        raise ValueError(f"KERNELS={choice!r}: must be 'torch' or 'triton'; unset, each tensor's device decides")
    return choice


def uses_triton(device: torch.device | str) -> bool:
    """Whether ops on tensors of this device go to the Triton kernels.

    Raises ValueError where ``KERNELS=triton`` meets a CPU outside the interpreter.
    """
    on_gpu = torch.device(device).type == "cuda"
    if forced() == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("KERNELS=triton on a CPU works in Triton's interpreter only; set TRITON_INTERPRET=1 as well")
    return forced() == "triton" or (forced() is None and on_gpu and _has_triton())


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        log.warning("ops on the GPU run in plain torch, several times slower: triton is not installed")
    return found


@functools.cache
def implementation(device: torch.device) -> ModuleType:
    """``kernels.triton``, ``kernels.cpu`` or ``kernels.reference``."""
    name = "triton" if uses_triton(device) else "reference" if forced() == "torch" else "cpu"
    return importlib.import_module(f"kernels.{name}")


def dispatched(op: Callable[P, R]) -> Callable[P, R]:
    """The public op of a reference one: its namesake where the first argument lives, itself where there is none."""
    name = op.__name__

    @functools.wraps(op)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor)
        return getattr(implementation(first.device), name, op)(*args, **kwargs)

    return run


@functools.cache
def warn_once(message: str) -> None:
    """Say why a slower path is taken, once a process."""
    log.warning(message)
