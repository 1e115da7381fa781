"""What of ``kernels/triton/packed_attention.py`` is shipped: head dims of real models, with windows and soft caps."""

from __future__ import annotations

import random

import torch
from packed import layout, qkv
from torch import Tensor

from kernels import AttentionKind, AttentionPlan
from kernels.triton.packed_attention import attend_packed

PRODUCTS = {"_packed_attention_kernel": "HGMMA"}
SPILLS: dict[str, str] = {}

CAUSAL, WINDOW = AttentionKind(), AttentionKind(window=4096)
BOTH = AttentionKind(softcap=50.0, window=4096)
# By head dim, heads and KV heads. A window compiles to more than none, and both to more than a soft cap.
MODELS = {
    (64, 14, 2): (CAUSAL,),
    (96, 32, 32): (CAUSAL,),
    (128, 32, 8): (CAUSAL, WINDOW, BOTH),
    (256, 8, 4): (CAUSAL, WINDOW, BOTH),
}
FP32 = {(128, 32, 8): (BOTH,), (256, 8, 4): (CAUSAL,)}
CONFIGURATIONS = [
    (dtype, *heads, kind)
    for dtype, models in ((torch.bfloat16, MODELS), (torch.float32, FP32))
    for heads, kinds in models.items()
    for kind in kinds
]


def batch(tokens: int, dtype: torch.dtype, dim: int, heads: int, kv_heads: int) -> tuple[list[Tensor], AttentionPlan]:
    """Sequences of random lengths that bring so many tokens, after prefixes of random lengths."""
    rng = random.Random(tokens)
    cuts = sorted(rng.randint(0, tokens) for _ in range(rng.randint(0, 5)))
    own = [end - begin for begin, end in zip([0, *cuts], [*cuts, tokens], strict=True)]
    contexts = [n + rng.randint(0, 100) for n in own]
    return qkv(own, contexts, (heads, kv_heads), dim, dtype), layout(own, contexts)[2]


def launch() -> None:
    for dtype, dim, heads, kv_heads, kind in CONFIGURATIONS:
        tensors, plan = batch(16, dtype, dim, heads, kv_heads)
        attend_packed(*tensors, plan, kind)


def launch_batch(tokens: int) -> None:
    tensors, plan = batch(tokens, torch.bfloat16, 64, 2, 1)
    attend_packed(*tensors, plan, WINDOW)
