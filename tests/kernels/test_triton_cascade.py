"""Rows that share a prefix read it once: which rows those are, what is then read, and that results stay the same."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from accuracy import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Batch, make_batch, truth

from kernels import AttentionKind, plan_tiles, reference
from kernels.triton import attend_blocks
from kernels.triton.attention_work import (
    CASCADE_KEYS,
    COUNT,
    MERGED,
    PART,
    SPLIT,
    START,
    STOP,
    TOKEN,
    WorkLists,
    divide,
    shared_prefixes,
)

pytestmark = pytest.mark.usefixtures("poisoned")
CPU = torch.device("cpu")
BLOCK = 32


def work_of(
    queries: Sequence[int], contexts: Sequence[int], tables: Sequence[Sequence[int]], **given: int
) -> WorkLists:
    """Of 4 query heads a KV head."""
    plan = plan_tiles(queries, contexts, tables)
    return divide(plan, 4, given.get("window"), BLOCK, [16, 64, 128], 64)


def blocks_read(work: WorkLists) -> int:
    """KV blocks that the programs of one KV head read."""
    return sum(
        -(-stop // BLOCK) - start // BLOCK
        for _, items in work.items
        for start, stop in items[:, [START, STOP]].tolist()
    )


def forked(prompts: Sequence[tuple[int, int]], *, common: int = 0) -> list[list[int]]:
    """Tables of samples of prompts, (blocks of the prompt, samples) each; everybody begins with ``common`` blocks."""
    fresh = iter(range(100, 1 << 20))
    tables = []
    for blocks, samples in prompts:
        prompt = [*range(common), *(next(fresh) for _ in range(blocks - common))]
        tables += [[*prompt, *(next(fresh) for _ in range(40))] for _ in range(samples)]
    return tables


@pytest.mark.parametrize("samples", [2, 4, 16, 32])
@pytest.mark.parametrize("prompt", [8, 16, 17, 33])
def test_a_group_reads_its_prompt_once(samples: int, prompt: int) -> None:
    contexts = [prompt * BLOCK + 1 + 30 * i for i in range(samples)]
    work = work_of([1] * samples, contexts, forked([(prompt, samples)]))
    own = sum(-(-(context - prompt * BLOCK) // BLOCK) for context in contexts)
    assert blocks_read(work) == prompt + own


def test_two_groups_and_a_prompt() -> None:
    """Each group reads its prompt once; the piece of a third prompt between them reads its own."""
    tables = [*forked([(10, 3)]), list(range(4)), *forked([(20, 5)])]
    work = work_of([1] * 3 + [20] + [1] * 5, [330] * 3 + [100] + [700] * 5, tables)
    assert blocks_read(work) == 10 + 3 + 4 + 20 + 5 * 2


def test_a_group_that_no_tile_holds_takes_several() -> None:
    """A tile of 128 rows holds 32 tokens of 4 heads."""
    work = work_of([1] * 70, [300] * 70, forked([(9, 70)]))
    assert blocks_read(work) == 3 * 9 + 70
    assert dict(work.items)[128][:, COUNT].tolist() == [32, 32, 6]


def test_plain_where_it_would_not_pay() -> None:
    short, one = CASCADE_KEYS // BLOCK - 1, CASCADE_KEYS // BLOCK
    for queries, contexts, tables, window in (
        ([1] * 4, [300] * 4, forked([(short, 4)]), None),  # too little in common
        ([1] * 4, [CASCADE_KEYS] * 4, forked([(one, 4)]), None),  # the last common key is each row's own
        ([2] * 4, [300] * 4, forked([(one, 4)]), None),  # no decode rows
        ([1] * 4, [300] * 4, forked([(one, 4)]), 1000),  # windowed
        ([1] * 4, [300] * 4, forked([(one, 1)] * 4), None),  # four prompts
    ):
        plan = plan_tiles(queries, contexts, tables, window=window)
        work = divide(plan, 4, window, BLOCK, [16, 64, 128], 64)
        assert work.num_parts == 0 and blocks_read(work) == 4 * -(-contexts[0] // BLOCK), (queries, contexts)
    assert work_of([1] * 4, [CASCADE_KEYS + 1] * 4, forked([(one, 4)])).num_parts == 4 * 2


def test_a_system_prompt_does_not_make_two_prompts_one() -> None:
    tables = [table[:60] for table in forked([(20, 4), (30, 4)], common=9)]
    groups, prefix = shared_prefixes(np.ones(8, np.int64), np.full(8, 1100), np.array(tables), BLOCK)
    assert groups.tolist() == [[0, 4, 20 * BLOCK], [4, 4, 30 * BLOCK]]
    assert prefix.tolist() == [20 * BLOCK] * 4 + [30 * BLOCK] * 4
    # Where no neighbour has more in common, it is what the group shares.
    tables = forked([(20, 1)] * 3, common=9)
    groups, _ = shared_prefixes(np.ones(3, np.int64), np.full(3, 1100), np.array(tables), BLOCK)
    assert groups.tolist() == [[0, 3, 9 * BLOCK]]


@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=6),
    common=st.sampled_from([0, 9]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_every_key_of_every_row_is_read_once(prompts: list[tuple[int, int]], common: int, seed: int) -> None:
    """Over all items of a token: its keys, each once; what is shared really is; parts are in the order of keys."""
    rng = random.Random(seed)
    tables = forked([(max(blocks, common), samples) for blocks, samples in prompts], common=common)
    queries = [rng.choice((1, 1, 1, 1, 2, 9)) for _ in tables]
    contexts = [rng.randint(max(n, 200), 900) for n in queries]
    work = work_of(queries, contexts, tables)
    token_sequence = [i for i, n in enumerate(queries) for _ in range(n)]
    last = [contexts[i] - queries[i] + j for i, n in enumerate(queries) for j in range(n)]
    spans: list[list[tuple[int, int, int]]] = [[] for _ in last]
    for _, items in work.items:
        for token, count, position, sequence, start, stop, merged, part in items.tolist():
            for j in range(count):
                mine = token_sequence[token + j]
                used = slice(start // BLOCK, -(-stop // BLOCK))
                assert tables[mine][used] == tables[sequence][used]
                assert stop <= position + j + 1 or position + j == last[token + j]
                spans[token + j].append((part, start, min(stop, last[token + j] + 1)))
                assert (merged == -1) or work.merges[merged + j, 0] == token + j
    for parts, at in zip(spans, last, strict=True):
        parts.sort()
        assert [part for part, _, _ in parts] == list(range(len(parts)))
        assert parts[0][1] == 0 and max(stop for _, _, stop in parts) == at + 1
        assert all(a[2] == b[1] for a, b in itertools.pairwise(parts) if b[1] <= at)
        assert all(stop - start <= SPLIT for _, start, stop in parts) or len(parts) == 1
    counts = {token: count for token, _, count, _ in work.merges.tolist()}
    assert counts == {token: len(parts) for token, parts in enumerate(spans) if len(parts) > 1}
    firsts = work.merges[:, 1].tolist()
    assert firsts == np.cumsum([0, *work.merges[:, 2].tolist()]).tolist()[:-1]


def group_batch(samples: int, prompt: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Batch:
    """Samples of one prompt in different places, a stranger, and a piece of a prompt."""
    contexts = [*(prompt + 1 + 17 * i for i in range(samples)), 40, 50]
    return make_batch(
        [1] * (samples + 1) + [20], contexts, heads=heads, dim=16, dtype=dtype, device=device,
        prompt=prompt, groups=[0] * samples + [1, 2],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("samples, prompt, heads", [(2, 256, (4, 2)), (5, 544, (4, 1)), (9, 256, (8, 1))])
def test_cascade_against_float64_and_plain(
    samples: int, prompt: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    batch = group_batch(samples, prompt, heads, dtype, device)
    plan, lse = batch.plan(), torch.empty(samples + 21, heads[0], 1, device=device)
    out = attend_blocks(batch.q, batch.k_cache, batch.v_cache, plan, lse=lse)
    (work,) = plan.prepared.values()
    assert len(work.merges) == samples
    wanted, sums = truth(batch, AttentionKind())
    narrow = reference.attend_blocks(batch.q, *batch.finite(), batch.plan()) if dtype != torch.float32 else None
    assert_close_to_truth(out, wanted, narrow)
    assert (lse.double() - sums).abs().max() <= 2e-6 * sums.abs().max()
    plain = torch.cat(
        [attend_blocks(x.q, x.k_cache, x.v_cache, x.plan()) for x in map(batch.alone, range(samples + 2))]
    )
    assert torch.equal(out[samples:], plain[samples:])  # who shares nothing doesn't notice
    assert (out - plain).abs().max() <= 2 * torch.finfo(dtype).eps * plain.abs().max()
    for _ in range(3):
        assert torch.equal(attend_blocks(batch.q, batch.k_cache, batch.v_cache, plan), out)


def test_parts_come_in_the_order_of_keys() -> None:
    work = work_of([1, 1], [1200, 1200], forked([(20, 2)]))
    for token in (0, 1):
        spans = [
            (part, start, stop)
            for _, items in work.items
            for first, count, start, stop, merged, part in items[:, [TOKEN, COUNT, START, STOP, MERGED, PART]].tolist()
            if first <= token < first + count and merged >= 0
        ]
        assert sorted(spans) == [(0, 0, 512), (1, 512, 640), (2, 640, 1152), (3, 1152, 1200)]
