"""What the roles that learn have in common: a model under DeepSpeed, and an optimizer step with its metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf.backends.deepspeed import DeepSpeedBackend
from rlhf.config import Train
from rlhf.schedule import learning_rate
from rlhf.types import Minibatch
from rollout_engine.models.decoder import Backbone

log = logging.getLogger(__name__)

# (model or its DeepSpeed engine, micro-batch) -> a loss that sums over micro-batches and ranks, and diagnostics by
# name, one value per trained token [R].
Data = TypeVar("Data", bound=Minibatch)
Forward = Callable[[nn.Module, Data], tuple[Tensor, dict[str, Tensor]]]


class Learner:
    """One rank of a role that learns.

    Args:
        name: of the role, under which metrics are filed. run_folder: where a skipped update leaves its batch.
        total_updates: optimizer steps of the run, for the schedule. timeout_s: bound of every collective.
    """

    def __init__(
        self, name: str, model: Backbone, train: Train, *, run_folder: Path, total_updates: int, timeout_s: float
    ) -> None:
        self.name = name
        self.train = train
        self.run_folder = run_folder
        self.total_updates = total_updates
        self.num_updates = 0
        self.num_skipped = 0
        self.backend = DeepSpeedBackend(model, train, model.norm.weight.dtype, timeout_s)

    def microbatches(self, batch: Data) -> list[Data]:
        """The batch's micro-batches, as many as on the rank that has the most. Collective."""
        return self.backend.microbatches(batch, self.train.tokens_per_microbatch)

    def step(
        self, minibatch: Data, forward: Forward[Data], before_step: Callable[[], None]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One optimizer step on this rank's share of a weighed minibatch.

        A non-finite gradient skips the step, on every rank, and leaves the batch behind. Returns the metrics of all
        ranks together, with the diagnostics' token means, and the diagnostics' maxima. Collective.
        """
        sums = _Diagnostics()

        def loss_fn(engine: nn.Module, micro: Data) -> Tensor:
            loss, diagnostics = forward(engine, micro)
            sums.add(diagnostics)
            return loss

        train = self.train
        lr = learning_rate(self.num_updates, self.total_updates, train.lr, train.warmup_steps, train.schedule)
        first = self.num_updates == self.num_skipped
        result = self.backend.step(minibatch, train.tokens_per_microbatch, loss_fn, lr, before_step, first=first)
        self.num_updates += 1
        if result.skipped:
            self.num_skipped += 1
            dump = self.run_folder / f"skipped-{self.name}-update-{self.num_updates}-rank-{self.backend.rank}.pt"
            torch.save(minibatch, dump)
            log.warning(
                "%s update %d skipped, gradient norm %s; its batch: %s",
                self.name, self.num_updates, result.grad_norm, dump,
            )  # fmt: skip
        means, peaks = sums.reduce(self.backend)
        metrics = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "skipped_updates": float(self.num_skipped),
            **means,
        }
        return {f"{self.name}/{key}": value for key, value in metrics.items()}, peaks

    def save_state(self, folder: Path, **extra: Any) -> None:
        """Write everything that the next step depends on, and ``extra`` plain values. Collective."""
        counts = {"num_updates": self.num_updates, "num_skipped": self.num_skipped}
        self.backend.save_state(folder, {**counts, **extra})

    def load_state(self, folder: Path) -> dict[str, Any]:
        """Be where the learner was that wrote ``folder``; the plain values. Collective."""
        values = self.backend.load_state(folder)
        self.num_updates, self.num_skipped = values["num_updates"], values["num_skipped"]
        return values


class _Diagnostics:
    """Token means and maxima over the micro-batches of a step. Held where they are: the host asks for them once."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.peak: dict[str, Tensor] = {}
        self.count = 0

    def add(self, columns: dict[str, Tensor]) -> None:
        self.count += len(next(iter(columns.values())))
        for name, column in columns.items():
            column = column.detach().double()
            peak = column.max() if len(column) else column.new_tensor(-math.inf)
            self.total[name] = self.total[name] + column.sum() if name in self.total else column.sum()
            self.peak[name] = torch.maximum(self.peak[name], peak) if name in self.peak else peak

    def reduce(self, backend: DeepSpeedBackend) -> tuple[dict[str, float], dict[str, float]]:
        """Means and maxima by name, over all ranks. Collective."""
        *totals, count = backend.reduce([*numbers(self.total.values()), self.count], "sum")
        peaks = backend.reduce(numbers(self.peak.values()), "max")
        means = {name: total / max(1.0, count) for name, total in zip(self.total, totals, strict=True)}
        return means, dict(zip(self.peak, peaks, strict=True))


def numbers(tensors: Iterable[Tensor]) -> list[float]:
    """Of tensors of one element each, after one wait."""
    return torch.stack([*tensors]).tolist()
