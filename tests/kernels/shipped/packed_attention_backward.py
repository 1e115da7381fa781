"""What of ``kernels/triton/packed_attention_backward.py`` is shipped: the gradients of what the forward ships."""

from __future__ import annotations

import torch
from shipped.packed_attention import CONFIGURATIONS, WINDOW, batch

from kernels import AttentionKind
from kernels.triton.packed_attention_backward import packed_attention_backward

PRODUCTS = {"_packed_attention_dq_kernel": "HGMMA", "_packed_attention_dkv_kernel": "HGMMA"}
SPILLS: dict[str, str] = {}


def gradients(tokens: int, dtype: torch.dtype, dim: int, heads: int, kv_heads: int, kind: AttentionKind) -> None:
    (q, k, v), plan = batch(tokens, dtype, dim, heads, kv_heads)
    packed_attention_backward(q, q, k, v, q, torch.zeros(q.shape[:2]), plan, kind)


def launch() -> None:
    for configuration in CONFIGURATIONS:
        gradients(16, *configuration)


def launch_batch(tokens: int) -> None:
    gradients(tokens, torch.bfloat16, 64, 2, 1, WINDOW)
