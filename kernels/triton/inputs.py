"""What kernels take, and what is said of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import warn_once

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def left_to_torch(op: str, x: Tensor) -> bool:
    """Whether plain torch computes ``op``, for a dtype that its kernel doesn't take. Warns once."""
    if x.dtype in FLOATS:
        return False
    warn_once(f"{op} in {x.dtype} runs in plain torch: the kernel takes float32, bfloat16 and float16")
    return True


def require(holds: bool, op: str, argument: str, given: object, expected: str) -> None:
    """Raises ValueError, naming all four, unless ``holds``."""
    if not holds:
        shown = tuple(given) if isinstance(given, torch.Size) else given
        raise ValueError(f"{op}: {argument} is {shown}; expected {expected}")
