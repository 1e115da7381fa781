"""Held-out evaluation: the policy answers, the judges of the run judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config import Config
from rlhf.judging import Judges
from rlhf.metrics import part_means
from rlhf.roles.policy import Policy
from rlhf.types import Prompt, Score, Trajectory
from rollout_engine import SamplingParams

FIRST_SAMPLE_ID = 1 << 40  # evaluation draws from noise that training never uses


@dataclass(frozen=True)
class Evaluation:
    step: int
    trajectories: list[Trajectory]
    accuracy_part: str | None = None  # of a score, that says whether the answer is right; None: the score itself

    @property
    def metrics(self) -> dict[str, float]:
        """Mean reward and its parts' means; ``accuracy`` is the share of right answers."""
        scores = [t.score for t in self.trajectories if t.score is not None]
        right = [verdict for verdict in map(self.is_right, scores) if verdict is not None]
        return {
            "eval/reward": sum(score.value for score in scores) / max(1, len(scores)),
            "eval/accuracy": sum(right) / max(1, len(right)),
            "eval/step": self.step,
            **part_means("eval", scores),
        }

    def is_right(self, score: Score) -> bool | None:
        """Whether the recipe's function, or where there is none the sum, gives the full reward of 1; None: it didn't
        judge."""
        if self.accuracy_part is None:
            return score.value >= 1
        return score.parts[self.accuracy_part] >= 1 if self.accuracy_part in score.parts else None


def evaluate(config: Config, policy: Policy, reward: Judges, prompts: Sequence[Prompt], step: int) -> Evaluation:
    """Answer every prompt ``eval.samples`` times at ``eval.temperature``."""
    params = SamplingParams(
        n=config.eval.samples, temperature=config.eval.temperature, max_tokens=config.rollout.max_tokens
    )
    for finished in policy.generate(prompts, params, first_sample_id=FIRST_SAMPLE_ID):
        reward.submit([(group, prompts[group], answers) for group, answers in finished])
    return Evaluation(step, reward.collect(), reward.accuracy_part)
