"""The reference: a frozen copy of the starting policy, against which KL is measured."""

from __future__ import annotations

from pathlib import Path

from kernels.device import default_device
from rlhf.config import ModelSection, Train
from rlhf.division import divide_batch, over_ranks
from rlhf.packing import forward_logprobs, score_tokens
from rlhf.types import Batch
from rollout_engine.models.checkpoint import load_model


class Reference:
    def __init__(self, *, checkpoint: Path, model: ModelSection, train: Train) -> None:
        loaded = load_model(checkpoint, dtype=model.dtype, device=default_device())
        self.decoder = loaded.decoder.requires_grad_(False)
        self.tokens_per_microbatch = train.tokens_per_microbatch

    @over_ranks(divide_batch)
    def score(self, batch: Batch) -> Batch:
        """Fill ``ref_logprobs``."""
        microbatches = batch.microbatches(self.tokens_per_microbatch)
        return batch.replace(ref_logprobs=score_tokens(forward_logprobs, self.decoder, microbatches))
