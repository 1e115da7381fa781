"""The KV pages themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.device import upload
from rollout_engine.models.config import DecoderConfig

GIB = 1 << 30


class KVCache:
    """Keys and values of all layers, [layers, pages, kv_heads, page_size, head_dim], zeroed.

    Zeroed because attention multiplies unwritten slots by a probability of 0, and 0 * NaN is NaN. One page more than
    ``num_pages`` is there, ``spare_page``: no sequence's, but of rows that only fill a batch.

    Raises ValueError when ``gib`` does not hold one page.
    """

    def __init__(
        self, config: DecoderConfig, gib: float, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        page_bytes = page_size * config.kv_bytes_per_token(dtype.itemsize)
        self.num_pages = int(gib * GIB) // page_bytes
        if self.num_pages < 1:
            raise ValueError(
                f"kv_cache_gib={gib} holds no page; one page of {page_size} tokens takes {page_bytes / GIB:.4f} GiB"
            )
        self.spare_page = self.num_pages
        shape = (config.num_layers, self.num_pages + 1, config.num_kv_heads, page_size, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole pages, (from, to)."""
        source, target = upload(torch.tensor(pairs).T, self.k.device)
        for cache in (self.k, self.v):
            cache[:, target] = cache[:, source]

    def clear(self) -> None:
        """Zero all pages: what a failed forward wrote may not be finite."""
        self.k.zero_()
        self.v.zero_()

    @property
    def page_size(self) -> int:
        return self.k.shape[3]

    def storage(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v
