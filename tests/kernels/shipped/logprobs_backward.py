"""What of ``kernels/triton/logprobs_backward.py`` is shipped: 16-bit and fp32, entropy or none, softcap or none,
both forms, and a vocabulary that isn't a multiple of 16."""

from __future__ import annotations

from unittest.mock import patch

import torch

from kernels.triton import logprobs_backward
from kernels.triton.logits import form_of
from kernels.triton.logprobs_backward import Scored, gradients

PRODUCTS = {"_dlogits_fused_kernel": "HGMMA"}
SPILLS: dict[str, str] = {}


def differentiate(
    rows: int, width: int, softcap: float | None, dtype: torch.dtype, entropy: bool, fused: bool, vocabulary: int = 5008
) -> None:
    hidden, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(vocabulary, width, dtype=dtype)
    targets, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    scored = Scored(hidden, weight, targets, ones, ones, ones, ones, 5000, softcap)
    form = form_of(weight)._replace(fused_backward=fused)
    gradients(scored, ones, ones if entropy else None, form, wants_hidden=True, wants_weight=False)


def launch() -> None:
    for entropy in (False, True):
        for softcap in (None, 30.0):
            for dtype in (torch.bfloat16, torch.float32):
                differentiate(8, 64, softcap, dtype, entropy, fused=False)
        for width in (64, 1000):
            differentiate(8, width, None, torch.bfloat16, entropy, fused=True)
        differentiate(8, 64, None, torch.bfloat16, entropy, fused=False, vocabulary=5007)


def launch_batch(tokens: int) -> None:
    """Every other one is divided into chunks, as a batch is that is too large for one."""
    with patch.object(logprobs_backward, "CHUNK_BYTES", tokens % 2 << 30):
        for fused in (True, False):
            differentiate(tokens, 64, None, torch.bfloat16, True, fused)
