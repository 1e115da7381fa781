"""Gradients of token log-probs and entropies, by chunks of the vocabulary.

A chunk's logits are computed once more, turned into their gradient, and that is multiplied twice. By chunks of the
vocabulary rather than of rows, since so a chunk's rows of dW are complete after one product: accumulated in fp32,
rounded once, and held nowhere else; what is carried from chunk to chunk is dhidden in fp32, R / V of dW's size. (A form
that never stores dlogits would compute the logits anew for every 256 or so columns of H that a program's registers
hold, or add up by atomics, in no fixed order.)

Axes: R rows, H hidden, V rows of the head, C columns of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.elementary import LN2
from kernels.triton.logits import (
    Form,
    add_mm,
    exponent,
    launch_constants,
    log2_scale,
    mm,
    place,
    softcapped,
    tile_product,
)

CHUNK_BYTES = 1 << 30  # of a chunk's logits, their gradient, its part of dW, and dhidden together
CHUNK_COLUMNS = 4096  # at least, whatever it takes: with fewer, adding up dhidden takes over a sixth of its product
LOGITS_TILE = {"ROWS": 8, "COLUMNS": 512}  # of logits in memory, for a program of 8 warps: a row each


@dataclass(frozen=True)
class Scored:
    """A forward's arguments, and what it found about each row."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [R]
    temperature: Tensor  # [R]
    peak: Tensor  # [R] largest logit
    log_total: Tensor  # [R] log2 of the sum of exp((logit - peak) / temperature)
    entropy: Tensor  # [R]
    num_tokens: int
    softcap: float | None


@triton.jit
def _gradient(
    z, row, column, targets, temperature, peak, log_total, entropy, dlogprob, dentropy, num_tokens, softcap,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of logits, which come before the softcap.

    d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy);  both over the temperature.
    """
    z = softcapped(z, softcap, SOFTCAP)
    scale = log2_scale(temperature, row)
    u = exponent(z, tl.load(peak + row)[:, None], scale[:, None]) - tl.load(log_total + row)[:, None]  # log2 p
    upstream = tl.load(dlogprob + row)[:, None]
    pull = upstream
    if ENTROPY:
        pull += tl.load(dentropy + row)[:, None] * (u * LN2 + tl.load(entropy + row)[:, None])
    target = tl.load(targets + row).to(tl.int32)
    dz = tl.where(column[None, :] == target[:, None], upstream, 0.0) - tl.exp2(u) * pull
    dz *= (scale * LN2)[:, None]
    if SOFTCAP:
        z *= 1 / softcap
        dz *= 1 - z * z
    return tl.where(column[None, :] < num_tokens, dz, 0.0)


@triton.jit(
    do_not_specialize=["first", "units", "rows"],
    do_not_specialize_on_alignment=["targets", "temperature", "dlogprob", "dentropy"],
)
def _dlogits_kernel(
    z,  # [R, C] fp32, before the softcap
    dz,  # [R, C], may be z
    targets,  # [R], as the next six
    temperature,
    peak,
    log_total,
    entropy,
    dlogprob,
    dentropy,
    first,  # column of the vocabulary that the chunk begins with
    units,  # of UNIT columns: C
    num_tokens,
    rows,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seen = (row < rows)[:, None] & (i < units * UNIT)[None, :]
    row = tl.minimum(row, rows - 1)
    at = row[:, None] * (units * UNIT) + i[None, :]
    grad = _gradient(
        tl.load(z + at, mask=seen, other=0.0), row, first + i, targets, temperature, peak, log_total, entropy,
        dlogprob, dentropy, num_tokens, softcap, SOFTCAP, ENTROPY,
    )  # fmt: skip
    tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=seen)


@triton.jit(
    do_not_specialize=["first", "units", "rows"],
    do_not_specialize_on_alignment=["targets", "temperature", "dlogprob", "dentropy"],
)
def _dlogits_fused_kernel(
    hidden,  # [R, H], rows hidden_stride apart
    weight,  # [C, H], the chunk's rows of the head, weight_stride apart
    dz,  # [R, C]
    targets,
    temperature,
    peak,
    log_total,
    entropy,
    dlogprob,
    dentropy,
    first,
    units,
    num_tokens,
    rows,
    hidden_stride,
    weight_stride,
    width,
    ENTROPY: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = units * UNIT
    tile, piece = place(rows, tl.cdiv(columns, BLOCK_N), BLOCK_M)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = (row < rows)[:, None] & (i < columns)[None, :]
    row = tl.minimum(row, rows - 1)
    z = tile_product(
        hidden, weight, row, tl.minimum(i, columns - 1), hidden_stride, weight_stride, width, BLOCK_K, EVEN
    )
    grad = _gradient(
        z, row, first + i, targets, temperature, peak, log_total, entropy, dlogprob, dentropy, num_tokens, 0.0,
        False, ENTROPY,
    )  # fmt: skip
    tl.store(dz + row.to(tl.int64)[:, None] * columns + i[None, :], grad.to(dz.dtype.element_ty), mask=seen)


def column_chunks(rows: int, weight: Tensor, logit_bytes: int) -> list[slice]:
    """The vocabulary in chunks, as wide as ``CHUNK_BYTES`` allows when a logit of the chunk takes ``logit_bytes``."""
    vocabulary, width = weight.shape
    columns = (CHUNK_BYTES - 4 * rows * width) // (logit_bytes * rows + 4 * width)
    columns = max(columns // 256 * 256, CHUNK_COLUMNS)
    return [slice(i, min(i + columns, vocabulary)) for i in range(0, vocabulary, columns)]


def row_unit(weight: Tensor) -> int:
    """Columns that a chunk's width is counted in: it tells the compiler how rows of logits are aligned, without
    compiling anew for another width."""
    return 16 if len(weight) % 16 == 0 else 1


def _dlogits(scored: Scored, dlogprob: Tensor, dentropy: Tensor | None, columns: slice, form: Form) -> Tensor:
    """Gradient [R, C] of a chunk of logits, in the head's dtype; fp16 wants a scaled loss here as elsewhere."""
    hidden, weight, softcap = scored.hidden, scored.weight[columns], scored.softcap
    rows, width = len(hidden), len(weight)
    unit = row_unit(scored.weight)
    arguments = (
        scored.targets, scored.temperature, scored.peak, scored.log_total, scored.entropy, dlogprob,
        dlogprob if dentropy is None else dentropy, columns.start, width // unit, scored.num_tokens, rows,
    )  # fmt: skip
    if form.fused_backward and softcap is None:
        dz = torch.empty((rows, width), dtype=weight.dtype, device=hidden.device)
        _dlogits_fused_kernel[(triton.cdiv(rows, form.rows) * triton.cdiv(width, form.columns),)](
            hidden, weight, dz, *arguments, hidden.stride(0), weight.stride(0), hidden.shape[1],
            ENTROPY=dentropy is not None, UNIT=unit, **launch_constants(form, hidden.shape[1]),
        )  # fmt: skip
        return dz
    z = mm(hidden, weight.T)
    dz = z if z.dtype == weight.dtype else torch.empty_like(z, dtype=weight.dtype)
    grid = (triton.cdiv(rows, LOGITS_TILE["ROWS"]), triton.cdiv(width, LOGITS_TILE["COLUMNS"]))
    _dlogits_kernel[grid](
        z, dz, *arguments, softcap or 0.0, SOFTCAP=softcap is not None, ENTROPY=dentropy is not None, UNIT=unit,
        **LOGITS_TILE, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return dz


def gradients(
    scored: Scored,
    dlogprob: Tensor,
    dentropy: Tensor | None,
    form: Form,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dhidden [R, H] and dweight [V, H], None where not wanted, for upstream gradients fp32 [R]; without ``dentropy``
    nothing is computed for the entropy."""
    hidden, weight = scored.hidden, scored.weight
    if not len(hidden):
        return torch.zeros_like(hidden), torch.zeros_like(weight)
    dhidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
    dweight = torch.empty_like(weight) if wants_weight else None
    in_place = (form.fused_backward and scored.softcap is None) or weight.dtype == torch.float32
    for columns in column_chunks(len(hidden), weight, weight.element_size() + (0 if in_place else 4)):
        dz = _dlogits(scored, dlogprob, dentropy, columns, form)
        if dhidden is not None:
            add_mm(dhidden, dz, weight[columns])
        if dweight is not None:
            dweight[columns] = mm(dz.T, hidden)
        del dz  # before the next chunk's is made
    return None if dhidden is None else dhidden.to(hidden.dtype), dweight
