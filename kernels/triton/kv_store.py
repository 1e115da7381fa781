"""Keys and values into their pages, as they are or quantised. A program a token.

Axes: T tokens, Hkv KV heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.dispatch import warn_once
from kernels.reference.kv_store import QUANTISED, Scales


@triton.jit
def _store(x, cache, scale, slot, page_size, x_row, page_stride, head_stride, slot_stride,
           HEADS: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
           LIMIT: tl.constexpr, INTEGER: tl.constexpr):  # fmt: skip
    """One token's keys, or values: x [Hkv, D] at x_row."""
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    seen = (h < HEADS)[:, None] & (d < D)[None, :]
    page = slot // page_size
    offset = slot % page_size
    y = tl.load(x + x_row + h[:, None] * D + d[None, :], mask=seen, other=0.0)
    if scale is not None:
        y = y.to(tl.float32)
        step = tl.div_rn(tl.max(tl.abs(y), 1), LIMIT)
        tl.store(scale + (page * HEADS + h) * page_size + offset, step, mask=h < HEADS)
        y = tl.div_rn(y, tl.where(step > 0, step, 1.0)[:, None])
        if INTEGER:
            # Adding and taking away 1.5 * 2^23 leaves no bits after the point: the nearest integer, ties to even.
            y = (y + 12582912.0) - 12582912.0
        y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
    place = cache + page * page_stride + offset * slot_stride + h[:, None].to(tl.int64) * head_stride + d[None, :]
    tl.store(place, y.to(cache.dtype.element_ty), mask=seen)


@triton.jit
def _store_kv_kernel(
    k,  # [T, Hkv, D], tokens k_stride apart
    v,  # [T, Hkv, D], tokens v_stride apart
    k_cache,  # [pages, Hkv, page, D]
    v_cache,
    k_scale,  # [pages, Hkv, page] fp32, or None
    v_scale,
    slots,  # [T] int64
    page_size,
    k_stride,
    v_stride,
    page_stride,
    head_stride,
    slot_stride,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LIMIT: tl.constexpr,  # of the quantised type
    INTEGER: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    _store(k, k_cache, k_scale, slot, page_size, token * k_stride, page_stride, head_stride, slot_stride,
           HEADS, D, BLOCK_H, BLOCK_D, LIMIT, INTEGER)  # fmt: skip
    _store(v, v_cache, v_scale, slot, page_size, token * v_stride, page_stride, head_stride, slot_stride,
           HEADS, D, BLOCK_H, BLOCK_D, LIMIT, INTEGER)  # fmt: skip


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, scales: Scales | None = None
) -> None:
    check_cache("store_kv", k, k_cache, v_cache, scales)
    if v.shape != k.shape or v.dtype != k.dtype:
        raise ValueError(f"store_kv: v is {v.dtype} {list(v.shape)}; as k: {k.dtype} {list(k.shape)}")
    if slots.shape != k.shape[:1] or slots.dtype != torch.int64 or slots.device != k.device:
        raise ValueError(
            f"store_kv: slots is {slots.dtype} {list(slots.shape)} on {slots.device}; "
            f"int64 [{len(k)}] on {k.device}: page id * page size + offset of each token"
        )
    if k.dtype == torch.float64:
        warn_once("store_kv of float64 runs in plain torch")
        reference.store_kv(k, v, k_cache, v_cache, slots, scales)
        return
    if not len(k):
        return
    k, v = heads_together(k), heads_together(v)
    heads, dim = k.shape[1:]
    block = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    k_scale, v_scale = (None, None) if scales is None else scales
    _store_kv_kernel[(len(k),)](
        k, v, k_cache, v_cache, k_scale, v_scale, slots,
        k_cache.shape[2], k.stride(0), v.stride(0), *k_cache.stride()[:3],
        HEADS=heads, D=dim, BLOCK_H=block[0], BLOCK_D=block[1],
        LIMIT=QUANTISED.get(k_cache.dtype, 0.0), INTEGER=k_cache.dtype == torch.int8,
        num_warps=min(8, max(1, block[0] * block[1] // 256)), enable_fp_fusion=False,
    )  # fmt: skip


def heads_together(x: Tensor) -> Tensor:
    """x [T, H, D] with each token's heads one after the other; tokens may lie apart (a slice of fused qkv)."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def check_cache(op: str, x: Tensor, k_cache: Tensor, v_cache: Tensor, scales: Scales | None) -> None:
    """Raise ValueError where pages and scales don't fit x [T, heads, D] or each other."""
    pages, heads, size, dim = k_cache.shape if k_cache.dim() == 4 else (0, 0, 0, 0)
    if x.dim() != 3 or dim != x.shape[2] or not heads or x.shape[1] % heads:
        raise ValueError(
            f"{op}: {list(x.shape)} with pages {list(k_cache.shape)}; "
            "[tokens, heads, head dim] with [pages, KV heads, page, head dim], heads a multiple of KV heads"
        )
    if size != 16 and size % 32:
        raise ValueError(f"{op}: pages of {size} tokens; 16, or a multiple of 32")
    # One set of strides serves both caches, and the elements of a key or value are one run.
    if v_cache.shape != k_cache.shape or v_cache.stride() != k_cache.stride() or k_cache.stride(3) != 1:
        raise ValueError(
            f"{op}: k_cache {list(k_cache.shape)} with strides {k_cache.stride()}, v_cache {list(v_cache.shape)} with "
            f"{v_cache.stride()}; both the same, the last stride 1"
        )
    wanted = {x.dtype} if scales is None else set(QUANTISED)
    if k_cache.dtype not in wanted or v_cache.dtype != k_cache.dtype:
        raise ValueError(
            f"{op}: {k_cache.dtype} and {v_cache.dtype} pages {'without' if scales is None else 'with'} scales; "
            f"{' or '.join(sorted(map(str, wanted)))}"
        )
    if any(t.device != x.device for t in (k_cache, v_cache, *(scales or ()))):
        raise ValueError(f"{op}: pages on {k_cache.device} and {v_cache.device}; on {x.device}, scales too")
    for scale in scales or ():
        if scale.shape != (pages, heads, size) or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(
                f"{op}: scales {scale.dtype} {list(scale.shape)}; contiguous float32 [{pages}, {heads}, {size}]"
            )
        if scale.numel() >= 1 << 31:
            raise ValueError(f"{op}: {scale.numel()} scales of a layer; fewer than 2^31")
