"""One algorithm a file: a frozen dataclass that is its own config section, with pure methods.

The name in the config is the name of the module; :func:`load` finds it. Those without a critic are presets over
the axes of ``policy_gradient``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from rlhf.types import Batch

# The warm start's objective and what the presets share; not choices for `algorithm.name`.
_NOT_ALGORITHMS = {"sft", "policy_gradient"}


class Objective(Protocol):
    """What the policy asks of what it is trained with."""

    def policy_loss(
        self, logprobs: Tensor, entropy: Tensor, batch: Batch, scored: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (a scalar that sums over micro-batches) of the scored tokens [R] and per-token diagnostics [R]."""


class Algorithm(Objective, Protocol):
    """What the loop asks of an algorithm."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Scoring roles beside the policy, in the order they run."""

    @property
    def kl_coef(self) -> float: ...

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per pass over a rollout batch."""

    @property
    def epochs(self) -> int: ...

    @property
    def needs_old_logprobs(self) -> bool:
        """The ratio's denominator is the trainer's policy before several optimizer steps; the policy scores them."""

    @property
    def corrects_sampling(self) -> bool:
        """Tokens may come from another distribution than the policy's: of older weights, or truncated."""

    def learners(self, step: int) -> tuple[str, ...]:
        """Roles that take every optimizer step of the rollout of ``step`` (from 1)."""

    @property
    def mask_truncated(self) -> bool:
        """Keep cut-off answers out of the loss."""

    @property
    def min_samples_per_prompt(self) -> int:
        """Answers to a prompt below which all advantages would be 0."""

    @property
    def greedy_baseline(self) -> bool:
        """Every prompt is answered once more, greedily, and ``baselines`` holds that answer's reward."""

    @property
    def dynamic_sampling(self) -> bool:
        """Groups of equal rewards are replaced by more samples, in at most ``max_rollouts_per_step`` rounds."""

    @property
    def max_rollouts_per_step(self) -> int: ...

    @property
    def overlong_buffer(self) -> float:
        """Share of the longest answer over which the reward falls by up to ``overlong_penalty``; 0: none."""

    @property
    def overlong_penalty(self) -> float: ...

    def advantages(self, batch: Batch) -> Batch:
        """Fill ``advantages``, and ``returns`` where there is a critic, over the whole rollout batch."""

    def mean_kl(self, batch: Batch) -> float:
        """KL per token to the reference, in nats, of the policy that sampled."""

    def adapted(self, batch: Batch, step: int) -> Algorithm:
        """The algorithm for the step after ``step``: this one, but for what it tunes by itself (the KL coefficient)."""

    def minibatches(self, batch: Batch, max_tokens: int) -> Iterator[Batch]:
        """One batch per optimizer step, with ``loss_weights``."""


def names() -> list[str]:
    """Names that ``algorithm.name`` may take."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_ALGORITHMS)


def summary(name: str) -> str:
    """What an algorithm is, and its paper, in a line."""
    return (importlib.import_module(f"rlhf.algorithms.{name}").__doc__ or "").partition("\n")[0]


def load(section: dict[str, Any]) -> Algorithm:
    """Build the algorithm of a config section ``{name: ..., **hyper-parameters}``.

    Raises ValueError naming the known algorithms.
    """
    name = section.get("name")
    if name not in names():
        raise ValueError(f"algorithm.name={name!r}: choose one of {names()}, or add rlhf/algorithms/{name}.py")
    module = importlib.import_module(f"rlhf.algorithms.{name}")
    return module.ALGORITHM(**section)
