"""Trajectories become a packed batch; a packed batch goes through the decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kernels.device import upload
from rlhf.types import Batch, Trajectory
from rollout_engine.models.context import PackedAttention


def pack(trajectories: Sequence[Trajectory], *, mask_truncated: bool = False) -> Batch:
    """Lay trajectories end to end. Those without a score are left out.

    ``mask_truncated`` keeps cut-off answers in their group's baseline but out of the loss.
    Optional columns are there when trajectories have what they hold. Raises ValueError when nothing was judged.
    """
    judged = [t for t in trajectories if t.score is not None]
    if not judged:
        raise ValueError(f"the reward judged none of {len(trajectories)} answers (None for each); nothing to train on")

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([x for t in judged for x in getattr(t, name)], dtype=dtype)

    lengths = tuple(len(t.token_ids) for t in judged)
    heat = torch.tensor([t.completion.temperature for t in judged], dtype=torch.float32)
    kept = torch.tensor([not (mask_truncated and t.truncated) for t in judged])
    repeats = torch.tensor(lengths)
    optional: dict[str, Tensor] = {}
    if any(t.completion.log_kept_mass for t in judged):
        optional["log_kept_mass"] = column("log_kept_mass", torch.float32)
    if any(t.completion.weight_versions for t in judged):
        optional["weight_versions"] = column("weight_versions", torch.int64)
    if any(t.baseline is not None for t in judged):
        optional["baselines"] = torch.tensor([t.baseline for t in judged], dtype=torch.float32)
    return Batch(
        tokens=column("token_ids", torch.int64),
        lengths=lengths,
        loss_mask=column("loss_mask", torch.bool) & kept.repeat_interleave(repeats),
        temperature=heat.repeat_interleave(repeats),
        rollout_logprobs=column("logprobs", torch.float32),
        groups=torch.tensor([t.group for t in judged]),
        rewards=torch.tensor([t.score.value for t in judged if t.score is not None], dtype=torch.float32),
        **optional,
    )


def pack_supervised(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """(prompt ids, answer ids) pairs as a batch that trains on the answers."""
    lengths = tuple(len(prompt) + len(answer) for prompt, answer in rows)
    total = sum(lengths)
    return Batch(
        tokens=torch.tensor([token for row in rows for part in row for token in part]),
        lengths=lengths,
        loss_mask=torch.tensor([scored for p, a in rows for scored in (*[False] * len(p), *[True] * len(a))]),
        temperature=torch.ones(total),
        rollout_logprobs=torch.zeros(total),
        groups=torch.arange(len(rows)),
        rewards=torch.zeros(len(rows)),
    )


@dataclass(frozen=True)
class SharedPrefixes:
    """A batch without the tokens that a sequence has in common with the first of its group, from the start on.

    The samples of a prompt repeat it, and what they repeat has the same hidden states, bit for bit: a token's row
    doesn't depend on its company. A sequence that repeats everything is left out altogether. So is every sequence's
    last token, which predicts nothing, unless it is kept (``keep_last``).
    """

    tokens: Tensor  # [P] int64, those that are left
    row_of: Tensor  # [T] int64 in [0, P), of every token of the batch but those left out as last ones
    lengths: list[int]  # of the sequences that are left, without the last tokens left out
    num_own: list[int]  # tokens that each of those brings
    source: np.ndarray  # [sum of lengths] int64 row of each of their tokens

    @classmethod
    def of(cls, batch: Batch) -> SharedPrefixes:
        return cls.of_sequences(batch.tokens, batch.lengths, batch.groups.tolist())

    @classmethod
    def of_sequences(
        cls, all_tokens: Tensor, whole_lengths: Sequence[int], groups: Sequence[int], *, keep_last: bool = False
    ) -> SharedPrefixes:
        """For tokens [T] of sequences laid end to end; those of a group follow one another."""
        tokens = all_tokens.numpy()
        rows = np.zeros(len(tokens), dtype=np.int64)
        kept, lengths, num_own, sources = [], [], [], []
        begin, num_rows, leader, leader_group = 0, 0, slice(0, 0), None
        for whole, group in zip(whole_lengths, groups, strict=True):
            length = whole if keep_last else max(1, whole - 1)
            end, shared = begin + length, 0
            if group == leader_group:
                most = min(length, leader.stop - leader.start)
                differs = tokens[begin : begin + most] != tokens[leader.start : leader.start + most]
                shared = int(differs.argmax()) if differs.any() else most
                rows[begin : begin + shared] = rows[leader.start : leader.start + shared]
            else:
                leader, leader_group = slice(begin, end), group
            if shared < length:
                own = length - shared
                rows[begin + shared : end] = np.arange(num_rows, num_rows + own)
                num_rows += own
                kept.append(tokens[begin + shared : end])
                lengths.append(length)
                num_own.append(own)
                sources.append(rows[begin:end])
            begin += whole
        return cls(
            torch.from_numpy(np.concatenate(kept)), torch.from_numpy(rows), lengths, num_own, np.concatenate(sources)
        )


def forward_logprobs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Score the batch's trained tokens with a decoder (or its DeepSpeed engine), shared prefixes once.

    Returns (index [R] of the scored tokens in the batch, log-probs [R], entropies [R]), on the model's device.
    """
    scored, inputs = _inputs(model, batch)
    device = inputs[0].device
    targets, heat = upload(batch.tokens[scored], device), upload(batch.temperature[scored], device)
    return upload(scored, device), *model(*inputs, targets, heat)


def forward_values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The scalar decoder's number before each trained token: (index [R] of those in the batch, values [R])."""
    scored, inputs = _inputs(model, batch)
    return upload(scored, inputs[0].device), model(*inputs)


def _inputs(model: nn.Module, batch: Batch) -> tuple[Tensor, tuple[Tensor, PackedAttention, Tensor]]:
    """Index [R] of the trained tokens, where the batch is; and, on the model's device, what that reads: tokens [P],
    their context, and the rows [R] that stand before the trained ones."""
    (scored,) = torch.nonzero(batch.loss_mask, as_tuple=True)
    return scored, _rows_of(model, SharedPrefixes.of(batch), scored - 1)


def _rows_of(model: nn.Module, shared: SharedPrefixes, index: Tensor) -> tuple[Tensor, PackedAttention, Tensor]:
    """What a model reads, and the rows of the tokens ``index`` [R]; on the model's device."""
    device = next(model.parameters()).device
    ctx = PackedAttention.from_lengths(
        shared.lengths, device, num_own=shared.num_own, source=shared.source, exact=bool(model.exact)
    )
    return upload(shared.tokens, device), ctx, upload(shared.row_of[index], device)


def forward_scores(
    model: nn.Module, token_ids: Sequence[Sequence[int]], groups: Sequence[int], index: Tensor | None = None
) -> Tensor:
    """The scalar decoder's number at the tokens ``index`` [R] of sequences laid end to end, or at the last token of
    each; [R] fp32 on the model's device. Sequences of a group follow one another, and share the prefix that they have
    in common with the first."""
    lengths = [len(ids) for ids in token_ids]
    tokens = torch.tensor([token for ids in token_ids for token in ids])
    shared = SharedPrefixes.of_sequences(tokens, lengths, groups, keep_last=True)
    if index is None:
        index = torch.tensor(lengths).cumsum(0) - 1
    return model(*_rows_of(model, shared, index))


@torch.no_grad()
def score_tokens(
    forward: Callable[[nn.Module, Batch], tuple[Tensor, ...]], model: nn.Module, microbatches: Iterable[Batch]
) -> Tensor:
    """The first column that ``forward`` gives of the trained tokens of all micro-batches: [T] fp32, 0 elsewhere, on
    the CPU."""
    parts = []
    for micro in microbatches:
        column = torch.zeros(micro.num_tokens)
        scored, found, *_ = forward(model, micro)
        column[scored.cpu()] = found.cpu()
        parts.append(column)
    return torch.cat(parts)
