"""What kernels take, and what is said of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import warn_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def left_to_torch(op: str, x: Tensor, largest_row: int | None = None) -> bool:
    """Whether plain torch computes ``op``: for a dtype, or rows of more bytes, than its kernel takes. Warns once."""
    if x.dtype not in FLOATS:
        warn_once(f"{op} in {x.dtype} runs in plain torch: the kernel takes float32, bfloat16 and float16")
        return True
    if largest_row is not None and x.shape[-1] * x.element_size() > largest_row:
        limit = largest_row // x.element_size()
        warn_once(f"{op} of width {x.shape[-1]} runs in plain torch: in {x.dtype} the kernel takes up to {limit}")
        return True
    return False


def require(holds: bool, op: str, argument: str, given: object, expected: str) -> None:
    """Raises ValueError, naming all four, unless ``holds``."""
    if not holds:
        shown = tuple(given) if isinstance(given, torch.Size) else given
        raise ValueError(f"{op}: {argument} is {shown}; expected {expected}")
