"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    """Rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up over ``warmup`` steps, then
    constant, or decaying to 0 linearly or along a half cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    assert schedule == "constant", schedule
    return peak
