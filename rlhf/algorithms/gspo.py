"""GSPO: importance ratio and clip of whole answers (Zheng et al. 2025, arXiv 2507.18071)."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from rlhf.algorithms.policy_gradient import STRICT, Aggregation, ClipHigh, ClipLow, CriticFree, Unit


@dataclass(frozen=True, config=STRICT)
class GSPO(CriticFree):
    """The paper's bounds: a mean over an answer's tokens moves far less than one token's ratio."""

    name: Literal["gspo"] = "gspo"
    ratio: Unit = "sequence"
    clip_low: ClipLow = 3e-4
    clip_high: ClipHigh = 4e-4
    aggregation: Aggregation = "sequence_mean"


ALGORITHM = GSPO
