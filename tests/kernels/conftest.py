"""Ops come twice, in plain torch and in C++; what holds for one is tested on both."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

import kernels.cpu
import kernels.reference


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
