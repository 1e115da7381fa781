"""Gradients of packed attention: a kernel for dQ, one for dK and dV, both making the weights again (Dao 2023).

No two programs add to the same number, so every run gives the same bits: dQ belongs to the program that has the
queries, dK and dV to the one that has the keys, which goes through the queries of all heads of its group. That costs
seven products where one pass with atomics has five. Axes: see ``ragged.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.attention import AttentionKind, AttentionPlan
from kernels.triton.ragged import (
    LOG2E,
    Tile,
    find_tile,
    key_ranges,
    launch,
    load_rows,
    query_ranges,
    sees,
    store_rows,
    tanh,
    whole_heads,
)


@triton.jit
def _weights(
    s, lse, key, position, scale, softcap, window,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The softmax's weights, from raw scores and log2-sum-exp2; and what the soft cap multiplies gradients by."""
    slope = 1.0
    if CAPPED:
        capped = tanh(s * (scale / softcap))
        slope = 1 - capped * capped
        s = capped * (softcap * LOG2E)
    else:
        s *= scale * LOG2E
    if MASKED:
        s = tl.where(sees(position, key, window, WINDOWED), s, float("-inf"))
    return tl.exp2(s - lse), slope


@triton.jit
def _load_lse(lse, seen, stride):
    """[M] in base 2; 0 past the end, and for a row that sees nothing, whose scores are all -inf."""
    i = tl.arange(0, seen.shape[0])
    natural = tl.load(lse + i * stride, mask=seen, other=0.0)
    return tl.where(natural == float("-inf"), 0.0, natural) * LOG2E


@triton.jit
def _query_gradient(
    dq, q, dout, lse, delta, k, v, k_stride, v_stride, position, begin, end, num_keys, scale, softcap, window,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add to dq [M, D] what comes through the keys begin .. end."""
    i = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        at = tl.to_tensor(start).to(tl.int64)
        keys = load_rows(k + at * k_stride, i, k_stride, num_keys - start, MASKED, DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        key = start + i[None, :]
        p, slope = _weights(
            s, lse[:, None], key, position[:, None], scale, softcap, window, MASKED, CAPPED, WINDOWED
        )  # fmt: skip
        values = load_rows(v + at * v_stride, i, v_stride, num_keys - start, MASKED, DIM, BLOCK_D)
        dp = tl.dot(dout, tl.trans(values), input_precision="ieee")
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def _packed_attention_dq_kernel(
    q, k, v, out, dout, lse,  # as in the forward; dout [T, Hq, D]
    delta,  # [T, Hq] fp32 sum of out * dout, written here for dK and dV
    dq,  # [T, Hq, D]
    tiles, query_bounds, context_bounds, q_stride, k_stride, v_stride, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first, query, key, num_queries, num_keys = find_tile(program, tiles, query_bounds, context_bounds)
    i, row, rows, width = tl.arange(0, BLOCK_M), query + first, num_queries - first, HEADS * DIM
    place = row * width + head * DIM
    do_tile = load_rows(dout + place, i, width, rows, True, DIM, BLOCK_D)
    o_tile = load_rows(out + place, i, width, rows, True, DIM, BLOCK_D)
    delta_tile = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + row * HEADS + head + i * HEADS, delta_tile, mask=i < rows)
    lse_tile = _load_lse(lse + row * HEADS + head, i < rows, HEADS)
    q_tile = load_rows(q + row * q_stride + head * DIM, i, q_stride, rows, True, DIM, BLOCK_D)
    k += key * k_stride + head // GROUP * DIM
    v += key * v_stride + head // GROUP * DIM
    position = num_keys - num_queries + first + i
    ranges = key_ranges(num_keys - num_queries + first, num_keys, window, WINDOWED, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(3):
        if WINDOWED or part > 0:
            acc = _query_gradient(
                acc, q_tile, do_tile, lse_tile, delta_tile, k, v, k_stride, v_stride, position,
                ranges[part], ranges[part + 1], num_keys, scale, softcap, window,
                part != 1, CAPPED, WINDOWED, DIM, BLOCK_D, BLOCK_N,
            )  # fmt: skip
    store_rows(dq + place, acc * scale, i, width, rows, DIM, BLOCK_D)


@triton.jit
def _key_gradients(
    dk, dv, k, v, q, dout, lse, delta, q_stride, place, begin, end, num_queries, scale, softcap, window,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv [N, D] what comes from the queries begin .. end of one head. Scores lie keys by queries."""
    i = tl.arange(0, BLOCK_M)
    key = place + tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_M):
        at, rows = tl.to_tensor(start).to(tl.int64), num_queries - start
        q_tile = load_rows(q + at * q_stride, i, q_stride, rows, True, DIM, BLOCK_D)
        lse_tile = _load_lse(lse + at * HEADS, i < rows, HEADS)
        s = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        p, slope = _weights(
            s, lse_tile[None, :], key[:, None], (start + i)[None, :], scale, softcap, window,
            MASKED, CAPPED, WINDOWED,
        )  # fmt: skip
        do_tile = load_rows(dout + at * (HEADS * DIM), i, HEADS * DIM, rows, True, DIM, BLOCK_D)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        delta_tile = tl.load(delta + at * HEADS + i * HEADS, mask=i < rows, other=0.0)
        dp = tl.dot(v, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - delta_tile[None, :]) * slope
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _packed_attention_dkv_kernel(
    q, k, v, dout, lse, delta,  # as above
    dk, dv,  # [K, Hkv, D]
    tiles,  # [programs / Hkv, 2] int32 sequence and first key in it
    query_bounds, context_bounds, q_stride, k_stride, v_stride, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    KV_HEADS: tl.constexpr = HEADS // GROUP
    kv_head = tl.program_id(0) % KV_HEADS
    first, query, key, num_queries, num_keys = find_tile(
        tl.program_id(0) // KV_HEADS, tiles, query_bounds, context_bounds
    )
    i, row, rows = tl.arange(0, BLOCK_N), key + first, num_keys - first
    k_tile = load_rows(k + row * k_stride + kv_head * DIM, i, k_stride, rows, True, DIM, BLOCK_D)
    v_tile = load_rows(v + row * v_stride + kv_head * DIM, i, v_stride, rows, True, DIM, BLOCK_D)
    place = first - (num_keys - num_queries)  # of the first key, among the queries
    ranges = query_ranges(place, num_queries, window, WINDOWED, BLOCK_M, BLOCK_N)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        for part in tl.static_range(3):
            if WINDOWED or part < 2:
                dk_acc, dv_acc = _key_gradients(
                    dk_acc, dv_acc, k_tile, v_tile, q + query * q_stride + head * DIM,
                    dout + query * (HEADS * DIM) + head * DIM, lse + query * HEADS + head, delta + query * HEADS + head,
                    q_stride, place, ranges[part], ranges[part + 1], num_queries, scale, softcap, window,
                    part != 1, CAPPED, WINDOWED, HEADS, DIM, BLOCK_D, BLOCK_M, BLOCK_N,
                )  # fmt: skip
    width = KV_HEADS * DIM
    store_rows(dk + row * width + kv_head * DIM, dk_acc * scale, i, width, rows, DIM, BLOCK_D)
    store_rows(dv + row * width + kv_head * DIM, dv_acc, i, width, rows, DIM, BLOCK_D)


def _query_tile(dtype: torch.dtype, dim: int) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    return Tile(128, 64, 8, 2) if dim <= 128 else Tile(64, 64, 8, 2)


def _key_tile(dtype: torch.dtype, dim: int) -> Tile:
    if dtype == torch.float32:
        return Tile(32, 32, 4, 2)
    if dim <= 64:
        return Tile(64, 128, 8, 2)
    return Tile(32, 128, 8, 2) if dim <= 128 else Tile(32, 64, 8, 2)


def packed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    kind: AttentionKind,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv for the gradient dout [T, Hq, D] of ``out``; the rest as the forward had and made it."""
    q, k, v, dout = whole_heads(q), whole_heads(k), whole_heads(v), dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    given = (q, k, v, out, dout, lse)
    dtype, dim = q.dtype, q.shape[2]
    launch(_packed_attention_dq_kernel, (*given, delta, dq), q, k, v, plan, kind, _query_tile(dtype, dim))
    launch(
        _packed_attention_dkv_kernel, (q, k, v, dout, lse, delta, dk, dv), q, k, v, plan, kind, _key_tile(dtype, dim),
        by_keys=True,
    )  # fmt: skip
    return dq, dk, dv
