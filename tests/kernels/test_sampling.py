"""Philox against its published vectors, sampling against float64 inverse CDF, filters against a naive one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import SampledTokens, philox_uniform, sample_tokens
from kernels.reference.sampling import filter_mask

pytestmark = pytest.mark.usefixtures("implementation")

VOCABS = (5, 20, 256, 257, 1000)
TOP = 1 - 2.0**-24  # the largest uniform


# ---------------------------------------------------------------- Philox


def naive_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as its paper has it, in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return c0, c1, c2, c3


def naive_uniform(seed: int, sample_id: int, position: int) -> float:
    words = [x % (1 << 32) for x in (sample_id, sample_id >> 32, position, 0, seed, seed >> 32)]
    return (naive_philox(tuple(words[:4]), (words[4], words[5]))[0] >> 8) / (1 << 24)


@pytest.mark.parametrize(
    "counter, key, expected",  # philox4x32 10 of Random123's kat_vectors
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_naive_philox_reproduces_the_published_vectors(counter: str, key: str, expected: str) -> None:
    words, (k0, k1), answer = ([int(w, 16) for w in text.split()] for text in (counter, key, expected))
    assert naive_philox(tuple(words), (k0, k1)) == tuple(answer)


def test_philox_uniform_at_zero_is_the_published_vector() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox_uniform(zero, zero, zero).tolist() == [(0x6627E8D5 >> 8) * 2.0**-24]


def test_philox_uniform_matches_the_naive_one() -> None:
    rng = random.Random(0)
    edges = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1)
    seeds = [*edges, *(rng.randrange(2**63) for _ in range(300))]
    ids = [*reversed(edges), *(rng.randrange(2 ** rng.choice((8, 33, 63))) for _ in range(300))]
    positions = [*(e % 2**32 for e in edges), *(rng.randrange(2**32) for _ in range(300))]
    got = philox_uniform(*(torch.tensor(column) for column in (seeds, ids, positions)))
    assert got.dtype == torch.float32
    assert got.tolist() == [naive_uniform(*row) for row in zip(seeds, ids, positions, strict=True)]


# ---------------------------------------------------------------- inverse CDF


def make_logits(rows: int, vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def naive_kept(p: Tensor, top_k: int, top_p: float, slack: float = 0.0) -> list[int]:
    """Ids that the filters keep of one row of float64 probabilities, the likeliest first."""
    order = sorted(range(len(p)), key=lambda i: (-p[i].item(), i))
    order = order[:top_k] if top_k > 0 else order
    mass, before, kept = sum(p[i].item() for i in order), 0.0, []
    for i in order:
        if before >= top_p * mass + slack and kept and top_p < 1:
            break
        kept.append(i)
        before += p[i].item()
    return kept


def check_inverse_cdf(out: SampledTokens, p: Tensor, uniform: Tensor) -> None:
    """Each token's stretch of the float64 CDF contains the uniform, but for 1e-6; nearly all match exactly."""
    p = p / p.sum(-1, keepdim=True)
    cdf = p.cumsum(-1)
    u = uniform.double()[:, None]
    upper = cdf.gather(1, out.tokens[:, None])
    lower = upper - p.gather(1, out.tokens[:, None])
    assert ((lower - 1e-6 <= u) & (u <= upper + 1e-6)).all()
    assert (p.gather(1, out.tokens[:, None]) > 0).all()
    exact = (cdf <= u).sum(-1).clamp(max=p.shape[1] - 1)
    assert (out.tokens == exact).double().mean() > 0.99


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("filtered", [False, True])
def test_tokens_and_columns_match_float64_inverse_cdf(vocab: int, filtered: bool) -> None:
    rows = 1024
    z = make_logits(rows, vocab)
    heat = torch.tensor([0.5, 0.8, 1.0, 1.6]).repeat(rows // 4)
    uniform = (torch.arange(rows) * 16411 % 2**24 + 0.0) * 2.0**-24
    top_k = torch.tensor([0, 1, 3, 0, 50]).repeat(rows)[:rows]
    top_p = torch.tensor([1.0, 1.0, 0.7, 0.3, 0.9, 1.0, 0.05]).repeat(rows)[:rows]
    out = sample_tokens(z, heat, uniform, *((top_k, top_p) if filtered else ()))
    full = torch.softmax(z.double() / heat.double()[:, None], -1)
    kept = torch.ones_like(full)
    if filtered:
        kept.zero_()
        for row in range(rows):
            kept[row, naive_kept(full[row], int(top_k[row]), float(top_p[row]))] = 1
    check_inverse_cdf(out, full * kept, uniform)
    logprob = full.gather(1, out.tokens[:, None])[:, 0].log()
    assert (out.logprobs.double() - logprob).abs().max() < 1e-5
    assert (out.log_kept_mass.double() - (full * kept).sum(-1).log()).abs().max() < 1e-5
    assert torch.equal(out.processed_logprobs, out.logprobs - out.log_kept_mass)
    torch.testing.assert_close(out.entropy.double(), torch.special.entr(full).sum(-1), rtol=2e-6, atol=2e-6)
    if filtered:
        free = (top_k == 0) & (top_p == 1)
        assert free.any() and torch.count_nonzero(out.log_kept_mass[free]) == 0
    else:
        assert torch.count_nonzero(out.log_kept_mass) == 0 and torch.equal(out.processed_logprobs, out.logprobs)


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 40000 draws on 20 tokens; 43.8 is exceeded with probability 0.001 at 19 degrees of freedom."""
    draws, vocab = 40000, 20
    z = make_logits(1, vocab, spread=1.0).expand(draws, vocab).contiguous()
    ids = torch.arange(draws)
    uniform = philox_uniform(torch.full_like(ids, 7), ids, ids % 13)
    tokens = sample_tokens(z, torch.ones(draws), uniform).tokens
    expected = torch.softmax(z[0].double(), -1) * draws
    counts = torch.bincount(tokens, minlength=vocab).double()
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("layout", ["last", "first", "middle", "sparse", "tiny"])
def test_a_token_without_mass_is_never_drawn(vocab: int, layout: str, filtered: bool) -> None:
    """Not at a uniform of 0, not at the largest one; not before, between or after the tokens with mass."""
    alive = {"last": [vocab - 1], "first": [0], "middle": [vocab // 2], "sparse": range(1, vocab - 1, 3), "tiny": [2]}
    z = torch.full((24, vocab), -torch.inf)
    z[:, list(alive[layout])] = make_logits(24, len(alive[layout]), spread=5)
    if layout == "tiny":
        z[:, 1], z[:, 3] = z[:, 2] - 120, z[:, 2] - 90  # exp underflows: no mass, or a subnormal
    uniform = torch.tensor([0.0, TOP, 0.5, 1 - 2.0**-20, 2.0**-24, 1 / 3, TOP, 0.0]).repeat(3)
    filters = (torch.full((24,), 4), torch.full((24,), 0.999)) if filtered else ()
    out = sample_tokens(z, torch.ones(24), uniform, *filters)
    p = torch.softmax(z, -1)
    assert (p.gather(1, out.tokens[:, None]) > 0).all()
    assert torch.isfinite(out.logprobs).all() and torch.isfinite(out.processed_logprobs).all()


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_extreme_uniforms_reach_the_first_and_last_kept_token(vocab: int) -> None:
    """Equal logits: a uniform of 0 draws the first id, the largest uniform the last."""
    z = torch.zeros(8, vocab)
    uniform = torch.tensor([0.0, TOP]).repeat(4)
    assert sample_tokens(z, torch.ones(8), uniform).tokens.tolist() == [0, vocab - 1] * 4
    top_k = torch.full((8,), min(vocab, 4))  # ties go to the lower id
    assert sample_tokens(z, torch.ones(8), uniform, top_k, torch.ones(8)).tokens.tolist() == [0, 3] * 4


# ---------------------------------------------------------------- greedy and filters


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("vocab", VOCABS)
def test_greedy_takes_the_lowest_id_of_the_largest_logits(vocab: int, filtered: bool) -> None:
    z = make_logits(16, vocab).clamp(max=1.0)
    tied = [(row * 7 % (vocab - 2), vocab - 1) for row in range(16)]
    for row, ids in enumerate(tied):
        z[row, list(ids)] = 3.0
    heat = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(4)
    filters = (torch.full((16,), 2), torch.full((16,), 0.9)) if filtered else ()
    out = sample_tokens(z, heat, torch.full((16,), TOP), *filters)
    greedy = heat == 0
    assert out.tokens[greedy].tolist() == [ids[0] for ids, cold in zip(tied, greedy, strict=True) if cold]
    if filtered:  # the two tied tokens are all that top-k leaves, and the largest uniform draws the second
        assert out.tokens[~greedy].tolist() == [ids[1] for ids, cold in zip(tied, greedy, strict=True) if not cold]
    scored = torch.log_softmax(z.double(), -1).gather(1, out.tokens[:, None])[:, 0]
    assert (out.logprobs.double() - scored).abs().max() < 1e-5  # greedy is scored at temperature 1
    assert torch.count_nonzero(out.processed_logprobs[greedy]) == 0  # the one token kept has all the mass
    assert torch.equal(out.processed_logprobs, out.logprobs - out.log_kept_mass)


@given(
    vocab=st.sampled_from(VOCABS),
    seed=st.integers(0, 1 << 16),
    ties=st.booleans(),
    top_k=st.integers(0, 1100),
    top_p=st.floats(1 / 64, 1.0, width=32),
)
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_filters_keep_what_a_naive_filter_keeps(vocab: int, seed: int, ties: bool, top_k: int, top_p: float) -> None:
    z = make_logits(8, vocab, seed)
    z = z.round() if ties else z
    logp = torch.log_softmax(z, -1)
    keep = filter_mask(logp, torch.full((8,), top_k), torch.full((8,), top_p))
    for row in range(8):
        p = logp[row].double().exp()
        got = set(keep[row].nonzero()[:, 0].tolist())
        # Rounding decides the last token where the mass before it is within 1e-6 of the threshold.
        fewest, most = naive_kept(p, top_k, top_p, -1e-6), naive_kept(p, top_k, top_p, 1e-6)
        assert set(fewest) <= got <= set(most)
        assert len(got) >= 1 and (top_k == 0 or len(got) <= top_k)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    z = torch.log(torch.tensor([[0.125, 0.5, 0.25, 0.125]])).repeat(8, 1)
    top_p = torch.tensor([0.25, 0.51, 0.74, 0.76, 0.01, 0.9, 1.0, 0.49])
    keep = filter_mask(torch.log_softmax(z, -1), torch.zeros(8, dtype=torch.int64), top_p)
    assert keep.sum(-1).tolist() == [1, 2, 2, 3, 1, 4, 4, 1]
    assert keep[3].tolist() == [True, True, True, False]  # of the two equal ones, the lower id


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("vocab", [*VOCABS, 50257])
def test_rows_keep_their_bits_in_any_company(vocab: int, threads: int, set_threads: Callable[[int], None]) -> None:
    z = make_logits(40, vocab)
    heat = torch.tensor([0.0, 0.7, 1.0, 1.3, 0.9]).repeat(8)
    uniform = philox_uniform(torch.full((40,), 3), torch.arange(40), torch.arange(40))
    top_k = torch.tensor([0, 5, 0, 40]).repeat(10)
    top_p = torch.tensor([1.0, 0.9, 0.8, 1.0]).repeat(10)
    for filters in ((), (top_k, top_p)):
        set_threads(1)
        whole = sample_tokens(z, heat, uniform, *filters)
        set_threads(threads)
        for count in (8, 16, 32, 40):
            chosen = torch.randperm(40, generator=torch.Generator().manual_seed(count))[:count]
            part = sample_tokens(z[chosen], heat[chosen], uniform[chosen], *(f[chosen] for f in filters))
            for name, column in vars(part).items():
                assert torch.equal(column, getattr(whole, name)[chosen]), f"{name} of {count} rows"


def test_a_row_that_filters_leaves_its_neighbours_bits_alone() -> None:
    """Engine and test alike: rows without filters must not notice that another row has one."""
    z = make_logits(8, 1000)
    heat, uniform = torch.full((8,), 0.9), torch.linspace(0.05, 0.95, 8)
    plain = sample_tokens(z, heat, uniform)
    top_k, top_p = torch.tensor([5] + [0] * 7), torch.ones(8)
    mixed = sample_tokens(z, heat, uniform, top_k, top_p)
    for name, column in vars(mixed).items():
        assert torch.equal(column[1:], getattr(plain, name)[1:]), name
    assert math.isclose(mixed.log_kept_mass[0], torch.softmax(z[0] / 0.9, -1).topk(5).values.sum().log(), abs_tol=1e-5)
