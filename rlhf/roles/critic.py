"""The critic: a scalar model that learns the return to expect at every token."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from kernels.device import default_device
from rlhf.algorithms.ppo import PPO
from rlhf.config import ModelSection, Train
from rlhf.division import divide_batch, divide_minibatch, over_ranks
from rlhf.packing import forward_values, score_tokens
from rlhf.roles.learner import Learner
from rlhf.types import Batch
from rollout_engine.models.checkpoint import load_scalar_model, save_model


class Critic:
    """One rank of it.

    Args:
        checkpoint: of a reward model, or of a language model, whose head gives way to one of zeros.
        run_folder, total_updates, timeout_s: as :class:`rlhf.roles.learner.Learner`'s.
    """

    def __init__(
        self,
        *,
        checkpoint: Path,
        run_folder: Path,
        model: ModelSection,
        train: Train,
        algorithm: PPO,
        total_updates: int,
        timeout_s: float,
    ) -> None:
        self.algorithm = algorithm
        self.model = load_scalar_model(checkpoint, dtype=model.dtype, device=default_device())
        self.model.decoder.gradient_checkpointing = model.gradient_checkpointing
        self.learner = Learner(
            "critic",
            self.model.decoder,
            train,
            run_folder=run_folder,
            total_updates=total_updates,
            timeout_s=timeout_s,
        )

    @over_ranks(divide_batch)
    def score(self, batch: Batch) -> Batch:
        """Fill ``values``. Collective."""
        micro = self.learner.microbatches(batch)
        values = score_tokens(forward_values, self.learner.backend.engine, micro)
        return batch.replace(values=values[: batch.num_tokens])

    @over_ranks(divide_minibatch)
    def update(self, minibatch: Batch) -> dict[str, float]:
        """One optimizer step towards the minibatch's ``returns``; metrics as :meth:`Learner.step`. Collective."""

        def forward(engine: nn.Module, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            scored, values = forward_values(engine, micro)
            return self.algorithm.value_loss(values, micro, scored)

        metrics, _ = self.learner.step(minibatch, forward, before_step=lambda: None)
        return metrics

    def save_state(self, folder: Path) -> None:
        """Write everything that the next step depends on. Collective."""
        self.learner.save_state(folder)

    def load_state(self, folder: Path) -> None:
        """Be where the critic was that wrote ``folder``; before the first step. Collective."""
        self.learner.load_state(folder)

    def save(self, folder: Path) -> None:
        """Write the weights as a Hugging Face sequence classifier (new folder, atomic); rank 0 does. Collective."""
        names = [name for name, _ in self.model.decoder.named_parameters()]
        with self.learner.backend.gathered(names):
            if self.learner.backend.rank == 0:
                save_model(self.model, folder)
