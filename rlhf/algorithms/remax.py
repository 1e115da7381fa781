"""ReMax: REINFORCE with the reward of the greedy answer as baseline (Li et al. 2023, arXiv 2310.10505)."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from rlhf.algorithms.policy_gradient import (
    STRICT,
    Aggregation,
    Baseline,
    ClipRule,
    CriticFree,
    KLEstimator,
    KLPlace,
    Level,
    Unit,
)


@dataclass(frozen=True, config=STRICT)
class ReMax(CriticFree):
    """One more answer per prompt, which isn't trained on. ``constant_length`` as in RLOO."""

    name: Literal["remax"] = "remax"
    returns: Unit = "token"
    baseline: Baseline = "greedy"
    std: Level = "none"
    clip: ClipRule = "none"
    aggregation: Aggregation = "constant_length"
    kl_estimator: KLEstimator = "k1"
    kl_in: KLPlace = "reward"


ALGORITHM = ReMax
