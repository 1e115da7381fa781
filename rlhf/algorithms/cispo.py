"""CISPO: clip the importance weight, keep every token's gradient (MiniMax-M1 2025, arXiv 2506.13585)."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from rlhf.algorithms.policy_gradient import STRICT, ClipHigh, ClipLow, ClipRule, CriticFree


@dataclass(frozen=True, config=STRICT)
class CISPO(CriticFree):
    """The paper bounds the weight from above only and gives no number; at most 5 is our choice."""

    name: Literal["cispo"] = "cispo"
    clip: ClipRule = "cispo"
    clip_low: ClipLow = 1.0
    clip_high: ClipHigh = 4.0


ALGORITHM = CISPO
