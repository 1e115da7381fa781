"""What of ``kernels/triton/norms.py`` is shipped: model widths and head dims, by dtype, with and without residual."""

from __future__ import annotations

import torch

from kernels.triton.norms import add_rms_norm, rms_norm

PRODUCTS: dict[str, str] = {}
SPILLS: dict[str, str] = {}
VARIANTS = {"_rms_norm_kernel": 2, "_rms_norm_backward_kernel": 2}  # of heads, and of rows with a residual


def norm(tokens: int, width: int, dtype: torch.dtype) -> None:
    """A layer's norms: of the residual, with an offset, and of rows or the heads of a fused projection."""
    weight = torch.zeros(width, dtype=dtype, requires_grad=True)
    x = torch.zeros(tokens, width, dtype=dtype, requires_grad=True)
    sum(add_rms_norm(x, x, weight, 1e-6, offset=True)).sum().backward()
    rows = torch.zeros(tokens, 48, width, dtype=dtype, requires_grad=True)[:, :32] if width <= 256 else x
    rms_norm(rows, weight, 1e-6).sum().backward()


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for width in (128, 4096, 8192):
            norm(8, width, dtype)
    norm(8, 16384, torch.bfloat16)


def launch_batch(tokens: int) -> None:
    norm(tokens, 128, torch.bfloat16)
