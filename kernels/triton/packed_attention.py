"""Causal attention within packed sequences (FlashAttention-2, Dao 2023).

A program has a tile of queries of one sequence and head, and goes through the keys that they see. Key blocks count from
the start of the context and are taken in that order, so a query's bits do not depend on which other queries there are.
Scores are multiplied by log2(e) and go through exp2, as a GPU has an instruction for that one. A block that all rows of
a tile see whole is not masked. ``packed_attention_backward.py`` has the gradients. Axes: see ``ragged.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.dispatch import warn_once
from kernels.reference.attention import CAUSAL, AttentionKind, AttentionPlan, score_scale
from kernels.triton import paged_attention
from kernels.triton.elementary import LOG2E, tanh
from kernels.triton.packed_attention_backward import packed_attention_backward
from kernels.triton.ragged import (
    Tile,
    find_tile,
    fp32_tile,
    keys_seen,
    launch,
    load_rows,
    partly_hidden,
    sees,
    store_rows,
    whole_heads,
)
from kernels.triton.tables import cached, chosen
from kernels.triton.tiles import head_block

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["window"])
def _packed_attention_kernel(
    q,  # [T, Hq, D], tokens q_stride apart
    k,  # [K, Hkv, D], tokens k_stride apart
    v,  # [K, Hkv, D], tokens v_stride apart
    out,  # [T, Hq, D]
    lse,  # [T, Hq] fp32
    tiles,  # [n, 2] int32 sequence and first query in it; a program for each and for each head
    query_bounds,  # [S + 1] int32
    context_bounds,  # [S + 1] int32
    scale, softcap, window,
    q_stride: tl.constexpr, k_stride: tl.constexpr, v_stride: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first, query, key, num_queries, num_keys = find_tile(tiles, query_bounds, context_bounds)
    m, n, row, rows = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), query + first, num_queries - first
    q_tile = load_rows(q + row * q_stride + head * DIM, m, q_stride, rows, DIM, BLOCK_D)
    k += key * k_stride + head // GROUP * DIM
    v += key * v_stride + head // GROUP * DIM
    place = num_keys - num_queries + first  # of the first query, in the context
    begin, end = keys_seen(place, num_keys, window, WINDOWED, BLOCK_M, BLOCK_N)
    position = place + m
    if CAPPED:
        log2_scale = LOG2E
    else:
        log2_scale = scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = tl.cast(start, tl.int64)
        keys = load_rows(k + at * k_stride, n, k_stride, num_keys - start, DIM, BLOCK_D)
        s = tl.dot(q_tile, tl.trans(keys), input_precision="ieee")
        if CAPPED:
            s = softcap * tanh(s * (scale / softcap))
        if partly_hidden(place, start, window, WINDOWED, BLOCK_M, BLOCK_N):
            s = tl.where(sees(position[:, None], (start + n)[None, :], window, WINDOWED), s, float("-inf"))
        highest = tl.maximum(peak, tl.max(s, 1))
        # A row that has seen no key yet has -inf, and -inf - -inf is NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest) * log2_scale
        p = tl.exp2(s * log2_scale - base[:, None])
        kept = tl.exp2(peak * log2_scale - base)
        values = load_rows(v + at * v_stride, n, v_stride, num_keys - start, DIM, BLOCK_D)
        mass = mass * kept + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * kept[:, None], input_precision="ieee")
        peak = highest
    mass = tl.where(mass == 0, 1.0, mass)
    width = HEADS * DIM
    store_rows(out + row * width + head * DIM, acc / mass[:, None], m, width, rows, DIM, BLOCK_D)
    tl.store(lse + (row + m) * HEADS + head, peak * log2_scale + tl.log2(mass), mask=m < rows)


@cached
def _tile(dtype: torch.dtype, dim: int, device: torch.device) -> Tile:
    """Two stages of 64 keys of the widest heads fill the shared memory; eight warps, since four spill."""
    if dtype == torch.float32:
        return fp32_tile(dim)
    return chosen(device, Tile(128, 64, 8, 3 if dim <= 128 else 2), "packed_forward", dtype, head_block(dim))


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, kind: AttentionKind) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp in base 2, [T, Hq] fp32."""
    _check(q, k, v, plan, kind)
    q, k, v = whole_heads(q), whole_heads(k), whole_heads(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    launch(_packed_attention_kernel, (q, k, v, out, lse), q, k, v, plan, kind, _tile(q.dtype, q.shape[2], q.device))
    return out, lse


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        num_blocks: int,
        plan: AttentionPlan,
        kind: AttentionKind,
    ) -> Tensor:
        if plan.exact:  # the engine's own kernel, and so its bits
            out, natural = paged_attention.attend_packed(q, k, v, slots, num_blocks, plan, kind)
            lse = natural[..., 0] / math.log(2)
        else:
            out, lse = _forward(q, k, v, plan, kind)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.kind = plan, kind
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        found = packed_attention_backward(grads[0], q, k, v, out, lse, ctx.plan, ctx.kind)
        return *found, None, None, None, None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    num_blocks: int,
    plan: AttentionPlan,
    kind: AttentionKind = CAUSAL,
) -> Tensor:
    """Sequences are read where they lie; ``slots`` and ``num_blocks`` serve an exact plan."""
    reason = _unsupported(q, kind)
    if reason is not None:
        warn_once(f"packed_attention runs in plain torch, many times slower: {reason}")
        return reference.packed_attention(q, k, v, slots, num_blocks, plan, kind)
    return _PackedAttention.apply(q, k, v, slots, num_blocks, plan, kind)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, kind: AttentionKind = CAUSAL
) -> tuple[Tensor, Tensor]:
    """:func:`packed_attention` without autograd, and the log-sum-exp [T, Hq] fp32 of the scores as ``kind`` makes them.

    Raises ValueError for what the kernel doesn't take.
    """
    reason = _unsupported(q, kind)
    if reason is not None:
        raise ValueError(f"attend_packed: {reason}")
    out, lse = _forward(q, k, v, plan, kind)
    return out, lse * math.log(2)


def _unsupported(q: Tensor, kind: AttentionKind) -> str | None:
    """Why the kernel doesn't take this; None: it does."""
    if q.dtype not in DTYPES:
        return f"the kernel takes {', '.join(map(str, DTYPES))}, not {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the kernel's head dims go to {MAX_HEAD_DIM}, not {q.shape[-1]}"
    if score_scale(kind, q.shape[-1]) <= 0:
        return f"the kernel wants a scale above 0, not {kind.scale}"
    return None


def _check(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, kind: AttentionKind) -> None:
    """Raises ValueError where the arguments don't belong together."""
    shapes = f"q {[*q.shape]}, k {[*k.shape]}, v {[*v.shape]}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"packed_attention: {shapes}; must be [T, Hq, D] and twice [K, Hkv, D]")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"packed_attention: {shapes}; the heads of q must be a multiple of those of k and v")
    wanted = (plan.query_spans.total, plan.context_spans.total)
    if (len(q), len(k)) != wanted:
        raise ValueError(f"packed_attention: {shapes}; the plan has {wanted[0]} queries and {wanted[1]} keys")
    for name, x in (("k", k), ("v", v)):
        if (x.dtype, x.device) != (q.dtype, q.device):
            raise ValueError(f"packed_attention: {name} is {x.dtype} on {x.device}; must be {q.dtype} on {q.device}")
    if plan.query_spans.bounds.device != q.device:
        raise ValueError(f"packed_attention: the plan is on {plan.device}, the tensors on {q.device}; plan it there")
    if kind.window is not None and kind.window < 1:
        raise ValueError(f"packed_attention: window={kind.window}; must be at least 1: a query sees itself")
