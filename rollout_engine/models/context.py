"""Attention contexts: the one argument by which trainer and engine differ.

A layer calls ``ctx.attend(layer, q, k, v, kind)`` and knows nothing else. Contexts are immutable and built
once per forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernels import KV_BLOCK, AttentionKind, AttentionPlan, attend_paged, packed_attention, plan_tiles


class AttentionContext(Protocol):
    @property
    def positions(self) -> Tensor:
        """[T] int64 position of each token in its sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], already rotated -> [T, Hq, D]."""


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
    ) -> None:
        self._batch = (num_queries, context_lens, block_tables, device)
        self._plans: dict[int | None, AttentionPlan] = {}

    def __getitem__(self, window: int | None) -> AttentionPlan:
        if window not in self._plans:
            self._plans[window] = plan_tiles(*self._batch, window=window)
        return self._plans[window]


@dataclass(frozen=True)
class PackedAttention:
    """Whole sequences laid end to end, causal within each, differentiable: the trainer's context."""

    positions: Tensor
    slots: Tensor  # [T] int64
    num_blocks: int
    plans: TilePlans

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedAttention:
        lens = torch.tensor(lengths, dtype=torch.int64)
        blocks = -(-lens // KV_BLOCK)
        first = blocks.cumsum(0) - blocks
        positions = torch.cat([torch.arange(n) for n in lengths])
        slots = torch.repeat_interleave(first * KV_BLOCK, lens) + positions
        tables = (first[:, None] + torch.arange(int(blocks.max()))).numpy()
        plans = TilePlans(lengths, lengths, tables, device)
        return cls(positions.to(device), slots.to(device), int(blocks.sum()), plans)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind) -> Tensor:
        return packed_attention(q, k, v, self.slots, self.num_blocks, self.plans[kind.window], kind)


@dataclass(frozen=True)
class PagedAttention:
    """New tokens of running sequences over their KV pages: the engine's context. Writes the pages."""

    positions: Tensor
    slots: Tensor  # [T] int64
    k_cache: Tensor  # [layers, pages, Hkv, page, D]
    v_cache: Tensor
    plans: TilePlans

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind) -> Tensor:
        k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
        return attend_paged(q, k, v, k_cache, v_cache, self.slots, self.plans[kind.window], kind)
