"""Scale, soft cap and sliding window: packed attention against float64, and paged against packed bit for bit."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import KV_BLOCK, AttentionKind, TileBatch, attend_paged, packed_attention, plan_tiles

FORWARD, BACKWARD = 2e-6, 1e-5
LENGTHS = (1, 31, 32, 33, 70, 129)
KINDS = {
    "scale": AttentionKind(scale=0.7),
    "softcap": AttentionKind(softcap=1.5),  # scores reach 4
    "window_1": AttentionKind(window=1),
    "window_20": AttentionKind(window=20),
    "window_32": AttentionKind(window=32),
    "window_33": AttentionKind(window=33),
    "window_100": AttentionKind(window=100),
    "window_1000": AttentionKind(window=1000),
    "all": AttentionKind(scale=0.4, softcap=2.0, window=45),
}


def make_qkv(tokens: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads)]


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest error in units of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)).item()


def naive_attention(qkv: Sequence[Tensor], lengths: Sequence[int], kind: AttentionKind) -> Tensor:
    """One sequence, one head and one query at a time, over nothing but the keys that it sees."""
    q, k, v = qkv
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if kind.scale is None else kind.scale
    outputs = []
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        for at in range(end - length, end):
            seen = slice(max(end - length, at + 1 - (kind.window or length)), at + 1)
            heads = []
            for head in range(q.shape[1]):
                scores = scale * (k[seen, head // group] @ q[at, head])
                if kind.softcap is not None:
                    scores = kind.softcap * torch.tanh(scores / kind.softcap)
                heads.append(torch.softmax(scores, -1) @ v[seen, head // group])
            outputs.append(torch.stack(heads))
    return torch.stack(outputs)


def packed(qkv: Sequence[Tensor], lengths: Sequence[int], kind: AttentionKind, *, skip: bool = True) -> Tensor:
    """``skip`` leaves blocks before the window out of the plan, rather than only masking them."""
    counts = [-(-length // KV_BLOCK) for length in lengths]
    firsts = [end - count for end, count in zip(itertools.accumulate(counts), counts, strict=True)]
    tables = [list(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)]
    slots = [first * KV_BLOCK + i for first, length in zip(firsts, lengths, strict=True) for i in range(length)]
    plan = plan_tiles(lengths, lengths, tables, window=kind.window if skip else None)
    return packed_attention(qkv[0], qkv[1], qkv[2], torch.tensor(slots), sum(counts), plan, kind)


@pytest.mark.parametrize("name", KINDS)
def test_packed_matches_float64(name: str) -> None:
    kind = KINDS[name]
    qkv = [x.requires_grad_() for x in make_qkv(sum(LENGTHS), 6, 2, 20)]
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out, expected = packed(qkv, LENGTHS, kind), naive_attention(wide, LENGTHS, kind)
    assert gap(out, expected) < FORWARD
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, qkv, upstream)
    for got, want in zip(grads, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert gap(got, want) < BACKWARD


@pytest.mark.parametrize("window", [1, 20, 32, 33, 64, 100])
def test_a_token_is_seen_for_the_length_of_the_window(window: int) -> None:
    qkv = make_qkv(150, 4, 2, 16)
    before = packed(qkv, [150], AttentionKind(window=window))
    for token in (0, 31, 32, 63, 100):
        changed = [qkv[0], *(x.clone() for x in qkv[1:])]
        changed[1][token] += 1
        changed[2][token] -= 1
        differs = (packed(changed, [150], AttentionKind(window=window)) != before).flatten(1).any(1)
        assert differs.tolist() == [token <= t < token + window for t in range(150)]


@pytest.mark.parametrize("name", KINDS)
def test_skipping_blocks_before_the_window_changes_no_bit(name: str) -> None:
    results = []
    for skip in (True, False):
        qkv = [x.requires_grad_() for x in make_qkv(sum(LENGTHS), 6, 2, 20)]
        out = packed(qkv, LENGTHS, KINDS[name], skip=skip)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.isfinite(x).all() for x in results[0])
    for skipped, masked in zip(results[0][1:], results[1][1:], strict=True):
        assert gap(skipped, masked) < 1e-6


def planned_blocks(plan: Sequence[TileBatch]) -> int:
    return sum(len(tiles.pair_tile) for tiles in plan)


def test_a_window_bounds_the_blocks_that_a_token_costs() -> None:
    table = [list(range(64))]
    assert planned_blocks(plan_tiles([1], [2048], table)) == 64
    assert planned_blocks(plan_tiles([1], [2048], table, window=32)) == 1
    assert planned_blocks(plan_tiles([1], [2048], table, window=33)) == 2
    assert planned_blocks(plan_tiles([2048], [2048], table, window=64)) <= 2048 // 16 * 4


@pytest.mark.parametrize("page_size", [32, 96])
@given(
    lengths=st.lists(st.sampled_from(LENGTHS) | st.integers(1, 140), min_size=1, max_size=4),
    window=st.none() | st.sampled_from([1, 31, 32, 33, 64]) | st.integers(1, 150),
    softcap=st.none() | st.floats(0.5, 50),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 2), (8, 1)]),
    fill=st.sampled_from([0.0, 1.0, 3e38]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_paged_in_any_chunks_gives_the_bits_of_packed(
    page_size: int,
    lengths: list[int],
    window: int | None,
    softcap: float | None,
    heads: tuple[int, int],
    fill: float,
    seed: int,
) -> None:
    """Pages in random order, sequences in random chunks, garbage of size ``fill`` in unwritten slots."""
    kind, rng, dim = AttentionKind(scale=0.3, softcap=softcap, window=window), random.Random(seed), 20
    q, k, v = make_qkv(sum(lengths), *heads, dim, seed)
    starts = [end - n for end, n in zip(itertools.accumulate(lengths), lengths, strict=True)]
    counts = [-(-length // page_size) for length in lengths]
    free = list(range(sum(counts) + 2))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(count)] for count in counts]
    per_page = page_size // KV_BLOCK
    blocks = [[page * per_page + i for page in table for i in range(per_page)] for table in tables]
    caches = [torch.full((sum(counts) + 2, heads[1], page_size, dim), fill) for _ in range(2)]
    done, out = [0] * len(lengths), torch.full_like(q, torch.nan)
    while left := [i for i, n in enumerate(lengths) if done[i] < n]:
        chosen = rng.sample(left, rng.randint(1, len(left)))
        sizes = [rng.choice((1, rng.randint(1, lengths[i] - done[i]), lengths[i] - done[i])) for i in chosen]
        spans = [(i, range(done[i], done[i] + size)) for i, size in zip(chosen, sizes, strict=True)]
        rows = [starts[i] + at for i, span in spans for at in span]
        slots = [tables[i][at // page_size] * page_size + at % page_size for i, span in spans for at in span]
        for i, size in zip(chosen, sizes, strict=True):
            done[i] += size
        plan = plan_tiles(sizes, [done[i] for i in chosen], [blocks[i] for i in chosen], window=window)
        out[rows] = attend_paged(q[rows], k[rows], v[rows], *caches, torch.tensor(slots), plan, kind)
    assert torch.equal(out, packed((q, k, v), lengths, kind))
