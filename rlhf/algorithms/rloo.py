"""RLOO: REINFORCE with the mean of the other answers as baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from rlhf.algorithms.policy_gradient import STRICT, Aggregation, ClipRule, CriticFree, KLEstimator, KLPlace, Level


@dataclass(frozen=True, config=STRICT)
class RLOO(CriticFree):
    """``constant_length`` weighs every token alike in every batch: an answer counts by its summed log-prob."""

    name: Literal["rloo"] = "rloo"
    leave_one_out: bool = True
    std: Level = "none"
    clip: ClipRule = "none"
    aggregation: Aggregation = "constant_length"
    kl_estimator: KLEstimator = "k1"
    kl_in: KLPlace = "reward"


ALGORITHM = RLOO
