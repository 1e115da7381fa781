"""Tiles of packed sequences: which program has which, what it loads, and what its rows may see.

Axes: T query tokens, K tokens of the contexts, Hq query heads, Hkv KV heads, D head dim, S sequences, M and N queries
and keys of a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.attention import AttentionKind, AttentionPlan, score_scale

MAX_WINDOW = 1 << 30  # more than any sequence has; sums with it stay in int32
MAX_STRIDE = 1 << 24  # elements between tokens: offsets within a tile, of at most 128 rows, are int32

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(rows, i, stride, num_rows, CHECKED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i of a head, [I, BLOCK_D]: zeros past DIM and, where CHECKED, past num_rows."""
    d = tl.arange(0, BLOCK_D)
    at = rows + i[:, None] * stride + d[None, :]
    if CHECKED:
        seen = i[:, None] < num_rows
        if DIM < BLOCK_D:
            seen = seen & (d[None, :] < DIM)
        return tl.load(at, mask=seen, other=0.0)
    elif DIM < BLOCK_D:
        return tl.load(at, mask=d[None, :] < DIM, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(rows, x, i, stride, num_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    seen = (i[:, None] < num_rows) & (d[None, :] < DIM)
    tl.store(rows + i[:, None] * stride + d[None, :], x.to(rows.dtype.element_ty), mask=seen)


@triton.jit
def tanh(x):
    # The quotient cancels near 0; there the series is exact to fp32.
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315))))
    return tl.where(tl.abs(x) < 0.2, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def sees(position, key, window, WINDOWED: tl.constexpr):
    """Whether a query sees a key, both counted from the start of the context."""
    sees = key <= position
    if WINDOWED:
        sees = sees & (key > position - window)
    return sees


@triton.jit
def find_tile(program, tiles, query_bounds, context_bounds):
    """Of a program: its first row, the sequence's first query, first key, queries and keys."""
    seq = tl.load(tiles + 2 * program)
    first = tl.load(tiles + 2 * program + 1)
    query, key = tl.load(query_bounds + seq), tl.load(context_bounds + seq)
    num_queries, num_keys = tl.load(query_bounds + seq + 1) - query, tl.load(context_bounds + seq + 1) - key
    return first, query.to(tl.int64), key.to(tl.int64), num_queries, num_keys


@triton.jit
def key_ranges(first, num_keys, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys of a tile of queries, the first of them at position ``first``: begin, full_begin, full_end, end.

    It sees none outside begin .. end; all its rows see full_begin .. full_end. All but end are whole blocks.
    """
    end = tl.minimum(first + BLOCK_M, num_keys)
    full_end = (first + 1) // BLOCK_N * BLOCK_N
    begin = 0
    full_begin = 0
    if WINDOWED:
        begin = tl.maximum(first + 1 - window, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        full_begin = tl.minimum(full_begin, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def query_ranges(first, num_queries, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Queries of a tile of keys, the first of them at the place of query ``first``, which may be negative.

    As :func:`key_ranges`; full_end is whole blocks, or the end.
    """
    begin = tl.maximum(first, 0) // BLOCK_M * BLOCK_M
    full_begin = tl.cdiv(tl.maximum(first + BLOCK_N - 1, 0), BLOCK_M) * BLOCK_M
    end = num_queries
    if WINDOWED:
        end = tl.minimum(end, first + BLOCK_N - 1 + window)
    end = tl.maximum(end, begin)
    full_begin = tl.minimum(full_begin, end)
    full_end = end
    if WINDOWED:
        full_end = tl.minimum(tl.maximum(first + window, 0) // BLOCK_M * BLOCK_M, end)
        full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


class Tile(NamedTuple):
    """How many queries and keys a step of a program has, and what it gets for them."""

    queries: int
    keys: int
    warps: int
    stages: int


def whole_heads(x: Tensor) -> Tensor:
    """x [T, H, D] as kernels read it: heads without gaps, tokens any reasonable distance apart."""
    _, heads, dim = x.shape
    packed = x.stride(2) == 1 and (heads == 1 or x.stride(1) == dim) and x.stride(0) <= MAX_STRIDE
    return x if packed else x.contiguous()


def _stride(x: Tensor) -> int:
    """Between tokens. That of a single token is whatever; a constant spares a compilation."""
    return x.shape[1] * x.shape[2] if x.is_contiguous() else x.stride(0)


def launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    kind: AttentionKind,
    tile: Tile,
    *,
    by_keys: bool = False,
) -> None:
    """Run ``kernel`` on ``tensors`` and on what all kernels get, a program for each tile and head of the queries.

    ``by_keys``: for each tile and head of the keys.
    """
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    # Under causality a sequence's last queries have most to do, and its first keys.
    if by_keys:
        tiles, per_tile = plan.context_spans.tiles(tile.keys, "first"), kv_heads
    else:
        tiles, per_tile = plan.query_spans.tiles(tile.queries, "last"), heads
    if len(tiles) and per_tile:
        kernel[(len(tiles) * per_tile,)](
            *tensors, tiles, plan.query_spans.bounds, plan.context_spans.bounds, _stride(q), _stride(k), _stride(v),
            float(score_scale(kind, dim)), float(kind.softcap or 0), min(kind.window or 0, MAX_WINDOW),
            HEADS=heads, GROUP=heads // kv_heads, CAPPED=kind.softcap is not None, WINDOWED=kind.window is not None,
            DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=tile.queries, BLOCK_N=tile.keys,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
