"""The reference: a frozen copy of the starting policy, against which KL is measured."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf.config import ModelSection, Train
from rlhf.division import divide_batch, over_ranks
from rlhf.packing import forward_logprobs, score_tokens
from rlhf.roles.frozen import Frozen
from rlhf.types import Batch
from rollout_engine.models.checkpoint import load_model
from rollout_engine.models.decoder import Backbone


class Reference:
    """One rank of it. exact: log-probs of the bits that a policy in exact numerics gives, on a GPU too. train,
    timeout_s: as :class:`rlhf.roles.frozen.Frozen`'s."""

    def __init__(
        self, *, checkpoint: Path, model: ModelSection, train: Train, timeout_s: float, exact: bool = False
    ) -> None:
        def load(device: torch.device) -> Backbone:
            decoder = load_model(checkpoint, dtype=model.dtype, device=device).decoder
            decoder.set_exact(exact)
            return decoder

        self.frozen = Frozen(load, train, timeout_s)

    @over_ranks(divide_batch)
    def score(self, batch: Batch) -> Batch:
        """Fill ``ref_logprobs``."""
        logprobs = score_tokens(forward_logprobs, self.frozen.model, self.frozen.microbatches(batch))
        return batch.replace(ref_logprobs=logprobs[: batch.num_tokens])
