"""Attention contexts: the one argument by which trainer and engine differ.

A layer calls ``ctx.attend(layer, q, k, v)`` and knows nothing else. Contexts are immutable and built
once per forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import KV_BLOCK, TileBatch, attend_paged, packed_attention, plan_tiles


class AttentionContext(Protocol):
    @property
    def positions(self) -> Tensor:
        """[T] int64 position of each token in its sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], already rotated -> [T, Hq, D]."""


@dataclass(frozen=True)
class PackedAttention:
    """Whole sequences laid end to end, causal within each, differentiable: the trainer's context."""

    positions: Tensor
    slots: Tensor  # [T] int64
    num_blocks: int
    plan: tuple[TileBatch, ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedAttention:
        lens = torch.tensor(lengths, dtype=torch.int64)
        blocks = -(-lens // KV_BLOCK)
        first = blocks.cumsum(0) - blocks
        positions = torch.cat([torch.arange(n) for n in lengths])
        slots = torch.repeat_interleave(first * KV_BLOCK, lens) + positions
        tables = (first[:, None] + torch.arange(int(blocks.max()))).numpy()
        plan = plan_tiles(lengths, lengths, tables, device)
        return cls(positions.to(device), slots.to(device), int(blocks.sum()), plan)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, self.slots, self.num_blocks, self.plan)


@dataclass(frozen=True)
class PagedAttention:
    """New tokens of running sequences over their KV pages: the engine's context. Writes the pages."""

    positions: Tensor
    slots: Tensor  # [T] int64
    k_cache: Tensor  # [layers, pages, Hkv, page, D]
    v_cache: Tensor
    plan: tuple[TileBatch, ...]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_paged(q, k, v, self.k_cache[layer], self.v_cache[layer], self.slots, self.plan)
