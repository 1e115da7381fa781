"""The family behind the presets: one policy-gradient loss, advantages without a critic, and the axes of both.

A preset (``grpo.py``, ``gspo.py``, ...) is a name and defaults. Every axis is a key of the config's ``algorithm``
section and can be set under any preset; what contradicts itself is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from rlhf import functional
from rlhf.types import Batch

Level = Literal["group", "batch", "none"]
Unit = Literal["token", "sequence"]
ClipRule = Literal["ppo", "cispo", "none"]
ClipLow = Annotated[float, Field(ge=0, le=1)]
ClipHigh = Annotated[float, Field(ge=0)]
Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]
KLEstimator = Literal["k1", "k2", "k3"]
KLPlace = Literal["loss", "reward"]

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class PolicyGradient:
    """The loss, whatever made the advantages. Raises ValueError for axes that contradict each other.

    ratio: importance ratio of each token, or of the whole answer (``functional.sequence_ratio``).
    clip: ``ppo`` clips the objective (``functional.clipped_surrogate``), ``cispo`` the detached weight of
    REINFORCE (``functional.clipped_weight_loss``), to [1 - clip_low, 1 + clip_high]; ``none``: ratio x advantage.
    dual_clip: bound on the loss of bad tokens, only with ``ppo``.
    aggregation: what a token weighs (``functional.token_weights``).
    entropy_coef: weight of the entropy, which is subtracted from the loss.
    kl_coef: weight of the KL to the frozen reference; 0 runs without one. kl_estimator:
    ``functional.kl_estimate``. kl_in: a term of the ``loss``, with gradient, or a penalty on each token's
    ``reward``, of the policy that sampled (beware: divided by their deviation, answers of equal reward are
    then told apart by their penalties alone, however small kl_coef is).
    kl_target: mean KL per token (nats) that kl_coef is adapted to after each step (``functional.adapted_kl_coef``);
    None: it stays.
    tis_clip: multiply the policy loss by the importance of trainer over sampler, at most this
    (``functional.truncated_importance``); None: the two agree.
    updates_per_rollout: optimizer steps per pass over a batch of samples. epochs: passes.
    truncated: ``mask`` keeps cut-off answers out of the loss (they stay in the baseline over answers).
    """

    name: str
    ratio: Unit = "token"
    clip: ClipRule = "ppo"
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    aggregation: Aggregation = "token_mean"
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    kl_target: Annotated[float, Field(gt=0)] | None = None
    kl_estimator: KLEstimator = "k3"
    kl_in: KLPlace = "loss"
    tis_clip: Annotated[float, Field(gt=0)] | None = None
    updates_per_rollout: Annotated[int, Field(ge=1)] = 1
    epochs: Annotated[int, Field(ge=1)] = 1
    truncated: Literal["score", "mask"] = "score"

    def __post_init__(self) -> None:
        if self.dual_clip is not None and self.clip != "ppo":
            raise ValueError(
                f"algorithm.dual_clip={self.dual_clip} bounds PPO's objective, and algorithm.clip={self.clip}; "
                "set clip=ppo or dual_clip=null"
            )
        if self.kl_coef == 0:
            return
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "algorithm.kl_estimator=k1 with kl_in=loss: on the policy's own samples the expectation of its "
                "gradient is 0, so it would hold nothing back; set kl_estimator to k2 or k3, or kl_in=reward"
            )
        if self.kl_in == "reward" and self.truncated == "mask":
            raise ValueError(
                "algorithm.kl_in=reward with truncated=mask: the tokens of a masked answer aren't scored, so its "
                "penalty would be missing from the baseline; set truncated=score or kl_in=loss"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        return ("reference",) if self.kl_coef > 0 else ()

    @property
    def is_on_policy(self) -> bool:
        """One optimizer step per rollout: the policy that is trained is the one that sampled."""
        return self.epochs * self.updates_per_rollout == 1

    def learners(self, step: int) -> tuple[str, ...]:
        return ("policy",)

    @property
    def mask_truncated(self) -> bool:
        return self.truncated == "mask"

    def kl_penalty(self, batch: Batch) -> Tensor:
        """What each token costs in reward, [T] fp64: kl_coef x the estimate under the policy that sampled it."""
        if self.kl_coef == 0 or self.kl_in == "loss":
            return torch.zeros(batch.num_tokens, dtype=torch.float64)
        sampled = batch.rollout_logprobs if self.is_on_policy else batch.column("old_logprobs")
        kl = functional.kl_estimate(sampled.double(), batch.column("ref_logprobs").double(), self.kl_estimator)
        return self.kl_coef * kl * batch.loss_mask

    def mean_kl(self, batch: Batch) -> float:
        """Estimate of the KL per trained token, in nats, of the policy that sampled."""
        trained = batch.loss_mask
        sampled, reference = batch.rollout_logprobs[trained].double(), batch.column("ref_logprobs")[trained].double()
        return float(functional.kl_estimate(sampled, reference, self.kl_estimator).mean())

    def adapted(self, batch: Batch) -> Self:
        if self.kl_target is None or self.kl_coef == 0 or not batch.loss_mask.any():
            return self
        return replace(self, kl_coef=functional.adapted_kl_coef(self.kl_coef, self.mean_kl(batch), self.kl_target))

    def minibatches(self, batch: Batch, max_tokens: int) -> Iterator[Batch]:
        """Sequence i goes to step i mod ``updates_per_rollout``, which spreads a group over the steps; further epochs
        divide the sequences anew, the same way in every run."""
        for epoch in range(self.epochs):
            order = torch.arange(batch.num_sequences)
            if epoch:
                order = torch.randperm(batch.num_sequences, generator=torch.Generator().manual_seed(epoch))
            for first in range(min(self.updates_per_rollout, batch.num_sequences)):  # some may not have been judged
                yield self.weighed(batch.select(sorted(order[first :: self.updates_per_rollout].tolist())), max_tokens)

    def weighed(self, minibatch: Batch, max_tokens: int) -> Batch:
        """What each token counts in the losses of one optimizer step."""
        weights = functional.token_weights(minibatch.loss_mask, minibatch.lengths, self.aggregation, max_tokens)
        minibatch = minibatch.replace(loss_weights=weights)
        if self.kl_coef > 0 and self.kl_in == "loss":
            minibatch = minibatch.replace(kl_weights=self.kl_coef * weights)
        return minibatch

    def policy_loss(
        self, logprobs: Tensor, entropy: Tensor, batch: Batch, scored: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def column(name: str) -> Tensor:
            return batch.column(name).to(logprobs.device)[scored]

        # With one step per rollout the sampling policy is the current one: the ratio is 1, only its gradient counts.
        old = logprobs.detach() if self.is_on_policy else column("old_logprobs")
        if self.ratio == "sequence":
            counts = tuple(int(part.sum()) for part in batch.loss_mask.split(batch.lengths))
            ratio = functional.sequence_ratio(logprobs, old, counts)
        else:
            ratio = functional.token_ratio(logprobs, old)
        loss, clipped = self._clip(ratio, logprobs, column("advantages"))
        diagnostics = {"entropy": entropy.detach(), "ratio": ratio.detach(), "clip_fraction": clipped.float()}
        if self.tis_clip is not None:
            weight, capped = functional.truncated_importance(old, column("rollout_logprobs"), self.tis_clip)
            loss = weight * loss
            diagnostics.update(tis_weight=weight, tis_truncated=capped.float())
        if self.kl_coef > 0:
            kl = functional.kl_estimate(logprobs, column("ref_logprobs"), self.kl_estimator)
            diagnostics["kl"] = kl.detach()
        total = (column("loss_weights") * (loss - self.entropy_coef * entropy)).sum()
        if self.kl_coef > 0 and self.kl_in == "loss":
            total = total + (column("kl_weights") * kl).sum()
        return total, diagnostics

    def _clip(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [R], and where a clip acted [R] bool."""
        if self.clip == "ppo":
            return functional.clipped_surrogate(ratio, advantages, self.clip_low, self.clip_high, self.dual_clip)
        if self.clip == "cispo":
            return functional.clipped_weight_loss(ratio, logprobs, advantages, self.clip_low, self.clip_high)
        return -ratio * advantages, torch.zeros_like(ratio, dtype=torch.bool)


@dataclass(frozen=True, config=STRICT)
class CriticFree(PolicyGradient):
    """Advantages from the returns of the batch alone (``functional.relative_advantages``); the defaults are GRPO's.

    returns: ``sequence`` compares answers, each by its reward less the KL penalties of all its tokens; ``token``
    compares trained tokens, each by the reward less the penalties still to come (reward-to-go, REINFORCE++).
    baseline: the mean that is subtracted is over the prompt's group, the rollout batch, or there is none.
    leave_one_out: of the other answers of the group only (RLOO). std: the deviation that is divided by.
    """

    returns: Unit = "sequence"
    baseline: Level = "group"
    leave_one_out: bool = False
    std: Level = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leave_one_out and self.baseline != "group":
            raise ValueError(
                f"algorithm.leave_one_out=true leaves an answer out of its group's mean, and algorithm.baseline="
                f"{self.baseline}; set baseline=group or leave_one_out=false"
            )
        if self.std != "none" and self.baseline not in ("group", self.std):
            raise ValueError(
                f"algorithm.std={self.std} with baseline={self.baseline}: equal returns in a {self.std} would be "
                f"divided by 0; set std=none{'' if self.baseline == 'none' else ' or batch'}, or baseline={self.std}"
            )
        if self.returns == "token" and "group" in (self.baseline, self.std):
            raise ValueError(
                f"algorithm.returns=token compares tokens over the whole batch, and algorithm.baseline={self.baseline} "
                f"with std={self.std} groups them by prompt; set both to batch or none, or returns=sequence"
            )

    @property
    def min_samples_per_prompt(self) -> int:
        return 2 if self.baseline == "group" else 1

    def advantages(self, batch: Batch) -> Batch:
        penalty, rewards = self.kl_penalty(batch), batch.rewards.double()
        if self.returns == "sequence":
            returns = rewards - functional.sequence_sums(penalty, batch.lengths)
            return batch.replace(advantages=batch.per_token(self._relative(returns, batch.groups)))
        trained = batch.loss_mask
        returns = batch.per_token(rewards) - functional.sums_to_go(penalty, batch.lengths)
        column = torch.zeros(batch.num_tokens)
        column[trained] = self._relative(returns[trained], batch.per_token(batch.groups)[trained])
        return batch.replace(advantages=column)

    def _relative(self, returns: Tensor, groups: Tensor) -> Tensor:
        return functional.relative_advantages(
            returns, groups, baseline=self.baseline, std=self.std, leave_one_out=self.leave_one_out
        ).float()
