"""Ops come twice, in plain torch and in C++; what holds for one is tested on both. Triton's also run without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import interpreter
import pytest
import torch

import kernels.cpu
import kernels.reference
from kernels.device import default_device

if not torch.cuda.is_available():
    interpreter.install()


@pytest.fixture
def device() -> torch.device:
    """Where Triton kernels run: a GPU, or the CPU in the interpreter."""
    return default_device()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op allocates without filling it holds NaN, or the largest integer: what isn't written shows."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            if out.dtype == torch.bool:
                return out.fill_(True)
            return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return allocated

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(scope="module", params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The test module's ops are those of one implementation."""
    if request.param == "cpu" and kernels.cpu.extension() is None:
        pytest.skip("no C++ ops here: no compiler, or a CPU they aren't written for")
    found = {"reference": kernels.reference, "cpu": kernels.cpu}[request.param]
    with pytest.MonkeyPatch.context() as patch:
        for name in kernels.reference.__all__:
            if hasattr(request.module, name) and hasattr(found, name):
                patch.setattr(request.module, name, getattr(found, name))
        yield found
