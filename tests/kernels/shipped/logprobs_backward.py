"""What of ``kernels/triton/logprobs_backward.py`` is shipped: both forms, 16-bit and fp32, with and without entropy and
softcap."""

from __future__ import annotations

from dataclasses import replace

import torch

from kernels.triton.logits import form_of
from kernels.triton.logprobs_backward import Scored, gradients

PRODUCTS = {"_dlogits_fused_kernel": "HGMMA"}
SPILLS: dict[str, str] = {}


def differentiate(rows: int, width: int, softcap: float | None, dtype: torch.dtype, entropy: bool, fused: bool) -> None:
    hidden, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(5008, width, dtype=dtype)
    targets, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    form = replace(form_of(weight), fused_backward=fused)
    gradients(
        Scored(hidden, weight, targets, ones, ones, ones, ones, 5000, softcap),
        ones, ones if entropy else None, form, True, False,
    )  # fmt: skip


def launch() -> None:
    for softcap in (None, 30.0):
        for entropy in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                differentiate(8, 64, softcap, dtype, entropy, fused=False)
    for width in (64, 1000):
        for entropy in (False, True):
            differentiate(8, width, None, torch.bfloat16, entropy, fused=True)


def launch_batch(tokens: int) -> None:
    for fused in (True, False):
        differentiate(tokens, 64, None, torch.bfloat16, True, fused)
