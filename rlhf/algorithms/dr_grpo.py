"""Dr. GRPO: GRPO without the biases towards long wrong answers and easy prompts (Liu et al. 2025, arXiv 2503.20783)."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from rlhf.algorithms.policy_gradient import STRICT, Aggregation, CriticFree, Level


@dataclass(frozen=True, config=STRICT)
class DrGRPO(CriticFree):
    name: Literal["dr_grpo"] = "dr_grpo"
    std: Level = "none"
    aggregation: Aggregation = "constant_length"


ALGORITHM = DrGRPO
