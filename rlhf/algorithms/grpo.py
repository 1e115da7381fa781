"""GRPO: group-relative advantages, no critic (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from rlhf.algorithms.policy_gradient import STRICT, CriticFree


@dataclass(frozen=True, config=STRICT)
class GRPO(CriticFree):
    """As published but for the aggregation: ``sequence_mean`` there, DAPO's ``token_mean`` here."""

    name: Literal["grpo"] = "grpo"


ALGORITHM = GRPO
