"""Token log-probs and entropies from hidden states, without logits in memory.

A program multiplies a tile of hidden states with a tile of the head and keeps what a softmax needs of the product; a
second kernel merges the pieces of the vocabulary. Only how many programs there are depends on the number of rows, so a
row's bits don't depend on its company: in ``exact`` numerics the engine's log-probs and the trainer's come from here.

Axes: R rows, H hidden, V rows of the head, S pieces of the vocabulary. The statistics of a row and a piece are peak,
the largest logit, and total and moment, the sums of 2^u and u 2^u, where u = log2(e) (logit - peak) / temperature. They
lose no precision to large logits, since u comes of a difference, nor to cancellation, since no terms differ in sign.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import reference
from kernels.reference.dense import linear
from kernels.reference.logprobs import Product
from kernels.triton.elementary import LN2
from kernels.triton.logits import (
    Form,
    check_head,
    exponent,
    form_of,
    launch_constants,
    log2_scale,
    mm,
    place,
    softcapped,
    takes,
    tile_product,
)
from kernels.triton.logprobs_backward import LOGITS_TILE, Scored, column_chunks, gradients, row_unit

MERGED = {"ROWS": 16, "PIECES": 64}  # by a program at a time: 64 bytes in a row, and enough loads under way


@triton.jit
def _finite(peak):
    """What exponents can be taken relative to, if there are only logits of -inf."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def _statistics(z, scale):
    """peak, total and moment of each row of a tile."""
    peak = tl.max(z, 1)
    u = exponent(z, _finite(peak)[:, None], scale[:, None])
    p = tl.exp2(u)
    return peak, tl.sum(p, 1), tl.sum(p * u, 1)


@triton.jit
def _aim(z, column, target):
    """The target's logit in each row of a tile; -inf where the target lies elsewhere."""
    return tl.max(tl.where(column[None, :] == target[:, None], z, -float("inf")), 1)


@triton.jit
def _store(partials, piece, row, seen, rows, pieces, peak, total, moment, aim):
    to = partials + tl.cast(piece, tl.int64) * rows + row
    step = tl.cast(pieces, tl.int64) * rows
    tl.store(to, peak, mask=seen)
    tl.store(to + step, total, mask=seen)
    tl.store(to + 2 * step, moment, mask=seen)
    tl.store(to + 3 * step, aim, mask=seen)


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["targets", "temperature"])
def _token_logprobs_kernel(
    hidden,  # [R, H], rows hidden_stride apart
    weight,  # [V, H], rows weight_stride apart
    targets,  # [R]
    temperature,  # [R]
    partials,  # [4, S, R]: peak, total, moment, aim
    hidden_stride,
    weight_stride,
    rows,
    width,
    pieces,
    num_tokens,
    softcap,
    SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, piece = place(rows, pieces, BLOCK_M)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    seen = row < rows
    # Rows and columns beyond the last repeat it, so that loads need no masks.
    row = tl.minimum(row, rows - 1)
    column = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tile_product(
        hidden, weight, row, tl.minimum(column, num_tokens - 1), hidden_stride, weight_stride, width, BLOCK_K, EVEN
    )
    z = tl.where(column[None, :] < num_tokens, softcapped(z, softcap, SOFTCAP), -float("inf"))
    target = tl.load(targets + row).to(tl.int32)
    aim = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if tl.max((target // BLOCK_N == piece).to(tl.int32), 0) > 0:  # for most tiles no row's target is in it
        aim = _aim(z, column, target)
    peak, total, moment = _statistics(z, log2_scale(temperature, row))
    _store(partials, piece, row, seen, rows, pieces, peak, total, moment, aim)


@triton.jit(
    do_not_specialize=["rows", "units", "first_piece", "pieces", "first"],
    do_not_specialize_on_alignment=["targets", "temperature"],
)
def _token_logprobs_chunk_kernel(
    z,  # [R, units * UNIT] a chunk's logits before the softcap
    targets,
    temperature,
    partials,  # of which those from first_piece on are filled, one for every COLUMNS logits
    rows,
    units,
    first_piece,
    pieces,
    first,  # column of the vocabulary that the chunk begins with
    num_tokens,
    softcap,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    seen = row < rows
    row = tl.minimum(row, rows - 1)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = units * UNIT
    logit = tl.load(z + row[:, None] * columns + i[None, :], mask=(i < columns)[None, :], other=0.0)
    exists = (i < columns) & (first + i < num_tokens)
    logit = tl.where(exists[None, :], softcapped(logit, softcap, SOFTCAP), -float("inf"))
    aim = _aim(logit, first + i, tl.load(targets + row).to(tl.int32))
    peak, total, moment = _statistics(logit, log2_scale(temperature, row))
    _store(partials, first_piece + tl.program_id(1), row, seen, rows, pieces, peak, total, moment, aim)


@triton.jit(do_not_specialize=["rows", "pieces"], do_not_specialize_on_alignment=["temperature"])
def _token_logprobs_merge_kernel(
    partials,  # [4, S, R]
    temperature,  # [R], as the next four
    logprob,
    entropy,
    peak_out,
    log_total,
    rows,
    pieces,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    seen = row < rows
    row = tl.minimum(row, rows - 1)
    scale = log2_scale(temperature, row)
    step = tl.cast(pieces, tl.int64) * rows
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    aim = tl.full([ROWS], -float("inf"), tl.float32)
    for start in range(0, pieces, PIECES):
        piece = start + tl.arange(0, PIECES)
        at = partials + piece.to(tl.int64)[None, :] * rows + row[:, None]
        there = (piece < pieces)[None, :]
        peaks = tl.load(at, mask=there, other=-float("inf"))
        totals = tl.load(at + step, mask=there, other=0.0)
        moments = tl.load(at + 2 * step, mask=there, other=0.0)
        aim = tl.maximum(aim, tl.max(tl.load(at + 3 * step, mask=there, other=-float("inf")), 1))
        # What was found so far, and these pieces, relative to their common peak.
        top = tl.maximum(peak, tl.max(peaks, 1))
        u = exponent(peaks, _finite(top)[:, None], scale[:, None])
        before = exponent(peak, _finite(top), scale)
        moment = tl.exp2(before) * (moment + before * total) + tl.sum(tl.exp2(u) * (moments + u * totals), 1)
        total = tl.exp2(before) * total + tl.sum(tl.exp2(u) * totals, 1)
        peak = top
    bits = tl.log2(total)
    tl.store(logprob + row, ((aim - peak) * scale - bits) * LN2, mask=seen)
    tl.store(entropy + row, (bits - moment / total) * LN2, mask=seen)
    tl.store(peak_out + row, peak, mask=seen)
    tl.store(log_total + row, bits, mask=seen)


def _fused_partials(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, num_tokens: int, softcap: float | None,
    form: Form,
) -> Tensor:  # fmt: skip
    """Statistics [4, S, R] of each piece of the vocabulary: 16 bytes of memory for every 256 logits, or 128."""
    rows, width = hidden.shape
    pieces = triton.cdiv(num_tokens, form.columns)
    partials = torch.empty((4, pieces, rows), dtype=torch.float32, device=hidden.device)
    _token_logprobs_kernel[(triton.cdiv(rows, form.rows) * pieces,)](
        hidden, weight, targets, temperature, partials, hidden.stride(0), weight.stride(0), rows, width, pieces,
        num_tokens, softcap or 0.0, SOFTCAP=softcap is not None, **launch_constants(form, width),
    )  # fmt: skip
    return partials


def _chunked_partials(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, num_tokens: int, softcap: float | None
) -> Tensor:
    """The same from chunks of logits by cuBLAS, in larger pieces."""
    rows, unit = len(hidden), row_unit(weight)
    chunks = column_chunks(rows, weight, logit_bytes=4)
    blocks = [triton.cdiv(columns.stop - columns.start, LOGITS_TILE["COLUMNS"]) for columns in chunks]
    partials = torch.empty((4, sum(blocks), rows), dtype=torch.float32, device=hidden.device)
    for i, columns in enumerate(chunks):
        z = mm(hidden, weight[columns].T)
        _token_logprobs_chunk_kernel[(triton.cdiv(rows, LOGITS_TILE["ROWS"]), blocks[i])](
            z, targets, temperature, partials, rows, z.shape[1] // unit, sum(blocks[:i]), sum(blocks), columns.start,
            num_tokens, softcap or 0.0, SOFTCAP=softcap is not None, UNIT=unit, **LOGITS_TILE, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
        del z  # before the next chunk's are made
    return partials


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        num_tokens: int,
        softcap: float | None,
        form: Form,
    ) -> tuple[Tensor, Tensor]:
        rows = len(hidden)
        columns = [torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(4)]
        logprob, entropy, peak, log_total = columns
        if rows:
            arguments = hidden, weight, targets, temperature, num_tokens, softcap
            partials = _fused_partials(*arguments, form) if form.fused_forward else _chunked_partials(*arguments)
            _token_logprobs_merge_kernel[(triton.cdiv(rows, MERGED["ROWS"]),)](
                partials, temperature, *columns, rows, partials.shape[1], **MERGED, enable_fp_fusion=True
            )
        ctx.save_for_backward(hidden, weight, targets, temperature, peak, log_total, entropy)
        ctx.num_tokens, ctx.softcap, ctx.form = num_tokens, softcap, form
        ctx.set_materialize_grads(False)  # a column that nobody uses costs nothing
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        dlogprob, dentropy = (None if grad is None else grad.contiguous() for grad in grads)
        if dlogprob is None:
            if dentropy is None:
                return (None,) * 7
            dlogprob = torch.zeros_like(dentropy)
        hidden, weight, targets, temperature, peak, log_total, entropy = ctx.saved_tensors
        scored = Scored(
            hidden, weight, targets, temperature, peak, log_total, entropy, ctx.num_tokens, ctx.softcap
        )  # fmt: skip
        return *gradients(scored, dlogprob, dentropy, ctx.form, *ctx.needs_input_grad[:2]), *(None,) * 5


def token_logprobs_by(
    form: Form,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    num_tokens: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` in a form of the caller's choice: for benchmarks and tests."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    return _TokenLogprobs.apply(
        hidden, weight, targets.contiguous(), temperature.contiguous(), num_tokens, softcap, form
    )


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    num_tokens: int,
    softcap: float | None = None,
    product: Product = linear,
) -> tuple[Tensor, Tensor]:
    check_head("token_logprobs", hidden, weight, num_tokens, softcap)
    for name, column, dtype in (("targets", targets, torch.int64), ("temperature", temperature, torch.float32)):
        if column.shape != hidden.shape[:1] or column.dtype != dtype or column.device != hidden.device:
            given = f"{column.dtype} {list(column.shape)} on {column.device}"
            wanted = f"{dtype} {list(hidden.shape[:1])} on {hidden.device}, one for each row of hidden"
            raise ValueError(f"token_logprobs: {name} must be {wanted}, but is {given}")
    if not takes("token_logprobs", hidden, weight, product):
        return reference.token_logprobs(hidden, weight, targets, temperature, num_tokens, softcap, product)
    return token_logprobs_by(form_of(weight), hidden, weight, targets, temperature, num_tokens, softcap)
