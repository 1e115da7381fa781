"""RMSNorm, alone and with the residual's addition, forward and backward. Several short rows a program, or a long one.

dW is summed without atomics: a program adds up the rows that it takes, and the programs' sums are added at the end.

Axes: R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.triton.inputs import left_to_torch, require
from kernels.triton.tiles import multiprocessors, register_limit, resident_programs, row_warps, rows_per_program

LARGEST_ROW = 32768  # bytes: the backward keeps a row of dW in registers, and of larger ones it would spill


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_kernel(
    x,  # [R, D]; row r is head r % heads of token r // heads, and they lie apart by their strides
    residual,  # [R, D], with ADD
    weight,  # [D]
    out,  # [R, D]
    total,  # [R, D] x + residual, with ADD
    inverse,  # [R] 1 / rms, for the backward
    token_stride,
    head_stride,
    heads,
    rows,
    width,
    eps,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)[None, :]
    seen = (row < rows)[:, None] & (i < width)
    at = row.to(tl.int64)[:, None] * width + i
    place = (row // heads).to(tl.int64) * token_stride + (row % heads).to(tl.int64) * head_stride
    h = tl.load(x + place[:, None] + i, mask=seen, other=0.0)
    if ADD:
        h = h + tl.load(residual + at, mask=seen, other=0.0)
        tl.store(total + at, h, mask=seen)
    h = h.to(tl.float32)
    inv = tl.rsqrt(tl.sum(h * h, 1) / width + eps)
    tl.store(inverse + row, inv, mask=row < rows)
    w = tl.load(weight + i, mask=i < width, other=0.0)
    if OFFSET:
        y = h * inv[:, None] * (w.to(tl.float32) + 1)
    else:
        y = (h * inv[:, None]).to(x.dtype.element_ty) * w
    tl.store(out + at, y.to(out.dtype.element_ty), mask=seen)


@triton.jit
def factor(weight, seen, OFFSET: tl.constexpr):
    """What the normed row is multiplied by, in fp32."""
    w = tl.load(weight, mask=seen, other=0.0).to(tl.float32)
    if OFFSET:
        w += 1
    return w


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_backward_kernel(
    dout,  # [R, D]
    h,  # [R, D] what was normed, rows as the forward's x
    weight,  # [D]
    inverse,  # [R]
    dtotal,  # [R, D] gradient that reaches h directly, with ADD
    dh,  # [R, D]
    dweight,  # [programs, D] fp32, summed by the caller
    token_stride,
    head_stride,
    heads,
    rows,
    width,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    # A program takes every n-th group of rows, in order: its part of dW is the same sum at every run.
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        seen = (row < rows)[:, None] & (i < width)
        at = row.to(tl.int64)[:, None] * width
        place = ((row // heads).to(tl.int64) * token_stride + (row % heads).to(tl.int64) * head_stride)[:, None]
        inv = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        normed = tl.load(h + place + i, mask=seen, other=0.0, eviction_policy="evict_last").to(tl.float32) * inv
        dy = tl.load(dout + at + i, mask=seen, other=0.0, eviction_policy="evict_last").to(tl.float32)
        mean = (tl.sum(dy * factor(weight + i, i < width, OFFSET) * normed, 1) / width)[:, None]
        # All are read again, from L1: kept over the sum they would take the registers that dW needs. That goes first,
        # and loads come when their numbers are used, for the same reason.
        normed = tl.load(h + place + i, mask=seen, other=0.0).to(tl.float32) * inv
        dy = tl.load(dout + at + i, mask=seen, other=0.0).to(tl.float32)
        dw += dy * normed
        dx = inv * (dy * factor(weight + i, i < width, OFFSET) - normed * mean)
        if ADD:
            dx += tl.load(dtotal + at + i, mask=seen, other=0.0).to(tl.float32)
        tl.store(dh + at + i, dx.to(dh.dtype.element_ty), mask=seen)
    part = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    tl.store(dweight + part, tl.sum(dw, 0), mask=tl.arange(0, BLOCK) < width)


def _tile(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"ROWS": rows_per_program(block), "BLOCK": block}


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: bool) -> tuple[Tensor, ...]:
    """out, 1/rms and, with a residual, the sum. x [tokens, heads, D] may lie apart, all else is contiguous."""
    tokens, heads, width = x.shape
    rows, tile = tokens * heads, _tile(width)
    warps = row_warps(tile["ROWS"] * tile["BLOCK"])
    out = torch.empty((tokens, heads, width), dtype=x.dtype, device=x.device)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = torch.empty_like(out) if residual is not None else out
    if rows:
        _rms_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x, x if residual is None else residual, weight, out, total, inverse, x.stride(0), x.stride(1), heads,
            rows, width, eps, ADD=residual is not None, OFFSET=offset, **tile, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out, inverse, total


def _backward(
    dout: Tensor, h: Tensor, weight: Tensor, inverse: Tensor, dtotal: Tensor | None, offset: bool
) -> tuple[Tensor, Tensor]:
    tokens, heads, width = h.shape
    rows, tile = tokens * heads, _tile(width)
    held = tile["ROWS"] * tile["BLOCK"]
    resident, warps = resident_programs(held * h.element_size()), min(8, held // 512)
    programs = min(triton.cdiv(rows, tile["ROWS"]), resident * multiprocessors(h.device))
    dh = torch.empty((tokens, heads, width), dtype=dout.dtype, device=h.device)
    dweight = torch.empty((programs, width), dtype=torch.float32, device=h.device)
    if rows:
        _rms_norm_backward_kernel[(programs,)](
            dout, h, weight, inverse, dout if dtotal is None else dtotal, dh, dweight, h.stride(0), h.stride(1), heads,
            rows, width, ADD=dtotal is not None, OFFSET=offset, **tile, num_warps=warps,
            maxnreg=register_limit(resident, warps), enable_fp_fusion=False,
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


def _heads(x: Tensor) -> Tensor:
    """[..., D] as [tokens, heads, D]: heads of a fused projection as they lie."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1])


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    require(x.ndim >= 2, op, "the shape of x", x.shape, "[..., width]")
    require(weight.shape == x.shape[-1:], op, "the shape of weight", weight.shape, f"[{x.shape[-1]}], the width of x")
    require(weight.stride(0) == 1, op, "the stride of weight", weight.stride(0), "1")
    require(weight.device == x.device, op, "weight.device", weight.device, f"that of x, {x.device}")


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    if left_to_torch("rms_norm", x, LARGEST_ROW):
        return reference.rms_norm(x, weight, eps, offset)
    _check("rms_norm", x, weight)
    return _RMSNorm.apply(_heads(x), weight, eps, offset).view(x.shape)


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
    if left_to_torch("add_rms_norm", x, LARGEST_ROW):
        return reference.add_rms_norm(x, residual, weight, eps, offset)
    _check("add_rms_norm", x, weight)
    require(residual.shape == x.shape, "add_rms_norm", "the shape of residual", residual.shape, f"x's {tuple(x.shape)}")
    require(residual.dtype == x.dtype, "add_rms_norm", "residual.dtype", residual.dtype, f"x's {x.dtype}")
    out, total = _AddRMSNorm.apply(_heads(x.contiguous()), _heads(residual.contiguous()), weight, eps, offset)
    return out.view(x.shape), total.view(x.shape)
