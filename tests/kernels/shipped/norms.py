"""What of ``kernels/triton/norms.py`` is shipped: model widths and head dims, by dtype, with and without residual."""

from __future__ import annotations

import torch

from kernels.triton.norms import add_rms_norm, rms_norm

PRODUCTS: dict[str, str] = {}
SPILLS: dict[str, str] = {}


def launch() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for width in (128, 4096, 8192):
            x = torch.zeros(8, width, dtype=dtype, requires_grad=True)
            weight = torch.zeros(width, dtype=dtype, requires_grad=True)
            for offset in (False, True):
                rms_norm(x, weight, 1e-6, offset).sum().backward()
                sum(add_rms_norm(x, x, weight, 1e-6, offset)).sum().backward()
