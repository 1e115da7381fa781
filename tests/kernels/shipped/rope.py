"""What of ``kernels/triton/rope.py`` is shipped: heads of a fused projection, whole and partial rotation, by dtype."""

from __future__ import annotations

import torch

from kernels.triton.rope import rope

PRODUCTS: dict[str, str] = {}
SPILLS: dict[str, str] = {}
VARIANTS = {"_rope_kernel": 2}  # forward, backward


def turn(tokens: int, heads: int, width: int, turning: int, dtype: torch.dtype) -> None:
    fused = torch.zeros(tokens, heads + 2, width, dtype=dtype, requires_grad=True)
    table = torch.zeros(tokens, turning // 2)
    rope(fused[:, :heads], table, table).sum().backward()


def launch() -> None:
    for heads, width, turning in ((32, 128, 128), (14, 64, 64), (16, 256, 256), (32, 96, 72)):
        turn(8, heads, width, turning, torch.bfloat16)
    turn(8, 8, 128, 128, torch.float32)


def launch_batch(tokens: int) -> None:
    turn(tokens, 4, 64, 64, torch.bfloat16)
