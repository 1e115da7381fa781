"""fp32 logits, and what the log-prob kernels share with them: a tile of hidden states times a tile of the head.

Axes: R rows, H hidden, V rows of the head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import reference
from kernels.dispatch import warn_once
from kernels.reference.dense import linear
from kernels.reference.logprobs import Product
from kernels.triton.elementary import LOG2E, LOWEST
from kernels.triton.tables import cached, chosen

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

GROUP = tl.constexpr(16)  # row tiles whose hidden states stay in the L2 cache: 16 MB at H = 4096


class Form(NamedTuple):
    """How a head's logits and log-probs are computed."""

    rows: int  # of a tile
    columns: int
    depth: int  # of H, multiplied at a time
    warps: int
    stages: int
    fused_backward: bool  # without a softcap, dlogits from one kernel; else from cuBLAS and an elementwise kernel
    fused_forward: bool = True  # else from chunks of cuBLAS' logits: the benchmark's peer, its bits vary with R


def form_of(weight: Tensor) -> Form:
    """The form for a head [V, H]: by its shape and dtype, never by the number of rows, so that a row's bits don't
    depend on its company."""
    return _form(weight.shape[0], weight.shape[1], weight.dtype, weight.device)


@cached
def _form(vocabulary: int, width: int, dtype: torch.dtype, device: torch.device) -> Form:
    """The 16-bit tile is the largest that neither spills nor exceeds shared memory. Loads of an H that its depth
    doesn't divide need masks, and a smaller tile; fp32 goes without tensor cores. The fused backward saves 8 bytes of
    traffic per logit, 1.9 ps on an H200 (4.3 TB/s); at three quarters of cuBLAS' speed (790 TFLOP/s) its product takes
    0.84 fs times H longer. It should win below H = 2200, where rows of logits are aligned: an estimate, not a timing.
    """
    if dtype == torch.float32:
        return Form(64, 128, 16, warps=8, stages=3, fused_backward=False)
    fused = width <= 2048 and vocabulary % 16 == 0
    if width % 64:
        return Form(128, 128, 32, warps=8, stages=3, fused_backward=fused)
    return chosen(device, Form(128, 256, 64, warps=8, stages=3, fused_backward=fused), "head", dtype)


@triton.jit
def place(rows, pieces, BLOCK_M: tl.constexpr):
    """This program's row tile and piece of the vocabulary. Neighbours share the piece, and so its part of the head."""
    first = tl.program_id(0) // (pieces * GROUP) * GROUP
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    inside = tl.program_id(0) % (pieces * GROUP)
    return first + inside % size, inside // size


@triton.jit
def tile_product(
    hidden, weight, row, column, hidden_stride, weight_stride, width, BLOCK_K: tl.constexpr, EVEN: tl.constexpr
):
    """hidden[row] @ weight[column].T in fp32, added up from the first BLOCK_K of H to the last."""
    k = tl.arange(0, BLOCK_K)
    x = hidden + row.to(tl.int64)[:, None] * hidden_stride + k[None, :]
    w = weight + column.to(tl.int64)[None, :] * weight_stride + k[:, None]
    z = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            a = tl.load(x)
            b = tl.load(w)
        else:
            a = tl.load(x, mask=(start + k < width)[None, :], other=0.0)
            b = tl.load(w, mask=(start + k < width)[:, None], other=0.0)
        z = tl.dot(a, b, z, input_precision="ieee")
        x += BLOCK_K
        w += BLOCK_K
    return z


@triton.jit
def softcapped(z, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(z / softcap), with SOFTCAP."""
    if SOFTCAP:
        z = softcap - 2 * softcap / (tl.exp(z * (2 / softcap)) + 1)
    return z


@triton.jit
def log2_scale(temperature, row):
    """log2(e) / temperature[row]; a temperature of 0 counts as 1."""
    heat = tl.load(temperature + row).to(tl.float32)
    return 1 / tl.where(heat > 0, heat, 1.0) * LOG2E


@triton.jit
def exponent(z, peak, scale):
    """The power of 2 that exp((z - peak) / temperature) is, but at least LOWEST. NaN stays NaN."""
    return tl.maximum((z - peak) * scale, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows"])
def _logits_kernel(
    hidden,  # [R, H], rows hidden_stride apart
    weight,  # [V, H], rows weight_stride apart
    out,  # [R, V]
    hidden_stride,
    weight_stride,
    rows,
    width,
    vocabulary,
    num_tokens,
    softcap,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, piece = place(rows, tl.cdiv(vocabulary, BLOCK_N), BLOCK_M)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the last repeat it, so that loads need no masks.
    z = tile_product(
        hidden, weight, tl.minimum(row, rows - 1), tl.minimum(column, num_tokens - 1),
        hidden_stride, weight_stride, width, BLOCK_K, EVEN,
    )  # fmt: skip
    z = tl.where(column[None, :] < num_tokens, softcapped(z, softcap, SOFTCAP), -float("inf"))
    to = out + row.to(tl.int64)[:, None] * vocabulary + column[None, :]
    tl.store(to, z, mask=(row < rows)[:, None] & (column < vocabulary)[None, :])


def launch_constants(form: Form, width: int) -> dict[str, Any]:
    """What a kernel over tiles of :func:`tile_product` is compiled for."""
    return {
        "EVEN": width % form.depth == 0, "BLOCK_M": form.rows, "BLOCK_N": form.columns, "BLOCK_K": form.depth,
        "num_warps": form.warps, "num_stages": form.stages, "enable_fp_fusion": True,
    }  # fmt: skip


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32, from operands of any float type."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``; total is fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def check_head(op: str, hidden: Tensor, weight: Tensor, num_tokens: int, softcap: float | None) -> None:
    """Raises ValueError naming the argument that doesn't fit the others."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"{op}: hidden and weight must be [rows, H] and [vocabulary, H], but are {shapes}")
    if hidden.device != weight.device:
        raise ValueError(f"{op}: hidden is on {hidden.device}, but weight on {weight.device}; move one of them")
    if weight.stride(1) != 1:
        raise ValueError(f"{op}: weight's rows must be contiguous, but its strides are {weight.stride()}")
    if not 0 < num_tokens <= weight.shape[0]:
        raise ValueError(f"{op}: num_tokens must be from 1 to {weight.shape[0]}, weight's rows, but is {num_tokens}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive, or None for none, but is {softcap}")


def takes(op: str, hidden: Tensor, weight: Tensor, product: Product) -> bool:
    """Whether there are kernels for these dtypes and this product; says so once where there are none."""
    if hidden.dtype != weight.dtype or weight.dtype not in DTYPES:
        why = f"the kernels take bf16, fp16 or fp32 throughout, not {hidden.dtype} under a head in {weight.dtype}"
    elif product is not linear:
        why = f"the product is {product}, and the kernels have their own"
    else:
        return True
    warn_once(f"{op} runs in plain torch, several times slower: {why}")
    return False


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, num_tokens: int, softcap: float | None) -> Tensor:
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        (rows, width), vocabulary = hidden.shape, weight.shape[0]
        form = form_of(weight)
        out = torch.empty((rows, vocabulary), dtype=torch.float32, device=hidden.device)
        if rows:
            grid = (triton.cdiv(rows, form.rows) * triton.cdiv(vocabulary, form.columns),)
            _logits_kernel[grid](
                hidden, weight, out, hidden.stride(0), weight.stride(0), rows, width, vocabulary, num_tokens,
                softcap or 0.0, SOFTCAP=softcap is not None, **launch_constants(form, width),
            )  # fmt: skip
        ctx.save_for_backward(hidden, weight, out)
        ctx.num_tokens, ctx.softcap = num_tokens, softcap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, z = ctx.saved_tensors
        dz = grads[0].clone()
        if ctx.softcap is not None:
            dz *= 1 - (z / ctx.softcap).square()
        dz[:, ctx.num_tokens :] = 0
        dz = dz.to(weight.dtype)
        return mm(dz, weight).to(hidden.dtype), mm(dz.T, hidden).to(weight.dtype), None, None


def logits(
    hidden: Tensor, weight: Tensor, num_tokens: int, softcap: float | None = None, product: Product = linear
) -> Tensor:
    check_head("logits", hidden, weight, num_tokens, softcap)
    if not takes("logits", hidden, weight, product):
        return reference.logits(hidden, weight, num_tokens, softcap, product)
    return _Logits.apply(hidden, weight, num_tokens, softcap)
