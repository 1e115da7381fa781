"""What the roles that don't learn have in common: a model, whole on every rank or divided among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from kernels.device import default_device
from rlhf.config import Train
from rlhf.types import Minibatch
from rollout_engine.models.decoder import Backbone

Data = TypeVar("Data", bound=Minibatch)


class Frozen:
    """One rank of it.

    Args:
        load: the decoder on a device. train: ``zero_stage`` 3 divides the weights among the ranks, and every call is
            then collective; otherwise each rank has them all, and works for itself. timeout_s: bound of a collective.
    """

    def __init__(self, load: Callable[[torch.device], Backbone], train: Train, timeout_s: float) -> None:
        self.tokens_per_microbatch = train.tokens_per_microbatch
        self.ranks = None
        if train.zero_stage == 3:
            from rlhf.backends.deepspeed import FrozenBackend

            self.ranks = FrozenBackend(load(torch.device("cpu")).requires_grad_(False), timeout_s)
            self.model: nn.Module = self.ranks.engine
        else:
            self.model = load(default_device()).requires_grad_(False)

    def microbatches(self, batch: Data) -> list[Data]:
        """Those to run: the batch's, and where the model is divided as many fillers as it takes to keep up with the
        rank that has the most."""
        if self.ranks is None:
            return list(batch.microbatches(self.tokens_per_microbatch))
        return self.ranks.microbatches(batch, self.tokens_per_microbatch)
