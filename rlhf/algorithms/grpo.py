"""GRPO: group-relative advantages, no critic (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from rlhf.functional import clipped_surrogate, group_advantages, kl_k3, token_weights
from rlhf.types import Batch


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GRPO:
    """Hyper-parameters, as in the config's ``algorithm`` section.

    clip_low, clip_high: the ratio is clipped to [1 - low, 1 + high]. kl_coef: weight of the k3 estimate
    against the frozen reference in the loss; 0 runs without a reference. std: divide the advantage by
    the group's standard deviation, or don't. aggregation: see ``functional.token_weights``.
    updates_per_rollout: optimizer steps per batch of samples. truncated: "mask" keeps cut-off answers
    out of the loss (they stay in the baseline).
    """

    name: Literal["grpo"] = "grpo"
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    std: Literal["group", "none"] = "group"
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    updates_per_rollout: Annotated[int, Field(ge=1)] = 1
    truncated: Literal["score", "mask"] = "score"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("reference",) if self.kl_coef > 0 else ()

    @property
    def mask_truncated(self) -> bool:
        return self.truncated == "mask"

    def advantages(self, batch: Batch) -> Batch:
        per_sequence = group_advantages(batch.rewards, batch.groups, normalize_std=self.std == "group")
        return batch.replace(advantages=batch.per_token(per_sequence))

    def minibatches(self, batch: Batch, max_tokens: int) -> Iterator[Batch]:
        """Sequence i goes to step i mod ``updates_per_rollout``, which spreads a group over the steps."""
        for first in range(self.updates_per_rollout):
            sequences = range(first, batch.num_sequences, self.updates_per_rollout)
            if not sequences:  # fewer answers were judged than there are steps
                return
            part = batch.select(sequences)
            weights = token_weights(part.loss_mask, part.lengths, self.aggregation, max_tokens)
            yield part.replace(loss_weights=weights)

    def policy_loss(
        self, logprobs: Tensor, entropy: Tensor, batch: Batch, scored: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        def column(name: str) -> Tensor:
            return batch.column(name).to(logprobs.device)[scored]

        # With one step per rollout the sampling policy is the current one: the ratio is 1, only its gradient counts.
        old = logprobs.detach() if self.updates_per_rollout == 1 else column("old_logprobs")
        loss, clipped = clipped_surrogate(logprobs, old, column("advantages"), self.clip_low, self.clip_high)
        diagnostics = {"entropy": entropy.detach(), "clip_fraction": clipped.float()}
        if self.kl_coef > 0:
            kl = kl_k3(logprobs, column("ref_logprobs"))
            loss = loss + self.kl_coef * kl
            diagnostics["kl"] = kl.detach()
        return (column("loss_weights") * loss).sum(), diagnostics


ALGORITHM = GRPO
