"""What of ``kernels/triton/kv_store.py`` is shipped: KV heads of real models, pages as they are and quantised."""

from __future__ import annotations

import torch

from kernels.triton.kv_store import store_kv

PRODUCTS: dict[str, str] = {}
SPILLS: dict[str, str] = {}


def launch() -> None:
    slots = torch.zeros(3, dtype=torch.int64)
    for heads, dim in ((8, 128), (1, 256)):
        for dtype, stored in (
            (torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.int8),
            (torch.bfloat16, torch.float8_e4m3fn),
        ):
            fused = torch.zeros(3, heads * 6, dim, dtype=dtype)
            cache = torch.zeros(2, heads, 32, dim, dtype=stored)
            scale = torch.zeros(2, heads, 32)
            scales = None if stored is dtype else (scale, scale)
            store_kv(fused[:, :heads], fused[:, heads : 2 * heads], cache, cache, slots, scales)


def launch_batch(tokens: int) -> None:
    k, cache = torch.zeros(tokens, 2, 64, dtype=torch.bfloat16), torch.zeros(2, 2, 32, 64, dtype=torch.bfloat16)
    store_kv(k, k, cache, cache, torch.zeros(tokens, dtype=torch.int64))
