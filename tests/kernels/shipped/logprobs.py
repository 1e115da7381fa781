"""What of ``kernels/triton/logprobs.py`` is shipped: 16-bit and fp32, softcap or none, H that fits the tile or doesn't,
and the forward by chunks."""

from __future__ import annotations

import torch

from kernels.triton.logits import form_of
from kernels.triton.logprobs import token_logprobs_by

PRODUCTS = {"_token_logprobs_kernel": "HGMMA"}
SPILLS: dict[str, str] = {}


def score(rows: int, width: int, softcap: float | None, dtype: torch.dtype, fused: bool = True) -> None:
    hidden, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(5008, width, dtype=dtype)
    form = form_of(weight)._replace(fused_forward=fused)
    token_logprobs_by(form, hidden, weight, torch.zeros(rows, dtype=torch.int64), torch.ones(rows), 5000, softcap)


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        score(8, 896, None, dtype)
        score(8, 896, 30.0, dtype)
        score(8, 1000, None, dtype)
    score(8, 64, None, torch.bfloat16, fused=False)
    score(8, 64, 30.0, torch.bfloat16, fused=False)


def launch_batch(tokens: int) -> None:
    for fused in (True, False):
        score(tokens, 64, None, torch.bfloat16, fused)
