"""Sequences laid end to end along a packed axis: where each begins (on the device) and how long they are (here)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kernels.device import upload


@dataclass(frozen=True, eq=False)
class Spans:
    """N sequences, end to end. What is on the device is copied there when first asked for, once."""

    sizes: np.ndarray  # [N] int64 rows of each, on the host
    device: torch.device | str
    _tiles: dict[tuple[int, str], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray, device: torch.device | str) -> Spans:
        return cls(np.asarray(lengths, dtype=np.int64), device)

    @cached_property
    def bounds(self) -> Tensor:
        """[N + 1] int32 on the device, from 0 to the total: sequence i has rows bounds[i] .. bounds[i + 1]."""
        bounds = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int32)
        return upload(torch.from_numpy(bounds), self.device)

    @cached_property
    def lengths(self) -> Tensor:
        """[N] int64 on the device."""
        return upload(torch.from_numpy(self.sizes), self.device)

    @cached_property
    def longest(self) -> int:
        return int(self.sizes.max(initial=0))

    @cached_property
    def total(self) -> int:
        return int(self.sizes.sum())

    def tiles(self, size: int, heaviest: Literal["first", "last"]) -> Tensor:
        """[n, 2] int32 on the device: the sequence, and the first row in it, of every tile of ``size`` rows.

        Those with most to do come first, so that none of them is left for the end: the further from the start of
        their sequence where ``heaviest`` is "last", the further from its end where it is "first".
        """
        key = (size, heaviest)
        if key not in self._tiles:
            counts = -(-self.sizes // size)
            seq = np.repeat(np.arange(len(counts)), counts)
            first = (np.arange(len(seq)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
            work = first if heaviest == "last" else self.sizes[seq] - first
            tiles = np.stack([seq, first], 1)[np.argsort(-work, kind="stable")].astype(np.int32)
            self._tiles[key] = upload(torch.from_numpy(tiles), self.device)
        return self._tiles[key]
