"""What of ``kernels/triton/activations.py`` is shipped: wide and narrow MLPs, by dtype and activation."""

from __future__ import annotations

import torch

from kernels.triton.activations import geglu, swiglu

PRODUCTS: dict[str, str] = {}
SPILLS: dict[str, str] = {}


def launch() -> None:
    for op in (swiglu, geglu):
        for dtype, width in ((torch.bfloat16, 192), (torch.bfloat16, 11008), (torch.float32, 11008)):
            op(torch.zeros(8, 2 * width, dtype=dtype, requires_grad=True)).sum().backward()


def launch_batch(tokens: int) -> None:
    swiglu(torch.zeros(tokens, 2 * 192, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
