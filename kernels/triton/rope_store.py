"""RoPE and the write to the KV pages in one launch: q turned, k turned into its page, v copied into its page.

A program takes some heads of one token: query heads, or KV heads of k and v.

Axes: T tokens, Hq query heads, Hkv KV heads, D head dim, R elements of a head that turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.triton.inputs import left_to_torch, require
from kernels.triton.rope import check_tables, copy_heads, turn_heads, turning_constants


@triton.jit
def _rope_store_kernel(
    q,  # [T, Hq, D]; tokens and heads of q, k and v lie apart by their strides
    k,  # [T, Hkv, D]
    v,
    out,  # [T, Hq, D] q turned
    k_cache,  # [pages, Hkv, page, D]
    v_cache,  # strides as k_cache's
    slots,  # [T] page id * page size + offset
    cos,  # [T, R/2]
    sin,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    page_stride,
    page_head_stride,
    offset_stride,
    page_size,
    q_heads,
    kv_heads,
    COLUMNS: tl.constexpr,  # D, rounded up to a power of two
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts = tl.cdiv(q_heads, HEADS)
    cos += token * HALF
    sin += token * HALF
    if part < q_parts:
        turn_heads(
            q + token * q_token_stride, out + token * q_heads * WIDTH, q_head_stride, WIDTH, cos, sin,
            part * HEADS, q_heads, WIDTH, HALF, False, HEADS, BLOCK, REST,
        )  # fmt: skip
    else:
        slot = tl.load(slots + token).to(tl.int64)
        place = slot // page_size * page_stride + slot % page_size * offset_stride
        first = (part - q_parts) * HEADS
        turn_heads(
            k + token * k_token_stride, k_cache + place, k_head_stride, page_head_stride, cos, sin,
            first, kv_heads, WIDTH, HALF, False, HEADS, BLOCK, REST,
        )  # fmt: skip
        copy_heads(
            v + token * v_token_stride, v_cache + place, v_head_stride, page_head_stride, first, kv_heads,
            0, WIDTH, HEADS, COLUMNS,
        )  # fmt: skip


def _check(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    op, tokens, width = "rope_store", q.shape[0], q.shape[2]
    right = k.ndim == 3 and len(k) == tokens and k.shape[2] == width
    require(right, op, "the shape of k", k.shape, f"[{tokens}, KV heads, {width}]")
    require(v.shape == k.shape, op, "the shape of v", v.shape, f"that of k, {tuple(k.shape)}")
    pages = k_cache.ndim == 4 and k_cache.shape[1] == k.shape[1] and k_cache.shape[3] == width
    require(pages, op, "the shape of k_cache", k_cache.shape, f"[pages, {k.shape[1]}, page size, {width}]")
    require(k_cache.stride(3) == 1, op, "the strides of k_cache", k_cache.stride(), "1 along the head dim")
    same = v_cache.shape == k_cache.shape and v_cache.stride() == k_cache.stride()
    layout = f"those of k_cache, {tuple(k_cache.shape)} and {k_cache.stride()}"
    require(same, op, "shape and strides of v_cache", (tuple(v_cache.shape), v_cache.stride()), layout)
    require(slots.shape == (tokens,), op, "the shape of slots", slots.shape, f"[{tokens}]")
    whole = slots.dtype in (torch.int64, torch.int32)
    require(whole, op, "slots.dtype", slots.dtype, "torch.int64 or torch.int32")
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        require(tensor.dtype == q.dtype, op, f"{name}.dtype", tensor.dtype, f"that of q, {q.dtype}")
    for name, tensor in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("slots", slots)):
        require(tensor.device == q.device, op, f"{name}.device", tensor.device, f"that of q, {q.device}")


def check_slots(slots: Tensor, k_cache: Tensor) -> None:
    """Raises ValueError for a slot outside the pages [pages, Hkv, page, D]. Waits for the device: to find faults."""
    limit = k_cache.shape[0] * k_cache.shape[2]
    wrong = slots[(slots < 0) | (slots >= limit)].tolist()
    require(not wrong, "rope_store", "slots", wrong[:8], f"0 to {limit - 1}, {k_cache.shape[0]} pages")


def rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    if left_to_torch("rope_store", q):
        return reference.rope_store(q, k, v, cos, sin, k_cache, v_cache, slots)
    check_tables("rope_store", q, cos, sin)
    _check(q, k, v, k_cache, v_cache, slots)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
    tokens, q_heads, width = q.shape
    kv_heads = k.shape[1]
    out = torch.empty((tokens, q_heads, width), dtype=q.dtype, device=q.device)
    constants = turning_constants(q_heads, width, cos.shape[1])
    if tokens:
        parts = sum(triton.cdiv(heads, constants["HEADS"]) for heads in (q_heads, kv_heads))
        _rope_store_kernel[(tokens, parts)](
            q, k, v, out, k_cache, v_cache, slots, cos, sin,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            k_cache.stride(0), k_cache.stride(1), k_cache.stride(2), k_cache.shape[2], q_heads, kv_heads,
            COLUMNS=triton.next_power_of_2(width), **constants,
        )  # fmt: skip
    return out
