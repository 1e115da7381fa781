"""Attention contexts: the one argument by which trainer and engine differ.

A layer calls ``ctx.attend(layer, q, k, v, cos, sin, kind)`` and knows nothing else. Contexts are immutable and built
once per forward. On CUDA without Triton both run torch's fused attention (``fused``), but for soft-capped layers,
which it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    KV_BLOCK,
    AttentionKind,
    AttentionPlan,
    attend_blocks,
    packed_attention,
    plan_tiles,
    rope,
    rope_store,
)
from kernels.device import upload
from kernels.dispatch import uses_triton
from kernels.reference import Spans
from kernels.torch_attention import varlen_attention


class AttentionContext(Protocol):
    @property
    def positions(self) -> Tensor:
        """[T] int64 position of each token in its sequence."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kind: AttentionKind
    ) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], and what turns q and k, each [T, R/2] -> [T, Hq, D]."""


class TilePlans:
    """The batch's tiles, planned once per window and forward, when the first layer with that window asks.

    Arguments as in :func:`kernels.plan_tiles`.
    """

    def __init__(
        self,
        num_queries: Sequence[int] | np.ndarray,
        context_lens: Sequence[int] | np.ndarray,
        block_tables: np.ndarray,
        device: torch.device | str,
        exact: bool = False,
    ) -> None:
        self._batch = (num_queries, context_lens, block_tables, device)
        self._exact = exact
        self.made: dict[int | None, AttentionPlan] = {}

    def __getitem__(self, window: int | None) -> AttentionPlan:
        if window not in self.made:
            self.made[window] = plan_tiles(*self._batch, window=window, exact=self._exact)
        return self.made[window]


def _torch_attends(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda" and not uses_triton(device)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, ...] at rows [R], some of them more than once: what the answers to a prompt have in common.

    ``x[rows]`` means the same, but its backward on a CPU adds up the gradients of a row in whatever order threads come
    by: no run would be like another.
    """
    return F.embedding(rows, x.flatten(1)).view(-1, *x.shape[1:])


@dataclass(frozen=True)
class PackedAttention:
    """Sequences laid end to end, causal within each, differentiable: the trainer's context.

    A sequence may leave out its first tokens where another one brings the same (samples share their prompt): their
    keys and values are then read from there, as the engine reads them from shared pages.
    """

    positions: Tensor  # [T] int64, of the tokens that are there
    source: Tensor | None  # [K] int64 row of each token of each context; None: all are there, in order
    slots: Tensor  # [K] int64
    num_blocks: int
    plans: TilePlans
    spans: tuple[Spans, Spans] | None  # tokens there, contexts; set: torch's fused attention

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        fused: bool | None = None,
        num_own: Sequence[int] | None = None,
        source: np.ndarray | None = None,
        exact: bool = False,
    ) -> PackedAttention:
        """For sequences of these lengths. Sequence i brings its last ``num_own[i]`` tokens (at least one; all, by
        default); ``source`` [K] then says in which row each token of each whole sequence is found. ``exact``: the
        bits are those that an exact engine computes, on a GPU too."""
        lens = np.asarray(lengths, dtype=np.int64)
        own = lens if num_own is None else np.asarray(num_own, dtype=np.int64)
        blocks = -(-lens // KV_BLOCK)
        first = np.cumsum(blocks) - blocks
        rows, offsets = _rows_and_positions(lens, lens)
        tables = first[:, None] + np.arange(int(blocks.max()))
        plans = TilePlans(own, lens, tables, device, exact)
        use_fused = _torch_attends(device) if fused is None else fused

        def tensor(x: np.ndarray) -> Tensor:
            return upload(torch.from_numpy(x), device)

        return cls(
            tensor(_rows_and_positions(own, lens)[1]),
            None if source is None else tensor(source),
            tensor(first[rows] * KV_BLOCK + offsets),
            int(blocks.sum()),
            plans,
            (Spans.of(own, device), Spans.of(lens, device)) if use_fused else None,
        )

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kind: AttentionKind
    ) -> Tensor:
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if self.source is not None:
            k, v = take_rows(k, self.source), take_rows(v, self.source)
        if self.spans is not None and kind.softcap is None:
            return varlen_attention(q, k, v, *self.spans, kind)
        return packed_attention(q, k, v, self.slots, self.num_blocks, self.plans[kind.window], kind)


@dataclass(frozen=True)
class PagedAttention:
    """New tokens of running sequences over their KV pages: the engine's context. Writes the pages."""

    positions: Tensor
    slots: Tensor  # [T] int64
    k_cache: Tensor  # [layers, pages, Hkv, page, D]
    v_cache: Tensor
    plans: TilePlans
    spans: tuple[Spans, Spans] | None  # new tokens, all tokens; set: torch's fused attention
    context_slots: Tensor | None  # [K] int64 of all tokens of all sequences, for it

    @classmethod
    def from_pages(
        cls,
        lengths: np.ndarray,
        ends: np.ndarray,
        tables: np.ndarray,
        k_cache: Tensor,
        v_cache: Tensor,
        fused: bool | None = None,
        exact: bool = False,
    ) -> PagedAttention:
        """For the last ``lengths[i]`` of the ``ends[i]`` tokens of sequence i, on pages ``tables[i]``; all int64."""
        device, size = k_cache.device, k_cache.shape[3]

        def slots_of(rows: np.ndarray, positions: np.ndarray) -> Tensor:
            return upload(torch.from_numpy(tables[rows, positions // size] * size + positions % size), device)

        rows, positions = _rows_and_positions(lengths, ends)
        per_page = size // KV_BLOCK
        blocks = (tables[:, :, None] * per_page + np.arange(per_page)).reshape(len(tables), -1)
        plans = TilePlans(lengths, ends, blocks, device, exact)
        spans, context_slots = None, None
        if _torch_attends(device) if fused is None else fused:
            spans = (Spans.of(lengths, device), Spans.of(ends, device))
            context_slots = slots_of(*_rows_and_positions(ends, ends))
        new = upload(torch.from_numpy(positions), device)
        return cls(new, slots_of(rows, positions), k_cache, v_cache, plans, spans, context_slots)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kind: AttentionKind
    ) -> Tensor:
        k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
        q = rope_store(q, k, v, cos, sin, k_cache, v_cache, self.slots)
        if self.spans is None or self.context_slots is None or kind.softcap is not None:
            return attend_blocks(q, k_cache, v_cache, self.plans[kind.window], kind)
        page, offset = self.context_slots // k_cache.shape[2], self.context_slots % k_cache.shape[2]
        return varlen_attention(q, k_cache[page, :, offset], v_cache[page, :, offset], *self.spans, kind)


def _rows_and_positions(lengths: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sequence and position of each of the last ``lengths[i]`` tokens of sequences that end at ``ends[i]``."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    return rows, np.arange(int(lengths.sum())) - np.repeat(starts - (ends - lengths), lengths)
