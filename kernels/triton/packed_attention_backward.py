"""Gradients of packed attention: a kernel for dQ, one for dK and dV, both making the weights again (Dao 2023).

No two programs add to the same number, so every run gives the same bits: dQ belongs to the program that has the
queries, dK and dV to the one that has the keys, which goes through the queries of all heads of its group. That costs
seven products where one pass with atomics has five (eight with head dims above 128). Axes: see ``ragged.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.attention import AttentionKind, AttentionPlan
from kernels.triton.elementary import LOG2E, tanh
from kernels.triton.ragged import (
    Tile,
    find_tile,
    fp32_tile,
    keys_seen,
    launch,
    load_rows,
    partly_hidden,
    queries_seeing,
    sees,
    store_rows,
    whole_heads,
)
from kernels.triton.tables import cached, chosen
from kernels.triton.tiles import head_block


@triton.jit
def _weights(
    s, lse, key, position, masked, scale, softcap, window, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The weights, from raw scores and their log-sum-exp in base 2; and what the soft cap multiplies gradients by."""
    slope = 1.0
    if CAPPED:
        capped = tanh(s * (scale / softcap))
        slope = 1 - capped * capped
        s = capped * (softcap * LOG2E)
    else:
        s *= scale * LOG2E
    p = tl.exp2(s - lse)
    if masked:
        # Not by a score of -inf: a row that sees nothing has a sum of -inf, and -inf - -inf is NaN.
        p = tl.where(sees(position, key, window, WINDOWED), p, 0.0)
    return p, slope


@triton.jit(do_not_specialize=["window"])
def _packed_attention_dq_kernel(
    q, k, v, out, dout, lse,  # as in the forward; dout [T, Hq, D]
    delta,  # [T, Hq] fp32 sum of out * dout, written here for dK and dV
    dq,  # [T, Hq, D]
    tiles, query_bounds, context_bounds, scale, softcap, window,
    q_stride: tl.constexpr, k_stride: tl.constexpr, v_stride: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first, query, key, num_queries, num_keys = find_tile(tiles, query_bounds, context_bounds)
    m, n, width = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), HEADS * DIM
    row, rows = query + first, num_queries - first
    own = row * width + head * DIM
    do_tile = load_rows(dout + own, m, width, rows, DIM, BLOCK_D)
    o_tile = load_rows(out + own, m, width, rows, DIM, BLOCK_D)
    delta_tile = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + row * HEADS + head + m * HEADS, delta_tile, mask=m < rows)
    lse_tile = tl.load(lse + row * HEADS + head + m * HEADS, mask=m < rows, other=0.0)
    q_tile = load_rows(q + row * q_stride + head * DIM, m, q_stride, rows, DIM, BLOCK_D)
    k += key * k_stride + head // GROUP * DIM
    v += key * v_stride + head // GROUP * DIM
    place = num_keys - num_queries + first  # of the first query, in the context
    position = place + m
    begin, end = keys_seen(place, num_keys, window, WINDOWED, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = tl.cast(start, tl.int64)
        keys = load_rows(k + at * k_stride, n, k_stride, num_keys - start, DIM, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(keys), input_precision="ieee")
        masked = partly_hidden(place, start, window, WINDOWED, BLOCK_M, BLOCK_N)
        p, slope = _weights(
            s, lse_tile[:, None], (start + n)[None, :], position[:, None], masked,
            scale, softcap, window, CAPPED, WINDOWED,
        )  # fmt: skip
        values = load_rows(v + at * v_stride, n, v_stride, num_keys - start, DIM, BLOCK_D)
        dp = tl.dot(do_tile, tl.trans(values), input_precision="ieee")
        ds = p * (dp - delta_tile[:, None]) * slope
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")
    store_rows(dq + own, acc * scale, m, width, rows, DIM, BLOCK_D)


@triton.jit(do_not_specialize=["window"])
def _packed_attention_dkv_kernel(
    q, k, v, dout, lse, delta,  # as above
    dk, dv,  # [K, Hkv, D], with DK and DV
    tiles,  # [n, 2] int32 sequence and first key in it; a program for each and for each KV head
    query_bounds, context_bounds, scale, softcap, window,
    q_stride: tl.constexpr, k_stride: tl.constexpr, v_stride: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    first, query, key, num_queries, num_keys = find_tile(tiles, query_bounds, context_bounds)
    m, n, row, rows = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), key + first, num_keys - first
    k_tile = load_rows(k + row * k_stride + kv_head * DIM, n, k_stride, rows, DIM, BLOCK_D)
    v_tile = load_rows(v + row * v_stride + kv_head * DIM, n, v_stride, rows, DIM, BLOCK_D)
    place = first - (num_keys - num_queries)  # of the first key, among the queries
    begin, end = queries_seeing(place, num_queries, window, WINDOWED, BLOCK_M, BLOCK_N)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # One loop over the heads of the group and their queries: two, one in the other, need more registers.
    head, start = kv_head * GROUP, begin
    for _ in range(GROUP * tl.cdiv(end - begin, BLOCK_M)):
        at, left = query + start, num_queries - start
        q_tile = load_rows(q + at * q_stride + head * DIM, m, q_stride, left, DIM, BLOCK_D)
        lse_tile = tl.load(lse + at * HEADS + head + m * HEADS, mask=m < left, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # keys by queries
        masked = partly_hidden(start, place, window, WINDOWED, BLOCK_M, BLOCK_N)
        p, slope = _weights(
            s, lse_tile[None, :], (place + n)[:, None], (start + m)[None, :], masked,
            scale, softcap, window, CAPPED, WINDOWED,
        )  # fmt: skip
        do_tile = load_rows(dout + at * (HEADS * DIM) + head * DIM, m, HEADS * DIM, left, DIM, BLOCK_D)
        if DV:
            dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile, input_precision="ieee")
        if DK:
            delta_tile = tl.load(delta + at * HEADS + head + m * HEADS, mask=m < left, other=0.0)
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
            ds = p * (dp - delta_tile[None, :]) * slope
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")
        start += BLOCK_M
        head += (start >= end).to(tl.int32)
        start = tl.where(start >= end, begin, start)
    # Found again: kept through the loop, all this takes registers that ptxas then spills.
    first, query, key, num_queries, num_keys = find_tile(tiles, query_bounds, context_bounds)
    row, rows, width = key + first + n, key + num_keys, HEADS // GROUP * DIM
    if DK:
        store_rows(dk + kv_head * DIM, dk_tile * scale, row, width, rows, DIM, BLOCK_D)
    if DV:
        store_rows(dv + kv_head * DIM, dv_tile, row, width, rows, DIM, BLOCK_D)


@cached
def _query_tile(dtype: torch.dtype, dim: int, device: torch.device) -> Tile:
    """Of dQ: as tall as the forward's; three products in place of two leave fewer stages."""
    if dtype == torch.float32:
        return fp32_tile(dim)
    tile = Tile(128, 64, 8, 2) if dim <= 128 else Tile(128, 32, 8, 2)
    return chosen(device, tile, "packed_dq", dtype, head_block(dim))


@cached
def _key_tile(dtype: torch.dtype, dim: int, device: torch.device) -> Tile:
    """Of dK and dV, two accumulators as wide as a head: the most that compiles without spilling."""
    if dtype == torch.float32:
        return fp32_tile(dim)
    tile = Tile(64 if dim <= 64 else 32, 128 if dim <= 128 else 64, 8, 2)
    return chosen(device, tile, "packed_dkv", dtype, head_block(dim))


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
    """dq, dk and dv for the gradient dout [T, Hq, D] of ``out``; lse [T, Hq] in base 2; the rest as the forward had."""
    q, k, v, dout = whole_heads(q), whole_heads(k), whole_heads(v), dout.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    dtype, dim = q.dtype, q.shape[2]
    given, tile = (q, k, v, out, dout, lse), _query_tile(dtype, dim, q.device)
    launch(_packed_attention_dq_kernel, (*given, delta, dq), q, k, v, plan, kind, tile)
    given, tile = (q, k, v, dout, lse, delta), _key_tile(dtype, dim, q.device)
    # Above 128 there are not enough registers for both.
    for with_dk, with_dv in [(True, True)] if dim <= 128 else [(True, False), (False, True)]:
        launch(
            _packed_attention_dkv_kernel, (*given, dk, dv), q, k, v, plan, kind, tile,
            by_keys=True, DK=with_dk, DV=with_dv,
        )  # fmt: skip
    return dq, dk, dv
