"""Held-out evaluation: the policy answers, the recipe's reward judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config import Config
from rlhf.roles.policy import Policy
from rlhf.roles.reward import RewardFunction
from rlhf.types import Prompt, Trajectory
from rollout_engine import SamplingParams

FIRST_SAMPLE_ID = 1 << 40  # evaluation draws from noise that training never uses


@dataclass(frozen=True)
class Evaluation:
    step: int
    trajectories: list[Trajectory]

    @property
    def metrics(self) -> dict[str, float]:
        """Mean reward; ``accuracy`` is the share of answers with the full reward of 1."""
        values = [t.score.value for t in self.trajectories if t.score is not None]
        count = max(1, len(values))
        return {
            "eval/reward": sum(values) / count,
            "eval/accuracy": sum(value >= 1 for value in values) / count,
            "eval/step": self.step,
        }


def evaluate(
    config: Config, policy: Policy, reward: RewardFunction, prompts: Sequence[Prompt], step: int
) -> Evaluation:
    """Answer every prompt ``eval.samples`` times at ``eval.temperature``."""
    params = SamplingParams(
        n=config.eval.samples, temperature=config.eval.temperature, max_tokens=config.rollout.max_tokens
    )
    for finished in policy.generate(prompts, params, first_sample_id=FIRST_SAMPLE_ID):
        reward.submit([(group, prompts[group], answers) for group, answers in finished])
    return Evaluation(step, reward.collect())
