"""What of ``kernels/triton/matmul.py`` is shipped: every tile, with and without bias; widths that divide and don't."""

from __future__ import annotations

import torch

from kernels.triton.matmul import BUCKETS, invariant_linear

PRODUCTS = {"_invariant_linear_kernel": "HGMMA"}
SPILLS: dict[str, str] = {}
VARIANTS = {"_invariant_linear_kernel": len(BUCKETS) + 1}


def multiply(tokens: int, in_features: int, out_features: int, dtype: torch.dtype, bias: bool = False) -> None:
    x, weight = torch.zeros(tokens, in_features, dtype=dtype), torch.zeros(out_features, in_features, dtype=dtype)
    invariant_linear(x, weight, torch.zeros(out_features, dtype=dtype) if bias else None)


def launch() -> None:
    for tokens in (*BUCKETS, max(BUCKETS) + 1):
        multiply(tokens, 1024, 512, torch.bfloat16)
    multiply(16, 1024, 512, torch.bfloat16, bias=True)
    multiply(1000, 1024, 512, torch.bfloat16, bias=True)
    multiply(16, 1000, 500, torch.bfloat16)
    multiply(2000, 1024, 512, torch.float16)
    multiply(16, 1024, 512, torch.float32)
    multiply(16, 1024, 1, torch.float32)


def launch_batch(tokens: int) -> None:
    multiply(tokens, 128, 64, torch.bfloat16)
