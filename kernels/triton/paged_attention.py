"""Causal attention over KV pages: decode, pieces of prompts, rows that share a prefix. Forward only.

A program takes one item of the work list (``attention_work``) and one KV head: its tile's rows are the G query heads
of the item's tokens. Keys come by the block table, a step of them at a time; softmax online, in fp32, in base 2.
Where a token has several items, their outputs are merged by a second kernel, in order.

Axes: T tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dim, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.dispatch import warn_once
from kernels.reference import KV_BLOCK, AttentionKind, AttentionPlan
from kernels.reference.attention import CAUSAL, score_scale
from kernels.reference.kv_store import Scales
from kernels.triton import tiles
from kernels.triton.attention_work import Work, WorkLists, divide, table_block
from kernels.triton.elementary import LN2, LOG2E, tanh
from kernels.triton.kv_store import check_cache, heads_together, store_kv


@triton.jit
def _rows_of(cache, offset, seen, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_N, BLOCK_D] keys or values; nothing is read where ``seen`` is false: such slots may hold anything."""
    d = tl.arange(0, BLOCK_D)
    place = cache + offset[:, None] + d[None, :]
    if MASKED:
        return tl.load(place, mask=seen[:, None] & (d < D)[None, :], other=0.0)
    if D != BLOCK_D:
        return tl.load(place, mask=(d < D)[None, :], other=0.0)
    return tl.load(place)


@triton.jit
def _as(x, dtype: tl.constexpr):
    """Keys or values of a narrow type as numbers for the product: exact. Straight from fp8 to bf16 is slow on sm_90."""
    if x.dtype == tl.float8e4nv:
        x = x.to(tl.float16).to(tl.float32)
    return x.to(dtype)


@triton.jit
def _attend(
    acc, peak, mass,  # [M, BLOCK_D], [M], [M]: the softmax so far
    q, positions,  # [M, BLOCK_D], [M]
    k_cache, v_cache, k_scale, v_scale, table, head, begin, end, stop,
    page_stride, head_stride, slot_stride, per_page, scale, softcap, window,
    BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go over keys begin to end, a step at a time, from a block's first; without MASKED every row sees all of them."""
    k_cache += head.to(tl.int64) * head_stride
    v_cache += head.to(tl.int64) * head_stride
    n = tl.arange(0, BLOCK_N)
    # A step's blocks are looked up one step ahead. Looked up when needed, they would take the stages of the pipeline
    # that keys and values want.
    ahead = tl.load(table + begin // BLOCK + n // BLOCK, mask=begin + n < stop, other=0)
    for first in range(begin, end, BLOCK_N):
        key = first + n
        seen = key < stop
        block = ahead
        ahead = tl.load(table + (first + BLOCK_N) // BLOCK + n // BLOCK, mask=key + BLOCK_N < stop, other=0)
        page = block // per_page
        slot = block % per_page * BLOCK + n % BLOCK
        offset = page.to(tl.int64) * page_stride + slot.to(tl.int64) * slot_stride
        k = _rows_of(k_cache, offset, seen, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(_as(k, q.dtype)), input_precision="ieee")
        if k_scale is not None:
            place = (page * tl.num_programs(1) + head) * (per_page * BLOCK) + slot  # 32 bits: check_cache sees to it
            s *= tl.load(k_scale + place, mask=seen, other=0.0)[None, :]
        if SOFTCAP:
            s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        else:
            s *= scale * LOG2E
        if MASKED:
            visible = (key[None, :] <= positions[:, None]) & seen[None, :]
            if WINDOW:
                visible &= key[None, :] > positions[:, None] - window
            s = tl.where(visible, s, float("-inf"))
        top = tl.maximum(peak, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # a row that has seen nothing yet: -inf - -inf is NaN
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(peak - base)
        mass = mass * shrink + tl.sum(p, 1)
        v = _rows_of(v_cache, offset, seen, D, BLOCK_D, MASKED)
        if v_scale is not None:
            place = (page * tl.num_programs(1) + head) * (per_page * BLOCK) + slot
            p *= tl.load(v_scale + place, mask=seen, other=0.0)[None, :]
        acc = tl.dot(p.to(q.dtype), _as(v, q.dtype), acc * shrink[:, None], input_precision="ieee")
        peak = top
    return acc, peak, mass


@triton.jit(do_not_specialize=["table_stride", "window"])
def _attend_kernel(
    q,  # [T, Hq, D], tokens q_stride apart
    k_cache,  # [pages, Hkv, page, D]
    v_cache,
    k_scale,  # [pages, Hkv, page] fp32, or None
    v_scale,
    out,  # [T, Hq, D]
    lse,  # [T, Hq] fp32, or None
    items,  # [programs, 8] int32
    tables,  # [S, table_stride] int32
    merges,  # [tokens with parts, 4] int32
    parts,  # [parts, Hq, D] fp32
    part_lse,  # [parts, Hq] fp32, base 2
    q_stride,
    page_stride,
    head_stride,
    slot_stride,
    table_stride,
    per_page,  # blocks a page
    scale,
    softcap,
    window,
    G: tl.constexpr,
    BLOCK: tl.constexpr,  # keys of an entry of the tables
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,  # steps that every row of the tile sees go without masks
):
    item = items + tl.program_id(0).to(tl.int64) * 8
    head = tl.program_id(1)
    heads = tl.num_programs(1) * G
    token = tl.load(item)
    count = tl.load(item + 1)
    position = tl.load(item + 2)
    table = tables + tl.load(item + 3).to(tl.int64) * table_stride
    start = tl.load(item + 4)
    stop = tl.load(item + 5)
    merged = tl.load(item + 6)
    part = tl.load(item + 7)

    r = tl.arange(0, M)
    d = tl.arange(0, BLOCK_D)
    nth = r // G  # of the item's tokens
    real = nth < count
    inside = real[:, None] & (d < D)[None, :]
    query_head = head * G + r % G
    row = (token + nth).to(tl.int64)
    rows = tl.load(q + row[:, None] * q_stride + query_head[:, None] * D + d[None, :], mask=inside, other=0.0)

    acc = tl.zeros([M, BLOCK_D], tl.float32)
    peak = tl.full([M], float("-inf"), tl.float32)
    mass = tl.zeros([M], tl.float32)
    masked_from = start
    if WHOLE:
        masked_from += tl.maximum(tl.minimum(position + 1, stop) - start, 0) // BLOCK_N * BLOCK_N
        acc, peak, mass = _attend(
            acc, peak, mass, rows, position + nth, k_cache, v_cache, k_scale, v_scale, table, head,
            start, masked_from, stop, page_stride, head_stride, slot_stride, per_page, scale, softcap, window,
            BLOCK, D, BLOCK_D, BLOCK_N, SOFTCAP, WINDOW, False,
        )  # fmt: skip
    acc, peak, mass = _attend(
        acc, peak, mass, rows, position + nth, k_cache, v_cache, k_scale, v_scale, table, head,
        masked_from, stop, stop, page_stride, head_stride, slot_stride, per_page, scale, softcap, window,
        BLOCK, D, BLOCK_D, BLOCK_N, SOFTCAP, WINDOW, True,
    )  # fmt: skip

    some = tl.where(mass == 0, 1.0, mass)
    acc /= some[:, None]
    log = tl.where(mass == 0, float("-inf"), peak + tl.log2(some))
    if merged < 0:
        place = row * heads + query_head
        tl.store(out + place[:, None] * D + d[None, :], acc.to(out.dtype.element_ty), mask=inside)
        if lse is not None:
            tl.store(lse + place, log * LN2, mask=real)
    else:
        first = tl.load(merges + (merged + nth) * 4 + 1, mask=real, other=0)
        place = (first + part).to(tl.int64) * heads + query_head
        tl.store(parts + place[:, None] * D + d[None, :], acc, mask=inside)
        tl.store(part_lse + place, log, mask=real)


@triton.jit
def _merge_kernel(
    merges,  # [tokens, 4] int32
    parts,  # [parts, Hq, D] fp32
    part_lse,  # [parts, Hq] fp32, base 2
    out,  # [T, Hq, D]
    lse,  # [T, Hq] fp32, or None
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    merge = merges + tl.program_id(0).to(tl.int64) * 4
    token = tl.load(merge).to(tl.int64)
    first = tl.load(merge + 1).to(tl.int64)
    count = tl.load(merge + 2)
    head = tl.program_id(1)
    heads = tl.num_programs(1)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    for begin in range(0, count, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        place = (first + p) * heads + head
        log = tl.load(part_lse + place, mask=p < count, other=float("-inf"))
        inside = (p < count)[:, None] & (d < D)[None, :]
        some = tl.load(parts + place[:, None] * D + d[None, :], mask=inside, other=0.0)
        top = tl.maximum(peak, tl.max(log, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(log - base)
        shrink = tl.exp2(peak - base)
        acc = acc * shrink + tl.sum(weight[:, None] * some, 0)
        mass = mass * shrink + tl.sum(weight, 0)
        peak = top
    place = token * heads + head
    tl.store(out + place * D + d, (acc / mass).to(out.dtype.element_ty), mask=d < D)
    if lse is not None:
        tl.store(lse + place + tl.arange(0, 1), (peak + tl.log2(mass)) * LN2)


def attend_blocks(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    kind: AttentionKind = CAUSAL,
    lse: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    check_cache("attend_blocks", q, k_cache, v_cache, scales)
    group, dim = q.shape[1] // k_cache.shape[1], q.shape[2]
    shapes = tiles.attention_tiles(group, dim, q.dtype, scales is not None, q.device)
    if not shapes:
        warn_once(f"attention of {q.dtype}, head dim {dim}, {group} query heads a KV head runs in plain torch: no tile")
        return reference.attend_blocks(q, k_cache, v_cache, plan, kind, lse, scales)
    if lse is not None and (lse.shape != (*q.shape[:2], 1) or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"attend_blocks: lse is {lse.dtype} {list(lse.shape)}; contiguous float32 [tokens, heads, 1]")
    work = work_of(plan, group, kind.window, table_block(k_cache.shape[2]), shapes, q.device)
    if work.num_tokens != len(q):
        raise ValueError(f"attend_blocks: q has {len(q)} tokens; the plan's sequences bring {work.num_tokens}")
    if plan.exact and lse is None:  # trainer and engine run one and the same compiled kernel
        lse = torch.empty((*q.shape[:2], 1), dtype=torch.float32, device=q.device)
    by_rows = {shape.rows: shape for shape in shapes}
    return _launch(heads_together(q), k_cache, v_cache, kind, lse, scales, work, by_rows, plan.exact)


def work_of(
    plan: AttentionPlan,
    group: int,
    window: int | None,
    block: int,
    shapes: tuple[tiles.AttentionTile, ...],
    device: torch.device,
) -> Work:
    """The plan's work list, made when the first layer of its kind asks."""
    key = ("paged_attention", group, window, block, shapes, device)
    if key not in plan.prepared:
        plan.prepared[key] = lists_of(plan, key).on(device)
    found = plan.prepared[key]
    assert isinstance(found, Work)
    return found


def lists_of(plan: AttentionPlan, key: tuple[Any, ...]) -> WorkLists:
    """What belongs in ``plan.prepared`` under a key of :func:`work_of`."""
    _, group, window, block, shapes, _ = key
    return divide(plan, group, window, block, [shape.rows for shape in shapes], shapes[0].keys)


def _launch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kind: AttentionKind,
    lse: Tensor | None,
    scales: Scales | None,
    work: Work,
    shapes: dict[int, tiles.AttentionTile],
    exact: bool,
) -> Tensor:
    (_, heads, dim), (_, kv_heads, page, _) = q.shape, k_cache.shape
    block_d, block = tiles.head_block(dim), table_block(page)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts = torch.empty((work.num_parts, heads, dim), dtype=torch.float32, device=q.device)
    part_lse = torch.empty((work.num_parts, heads), dtype=torch.float32, device=q.device)
    k_scale, v_scale = (None, None) if scales is None else scales
    for rows, items in work.items:
        shape = shapes[rows]
        _attend_kernel[(len(items), kv_heads)](
            q, k_cache, v_cache, k_scale, v_scale, out, lse, items, work.tables, work.merges, parts, part_lse,
            q.stride(0), *k_cache.stride()[:3], work.tables.shape[1], page // block,
            score_scale(kind, dim), kind.softcap or 0.0, kind.window or 0,
            G=heads // kv_heads, BLOCK=block, D=dim, BLOCK_D=block_d, M=rows, BLOCK_N=shape.keys,
            SOFTCAP=kind.softcap is not None, WINDOW=kind.window is not None,
            # A low tile waits for memory, and masks for nothing. Masked or not, rounding may differ: one form in exact.
            WHOLE=rows > 16 and kind.window is None and not exact,
            num_warps=shape.warps, num_stages=shape.stages, enable_fp_fusion=True,
        )  # fmt: skip
    if len(work.merges):
        _merge_kernel[(len(work.merges), heads)](
            work.merges, parts, part_lse, out, lse, D=dim, BLOCK_D=block_d, BLOCK_P=16, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def attend_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    plan: AttentionPlan,
    kind: AttentionKind = CAUSAL,
    scales: Scales | None = None,
) -> Tensor:
    store_kv(k, v, k_cache, v_cache, slots, scales)
    return attend_blocks(q, k_cache, v_cache, plan, kind, scales=scales)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, num_blocks: int, plan: AttentionPlan, kind: AttentionKind = CAUSAL
) -> tuple[Tensor, Tensor]:
    """What the engine computes of packed sequences: the trainer's forward where the plan is exact.

    Arguments as of :func:`kernels.packed_attention`. Returns out [T, Hq, D], of the bits that :func:`attend_paged`
    gives over any pages and chunks with an exact plan, and the log-sum-exp [T, Hq, 1] fp32.
    """
    # Slots that no token is stored in are never read.
    k_blocks, v_blocks = (x.new_empty((num_blocks, x.shape[1], KV_BLOCK, x.shape[2])) for x in (k, v))
    store_kv(k, v, k_blocks, v_blocks, slots)
    lse = torch.empty((*q.shape[:2], 1), dtype=torch.float32, device=q.device)
    return attend_blocks(q, k_blocks, v_blocks, plan, kind, lse), lse
