"""Sequences on shuffled pages, and what attention over them is by the formula, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accuracy import normal
from torch import Tensor

from kernels import AttentionKind, AttentionPlan, plan_tiles


@dataclass(frozen=True)
class Batch:
    """Sequence i has ``contexts[i]`` tokens on its pages and asks for its last ``queries[i]``."""

    q: Tensor  # [T, Hq, D]
    keys: list[Tensor]  # of each sequence, [context, Hkv, D]
    values: list[Tensor]
    k_cache: Tensor  # [pages, Hkv, page, D]; slots that nobody wrote hold NaN
    v_cache: Tensor
    queries: Sequence[int]
    contexts: Sequence[int]
    tables: list[list[int]]  # of blocks

    def plan(self, window: int | None = None, *, exact: bool = False) -> AttentionPlan:
        return plan_tiles(self.queries, self.contexts, self.tables, self.q.device, window, exact)

    def finite(self) -> tuple[Tensor, Tensor]:
        """Pages as the reference wants them, zeroed."""
        return self.k_cache.nan_to_num(), self.v_cache.nan_to_num()

    def alone(self, i: int) -> Batch:
        """Sequence i as a batch of one, on the same pages."""
        end = sum(self.queries[: i + 1])
        rows = self.q[end - self.queries[i] : end]
        return Batch(
            rows, self.keys[i : i + 1], self.values[i : i + 1], self.k_cache, self.v_cache,
            self.queries[i : i + 1], self.contexts[i : i + 1], self.tables[i : i + 1],
        )  # fmt: skip


def make_batch(
    queries: Sequence[int],
    contexts: Sequence[int],
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    page: int = 32,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prompt: int = 0,
    groups: Sequence[int] | None = None,
    seed: int = 0,
) -> Batch:
    """Random sequences; those of the same number in ``groups`` share the pages of their first ``prompt`` tokens."""
    q_heads, kv_heads = heads
    groups = list(range(len(queries))) if groups is None else groups
    assert prompt % page == 0
    k, v = (normal(sum(contexts), kv_heads, dim, seed=seed + i, dtype=dtype, device=device) for i in (1, 2))
    keys, values = list(k.split(list(contexts))), list(v.split(list(contexts)))
    leaders = [groups.index(group) for group in groups]
    counts = [-(-context // page) for context in contexts]
    free = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    shape = (len(free), kv_heads, page, dim)
    caches = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)]
    pages: list[list[int]] = []
    for i, leader in enumerate(leaders):
        common = 0 if leader == i else prompt // page
        for x in (keys, values) if common else ():
            x[i] = torch.cat([x[leader][:prompt], x[i][prompt:]])
        pages.append([*(pages[leader][:common] if common else ()), *(free.pop() for _ in range(counts[i] - common))])
        for cache, x in zip(caches, (keys[i], values[i]), strict=True):
            for at in range(0, contexts[i], page):
                some = x[at : at + page].transpose(0, 1)
                cache[pages[i][at // page], :, : some.shape[1]] = some
    per_page = max(1, page // 32)
    tables = [[p * per_page + j for p in table for j in range(per_page)] for table in pages]
    q = normal(sum(queries), q_heads, dim, seed=seed, dtype=dtype, device=device)
    return Batch(q, keys, values, *caches, queries, contexts, tables)


def truth(batch: Batch, kind: AttentionKind) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, D] and log-sum-exp [T, Hq, 1] in float64: a sequence and a head at a time, over what it sees."""
    group = batch.q.shape[1] // batch.k_cache.shape[1]
    scale = batch.q.shape[2] ** -0.5 if kind.scale is None else kind.scale
    outs, sums = [], []
    for q, k, v in zip(batch.q.double().split(list(batch.queries)), batch.keys, batch.values, strict=True):
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        s = torch.einsum("thd,nhd->htn", q, k) * scale
        if kind.softcap is not None:
            s = kind.softcap * torch.tanh(s / kind.softcap)
        at = torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
        n = torch.arange(len(k), device=q.device)
        hidden = (n > at) | (n <= at - (kind.window or len(k)))
        s = s.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("htn,nhd->thd", torch.softmax(s, -1), v))
        sums.append(torch.logsumexp(s, -1).T[..., None])
    return torch.cat(outs), torch.cat(sums)
