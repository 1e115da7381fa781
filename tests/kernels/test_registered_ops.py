"""What torch is told of the C++ ops is true: which arguments they write, and what they return anew.

``torch.library.opcheck`` runs an op and compares. Its tests of fake tensors are left out: nothing traces these ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import AttentionPlan, cpu

pytestmark = pytest.mark.skipif(cpu.extension() is None, reason="no compiler, or a CPU the ops aren't written for")
CHECKS = ("test_schema", "test_autograd_registration")
Call = tuple[str, tuple[Any, ...]]


class Recorder:
    """The extension, and a list of its calls."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.ops = cpu.extension()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.append((name, copies))
            return getattr(self.ops, name)(*args)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """All that the wrappers call, forward and backward."""
    recorder = Recorder()
    monkeypatch.setattr(cpu, "extension", lambda: recorder)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(recorder.calls))).requires_grad_()

    x, weight, heads, gate_up = normal(5, 16), normal(16), normal(5, 2, 16), normal(5, 32)
    cos, sin = normal(5, 8).detach(), normal(5, 8).detach()
    length, slots = torch.tensor([5]), torch.arange(5)
    plan = AttentionPlan(length, length, torch.tensor([[0]]), "cpu", None)
    total = cpu.linear(x, normal(8, 16), normal(8)).sum() + cpu.rms_norm(x, weight, 1e-6).sum()
    total = total + sum(out.sum() for out in cpu.add_rms_norm(x, normal(5, 16), weight, 1e-6))
    total = total + cpu.rope(heads, cos, sin).sum() + cpu.swiglu(gate_up).sum()
    total = total + cpu.packed_attention(heads, heads, heads, slots, 1, plan).sum()
    total.backward()
    uniform = cpu.philox_uniform(slots, slots, slots)
    cpu.sample_tokens(normal(5, 40).detach(), torch.ones(5), uniform)
    return recorder.calls


def registered() -> set[str]:
    names = (schema.name for schema in torch._C._jit_get_all_schemas())
    return {name.removeprefix("onpolicy::") for name in names if name.startswith("onpolicy::")}


def test_registered_ops_do_what_their_schemas_say(calls: list[Call]) -> None:
    assert {name for name, _ in calls} == registered()
    for name, args in calls:
        torch.library.opcheck(getattr(torch.ops.onpolicy, name).default, args, test_utils=CHECKS)


def test_an_op_that_writes_what_its_schema_does_not_say_is_noticed() -> None:
    def double(x: Tensor) -> None:
        x.mul_(2)

    with torch.library._scoped_library("onpolicy_test", "DEF") as library:
        library.define("double(Tensor x) -> ()")
        library.impl("double", double, "CPU")
        with pytest.raises(Exception, match="mutat"):
            torch.library.opcheck(torch.ops.onpolicy_test.double.default, (torch.ones(1),), test_utils="test_schema")
