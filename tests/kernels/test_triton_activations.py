"""The SwiGLU and GeGLU kernels against float64 and plain torch; gates so far from 0 that an exp overflows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from accuracy import BACKWARD, assert_close_to_truth, normal
from torch import Tensor
from vast import far_apart

from kernels import reference
from kernels.triton.activations import geglu, swiglu

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # numpy's word for what is wanted here
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8), (3, 0), (1, 1), (5, 33), (4, 128), (2, 1025)]  # tokens, width
REAL = pytest.param(2000, 11008, marks=pytest.mark.gpu)
OPS = {"swiglu": (swiglu, reference.swiglu), "geglu": (geglu, reference.geglu)}
Op = Callable[[Tensor], Tensor]


def truth(name: str, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if name == "swiglu" else F.gelu(gate, approximate="tanh")) * up


def outputs(op: Op, gate_up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.detach().clone().requires_grad_()
    out = op(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, dout.to(out.dtype))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, width", [*SHAPES, REAL])
@pytest.mark.parametrize("name", OPS)
def test_forward_and_backward(name: str, tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = 3 * normal(tokens, 2 * width, dtype=dtype, device=device)
    dout = normal(tokens, width, seed=1, dtype=dtype, device=device)
    found, plain = (outputs(op, gate_up, dout) for op in OPS[name])
    wanted = outputs(lambda x: truth(name, x), gate_up.double(), dout)
    for a, b, c, bound in zip(found, plain, wanted, (2e-6, BACKWARD), strict=True):
        assert a.dtype == dtype
        assert_close_to_truth(a, c, None if dtype == torch.float32 else b, bound)


@pytest.mark.parametrize("gate", [-1e6, -200.0, -104.0, -89.0, -88.0, -20.0, 0.0, 1e-3, 20.0, 89.0, 200.0, 1e6])
@pytest.mark.parametrize("name", OPS)
def test_extreme_gates(name: str, gate: float, device: torch.device) -> None:
    gate_up = torch.tensor([[gate, 3.0]], device=device)
    dout = torch.ones(1, 1, device=device)
    wanted = outputs(lambda x: truth(name, x), gate_up.double(), dout)
    for a, b in zip(outputs(OPS[name][0], gate_up, dout), wanted, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-30 if name == "swiglu" else 2e-6)


@pytest.mark.parametrize("name", OPS)
def test_rows_that_lie_apart_and_far_apart(name: str, device: torch.device) -> None:
    op = OPS[name][0]
    wider = normal(5, 70, dtype=torch.bfloat16, device=device)[:, 3:67]
    far = far_apart(wider[:3])
    dout = normal(5, 32, seed=1, dtype=torch.bfloat16, device=device)
    alone = outputs(op, wider.contiguous(), dout)
    for apart, rows in ((wider, 5), (far, 3), (wider.T.contiguous().T, 5)):
        leaf = apart.detach().requires_grad_()
        out = op(leaf)
        assert torch.equal(out, alone[0][:rows])
        assert torch.equal(torch.autograd.grad(out, leaf, dout[:rows])[0], alone[1][:rows])


@pytest.mark.parametrize("name", OPS)
def test_bits_depend_neither_on_company_nor_on_the_run(name: str, device: torch.device) -> None:
    op = OPS[name][0]
    gate_up, dout = normal(10, 96, device=device), normal(10, 48, seed=1, device=device)
    whole = outputs(op, gate_up, dout)
    alone = outputs(op, gate_up[7:8], dout[7:8])
    assert all(torch.equal(a, b[7:8]) for a, b in zip(alone, whole, strict=True))
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(outputs(op, gate_up, dout), whole, strict=True))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", [(4,), (4, 7), (2, 4, 8)])
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{name}: gate_up's shape is .* expected \[tokens, 2 \* width\]"):
        OPS[name][0](torch.zeros(shape))
