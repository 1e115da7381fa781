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


@triton.jit
def load_rows(rows, i, stride: tl.constexpr, num_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows i of a head, [I, BLOCK_D]: zeros past num_rows and DIM."""
    d = tl.arange(0, BLOCK_D)
    seen = i[:, None] < num_rows
    if DIM < BLOCK_D:
        seen = seen & (d[None, :] < DIM)
    return tl.load(rows + i[:, None] * stride + d[None, :], mask=seen, other=0.0)


@triton.jit
def store_rows(rows, x, i, stride: tl.constexpr, num_rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    seen = (i[:, None] < num_rows) & (d[None, :] < DIM)
    tl.store(rows + i[:, None] * stride + d[None, :], x.to(rows.dtype.element_ty), mask=seen)


@triton.jit
def sees(position, key, window, WINDOWED: tl.constexpr):
    """Whether a query sees a key, both counted from the same token."""
    seen = key <= position
    if WINDOWED:
        seen = seen & (key > position - window)
    return seen


@triton.jit
def partly_hidden(position, key, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether some query of a block that begins at ``position`` doesn't see some key of one that begins at ``key``."""
    hidden = key + BLOCK_N - 1 > position
    if WINDOWED:
        hidden = hidden | (key <= position + BLOCK_M - 1 - window)
    return hidden


@triton.jit
def keys_seen(position, num_keys, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The keys that queries from ``position`` on see: begin, a whole number of blocks, and end."""
    begin = 0
    if WINDOWED:
        begin = tl.maximum(position + 1 - window, 0) // BLOCK_N * BLOCK_N
    return begin, tl.minimum(position + BLOCK_M, num_keys)


@triton.jit
def queries_seeing(key, num_queries, window, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The queries that see keys from ``key`` on, which counts from the first query: begin, whole blocks, and end."""
    end = num_queries
    if WINDOWED:
        end = tl.minimum(end, key + BLOCK_N - 1 + window)
    return tl.maximum(key, 0) // BLOCK_M * BLOCK_M, end


@triton.jit
def find_tile(tiles, query_bounds, context_bounds):
    """Of a program: its first row, the sequence's first query, first key, queries and keys. Read anew at every call."""
    tile = tiles + 2 * tl.program_id(0)
    seq, first = tl.load(tile, volatile=True), tl.load(tile + 1, volatile=True)
    query, key = tl.load(query_bounds + seq, volatile=True), tl.load(context_bounds + seq, volatile=True)
    num_queries = tl.load(query_bounds + seq + 1, volatile=True) - query
    num_keys = tl.load(context_bounds + seq + 1, volatile=True) - key
    return first, query.to(tl.int64), key.to(tl.int64), num_queries, num_keys


class Tile(NamedTuple):
    """How many queries and keys a step of a program has, and what it gets for them."""

    queries: int
    keys: int
    warps: int
    stages: int


def fp32_tile(dim: int) -> Tile:
    """Without tensor cores a step costs so much that small ones do; wide heads spill in anything larger."""
    return Tile(32, 32, 8, 2) if dim <= 128 else Tile(16, 16, 4, 2)


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
    **constants: Any,
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
        kernel[(len(tiles), per_tile)](
            *tensors, tiles, plan.query_spans.bounds, plan.context_spans.bounds,
            float(score_scale(kind, dim)), float(kind.softcap or 0), min(kind.window or 0, MAX_WINDOW),
            q_stride=_stride(q), k_stride=_stride(k), v_stride=_stride(v), HEADS=heads, GROUP=heads // kv_heads,
            CAPPED=kind.softcap is not None, WINDOWED=kind.window is not None,
            DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK_M=tile.queries, BLOCK_N=tile.keys,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True, **constants,
        )  # fmt: skip
