"""Ragged batches for the tests of packed attention, and the naive form that says what is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accuracy import normal
from torch import Tensor

from kernels import KV_BLOCK, AttentionKind, AttentionPlan, plan_tiles


def layout(
    queries: Sequence[int], contexts: Sequence[int], device: torch.device | str = "cpu", window: int | None = None
) -> tuple[Tensor, int, AttentionPlan]:
    """Slots, number of blocks and plan: what ``packed_attention`` takes after q, k and v."""
    counts = [-(-n // KV_BLOCK) for n in contexts]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    tables = [list(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)]
    slots = [first * KV_BLOCK + i for first, n in zip(firsts, contexts, strict=True) for i in range(n)]
    plan = plan_tiles(queries, contexts, tables, device, window)
    return torch.tensor(slots, dtype=torch.int64, device=device), sum(counts), plan


def qkv(
    queries: Sequence[int],
    contexts: Sequence[int],
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    shapes = [(sum(queries), heads[0], dim), (sum(contexts), heads[1], dim), (sum(contexts), heads[1], dim)]
    return [normal(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes)]


def naive(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], contexts: Sequence[int], kind: AttentionKind
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, sequence by sequence, by the formula, in the dtype of the tensors."""
    scale = q.shape[2] ** -0.5 if kind.scale is None else kind.scale
    group = q.shape[1] // k.shape[1]
    outs, sums = [], []
    parts = zip(q.split([*queries]), k.split([*contexts]), v.split([*contexts]), strict=True)
    for rows, keys, values in parts:
        if not len(rows):
            continue
        scores = torch.einsum("qhd,khd->qhk", rows, keys.repeat_interleave(group, 1)) * scale
        if kind.softcap is not None:
            scores = kind.softcap * torch.tanh(scores / kind.softcap)
        key = torch.arange(len(keys), device=q.device)
        position = (len(keys) - len(rows) + torch.arange(len(rows), device=q.device))[:, None]
        hidden = key > position
        if kind.window is not None:
            hidden |= key <= position - kind.window
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        outs.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1)))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(sums)
