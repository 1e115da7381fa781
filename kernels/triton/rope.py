"""Rotary position embedding, forward and backward. A program turns some heads of one token.

Multiplications and additions are not fused: the bits are those of plain torch, and those of ``rope_store``, whatever
the compiler makes of either kernel.

Axes: T tokens, N heads, D head dim, R elements of a head that turn.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.triton.inputs import left_to_torch, require
from kernels.triton.tiles import heads_per_program, row_warps


@triton.jit
def copy_heads(
    source, target, source_stride, target_stride, first, heads, BEGIN: tl.constexpr, END: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements BEGIN to END of heads ``first`` to ``first + HEADS`` of a token; strides are from head to head."""
    head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    i = BEGIN + tl.arange(0, BLOCK)[None, :]
    seen = (head < heads) & (i < END)
    x = tl.load(source + head * source_stride + i, mask=seen, other=0.0)
    tl.store(target + head * target_stride + i, x, mask=seen)


@triton.jit
def turn_heads(
    source, target, source_stride, target_stride, cos, sin, first, heads, WIDTH: tl.constexpr, HALF: tl.constexpr,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads ``first`` to ``first + HEADS`` of a token, of which ``cos`` and ``sin`` point to its R/2 = HALF numbers.

    The WIDTH - 2 * HALF elements that don't turn (REST is that, rounded up to a power of two) are copied.
    """
    head = (first + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    c = tl.load(cos + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + i, mask=i < HALF, other=0.0)
    if INVERSE:
        s = -s
    seen = (head < heads) & (i < HALF)
    a = tl.load(source + head * source_stride + i, mask=seen, other=0.0).to(tl.float32)
    b = tl.load(source + head * source_stride + HALF + i, mask=seen, other=0.0).to(tl.float32)
    dtype = target.dtype.element_ty
    tl.store(target + head * target_stride + i, (a * c - b * s).to(dtype), mask=seen)
    tl.store(target + head * target_stride + HALF + i, (b * c + a * s).to(dtype), mask=seen)
    if REST > 0:
        copy_heads(source, target, source_stride, target_stride, first, heads, 2 * HALF, WIDTH, HEADS, REST)


@triton.jit
def _rope_kernel(
    x,  # [T, N, D], tokens and heads lie apart by their strides
    out,  # [T, N, D]
    cos,  # [T, R/2]
    sin,
    token_stride,
    head_stride,
    heads,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    turn_heads(
        x + token * token_stride, out + token * heads * WIDTH, head_stride, WIDTH, cos + token * HALF,
        sin + token * HALF, tl.program_id(1) * HEADS, heads, WIDTH, HALF, INVERSE, HEADS, BLOCK, REST,
    )  # fmt: skip


def check_tables(op: str, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError unless cos and sin can turn heads x [T, N, D]."""
    require(x.ndim == 3, op, "the shape of the heads", x.shape, "[tokens, heads, head dim]")
    require(cos.shape == sin.shape, op, "the shape of sin", sin.shape, f"that of cos, {tuple(cos.shape)}")
    fits = cos.ndim == 2 and len(cos) == len(x) and 0 < cos.shape[1] <= x.shape[2] // 2
    require(fits, op, "the shape of cos", cos.shape, f"[{len(x)}, up to {x.shape[2] // 2}], half the head dim")
    for name, table in (("cos", cos), ("sin", sin)):
        require(table.dtype == torch.float32, op, f"{name}.dtype", table.dtype, "torch.float32")
        require(table.device == x.device, op, f"{name}.device", table.device, f"that of the heads, {x.device}")


def turning_constants(heads: int, width: int, half: int) -> dict[str, Any]:
    """How :func:`turn_heads` is compiled and launched for a model's heads."""
    block = triton.next_power_of_2(half)
    share = heads_per_program(heads, block)
    rest = width - 2 * half
    return {
        "WIDTH": width,
        "HALF": half,
        "HEADS": share,
        "BLOCK": block,
        "REST": triton.next_power_of_2(rest) if rest else 0,
        "num_warps": row_warps(share * block),
        "enable_fp_fusion": False,
    }


def _turn(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    x, cos, sin = x if x.stride(2) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    tokens, heads, width = x.shape
    out = torch.empty((tokens, heads, width), dtype=x.dtype, device=x.device)
    constants = turning_constants(heads, width, cos.shape[1])
    if out.numel():
        _rope_kernel[(tokens, triton.cdiv(heads, constants["HEADS"]))](
            x, out, cos, sin, x.stride(0), x.stride(1), heads, INVERSE=inverse, **constants
        )
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, inverse=True), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if left_to_torch("rope", x):
        return reference.rope(x, cos, sin)
    check_tables("rope", x, cos, sin)
    return _Rope.apply(x, cos, sin)
