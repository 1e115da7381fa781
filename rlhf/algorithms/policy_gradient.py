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
Baseline = Literal["group", "batch", "greedy", "none"]
Unit = Literal["token", "sequence"]
ClipRule = Literal["ppo", "cispo", "none"]
ClipLow = Annotated[float, Field(ge=0, le=1)]
ClipHigh = Annotated[float, Field(ge=0)]
Aggregation = Literal["token_mean", "sequence_mean", "constant_length"]
KLEstimator = Literal["k1", "k2", "k3"]
KLPlace = Literal["loss", "reward"]
TISClip = Annotated[float, Field(gt=0)] | None

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class PolicyGradient:
    """The loss, whatever made the advantages. Raises ValueError for axes that contradict each other.

    What is sampled:
        dynamic_sampling: groups whose rewards are all equal are left out, and more prompts are sampled, in at most
        max_rollouts_per_step rounds; what is too many waits for the next step (``rlhf.rollouts``).
    What is rewarded:
        overlong_buffer: share of ``rollout.max_tokens`` over which an answer's reward falls by up to
        overlong_penalty (``functional.overlong_penalty``); 0: none. reward_norm: rewards of the rollout ``batch`` to
        mean 0 and deviation 1. reward_clip: then, bound on their size.
    What the loss is:
        ratio: importance ratio of each token, or of the whole answer (``functional.sequence_ratio``).
        proximal: what it is a ratio to: the ``trainer``'s policy at the start of the step, which with an importance
        weight or a rejection makes the decoupled objective of three policies (Hilton et al. 2021, arXiv 2110.00641;
        AReaL 2025, arXiv 2505.24298), or the ``sampler`` itself, without a pass for old log-probs.
        clip: ``ppo`` clips the objective (``functional.clipped_surrogate``), ``cispo`` the detached weight of
        REINFORCE (``functional.clipped_weight_loss``), to [1 - clip_low, 1 + clip_high]; ``none``: ratio x advantage.
        dual_clip: bound on the loss of bad tokens, only with ``ppo``.
        aggregation: what a token weighs (``functional.token_weights``).
        entropy_coef: weight of the entropy, which is subtracted from the loss.
    Where the sampler is not the trainer (older weights, other arithmetic, truncated sampling):
        tis_clip: multiply the policy loss by the importance of trainer over sampler, of each token or of the whole
        answer (``importance``), at most this (``functional.truncated_importance``); None: the two agree.
        reject: leave tokens out of the policy loss whose importance, by this unit, is outside [reject_low,
        reject_high] (``functional.rejection_mask``).
    What holds it back:
        kl_coef: weight of the KL to the frozen reference; 0 runs without one. kl_estimator:
        ``functional.kl_estimate``. kl_in: a term of the ``loss``, with gradient, or a penalty on each token's
        ``reward``, of the policy that sampled (beware: divided by their deviation, answers of equal reward are
        then told apart by their penalties alone, however small kl_coef is).
        kl_target: mean KL per token (nats) that kl_coef is adapted to after each step in which the policy learns
        (``functional.adapted_kl_coef``); None: it stays.
    How often:
        updates_per_rollout: optimizer steps per pass over a batch of samples. epochs: passes.
        truncated: ``mask`` keeps cut-off answers out of the loss (they stay in the baseline over answers).
    """

    name: str
    dynamic_sampling: bool = False
    max_rollouts_per_step: Annotated[int, Field(ge=1)] = 8
    overlong_buffer: Annotated[float, Field(ge=0, le=1)] = 0.0
    overlong_penalty: Annotated[float, Field(ge=0)] = 1.0
    reward_norm: Literal["none", "batch"] = "none"
    reward_clip: Annotated[float, Field(gt=0)] | None = None
    ratio: Unit = "token"
    proximal: Literal["trainer", "sampler"] = "trainer"
    clip: ClipRule = "ppo"
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    aggregation: Aggregation = "token_mean"
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    tis_clip: TISClip = None
    importance: Unit = "token"
    reject: Literal["none", "token", "sequence", "geometric"] = "none"
    reject_low: Annotated[float, Field(ge=0, le=1)] = 0.5
    reject_high: Annotated[float, Field(ge=1)] = 5.0
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    kl_target: Annotated[float, Field(gt=0)] | None = None
    kl_estimator: KLEstimator = "k3"
    kl_in: KLPlace = "loss"
    updates_per_rollout: Annotated[int, Field(ge=1)] = 1
    epochs: Annotated[int, Field(ge=1)] = 1
    truncated: Literal["score", "mask"] = "score"

    def __post_init__(self) -> None:
        if self.dual_clip is not None and self.clip != "ppo":
            raise ValueError(
                f"algorithm.dual_clip={self.dual_clip} bounds PPO's objective, and algorithm.clip={self.clip}; "
                "set clip=ppo or dual_clip=null"
            )
        if self.proximal == "sampler" and (self.tis_clip is not None or self.reject != "none"):
            raise ValueError(
                f"algorithm.proximal=sampler makes the ratio itself correct for the sampler, and algorithm.tis_clip="
                f"{self.tis_clip} with reject={self.reject} would do so again; set proximal=trainer, or tis_clip=null "
                "and reject=none"
            )
        if self.dynamic_sampling and not self.corrects_sampling:
            raise ValueError(
                "algorithm.dynamic_sampling=true trains on answers that waited for a step, which an older policy "
                "sampled, and nothing corrects for that; set tis_clip (2.0, say), or proximal=sampler"
            )
        low, high = functional.KL_COEF_MIN, functional.KL_COEF_MAX
        if self.kl_target is not None and self.kl_coef > 0 and not low <= self.kl_coef <= high:
            raise ValueError(
                f"algorithm.kl_coef={self.kl_coef} with kl_target={self.kl_target}: the coefficient is adapted within "
                f"[{low}, {high}]; start it there, or set kl_target=null"
            )
        if self.kl_coef > 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "algorithm.kl_estimator=k1 with kl_in=loss: on the policy's own samples the expectation of its "
                "gradient is 0, so it would hold nothing back; set kl_estimator to k2 or k3, or kl_in=reward"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        return ("reference",) if self.kl_coef > 0 else ()

    @property
    def is_on_policy(self) -> bool:
        """One optimizer step per rollout: the policy that is trained is the one that sampled."""
        return self.epochs * self.updates_per_rollout == 1

    @property
    def needs_old_logprobs(self) -> bool:
        return self.proximal == "trainer" and not self.is_on_policy

    @property
    def corrects_sampling(self) -> bool:
        return self.tis_clip is not None or self.proximal == "sampler"

    @property
    def greedy_baseline(self) -> bool:
        return False

    @property
    def min_samples_per_prompt(self) -> int:
        return 2 if self.dynamic_sampling else 1

    def learners(self, step: int) -> tuple[str, ...]:
        return ("policy",)

    @property
    def mask_truncated(self) -> bool:
        return self.truncated == "mask"

    def shaped(self, rewards: Tensor, batch: Batch) -> Tensor:
        """Rewards of answers to the batch's prompts, [S] fp64, normalised and clipped.

        Rounded to fp32, so that means of equal ones are exact in fp64 and a flat group's advantages exactly 0.
        """
        if self.reward_norm == "batch":
            rewards = functional.whitened(rewards.double(), of=batch.rewards).float()
        bound = self.reward_clip
        return (rewards if bound is None else rewards.clamp(-bound, bound)).double()

    def kl_penalty(self, batch: Batch) -> Tensor:
        """What each token costs in reward, [T] fp64: kl_coef x the estimate under the policy that sampled it."""
        if self.kl_coef == 0 or self.kl_in == "loss":
            return torch.zeros(batch.num_tokens, dtype=torch.float64)
        sampled = batch.column("old_logprobs") if self.needs_old_logprobs else batch.rollout_logprobs
        kl = functional.kl_estimate(sampled.double(), batch.column("ref_logprobs").double(), self.kl_estimator)
        return self.kl_coef * kl * batch.loss_mask

    def mean_kl(self, batch: Batch) -> float:
        """KL to the reference per trained token, in nats, of the policy that sampled; of no token, 0.

        Always k1, which is unbiased with little variance in the mean over a batch. That of k3 lies in the few tokens
        that the policy has all but given up: where k1 told 0.6 nats, k3 told 0.36 to 0.96 from step to step.
        """
        trained = batch.loss_mask
        sampled, reference = batch.rollout_logprobs[trained].double(), batch.column("ref_logprobs")[trained].double()
        kl = functional.kl_estimate(sampled, reference, "k1")
        return float(kl.sum() / max(1, len(kl)))

    def adapted(self, batch: Batch, step: int) -> Self:
        idle = "policy" not in self.learners(step) or not batch.loss_mask.any()
        if self.kl_target is None or self.kl_coef == 0 or idle:
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

        behaviour = batch.behaviour_logprobs.to(logprobs.device)[scored]
        if self.proximal == "sampler":
            old = behaviour
        elif self.needs_old_logprobs:
            old = column("old_logprobs")
        else:  # one step per rollout: the old policy is the current one, the ratio is 1 and only its gradient counts
            old = logprobs.detach()
        ratio = (
            functional.sequence_ratio(logprobs, old, batch.num_trained)
            if self.ratio == "sequence"
            else functional.token_ratio(logprobs, old)
        )
        loss, clipped = self._clip(ratio, logprobs, column("advantages"))
        diagnostics = {"entropy": entropy.detach(), "ratio": ratio.detach(), "clip_fraction": clipped.float()}
        if self.needs_old_logprobs or self.proximal == "sampler":
            diagnostics["approx_kl"] = functional.kl_estimate(old, logprobs.detach(), "k3")
        if self.tis_clip is not None:
            weight, capped = functional.truncated_importance(
                old, behaviour, batch.num_trained, self.importance, self.tis_clip
            )
            loss = weight * loss
            diagnostics.update(tis_weight=weight, tis_truncated=capped.float())
        if self.reject != "none":
            kept = functional.rejection_mask(
                old, behaviour, batch.num_trained, self.reject, self.reject_low, self.reject_high
            )
            loss = torch.where(kept, loss, 0)
            diagnostics["rejected"] = 1 - kept.float()
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
    baseline: the mean that is subtracted is over the prompt's group, the rollout batch, or there is none; ``greedy``
    subtracts the reward of the greedy answer to the prompt instead (ReMax).
    leave_one_out: of the other answers of the group only (RLOO). std: the deviation that is divided by.
    """

    returns: Unit = "sequence"
    baseline: Baseline = "group"
    leave_one_out: bool = False
    std: Level = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_coef > 0 and self.kl_in == "reward" and self.truncated == "mask":
            raise ValueError(
                "algorithm.kl_in=reward with truncated=mask: the tokens of a masked answer aren't scored, so its "
                "penalty would be missing from the baseline; set truncated=score or kl_in=loss"
            )
        if self.leave_one_out and self.baseline != "group":
            raise ValueError(
                f"algorithm.leave_one_out=true leaves an answer out of its group's mean, and algorithm.baseline="
                f"{self.baseline}; set baseline=group or leave_one_out=false"
            )
        if self.std != "none" and self.baseline not in ("group", self.std):
            raise ValueError(
                f"algorithm.std={self.std} with baseline={self.baseline}: equal returns in a {self.std} would be "
                f"divided by 0; set std=none{' or batch' if self.baseline == 'batch' else ''}, or baseline={self.std}"
            )
        if self.returns == "token" and "group" in (self.baseline, self.std):
            raise ValueError(
                f"algorithm.returns=token compares tokens over the whole batch, and algorithm.baseline={self.baseline} "
                f"with std={self.std} groups them by prompt; set both to batch or none, or returns=sequence"
            )

    @property
    def greedy_baseline(self) -> bool:
        return self.baseline == "greedy"

    @property
    def min_samples_per_prompt(self) -> int:
        return 2 if self.baseline == "group" else super().min_samples_per_prompt

    def advantages(self, batch: Batch) -> Batch:
        penalty, rewards = self.kl_penalty(batch), self.shaped(batch.rewards, batch)
        if self.greedy_baseline:
            rewards = rewards - self.shaped(batch.column("baselines"), batch)
        if self.returns == "sequence":
            returns = rewards - functional.sequence_sums(penalty, batch.lengths)
            return batch.replace(advantages=batch.per_token(self._relative(returns, batch.groups)))
        trained = batch.loss_mask
        returns = batch.per_token(rewards) - functional.sums_to_go(penalty, batch.lengths)
        column = torch.zeros(batch.num_tokens)
        column[trained] = self._relative(returns[trained], batch.per_token(batch.groups)[trained])
        return batch.replace(advantages=column)

    def _relative(self, returns: Tensor, groups: Tensor) -> Tensor:
        level = "none" if self.baseline == "greedy" else self.baseline  # that one is per answer, and gone already
        return functional.relative_advantages(
            returns, groups, baseline=level, std=self.std, leave_one_out=self.leave_one_out
        ).float()
