"""The types that flow: Prompt -> Completion -> Trajectory -> Batch -> WeightUpdate. All immutable.

Axes: S sequences, T tokens of all sequences laid end to end (no padding). A per-token column is aligned to
the token it speaks of: ``logprobs[t]`` scores ``tokens[t]``, given the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from rlhf.division import runs

if TYPE_CHECKING:  # importing rlhf must not import torch
    from torch import Tensor


Message = dict[str, Any]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Prompt:
    """One row of the data. ``columns`` are handed to the reward by name."""

    index: int
    text: str  # as the model sees it: of a conversation, what the chat template made
    token_ids: tuple[int, ...]
    columns: dict[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()  # the conversation, where there is one

    @property
    def question(self) -> str:
        """What a person knows it by: the last message, or the text."""
        return str(self.messages[-1]["content"]) if self.messages else self.text


@dataclass(frozen=True)
class Completion:
    """One sampled answer, as a reward sees it. Per-token fields have one entry per token of ``token_ids``."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" | "length"
    logprobs: tuple[float, ...] = ()  # full vocabulary at the sampling temperature
    weight_versions: tuple[int, ...] = ()
    sample_id: int = 0
    temperature: float = 1.0
    messages: tuple[Message, ...] = ()  # filled for the reward: the prompt's conversation, then this answer
    log_kept_mass: tuple[float, ...] = ()  # log of the probability that top_p, top_k, min_p left; (): all of it


@dataclass(frozen=True)
class Score:
    """A reward with the parts it is made of, which are logged by name (``reward/part/<name>``)."""

    value: float
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Why a component of the reward didn't score an answer; under ``reward.on_error: penalty`` it is the penalty."""

    kind: str  # "error": raised, or returned what is no score | "timeout"
    message: str


@dataclass(frozen=True)
class Trajectory:
    """A judged answer in token form. ``score`` None: not judged, left out of baseline and loss."""

    prompt: Prompt
    completion: Completion
    group: int  # samples of one prompt share it
    score: Score | None
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # True on sampled tokens
    logprobs: tuple[float, ...]  # of the sampler; 0 where loss_mask is False
    problem: Problem | None = None  # a component of the score is the penalty for it
    baseline: float | None = None  # reward of the greedy answer to the prompt, where the algorithm compares with it

    @classmethod
    def from_completion(
        cls,
        prompt: Prompt,
        completion: Completion,
        group: int,
        score: Score | None,
        problem: Problem | None = None,
    ) -> Trajectory:
        if len(completion.logprobs) != len(completion.token_ids):
            raise ValueError(f"{len(completion.logprobs)} log-probs for {len(completion.token_ids)} tokens; one each")
        given = len(prompt.token_ids)
        return cls(
            prompt,
            completion,
            group,
            score,
            token_ids=(*prompt.token_ids, *completion.token_ids),
            loss_mask=(False,) * given + (True,) * len(completion.token_ids),
            logprobs=(0.0,) * given + completion.logprobs,
            problem=problem,
        )

    @property
    def truncated(self) -> bool:
        return self.completion.finish_reason == "length"

    @property
    def log_kept_mass(self) -> tuple[float, ...]:
        """Aligned to ``token_ids``; 0 where nothing was cut off."""
        kept = self.completion.log_kept_mass or (0.0,) * len(self.completion.token_ids)
        return (0.0,) * (len(self.token_ids) - len(kept)) + kept

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """Aligned to ``token_ids``: of the weights that sampled the token, -1 for the prompt's."""
        versions = self.completion.weight_versions
        return (-1,) * (len(self.token_ids) - len(versions)) + versions


_FILLED_BY = {
    "old_logprobs": "Policy.score (needed when epochs x updates_per_rollout > 1 and proximal is trainer)",
    "ref_logprobs": "Reference.score (needed when kl_coef > 0)",
    "values": "Critic.score (needed by algorithms with a critic)",
    "log_kept_mass": "pack(), of answers sampled from a part of the vocabulary",
    "weight_versions": "pack(), of answers that carry theirs",
    "baselines": "pack(), of trajectories with a greedy answer (needed when baseline is greedy)",
    "advantages": "the algorithm's advantages()",
    "returns": "the advantages() of an algorithm with a critic",
    "kl_weights": "the algorithm's minibatches() (needed when kl_in is loss)",
    "loss_weights": "the algorithm's minibatches()",
}

_PER_SEQUENCE = ("groups", "rewards", "baselines")


@dataclass(frozen=True)
class Batch:
    """Packed sequences and their columns. Optional columns are filled on the way; :meth:`column` insists."""

    tokens: Tensor  # [T] int64
    lengths: tuple[int, ...]  # S
    loss_mask: Tensor  # [T] bool, True on the tokens that are trained
    temperature: Tensor  # [T] fp32, at which the token was sampled
    rollout_logprobs: Tensor  # [T] fp32, from the engine, full vocabulary
    groups: Tensor  # [S] int64
    rewards: Tensor  # [S] fp32
    log_kept_mass: Tensor | None = None  # [T] fp32, of truncated sampling; None: the full vocabulary was sampled from
    weight_versions: Tensor | None = None  # [T] int64, of the weights that sampled the token; -1: none did
    baselines: Tensor | None = None  # [S] fp32, reward of the greedy answer to the same prompt
    old_logprobs: Tensor | None = None  # [T] fp32
    ref_logprobs: Tensor | None = None  # [T] fp32
    values: Tensor | None = None  # [T] fp32, expected return before the token
    advantages: Tensor | None = None  # [T] fp32
    returns: Tensor | None = None  # [T] fp32, what the critic should have said
    loss_weights: Tensor | None = None  # [T] fp32, sums of weight * loss are the loss, however the batch is split
    kl_weights: Tensor | None = None  # [T] fp32, the same for the KL in the loss: loss weight x coefficient

    def column(self, name: str) -> Tensor:
        """A column that must be there. Raises ValueError naming who should have filled it."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"the batch has no {name!r}; it is filled by {_FILLED_BY[name]}")
        return value

    def replace(self, **columns: Tensor) -> Batch:
        return replace(self, **columns)  # type: ignore[arg-type]

    def with_columns_of(self, others: Sequence[Batch]) -> Batch:
        """With the columns that the others, made from this one, have beyond its own."""
        filled = {name: value for other in others for name, value in vars(other).items() if value is not None}
        return replace(self, **{name: value for name, value in filled.items() if getattr(self, name) is None})

    @property
    def behaviour_logprobs(self) -> Tensor:
        """[T] log-probs under the distribution that the tokens were drawn from: what truncated sampling kept of the
        full one, renormalised."""
        if self.log_kept_mass is None:
            return self.rollout_logprobs
        return self.rollout_logprobs - self.log_kept_mass

    @property
    def num_trained(self) -> tuple[int, ...]:
        """How many trained tokens each sequence has."""
        return tuple(int(part.sum()) for part in self.loss_mask.split(self.lengths))

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def per_token(self, per_sequence: Tensor) -> Tensor:
        """[S] -> [T], each value repeated over its sequence."""
        import torch

        return torch.repeat_interleave(per_sequence, torch.tensor(self.lengths))

    def select(self, sequences: Sequence[int]) -> Batch:
        """These sequences, in this order, with all their columns."""
        import torch

        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        index = torch.cat([torch.arange(ends[s], ends[s + 1]) for s in sequences])
        picked: dict[str, Any] = {"lengths": tuple(self.lengths[s] for s in sequences)}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "lengths" and value is not None:
                picked[f.name] = value[list(sequences)] if f.name in _PER_SEQUENCE else value[index]
        return Batch(**picked)

    def filler(self) -> Batch:
        """One token that trains nothing: for a rank that must run along with the others and has no work left."""
        import torch

        one = self.select([0])
        cut = {f.name: getattr(one, f.name) for f in fields(one) if f.name not in ("lengths", *_PER_SEQUENCE)}
        columns = {name: column[:1] for name, column in cut.items() if column is not None}
        return replace(one, lengths=(1,), **{**columns, "loss_mask": torch.zeros(1, dtype=torch.bool)})

    @classmethod
    def concatenate(cls, batches: Sequence[Batch]) -> Batch:
        """Sequences of several batches with the same columns, one after another."""
        import torch

        joined: dict[str, Any] = {"lengths": tuple(length for batch in batches for length in batch.lengths)}
        for f in fields(cls):
            if f.name != "lengths" and getattr(batches[0], f.name) is not None:
                joined[f.name] = torch.cat([batch.column(f.name) for batch in batches])
        return cls(**joined)

    def microbatches(self, max_tokens: int) -> Iterator[Batch]:
        """Runs of whole sequences of at most ``max_tokens`` tokens (or one sequence, if that alone is longer)."""
        for sequences in runs(self.lengths, max_tokens):
            yield self.select(sequences)


class Minibatch(Protocol):
    """What an optimizer step needs of its data: a :class:`Batch` has it, and preference pairs do."""

    def microbatches(self, max_tokens: int) -> Iterator[Self]:
        """Its parts, of at most ``max_tokens`` tokens where that can be."""

    def filler(self) -> Self:
        """The least there can be, which trains nothing."""


@dataclass(frozen=True)
class WeightUpdate:
    """What a swap did. ``changed`` False: every step since the last one was skipped, nothing moved."""

    version: int
    changed: bool
    mode: str  # "shared" | "copy"
    seconds: float
    bytes_moved: int
