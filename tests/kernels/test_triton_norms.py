"""The RMSNorm kernels against float64 and plain torch: all dtypes, odd widths, rows that lie apart, and repeats."""

from __future__ import annotations

import logging

import pytest
import torch
from accuracy import BACKWARD, assert_close_to_truth, normal
from torch import Tensor
from vast import far_apart

from kernels import dispatch, reference
from kernels.triton import norms

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 64), (2, 7), (1, 33), (5, 64), (37, 131), (3, 1024), (9, 2049)]
REAL = [pytest.param(shape, marks=pytest.mark.gpu) for shape in ((70000, 128), (3000, 8192), (700, 16384))]
EPS = 1e-5


def truth(x: Tensor, residual: Tensor | None, weight: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """In float64, by the formula. The sum is rounded to the working dtype, since it is handed on."""
    h = x.double() if residual is None else (x + residual).double()
    factor = weight.double() + 1 if offset else weight.double()
    return h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * factor, h


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, *REAL])
def test_forward_and_backward(
    shape: tuple[int, int], with_residual: bool, offset: bool, dtype: torch.dtype, device: torch.device
) -> None:
    data = [normal(*shape, seed=i, dtype=dtype, device=device) for i in range(4)]
    x, residual, dout, dtotal = data
    weight = normal(shape[1], seed=9, dtype=dtype, device=device)

    def run(op: object, wide: bool) -> list[Tensor]:
        """Outputs and gradients of an implementation, in its dtype."""
        leaves = [t.double() if wide else t.clone() for t in (x, residual, weight)]
        for leaf in leaves:
            leaf.requires_grad_()
        if wide:
            h = leaves[0] + leaves[1] if with_residual else leaves[0]
            factor = leaves[2] + 1 if offset else leaves[2]
            out = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * factor
        elif with_residual:
            out, h = op.add_rms_norm(*leaves, EPS, offset)
        else:
            out, h = op.rms_norm(leaves[0], leaves[2], EPS, offset), leaves[0]
        loss = (out * dout.to(out.dtype)).sum()
        if with_residual:
            loss = loss + (h * dtotal.to(out.dtype)).sum()
        wanted = leaves if with_residual else [leaves[0], leaves[2]]
        return [out.detach(), *torch.autograd.grad(loss, wanted)]

    found, plain, wanted = run(norms, False), run(reference, False), run(None, True)
    for i, (a, b, c) in enumerate(zip(found, plain, wanted, strict=True)):
        assert a.dtype == dtype
        assert_close_to_truth(a, c, None if dtype == torch.float32 else b, BACKWARD if i else 2e-6)


def test_heads_of_a_fused_projection_need_no_copy(device: torch.device) -> None:
    fused = normal(6, 9, 32, device=device)
    q, k = fused.split((5, 4), 1)
    weight = normal(32, seed=1, device=device)
    for heads in (q, k):
        assert not heads.is_contiguous() and norms._heads(heads).data_ptr() == heads.data_ptr()
        whole, apart = (x.detach().requires_grad_() for x in (heads.contiguous(), heads))
        outs = [norms.rms_norm(x, weight, EPS) for x in (whole, apart)]
        assert torch.equal(*outs)
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out, x in zip(outs, (whole, apart), strict=True)))


@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (5, 16), (16, 5, 16)])
def test_any_number_of_axes_and_any_strides(shape: tuple[int, ...], device: torch.device) -> None:
    x, weight = normal(*shape, device=device), normal(16, seed=1, device=device)
    for other in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        found = norms.rms_norm(other, weight, EPS)
        assert torch.equal(found, norms.rms_norm(x.reshape(-1, 16), weight, EPS).view(shape))


def test_rows_beyond_2_to_the_31_elements(device: torch.device) -> None:
    x, weight = normal(3, 48, dtype=torch.bfloat16, device=device), normal(48, seed=1, device=device).bfloat16()
    far = far_apart(x)
    outs = [norms.rms_norm(leaf.requires_grad_(), weight, EPS) for leaf in (x, far)]
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out.sum(), leaf)[0] for out, leaf in zip(outs, (x, far), strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_company_nor_on_the_run(dtype: torch.dtype, device: torch.device) -> None:
    x = normal(40, 96, dtype=dtype, device=device).requires_grad_()
    weight = normal(96, seed=1, dtype=dtype, device=device).requires_grad_()
    out = norms.rms_norm(x, weight, EPS)
    assert torch.equal(norms.rms_norm(x[7:8], weight, EPS), out[7:8])
    first = torch.autograd.grad(out.sum(), (x, weight))
    for _ in range(20):
        again = torch.autograd.grad(norms.rms_norm(x, weight, EPS).sum(), (x, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_wrong_shapes_and_dtypes_are_named() -> None:
    x, weight = torch.zeros(4, 16), torch.zeros(16)
    with pytest.raises(ValueError, match=r"rms_norm: the shape of weight is \(17,\); expected \[16\], the width of x"):
        norms.rms_norm(x, torch.zeros(17), EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: the shape of residual is \(3, 16\); expected x's \(4, 16\)"):
        norms.add_rms_norm(x, x[:3], weight, EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual.dtype is torch.bfloat16; expected x's torch.float32"):
        norms.add_rms_norm(x, x.bfloat16(), weight, EPS)


def test_what_the_kernel_does_not_take_is_left_to_torch_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.warn_once.cache_clear()
    x = normal(2, 8193)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(norms.rms_norm(x, x[0], EPS), reference.rms_norm(x, x[0], EPS))
        assert norms.add_rms_norm(x.double(), x.double(), x[0].double(), EPS)[0].dtype == torch.float64
    assert [r.message for r in caplog.records] == [
        "rms_norm of width 8193 runs in plain torch: in torch.float32 the kernel takes up to 8192",
        "add_rms_norm in torch.float64 runs in plain torch: the kernel takes float32, bfloat16 and float16",
    ]
