"""Engine settings. Sizes are bytes and counts, never a fraction of memory that somebody else uses too."""

from __future__ import annotations

from dataclasses import dataclass

from rollout_engine.types import fits_int64

PAGE_MULTIPLE = 32  # the attention's KV block


@dataclass(frozen=True)
class EngineConfig:
    """Args:
    kv_cache_gib: memory for KV pages, GiB. page_size: tokens per page, a multiple of 32.
    max_num_seqs: answers in flight at once. max_batch_tokens: tokens forwarded per step, at most.
    prefix_caching: share the pages of equal prompt prefixes.
    numerics: "exact" makes results independent of the batch, at a price on a GPU, and refuses to start where they
        aren't; "fast" doesn't ask; "auto" is exact for float32 on a CPU and fast elsewhere.
    cuda_graphs: on a GPU, record decode steps and replay them.
    seed: of the sampling noise.
    """

    kv_cache_gib: float = 0.5
    page_size: int = 32
    max_num_seqs: int = 512
    max_batch_tokens: int = 4096
    prefix_caching: bool = True
    numerics: str = "auto"
    cuda_graphs: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("kv_cache_gib", self.kv_cache_gib > 0, "a positive number of GiB"),
            ("page_size", self.page_size > 0 and self.page_size % PAGE_MULTIPLE == 0, "a multiple of 32"),
            ("max_num_seqs", self.max_num_seqs >= 1, "at least 1"),
            ("max_batch_tokens", self.max_batch_tokens >= 1, "at least 1"),
            ("seed", fits_int64(self.seed), "an integer of 64 bits"),
            ("numerics", self.numerics in ("auto", "exact", "fast"), "'auto', 'exact' or 'fast'"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")
