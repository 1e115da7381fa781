"""RMSNorm, alone and with the residual's addition, forward and backward. A program a row; dW without atomics.

Axes: R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.tiles import multiprocessors, row_warps


@triton.jit
def _rms_norm_kernel(
    x,  # [R, D], rows x_stride apart
    residual,  # [R, D], with ADD
    weight,  # [D]
    out,  # [R, D]
    total,  # [R, D] x + residual, with ADD
    inverse,  # [R] 1 / rms, for the backward
    x_stride,
    width,
    eps,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    seen = i < width
    h = tl.load(x + row * x_stride + i, mask=seen, other=0.0)
    if ADD:
        h = h + tl.load(residual + row * width + i, mask=seen, other=0.0)
        tl.store(total + row * width + i, h, mask=seen)
    h = h.to(tl.float32)
    inv = tl.rsqrt(tl.sum(h * h) / width + eps)
    tl.store(inverse + row, inv)
    w = tl.load(weight + i, mask=seen, other=0.0)
    if OFFSET:
        y = h * inv * (w.to(tl.float32) + 1)
    else:
        y = (h * inv).to(x.dtype.element_ty) * w
    tl.store(out + row * width + i, y.to(out.dtype.element_ty), mask=seen)


@triton.jit
def _rms_norm_backward_kernel(
    dout,  # [R, D]
    h,  # [R, D] what was normed, rows h_stride apart
    weight,  # [D]
    inverse,  # [R]
    dtotal,  # [R, D] gradient that reaches h directly, with ADD
    dh,  # [R, D]
    dweight,  # [programs, D] fp32, summed by the caller
    h_stride,
    rows,
    width,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    seen = i < width
    w = tl.load(weight + i, mask=seen, other=0.0).to(tl.float32)
    if OFFSET:
        w += 1
    dw = tl.zeros([BLOCK], tl.float32)
    # A program takes every n-th row, in order: its part of dW is the same sum at every run.
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.to_tensor(r).to(tl.int64)
        inv = tl.load(inverse + row)
        normed = tl.load(h + row * h_stride + i, mask=seen, other=0.0).to(tl.float32) * inv
        dy = tl.load(dout + row * width + i, mask=seen, other=0.0).to(tl.float32)
        g = dy * w
        dx = inv * (g - normed * (tl.sum(g * normed) / width))
        if ADD:
            dx += tl.load(dtotal + row * width + i, mask=seen, other=0.0).to(tl.float32)
        tl.store(dh + row * width + i, dx.to(dh.dtype.element_ty), mask=seen)
        dw += dy * normed
    tl.store(dweight + tl.program_id(0).to(tl.int64) * width + i, dw, mask=seen)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, ...]:
    """out, 1/rms and, with a residual, the sum. x [R, D] may have rows that lie apart."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = torch.empty_like(out) if residual is not None else out
    block = triton.next_power_of_2(width)
    if rows:
        _rms_norm_kernel[(rows,)](
            x, x if residual is None else residual, weight, out, total, inverse, x.stride(0), width, eps,
            ADD=residual is not None, OFFSET=offset, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
    return out, inverse, total


def _backward(
    dout: Tensor, h: Tensor, weight: Tensor, inverse: Tensor, dtotal: Tensor | None, offset: bool
) -> tuple[Tensor, Tensor]:
    rows, width = h.shape
    programs = min(rows, 4 * multiprocessors(h.device))
    dh = torch.empty_like(dout)
    dweight = torch.zeros((max(programs, 1), width), dtype=torch.float32, device=h.device)
    block = triton.next_power_of_2(width)
    if rows:
        _rms_norm_backward_kernel[(programs,)](
            dout, h, weight, inverse, dout if dtotal is None else dtotal, dh, dweight, h.stride(0), rows, width,
            ADD=dtotal is not None, OFFSET=offset, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
    return dh, dweight.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        out, inverse, _ = _forward(x, None, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        return *_backward(grads[0].contiguous(), x, weight, inverse, None, ctx.offset), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    rows = x.flatten(0, -2) if x.stride(-1) == 1 else x.contiguous().flatten(0, -2)
    return _RMSNorm.apply(rows, weight, eps, offset).view(x.shape)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: bool
    ) -> tuple[Tensor, Tensor]:
        out, inverse, total = _forward(x, residual, weight, eps, offset)
        ctx.save_for_backward(total, weight, inverse)
        ctx.offset = offset
        return out, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dout, dtotal = (grad.contiguous() for grad in grads)
        total, weight, inverse = ctx.saved_tensors
        dh, dweight = _backward(dout, total, weight, inverse, dtotal, ctx.offset)
        return dh, dh, dweight, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: bool = False
) -> tuple[Tensor, Tensor]:
    return _AddRMSNorm.apply(x.contiguous(), residual.contiguous(), weight, eps, offset)
