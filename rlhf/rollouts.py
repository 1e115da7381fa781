"""Where the loop's trajectories come from: prompts, answers by the policy, judged while more are being sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rlhf.config import Config
from rlhf.data import PromptStream
from rlhf.roles.policy import Policy
from rlhf.roles.reward import RewardFunction
from rlhf.types import Prompt, Trajectory
from rollout_engine import SamplingParams

Phase = Callable[[str], AbstractContextManager[None]]  # shows and times what goes on


class Rollouts:
    """Batches of judged answers, step after step."""

    def __init__(self, config: Config, policy: Policy, reward: RewardFunction, prompts: Sequence[Prompt]) -> None:
        rollout = config.rollout
        self.policy = policy
        self.reward = reward
        self.prompts_per_step = rollout.prompts_per_step
        self.stream = PromptStream(prompts, config.run.seed)
        self.params = SamplingParams(
            n=rollout.samples_per_prompt, temperature=rollout.temperature, max_tokens=rollout.max_tokens
        )

    def state(self) -> dict[str, Any]:
        """Where the prompts are. Plain values and the package's own types, to be pickled with a checkpoint."""
        return {"position": self.stream.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.stream.position = state["position"]

    def take(self, phase: Phase) -> list[Trajectory]:
        """Answers to the next ``prompts_per_step`` prompts, groups in the order of the prompts."""
        first_sample_id = self.stream.position * self.params.n
        asked = self.stream.take(self.prompts_per_step)
        with phase("generate"):
            for finished in self.policy.generate(asked, self.params, first_sample_id=first_sample_id):
                self.reward.submit([(group, asked[group], answers) for group, answers in finished])
        with phase("reward"):  # what is left of it: judging began with the first answers
            return self.reward.collect(control=True)
