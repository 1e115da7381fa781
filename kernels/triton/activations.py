"""SwiGLU and GeGLU, forward and backward: ``gate * sigmoid(z) * up``, in fp32. The backward recomputes.

SiLU has z = gate. The tanh form of GELU, ``gate * (1 + tanh(u)) / 2``, is the same with z = 2u. The sigmoid is
``1 / (1 + exp(-z))``, where an exp that overflows gives 0, and no NaN.

Axes: T tokens, I MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.reference.dense import GELU_CUBIC, GELU_SCALE
from kernels.triton.inputs import left_to_torch, require
from kernels.triton.tiles import row_warps

# z = gate * (GELU_LINEAR + GELU_CUBE * gate^2)
GELU_LINEAR = tl.constexpr(2 * GELU_SCALE)
GELU_CUBE = tl.constexpr(2 * GELU_SCALE * GELU_CUBIC)


@triton.jit
def _gated_kernel(
    gate_up,  # [T, 2I], rows row_stride apart
    out,  # [T, I]
    row_stride,
    width,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = i < width
    gate = tl.load(gate_up + row * row_stride + i, mask=seen, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + i, mask=seen, other=0.0).to(tl.float32)
    if GELU:
        z = gate * (GELU_LINEAR + GELU_CUBE * (gate * gate))
    else:
        z = gate
    act = gate / (1 + tl.exp(-z))
    tl.store(out + row * width + i, (act * up).to(out.dtype.element_ty), mask=seen)


@triton.jit
def _gated_backward_kernel(
    dout,  # [T, I]
    gate_up,  # [T, 2I], rows row_stride apart
    dgate_up,  # [T, 2I]
    row_stride,
    width,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = i < width
    dy = tl.load(dout + row * width + i, mask=seen, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * row_stride + i, mask=seen, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + i, mask=seen, other=0.0).to(tl.float32)
    if GELU:
        square = gate * gate
        z = gate * (GELU_LINEAR + GELU_CUBE * square)
        slope = GELU_LINEAR + 3 * GELU_CUBE * square  # dz / dgate
    else:
        z = gate
        slope = 1.0
    sig = 1 / (1 + tl.exp(-z))
    act = gate * sig
    dgate = (sig + act * (1 - sig) * slope) * up * dy
    at = dgate_up + row * 2 * width + i
    tl.store(at, dgate.to(dgate_up.dtype.element_ty), mask=seen)
    tl.store(at + width, (dy * act).to(dgate_up.dtype.element_ty), mask=seen)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], rows: int, row_stride: int, width: int, gelu: bool) -> None:
    block = min(1024, triton.next_power_of_2(width))
    if rows and width:
        kernel[(rows, triton.cdiv(width, block))](
            *tensors, row_stride, width, GELU=gelu, BLOCK=block, num_warps=row_warps(block), enable_fp_fusion=False
        )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gelu: bool) -> Tensor:
        gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        rows, width = len(gate_up), gate_up.shape[1] // 2
        out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
        _launch(_gated_kernel, (gate_up, out), rows, gate_up.stride(0), width, gelu)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        dout, rows = grads[0].contiguous(), len(gate_up)
        dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        tensors = (dout, gate_up, dgate_up)
        _launch(_gated_backward_kernel, tensors, rows, gate_up.stride(0), dout.shape[1], ctx.gelu)
        return dgate_up, None


def _check(op: str, gate_up: Tensor) -> None:
    even = gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0
    require(even, op, "gate_up's shape", gate_up.shape, "[tokens, 2 * width], gates first")


def swiglu(gate_up: Tensor) -> Tensor:
    if left_to_torch("swiglu", gate_up):
        return reference.swiglu(gate_up)
    _check("swiglu", gate_up)
    return _Gated.apply(gate_up, False)


def geglu(gate_up: Tensor) -> Tensor:
    if left_to_torch("geglu", gate_up):
        return reference.geglu(gate_up)
    _check("geglu", gate_up)
    return _Gated.apply(gate_up, True)
