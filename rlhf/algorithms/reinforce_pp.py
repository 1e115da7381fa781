"""REINFORCE++: reward-to-go with KL penalties, normalised over the whole batch (Hu et al. 2025, arXiv 2501.03262)."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from rlhf.algorithms.policy_gradient import STRICT, Baseline, CriticFree, KLEstimator, KLPlace, Level, Unit


@dataclass(frozen=True, config=STRICT)
class ReinforcePP(CriticFree):
    """The variant "with baseline" is returns=sequence, baseline=group, kl_estimator=k2, kl_in=loss."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    returns: Unit = "token"
    baseline: Baseline = "batch"
    std: Level = "batch"
    kl_estimator: KLEstimator = "k1"
    kl_in: KLPlace = "reward"


ALGORITHM = ReinforcePP
