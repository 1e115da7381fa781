"""What of ``kernels/triton/rope_store.py`` is shipped: grouped and plain heads, whole and partial turns, by dtype."""

from __future__ import annotations

import torch

from kernels.triton.rope_store import rope_store

HEADS = [(32, 8, 128, 128), (14, 2, 64, 64), (16, 8, 256, 256), (32, 32, 96, 72)]  # query, KV, head dim, turning

PRODUCTS: dict[str, str] = {}
SPILLS: dict[str, str] = {}


def store(tokens: int, heads: int, kv_heads: int, width: int, turning: int, dtype: torch.dtype) -> None:
    fused = torch.zeros(tokens, heads + 2 * kv_heads, width, dtype=dtype)
    table = torch.zeros(tokens, turning // 2)
    caches = torch.zeros(2, 2, kv_heads, 16, width, dtype=dtype)
    slots = torch.zeros(tokens, dtype=torch.int64)
    rope_store(*fused.split((heads, kv_heads, kv_heads), 1), table, table, *caches, slots)


def launch() -> None:
    for heads in HEADS:
        store(8, *heads, torch.bfloat16)
    store(8, *HEADS[0], torch.float32)


def launch_batch(tokens: int) -> None:
    store(tokens, 4, 2, 64, 64, torch.bfloat16)
