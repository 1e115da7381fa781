"""How close a kernel must come to float64: in fp32 within a fixed bound, in narrow floats no worse than plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, BACKWARD = 2e-6, 1e-5  # of fp32, relative to the largest true value
NARROW_FACTOR = 2.0  # times the error of plain torch in the same dtype


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal numbers, the same on every device, rounded to dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close_to_truth(found: Tensor, truth: Tensor, plain: Tensor | None = None, bound: float = FORWARD) -> None:
    """``found`` against ``truth`` (float64).

    In fp32 the largest error is at most ``bound`` times the largest true value. In narrower dtypes it is at most twice
    the error of ``plain``, which torch computed in the same dtype by ordinary operations; plus half a rounding step of
    the largest value, since plain torch may happen to be exact.
    """
    assert found.shape == truth.shape, (found.shape, truth.shape)
    assert truth.dtype == torch.float64
    assert torch.isfinite(found).all() or not torch.isfinite(truth).all(), "not finite"
    if not truth.numel():
        return
    size = truth.abs().max().item()
    error = (found.double() - truth).abs().max().item()
    if found.dtype == torch.float32 and plain is None:
        assert error <= bound * max(size, 1e-30), f"{error / size:.2e} of the largest value; at most {bound:.0e}"
        return
    assert plain is not None, "narrow floats are compared with plain torch in the same dtype"
    theirs = (plain.double() - truth).abs().max().item()
    allowed = NARROW_FACTOR * theirs + 0.5 * torch.finfo(found.dtype).eps * size
    assert error <= allowed, f"error {error:.2e}, plain torch's {theirs:.2e}, allowed {allowed:.2e}"
