"""Writing keys and values into pages, as they are or quantised, one scale a token and KV head.

Axes: T tokens, Hkv KV heads, D head dim. Pages are [pages, Hkv, page, D]; scales [pages, Hkv, page] fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

Scales = tuple[Tensor, Tensor]  # of keys and of values, [pages, Hkv, page] fp32
QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest number of a token and head becomes


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, scales: Scales | None = None
) -> None:
    """Write k, v [T, Hkv, D] into pages [pages, Hkv, page, D] at ``slots`` [T] = page id * page + offset.

    With ``scales`` the pages are int8 or float8_e4m3fn, and receive what :func:`quantise` makes of each token and head.
    """
    page, offset = slots // k_cache.shape[2], slots % k_cache.shape[2]
    if scales is None:
        k_cache[page, :, offset] = k
        v_cache[page, :, offset] = v
        return
    for x, cache, scale in ((k, k_cache, scales[0]), (v, v_cache, scales[1])):
        values, steps = quantise(x, cache.dtype)
        # As bytes, since torch on a CPU writes no single rows of fp8.
        cache.view(torch.uint8)[page, :, offset] = values.view(torch.uint8)
        scale[page, :, offset] = steps


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of x [..., D] as dtype and their scales [...] fp32: ``values * scale`` is x up to rounding.

    The largest magnitude of a row becomes the largest of dtype, 127 or 448; a row of zeros has the scale 0.
    """
    limit = QUANTISED[dtype]
    scale = x.float().abs().amax(-1) / limit
    values = x.float() / torch.where(scale > 0, scale, 1.0)[..., None]
    if dtype is torch.int8:
        values = values.round()
    return values.clamp(-limit, limit).to(dtype), scale


def dequantise(cache: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Pages of numbers again, in dtype."""
    return (cache.float() * scale[..., None]).to(dtype)
