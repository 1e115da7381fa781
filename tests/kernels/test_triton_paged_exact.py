"""With an exact plan a token's bits are the same whether it is prefilled, decoded, chunked, batched or packed."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from accuracy import normal
from paged import make_batch
from torch import Tensor

from kernels import KV_BLOCK, AttentionKind, plan_tiles
from kernels.triton import attend_blocks, attend_paged
from kernels.triton.attention_work import COUNT, MERGED, SPLIT, divide
from kernels.triton.paged_attention import attend_packed

pytestmark = pytest.mark.usefixtures("poisoned")
LENGTHS = (1, 33, 70)
KINDS = (AttentionKind(), AttentionKind(scale=0.3, softcap=2.0, window=45))


def make_qkv(
    lengths: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    return [
        normal(sum(lengths), n, 32, seed=i, dtype=dtype, device=device)
        for i, n in enumerate((heads[0], *heads[1:] * 2))
    ]


def packed(qkv: list[Tensor], lengths: tuple[int, ...], kind: AttentionKind) -> tuple[Tensor, Tensor]:
    counts = [-(-n // KV_BLOCK) for n in lengths]
    tables = [list(range(end - n, end)) for n, end in zip(counts, itertools.accumulate(counts), strict=True)]
    device = qkv[0].device
    slots = [table[0] * KV_BLOCK + at for table, n in zip(tables, lengths, strict=True) for at in range(n)]
    plan = plan_tiles(lengths, lengths, tables, device, kind.window, exact=True)
    q, k, v = qkv
    return attend_packed(q, k, v, torch.tensor(slots, device=device), sum(counts), plan, kind)


def paged(
    qkv: list[Tensor],
    lengths: tuple[int, ...],
    kind: AttentionKind,
    page: int,
    rng: random.Random,
) -> Tensor:
    """Fed in chunks of any size, several sequences at a time, on pages in any order that hold NaN until written."""
    q, k, v = qkv
    starts = [end - n for end, n in zip(itertools.accumulate(lengths), lengths, strict=True)]
    counts = [-(-n // page) for n in lengths]
    free = rng.sample(range(sum(counts)), sum(counts))
    tables = [[free.pop() for _ in range(count)] for count in counts]
    blocks = [[p * (page // KV_BLOCK) + i for p in table for i in range(page // KV_BLOCK)] for table in tables]
    shape = (sum(counts), k.shape[1], page, k.shape[2])
    caches = [torch.full(shape, torch.nan, dtype=q.dtype, device=q.device) for _ in range(2)]
    out, done = torch.full_like(q, torch.nan), [0] * len(lengths)
    while left := [i for i, n in enumerate(lengths) if done[i] < n]:
        chosen = rng.sample(left, rng.randint(1, len(left)))
        sizes = [rng.choice((1, rng.randint(1, rest := lengths[i] - done[i]), rest)) for i in chosen]
        spans = [(i, at) for i, size in zip(chosen, sizes, strict=True) for at in range(done[i], done[i] + size)]
        rows = [starts[i] + at for i, at in spans]
        slots = torch.tensor([tables[i][at // page] * page + at % page for i, at in spans], device=q.device)
        for i, size in zip(chosen, sizes, strict=True):
            done[i] += size
        contexts, own = [done[i] for i in chosen], [blocks[i] for i in chosen]
        plan = plan_tiles(sizes, contexts, own, q.device, kind.window, exact=True)
        out[rows] = attend_paged(q[rows], k[rows], v[rows], *caches, slots, plan, kind)
    return out


@pytest.mark.parametrize(
    "heads, page, dtype, kind",
    [
        ((4, 1), 32, torch.bfloat16, KINDS[0]),
        ((4, 1), 64, torch.float32, KINDS[1]),
        ((2, 2), 64, torch.float32, KINDS[0]),
        ((2, 2), 32, torch.bfloat16, KINDS[1]),
    ],
)
def test_chunked_decoded_and_batched_is_whole(
    heads: tuple[int, int], page: int, dtype: torch.dtype, kind: AttentionKind, device: torch.device
) -> None:
    qkv = make_qkv(LENGTHS, heads, dtype, device)
    whole, lse = packed(qkv, LENGTHS, kind)
    assert torch.isfinite(whole).all() and torch.isfinite(lse).all()
    for seed in range(2):
        assert torch.equal(paged(qkv, LENGTHS, kind, page, random.Random(seed)), whole), seed


def test_a_prompt_alone_is_the_prompt_in_company(device: torch.device) -> None:
    qkv = make_qkv(LENGTHS, (4, 1), torch.bfloat16, device)
    whole, lse = packed(qkv, LENGTHS, KINDS[0])
    for end, n in zip(itertools.accumulate(LENGTHS), LENGTHS, strict=True):
        alone = packed([x[end - n : end] for x in qkv], (n,), KINDS[0])
        assert torch.equal(alone[0], whole[end - n : end]) and torch.equal(alone[1], lse[end - n : end])


def test_decoding_over_several_splits_is_a_piece_of_the_prompt(device: torch.device) -> None:
    """And the comparison can fail: a fast plan divides the last token's keys among programs, which changes bits."""
    batch = make_batch([40], [SPLIT + 65], heads=(4, 1), dtype=torch.bfloat16, device=device)

    def last(count: int, before: int, *, exact: bool) -> Tensor:
        """The last tokens but the ``before`` last of all."""
        plan = plan_tiles([count], [batch.contexts[0] - before], batch.tables, device, exact=exact)
        rows = batch.q[40 - before - count : 40 - before]
        return attend_blocks(rows, batch.k_cache, batch.v_cache, plan)

    whole = last(40, 0, exact=True)
    assert torch.equal(torch.cat([last(8, 32, exact=True), last(31, 1, exact=True), last(1, 0, exact=True)]), whole)
    assert not torch.equal(last(1, 0, exact=False), whole[-1:])


def test_an_exact_plan_has_one_height_and_no_parts() -> None:
    """Nor cascades, though all four rows begin alike."""
    plan = plan_tiles([1, 1, 1, 1, 40], [600, 600, 600, 600, 90], [list(range(20))] * 5, exact=True)
    work = divide(plan, 4, None, 32, [16, 64, 128], 64)
    ((height, items),) = work.items
    assert height == 16 and work.num_parts == 0 and not len(work.merges)
    assert (items[:, MERGED] == -1).all() and sorted(items[:, COUNT].tolist()) == [1] * 4 + [4] * 10
