"""Supervised next-token training on given answers: what a warm start minimises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rlhf.functional import token_weights
from rlhf.types import Batch


@dataclass(frozen=True)
class SFT:
    """Mean negative log-likelihood per answer token."""

    def minibatches(self, batch: Batch, max_tokens: int) -> Iterator[Batch]:
        yield batch.replace(loss_weights=token_weights(batch.loss_mask, batch.lengths, "token_mean", max_tokens))

    def policy_loss(
        self, logprobs: Tensor, entropy: Tensor, batch: Batch, scored: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = batch.column("loss_weights").to(logprobs.device)[scored]
        return -(weights * logprobs).sum(), {"entropy": entropy.detach()}
