"""A linear layer whose rows have the same bits whatever stands beside them, at any number of rows.

An output element is one fp32 sum over k, ascending, in blocks of a size that the weight's shape decides. Tensor cores
sum inside an instruction as well, and HMMA, which tiles of less than 64 rows get, may do so in another order than
HGMMA. So the operands are always swapped: the weights are the rows of the product (64 and more) and the tokens its
columns, of which HGMMA takes as few as 16. How many of either a program holds is then a matter of speed only.

Axes: T tokens, I in, O out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.triton.inputs import left_to_torch, require
from kernels.triton.tables import cached, chosen


@triton.jit
def weight_tile(weight, rows, k, seen):
    """Weights [rows, k] as the product takes them. Those that are stored otherwise are widened here."""
    return tl.load(weight + rows + k, mask=seen, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def _invariant_linear_kernel(
    x,  # [T, I], rows x_stride apart
    weight,  # [O, I], rows weight_stride apart
    bias,  # [O], with BIAS
    out,  # [T, O]
    x_stride,
    weight_stride,
    tokens,
    in_features,
    out_features,
    BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that run at a time share tiles in L2: all weights for GROUP blocks of tokens, then the next GROUP.
    out_blocks = tl.cdiv(out_features, BLOCK_OUT)
    token_blocks = tl.cdiv(tokens, BLOCK_TOKENS)
    program = tl.program_id(0)
    first = program // (GROUP * out_blocks) * GROUP
    within = program % (GROUP * out_blocks)
    size = min(GROUP, token_blocks - first)
    o = within // size * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    t = (first + within % size) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[None, :]

    weight_rows = o.to(tl.int64) * weight_stride
    x_rows = x + t.to(tl.int64) * x_stride
    total = tl.zeros([BLOCK_OUT, BLOCK_TOKENS], tl.float32)
    for start in range(0, in_features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        seen = k < in_features
        w = weight_tile(weight, weight_rows, k[None, :], (o < out_features) & seen[None, :])
        columns = tl.load(x_rows + k[:, None], mask=(t < tokens) & seen[:, None], other=0.0)
        total = tl.dot(w, columns, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + o, mask=o < out_features, other=0.0).to(tl.float32)
    at = out + t.to(tl.int64) * out_features + o
    tl.store(at, total.to(out.dtype.element_ty), mask=(o < out_features) & (t < tokens))


class Tile(NamedTuple):
    """A program's share: ``out`` x ``tokens`` outputs, ``k`` summands at a time."""

    out: int
    tokens: int
    k: int
    warps: int
    stages: int


# By the number of tokens, up to which. Few tokens: a read of the weights, which wants many small programs and many
# loads under way. Many: tensor cores, which want few loads per product.
BUCKETS = {
    16: Tile(64, 16, 64, warps=4, stages=8),
    32: Tile(64, 32, 64, warps=4, stages=8),
    64: Tile(64, 64, 64, warps=4, stages=6),
    1024: Tile(128, 128, 64, warps=8, stages=4),
}
LARGEST = Tile(256, 128, 64, warps=8, stages=4)
FP32 = Tile(64, 32, 32, warps=4, stages=3)  # no tensor cores: one tile for all


@cached
def tile_for(tokens: int, in_features: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """``k`` depends on ``in_features`` and dtype alone, so that a sum is divided alike for any number of tokens."""
    limit = next((limit for limit in BUCKETS if tokens <= limit), None)
    if dtype == torch.float32:
        tile = FP32
    else:
        tile = chosen(device, LARGEST if limit is None else BUCKETS[limit], "invariant_linear", dtype, limit)
    return tile._replace(k=min(tile.k, max(16, triton.next_power_of_2(in_features))))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    (tokens, in_features), out_features = x.shape, len(weight)
    out = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    tile = tile_for(tokens, in_features, x.dtype, x.device)
    if out.numel():
        _invariant_linear_kernel[(triton.cdiv(out_features, tile.out) * triton.cdiv(tokens, tile.tokens),)](
            x, weight, weight if bias is None else bias, out, x.stride(0), weight.stride(0), tokens, in_features,
            out_features, BIAS=bias is not None, BLOCK_OUT=tile.out, BLOCK_TOKENS=tile.tokens, BLOCK_K=tile.k, GROUP=8,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """cuBLAS, as it comes: whose bits must not depend on the batch calls :func:`invariant_linear`."""
    return F.linear(x, weight, bias)


class _InvariantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dout,) = grads
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            dout @ weight if wanted[0] else None,
            dout.T @ x if wanted[1] else None,
            dout.sum(0) if wanted[2] else None,
        )


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "invariant_linear"
    require(x.ndim == 2, op, "the shape of x", x.shape, "[tokens, in]")
    fits = weight.ndim == 2 and weight.shape[1] == x.shape[1]
    require(fits, op, "the shape of weight", weight.shape, f"[out, {x.shape[1]}]")
    require(weight.stride(1) == 1, op, "the strides of weight", weight.stride(), "1 along in: store it as [out, in]")
    if bias is not None:
        require(bias.shape == weight.shape[:1], op, "the shape of bias", bias.shape, f"[{len(weight)}]")
        require(bias.stride(0) == 1, op, "the stride of bias", bias.stride(0), "1")
    for name, tensor in (("weight", weight), *(() if bias is None else (("bias", bias),))):
        require(tensor.dtype == x.dtype, op, f"{name}.dtype", tensor.dtype, f"that of x, {x.dtype}")
        require(tensor.device == x.device, op, f"{name}.device", tensor.device, f"that of x, {x.device}")


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if left_to_torch("invariant_linear", x):
        return reference.invariant_linear(x, weight, bias)
    _check(x, weight, bias)
    return _InvariantLinear.apply(x, weight, bias)
