"""What of ``kernels/triton/logits.py`` is shipped: 16-bit and fp32, softcap or none, H that fits tiles or doesn't."""

from __future__ import annotations

import torch

from kernels.triton.logits import logits

PRODUCTS = {"_logits_kernel": "HGMMA"}
SPILLS: dict[str, str] = {}


def compute(rows: int, width: int, softcap: float | None, dtype: torch.dtype) -> None:
    logits(torch.zeros(rows, width, dtype=dtype), torch.zeros(1024, width, dtype=dtype), 1000, softcap)


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        compute(8, 896, None, dtype)
        compute(8, 896, 30.0, dtype)
        compute(8, 1000, None, dtype)


def launch_batch(tokens: int) -> None:
    compute(tokens, 128, None, torch.bfloat16)
