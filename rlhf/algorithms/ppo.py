"""PPO: advantages from a critic, KL in the reward, several epochs (Schulman et al. 2017, arXiv 1707.06347)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from rlhf import functional
from rlhf.algorithms.policy_gradient import STRICT, KLEstimator, KLPlace, PolicyGradient
from rlhf.types import Batch


@dataclass(frozen=True, config=STRICT)
class PPO(PolicyGradient):
    """Actor and critic learn from the same minibatches.

    gamma, lam: discount and trace of ``functional.gae``. value_clip: ``functional.clipped_value_loss``; None: plain.
    whiten: advantages of all trained tokens of the rollout batch to mean 0 and deviation 1.
    critic_warmup_steps: first steps of the run in which the critic learns alone.
    """

    name: Literal["ppo"] = "ppo"
    kl_coef: Annotated[float, Field(ge=0)] = 0.02
    kl_estimator: KLEstimator = "k1"
    kl_in: KLPlace = "reward"
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    whiten: bool = True
    updates_per_rollout: Annotated[int, Field(ge=1)] = 2
    epochs: Annotated[int, Field(ge=1)] = 2
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0

    @property
    def roles(self) -> tuple[str, ...]:
        return (*super().roles, "critic")

    def learners(self, step: int) -> tuple[str, ...]:
        return ("critic",) if step <= self.critic_warmup_steps else ("policy", "critic")

    def advantages(self, batch: Batch) -> Batch:
        trained, counts = batch.loss_mask, batch.num_trained
        rewards = -self.kl_penalty(batch)[trained]
        ends, some = torch.tensor(counts).cumsum(0), torch.tensor(counts) > 0
        rewards[ends[some] - 1] += self.shaped(batch.rewards, batch)[some]  # an answer's reward is its last token's
        values = batch.column("values")[trained].double()
        advantages, returns = functional.gae(rewards, values, counts, self.gamma, self.lam)
        if self.whiten:
            advantages = functional.whitened(advantages)
        columns = {}
        for name, found in (("advantages", advantages), ("returns", returns)):
            columns[name] = torch.zeros(batch.num_tokens)
            columns[name][trained] = found.float()
        return batch.replace(**columns)

    def value_loss(self, values: Tensor, batch: Batch, scored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss, and diagnostics, as :meth:`policy_loss`. values [R]."""

        def column(name: str) -> Tensor:
            return batch.column(name).to(values.device)[scored]

        loss, clipped = functional.clipped_value_loss(values, column("values"), column("returns"), self.value_clip)
        diagnostics = {
            "value": values.detach(),
            "error": (values.detach() - column("returns")).square(),
            "clip_fraction": clipped.float(),
        }
        return (column("loss_weights") * loss).sum(), diagnostics


ALGORITHM = PPO
