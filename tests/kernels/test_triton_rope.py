"""The RoPE kernel: the bits of plain torch, the numbers of complex multiplication in float64, heads of any strides."""

from __future__ import annotations

import logging

import pytest
import torch
from accuracy import BACKWARD, assert_close_to_truth, normal
from torch import Tensor
from vast import far_apart

from kernels import dispatch, reference
from kernels.triton.rope import rope

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, heads, head dim, elements that turn
SHAPES = [(0, 2, 16, 16), (1, 1, 16, 16), (3, 5, 20, 20), (5, 3, 33, 14), (2, 40, 128, 128), (7, 2, 96, 48)]
REAL = pytest.param(2000, 32, 128, 128, marks=pytest.mark.gpu)


def tables(tokens: int, turning: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = 3 * normal(tokens, turning // 2, seed=7, device=device)
    return torch.cos(angle), torch.sin(angle)


def truth(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Element i of the first half and element i of the second are one complex number, turned by the angle."""
    half = cos.shape[1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, width, turning", [*SHAPES, REAL])
def test_forward_and_backward(
    tokens: int, heads: int, width: int, turning: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = normal(tokens, heads, width, dtype=dtype, device=device).requires_grad_()
    dout = normal(tokens, heads, width, seed=1, dtype=dtype, device=device)
    cos, sin = tables(tokens, turning, device)
    found, plain = rope(x, cos, sin), reference.rope(x, cos, sin)
    wide = x.detach().double().requires_grad_()
    wanted = truth(wide, cos.double(), sin.double())
    assert found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found, plain)
    assert_close_to_truth(found, wanted, None if dtype == torch.float32 else plain)
    (grad,), (plain_grad,) = (torch.autograd.grad(out, x, dout) for out in (found, plain))
    (wanted_grad,) = torch.autograd.grad(wanted, wide, dout.double())
    assert torch.equal(grad, plain_grad)
    assert_close_to_truth(grad, wanted_grad, None if dtype == torch.float32 else plain_grad, BACKWARD)


def test_gradients_are_those_of_finite_differences(device: torch.device) -> None:
    """Rotation is linear in x, so a difference of any size is exact up to rounding."""
    x, step = normal(3, 2, 16, device=device), normal(3, 2, 16, seed=1, device=device)
    dout = normal(3, 2, 16, seed=2, device=device)
    cos, sin = tables(3, 12, device)
    (grad,) = torch.autograd.grad(rope(x.requires_grad_(), cos, sin), x, dout)
    change = ((rope(x + step, cos, sin) - rope(x - step, cos, sin)).double() / 2 * dout).sum()
    torch.testing.assert_close((grad.double() * step).sum(), change, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_fused_projection_and_other_strides(dtype: torch.dtype, device: torch.device) -> None:
    q, k = normal(6, 9, 32, dtype=dtype, device=device).split((5, 4), 1)
    head_major = normal(5, 6, 32, dtype=dtype, device=device).transpose(0, 1)
    column_major = normal(6, 32, 5, dtype=dtype, device=device).mT
    cos, sin = tables(6, 32, device)
    for heads in (q, k, head_major, column_major):
        assert not heads.is_contiguous()
        assert torch.equal(rope(heads, cos, sin), rope(heads.contiguous(), cos, sin))


def test_a_broadcast_gradient(device: torch.device) -> None:
    x = normal(4, 2, 16, device=device).requires_grad_()
    cos, sin = tables(4, 16, device)
    (grad,) = torch.autograd.grad(rope(x, cos, sin).sum(), x)
    assert torch.equal(grad, reference.rope(torch.ones_like(x), cos, -sin))


def test_bits_depend_neither_on_company_nor_on_the_run(device: torch.device) -> None:
    x = normal(12, 3, 24, device=device)
    cos, sin = tables(12, 24, device)
    out = rope(x, cos, sin)
    assert torch.equal(rope(x[7:8], cos[7:8], sin[7:8]), out[7:8])
    assert all(torch.equal(rope(x, cos, sin), out) for _ in range(20))


def test_rows_beyond_2_to_the_31_elements(device: torch.device) -> None:
    x = normal(3, 64, dtype=torch.bfloat16, device=device)
    cos, sin = tables(3, 32, device)
    near, far = (rope(rows.view(3, 2, 32), cos, sin) for rows in (x, far_apart(x)))
    assert torch.equal(near, far)


@pytest.mark.parametrize(
    "x, cos, sin, message",
    [
        ((4, 16), (4, 8), (4, 8), r"rope: the shape of the heads is \(4, 16\); expected \[tokens, heads, head dim\]"),
        ((4, 2, 16), (4, 9), (4, 9), r"rope: the shape of cos is \(4, 9\); expected \[4, up to 8\]"),
        ((4, 2, 16), (3, 8), (3, 8), r"rope: the shape of cos is \(3, 8\)"),
        ((4, 2, 16), (4, 8), (4, 7), r"rope: the shape of sin is \(4, 7\); expected that of cos, \(4, 8\)"),
    ],
)
def test_wrong_shapes_are_named(x: tuple[int, ...], cos: tuple[int, ...], sin: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(torch.zeros(x), torch.zeros(cos), torch.zeros(sin))


def test_tables_are_fp32() -> None:
    with pytest.raises(ValueError, match=r"rope: sin.dtype is torch.bfloat16; expected torch.float32"):
        rope(torch.zeros(4, 2, 16), torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.bfloat16))


def test_float64_is_left_to_torch_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.warn_once.cache_clear()
    x = normal(4, 2, 16).double()
    cos, sin = tables(4, 16, x.device)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(rope(x, cos, sin), reference.rope(x, cos, sin))
        rope(x, cos, sin)
    assert [r.message for r in caplog.records] == [
        "rope in torch.float64 runs in plain torch: the kernel takes float32, bfloat16 and float16"
    ]
