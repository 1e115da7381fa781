"""The RMSNorm kernels against float64 and plain torch: all dtypes, odd widths, rows that lie apart, and repeats."""

from __future__ import annotations

import pytest
import torch
from accuracy import BACKWARD, assert_close_to_truth, normal
from torch import Tensor

from kernels import reference
from kernels.triton import norms

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 64), (2, 7), (1, 33), (5, 64), (37, 131), (3, 1024)]
EPS = 1e-5


def truth(x: Tensor, residual: Tensor | None, weight: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """In float64, by the formula. The sum is rounded to the working dtype, since it is handed on."""
    h = x.double() if residual is None else (x + residual).double()
    factor = weight.double() + 1 if offset else weight.double()
    return h / (h.square().mean(-1, keepdim=True) + EPS).sqrt() * factor, h


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
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
    q, _ = fused.split((5, 4), 1)
    assert not q.is_contiguous()
    weight = normal(32, seed=1, device=device)
    assert torch.equal(norms.rms_norm(q, weight, EPS), norms.rms_norm(q.contiguous(), weight, EPS))


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
