"""Packed attention against float64, paged attention against packed bit for bit, and checks that those can fail."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels.reference.attention as attention
from kernels import KV_BLOCK, AttentionPlan, attend_paged, packed_attention, plan_tiles

pytestmark = pytest.mark.usefixtures("implementation")

FORWARD, BACKWARD = 2e-6, 1e-5
LENGTHS = (1, 31, 32, 33, 70, 129)
Tensors = tuple[Tensor, Tensor, Tensor]


def make_qkv(tokens: int, heads: int, kv_heads: int, dim: int, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest error in units of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def naive_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Softmax over all earlier keys of the same sequence, one sequence and one head at a time."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        part = slice(end - length, end)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        heads = []
        for head in range(q.shape[1]):
            scores = q[part, head] @ k[part, head // group].T / math.sqrt(q.shape[2])
            heads.append(torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ v[part, head // group])
        outputs.append(torch.stack(heads, 1))
    return torch.cat(outputs)


def packed_layout(lengths: Sequence[int]) -> tuple[Tensor, int, AttentionPlan]:
    """Slots, number of blocks and plan of whole sequences, each in blocks of its own; blocks handed out backwards."""
    counts = [-(-length // KV_BLOCK) for length in lengths]
    free = list(range(sum(counts)))
    tables = [[free.pop() for _ in range(count)] for count in counts]
    pairs = [(table, i) for table, length in zip(tables, lengths, strict=True) for i in range(length)]
    slots = [table[i // KV_BLOCK] * KV_BLOCK + i % KV_BLOCK for table, i in pairs]
    return torch.tensor(slots), sum(counts), plan_tiles(lengths, lengths, tables)


def packed(qkv: Tensors, lengths: Sequence[int]) -> Tensor:
    return packed_attention(*qkv, *packed_layout(lengths))


def gradients(qkv: Tensors, lengths: Sequence[int], upstream: Tensor) -> Tensors:
    leaves = [x.clone().requires_grad_() for x in qkv]
    dq, dk, dv = torch.autograd.grad(packed((leaves[0], leaves[1], leaves[2]), lengths), leaves, upstream)
    return dq, dk, dv


# ---------------------------------------------------------------- packed against float64


@pytest.mark.parametrize("dim", [16, 20, 64])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_packed_matches_float64(group: int, dim: int) -> None:
    kv_heads = 2
    qkv = make_qkv(sum(LENGTHS), group * kv_heads, kv_heads, dim)
    wide = [x.double().requires_grad_() for x in qkv]
    expected = naive_attention(wide[0], wide[1], wide[2], LENGTHS)
    assert gap(packed(qkv, LENGTHS), expected) < FORWARD
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad(expected, wide, upstream.double())
    for got, want in zip(gradients(qkv, LENGTHS, upstream), expected_grads, strict=True):
        assert gap(got, want) < BACKWARD


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (16,), (17, 1), (64,), (65, 2, 1)])
def test_packed_matches_float64_at_tile_and_block_edges(lengths: tuple[int, ...]) -> None:
    qkv = make_qkv(sum(lengths), 6, 2, 20)
    wide = [x.double().requires_grad_() for x in qkv]
    expected = naive_attention(wide[0], wide[1], wide[2], lengths)
    assert gap(packed(qkv, lengths), expected) < FORWARD
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for i, want in enumerate(torch.autograd.grad(expected, wide, upstream.double())):
        # A sequence of one token has a softmax of 1 and so a dq and dk of 0; measure those in units of dv.
        error = (gradients(qkv, lengths, upstream)[i].double() - want).abs().max()
        assert error < BACKWARD * max(want.abs().max().item(), 1.0)


def test_large_scores_neither_overflow_nor_lose_the_softmax() -> None:
    """Scores in the hundreds: exp of them overflows unless the maximum is taken out first."""
    lengths = (70, 33)
    q, k, v = make_qkv(sum(lengths), 4, 2, 16)
    q = q * 100
    assert (q @ k.repeat_interleave(2, 1).transpose(1, 2) / 4).max() > 100
    out = packed((q, k, v), lengths)
    assert gap(out, naive_attention(q.double(), k.double(), v.double(), lengths)) < 1e-4


def test_a_token_sees_its_own_past_and_nothing_else() -> None:
    lengths = (70, 40)
    q, k, v = make_qkv(sum(lengths), 4, 2, 16)
    before = packed((q, k, v), lengths)
    for token in (0, 1, 31, 32, 50, 69):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[token] += 1
        changed_v[token] -= 1
        differs = (packed((q, changed_k, changed_v), lengths) != before).flatten(1).any(1)
        assert differs.tolist() == [token <= t < lengths[0] for t in range(sum(lengths))]


def test_backward_repeated_gives_the_same_bits() -> None:
    qkv = make_qkv(sum(LENGTHS), 6, 2, 20)
    upstream = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))
    first = gradients(qkv, LENGTHS, upstream)
    for _ in range(3):
        assert all(map(torch.equal, first, gradients(qkv, LENGTHS, upstream)))


@pytest.mark.parametrize("max_pairs", [1, 3, 17])
def test_max_pairs_bounds_memory_and_changes_no_bit(max_pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = make_qkv(sum(LENGTHS), 6, 2, 20)
    upstream = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))
    whole, grads = packed(qkv, LENGTHS), gradients(qkv, LENGTHS, upstream)
    longest = -(-max(LENGTHS) // KV_BLOCK)
    monkeypatch.setattr(attention, "MAX_PAIRS", max_pairs)
    plan = packed_layout(LENGTHS)[2].tiles
    assert len(plan) > 2 and all(len(tiles.pair_tile) <= max(max_pairs, longest) for tiles in plan)
    assert torch.equal(packed(qkv, LENGTHS), whole)
    assert all(map(torch.equal, gradients(qkv, LENGTHS, upstream), grads))


# ---------------------------------------------------------------- paged against packed, bit for bit


@dataclass
class Pages:
    """A toy engine: pages taken in random order, sequences fed in random chunks, several at a time."""

    qkv: Tensors
    lengths: Sequence[int]
    page_size: int
    rng: random.Random
    fill: float = 0.0  # garbage of this size in every slot not yet written
    done: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.done = [0] * len(self.lengths)
        self.tables = [[] for _ in self.lengths]
        self.free = list(range(3 + sum(-(-n // self.page_size) for n in self.lengths)))
        self.rng.shuffle(self.free)
        _, kv_heads, dim = self.qkv[1].shape
        generator = torch.Generator().manual_seed(self.rng.randrange(1 << 30))
        shape = (len(self.free), kv_heads, self.page_size, dim)
        self.k_cache, self.v_cache = (self.fill * torch.randn(shape, generator=generator).sign() for _ in range(2))
        self.starts = [end - n for end, n in zip(itertools.accumulate(self.lengths), self.lengths, strict=True)]

    def block_table(self, seq: int) -> list[int]:
        per_page = self.page_size // KV_BLOCK
        return [page * per_page + i for page in self.tables[seq] for i in range(per_page)]

    def step(self, chunks: dict[int, int], shift: tuple[int, int] | None = None) -> tuple[list[int], Tensor]:
        """Feed ``chunks`` (sequence -> tokens); rows of the packed tensors that were fed, and their outputs.

        ``shift`` (sequence, entry) puts the block after the right one into that entry of the block table.
        """
        rows, slots = [], []
        for seq, count in chunks.items():
            for at in range(self.done[seq], self.done[seq] + count):
                if at == len(self.tables[seq]) * self.page_size:
                    self.tables[seq].append(self.free.pop())
                rows.append(self.starts[seq] + at)
                slots.append(self.tables[seq][at // self.page_size] * self.page_size + at % self.page_size)
            self.done[seq] += count
        tables = [self.block_table(seq) for seq in chunks]
        if shift is not None:
            table = tables[list(chunks).index(shift[0])]
            table[shift[1]] = (table[shift[1]] + 1) % (len(self.k_cache) * self.page_size // KV_BLOCK)
        plan = plan_tiles(list(chunks.values()), [self.done[seq] for seq in chunks], tables)
        q, k, v = (x[rows] for x in self.qkv)
        return rows, attend_paged(q, k, v, self.k_cache, self.v_cache, torch.tensor(slots), plan)

    def run(self) -> Tensor:
        out = torch.full_like(self.qkv[0], torch.nan)
        while unfinished := [i for i, n in enumerate(self.lengths) if self.done[i] < n]:
            chosen = self.rng.sample(unfinished, self.rng.randint(1, len(unfinished)))
            left = {seq: self.lengths[seq] - self.done[seq] for seq in chosen}
            chunks = {seq: self.rng.choice((1, self.rng.randint(1, n), n)) for seq, n in left.items()}
            rows, part = self.step(chunks)
            out[rows] = part
        return out


@pytest.mark.parametrize("fill", [0.0, 1.0, 3e38])
@pytest.mark.parametrize("page_size", [32, 64, 96])
@given(
    lengths=st.lists(st.sampled_from(LENGTHS) | st.integers(1, 140), min_size=1, max_size=5),
    heads=st.sampled_from([(2, 2), (4, 2), (6, 2), (8, 1)]),
    dim=st.sampled_from([16, 20, 64]),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_paged_in_any_chunks_gives_the_bits_of_packed(
    page_size: int, fill: float, lengths: list[int], heads: tuple[int, int], dim: int, seed: int
) -> None:
    """Whatever finite garbage lies in unused slots (``fill``)."""
    qkv = make_qkv(sum(lengths), *heads, dim, seed)
    paged = Pages(qkv, lengths, page_size, random.Random(seed), fill).run()
    assert torch.equal(paged, packed(qkv, lengths))


@pytest.mark.parametrize("page_size", [32, 64, 96])
def test_one_wrong_block_id_changes_the_result(page_size: int) -> None:
    lengths = (129, 70)
    qkv = make_qkv(sum(lengths), 4, 2, 16)
    expected = packed(qkv, lengths)
    for seq, length in enumerate(lengths):
        for entry in range(-(-length // KV_BLOCK)):
            pages = Pages(qkv, lengths, page_size, random.Random(0))
            pages.step(dict(enumerate(n - 1 for n in lengths)))
            rows, last = pages.step({0: 1, 1: 1}, shift=(seq, entry))
            right = [torch.equal(last[i], expected[row]) for i, row in enumerate(rows)]
            assert right == [seq != 0, seq != 1], f"entry {entry} of sequence {seq}"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    qkv = make_qkv(sum(LENGTHS), 6, 2, 20)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = packed(qkv, LENGTHS)
        torch.set_num_threads(threads)
        paged = Pages(qkv, LENGTHS, 32, random.Random(threads)).run()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(paged, expected)
