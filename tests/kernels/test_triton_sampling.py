"""Triton's sampling against float64 and the reference: Philox, all combinations of filters and bans, edges."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from accuracy import normal
from sampling_truth import ROUNDING, Case, case_of, check_columns, check_kept, check_tokens, near_step
from torch import Tensor
from triton.runtime import interpreter

from kernels import reference
from kernels.triton import filters, sampling
from kernels.triton.sampling import philox_uniform, sample_tokens

pytestmark = pytest.mark.usefixtures("poisoned")
TOP = 1 - 2.0**-24  # the largest uniform
VOCABS = (1, 7, 255, 256, 257, 1000, 5000)
SETTINGS = list(itertools.product((False, True), repeat=4))  # top-k, top-p, min-p, bans


# ---------------------------------------------------------------- Philox


@triton.jit
def _philox_words_kernel(counter, key, out):
    """All four words of tl.philox_impl, which philox_uniform takes the first of."""
    c0, c1, c2, c3 = tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3)
    k0, k1 = tl.load(key), tl.load(key + 1)
    w0, w1, w2, w3 = tl.philox_impl(
        c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), k0.to(tl.uint32), k1.to(tl.uint32)
    )
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))


@pytest.mark.parametrize(
    "counter, key, expected",  # philox4x32 10 of Random123's kat_vectors
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_reproduces_the_published_vectors(counter: str, key: str, expected: str, device: torch.device) -> None:
    words, keys, answer = ([int(w, 16) for w in text.split()] for text in (counter, key, expected))
    out = torch.zeros(4, dtype=torch.int64, device=device)
    _philox_words_kernel[(1,)](torch.tensor(words, device=device), torch.tensor(keys, device=device), out)
    assert out.tolist() == answer


def test_philox_uniform_has_the_reference_bits(device: torch.device) -> None:
    rng = random.Random(0)
    edges = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1, -1, -(2**63))
    seeds = [*edges, *(rng.randrange(2**63) for _ in range(300))]
    ids = [*reversed(edges), *(rng.randrange(2 ** rng.choice((8, 33, 63))) for _ in range(300))]
    positions = [*(e % 2**32 for e in edges), *(rng.randrange(2**32) for _ in range(300))]
    columns = torch.tensor([seeds, ids, positions], device=device)
    found = philox_uniform(*columns)
    assert found.dtype == torch.float32
    assert torch.equal(found, reference.philox_uniform(*columns))
    assert torch.equal(found, philox_uniform(*columns.T.contiguous().T))  # columns that lie apart
    assert torch.equal(philox_uniform(*columns[:, 128:129]), found[128:129])
    assert philox_uniform(*columns[:, :0]).shape == (0,)


# ---------------------------------------------------------------- against float64


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the filters kept in each call of sample_tokens that had any, bool [R, V]."""
    found: list[Tensor] = []

    def watched(z: Tensor, *args: Tensor | None) -> tuple[Tensor, ...]:
        kept, border, last = filters.kept_prefixes(z, *args)
        x = z if args[-1] is None else z.masked_fill(args[-1], -torch.inf)
        ids = torch.arange(z.shape[1], device=z.device)
        found.append((x > border[:, None]) | ((x == border[:, None]) & (ids <= last[:, None])))
        return kept, border, last

    monkeypatch.setattr(sampling, "kept_prefixes", watched)
    return found


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "".join(n for n, on in zip("kpmb", s, strict=True) if on))
@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens_and_columns(vocab: int, setting: tuple[bool, ...], masks: list[Tensor], device: torch.device) -> None:
    """Three rows of the eight in turn, so that all meet all filters: one takes the interpreter a tenth of a second."""
    turn = VOCABS.index(vocab) + SETTINGS.index(setting)
    rows = [turn % 8, (turn + 3) % 8, (turn + 6) % 8]
    case = case_of(vocab, setting, device).rows(rows)
    uniform = torch.tensor([0.3, TOP, 0.0, 0.77, 0.5, 0.2, 0.9, TOP], device=device)[rows]
    warm = case.temperature > 0
    out = sample_tokens(**case.arguments(uniform))
    assert out.tokens.dtype == torch.int64
    kept = masks[-1] if masks else torch.ones_like(case.z, dtype=torch.bool)
    check_kept(kept[warm], case.rows(warm))
    check_tokens(out.tokens[warm], torch.where(kept, case.allowed(), -torch.inf)[warm], uniform[warm])
    check_columns(out, case, kept)
    assert len(masks) == any(setting[:3])

    theirs = reference.sample_tokens(**case.arguments(uniform))
    border = (case.kept(-ROUNDING) != case.kept(ROUNDING)).any(-1)  # rounding may let them keep other tokens
    same = ~(warm & (border | near_step(torch.where(kept, case.allowed(), -torch.inf), uniform)))
    assert torch.equal(out.tokens[same], theirs.tokens[same])
    for name, column in vars(out).items():  # theirs divides by the temperature first, and so loses more
        assert torch.allclose(column[same], getattr(theirs, name)[same], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("vocab", [20, 1000])
def test_tokens_are_the_references(vocab: int, device: torch.device) -> None:
    """Many uniforms on few rows: none differs, unless within rounding of a step."""
    rows = 64
    z = (normal(4, vocab, seed=3, device=device) * 2).repeat(rows // 4, 1)
    case = Case(z, torch.tensor([0.5, 0.8, 1.0, 1.6], device=device).repeat(rows // 4))
    ids = torch.arange(rows, device=device)
    uniform = philox_uniform(torch.full_like(ids, 7), ids, ids % 13)
    out, theirs = (f(**case.arguments(uniform)) for f in (sample_tokens, reference.sample_tokens))
    check_tokens(out.tokens, case.logp(), uniform)
    check_columns(out, case, torch.ones_like(z, dtype=torch.bool))
    assert torch.count_nonzero(out.log_kept_mass) == 0
    near = near_step(case.logp(), uniform)
    assert torch.equal(out.tokens[~near], theirs.tokens[~near])
    assert near.sum() < 4 and out.tokens.unique().numel() > 10


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow
@pytest.mark.parametrize("heat", [1e-38, 1e-45, 1e38])
def test_any_temperature_will_do(heat: float, device: torch.device) -> None:
    """Where z / temperature, as the reference has it, is inf or a subnormal: the largest logits alone, or all alike."""
    z = normal(4, 300, device=device)
    z[2, 17] = z[2, 270] = 9.0
    case = Case(z, torch.full((4,), heat, device=device))
    uniform = torch.tensor([0.3, 0.6, 0.51, TOP], device=device)
    out = sample_tokens(**case.arguments(uniform))
    if heat < 1:
        assert out.tokens.tolist() == [z[0].argmax(), z[1].argmax(), 270, z[3].argmax()]
        assert torch.allclose(out.logprobs, -torch.tensor([1.0, 1.0, 2.0, 1.0], device=device).log(), rtol=2e-6)
    else:
        assert out.tokens.tolist() == [90, 180, 153, 299]
        assert torch.allclose(out.logprobs, torch.full((4,), 1 / 300, device=device).log(), rtol=2e-6)


@pytest.mark.parametrize("filtered", [False, True])
def test_a_vocabulary_of_256_k(filtered: bool, masks: list[Tensor], device: torch.device) -> None:
    rows, vocab = 2, 262_208
    filters = (torch.tensor([50, 9], device=device), torch.tensor([0.9, 1.0], device=device)) if filtered else ()
    case = Case(normal(rows, vocab, device=device) * 3, torch.tensor([0.8, 1.0], device=device), *filters)
    uniform = torch.tensor([0.4, 0.99], device=device)
    out = sample_tokens(**case.arguments(uniform))
    kept = masks[0] if filtered else torch.ones_like(case.z, dtype=torch.bool)
    check_kept(kept, case)
    check_tokens(out.tokens, torch.where(kept, case.allowed(), -torch.inf), uniform)
    check_columns(out, case, kept)


def test_the_check_of_tokens_notices_neighbours() -> None:
    logp = torch.log_softmax(normal(64, 50, seed=2).double(), -1)
    uniform = torch.linspace(0.01, 0.95, 64)
    right = (logp.exp().cumsum(-1) <= uniform.double()[:, None]).sum(-1)
    check_tokens(right, logp, uniform)
    for wrong in (right + 1, right - 1):
        with pytest.raises(AssertionError):
            check_tokens(wrong.clamp(0, 49), logp, uniform)


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("layout", ["last", "first", "middle", "sparse", "padded", "tiny"])
@pytest.mark.parametrize("vocab", [7, 257, 5000])
def test_a_token_without_mass_is_never_drawn(vocab: int, layout: str, filtered: bool, device: torch.device) -> None:
    """Not at a uniform of 0, not at the largest one; not before, between or after the tokens with mass."""
    alive = {
        "last": [vocab - 1],
        "first": [0],
        "middle": [vocab // 2],
        "sparse": range(1, vocab - 1, 3),
        "padded": range(vocab // 3 + 1),
        "tiny": [2],
    }[layout]
    uniform = torch.tensor([0.0, TOP, 0.5, 1 - 2.0**-20, 2.0**-24, 1 / 3], device=device)
    z = torch.full((6, vocab), -torch.inf, device=device)
    z[:, list(alive)] = normal(6, len(alive), device=device) * 5
    if layout == "tiny":
        z[:, 1], z[:, 3] = z[:, 2] - 120, z[:, 2] - 90  # exp underflows: no mass, or a subnormal
    given = (torch.full((6,), 4, device=device), torch.full((6,), 0.999, device=device)) if filtered else ()
    out = sample_tokens(z, torch.ones(6, device=device), uniform, *given)
    assert (torch.softmax(z, -1).gather(1, out.tokens[:, None]) > 0).all()
    assert torch.isfinite(out.logprobs).all() and torch.isfinite(out.processed_logprobs).all()
    if len(alive) == 1:
        assert out.logprobs.abs().max() < 1e-30 and torch.count_nonzero(out.log_kept_mass) == 0


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_extreme_uniforms_reach_the_first_and_last_kept_token(vocab: int, device: torch.device) -> None:
    """Equal logits: a uniform of 0 draws the first id, the largest uniform the last. Ties go to the lower id."""
    z = torch.full((2, vocab), -3.5, device=device)
    heat, uniform = torch.ones(2, device=device), torch.tensor([0.0, TOP], device=device)
    k, half = torch.full((2,), min(vocab, 4), device=device), torch.full((2,), 0.5, device=device)
    most = (vocab + 1) // 2
    for given, last in (((), vocab - 1), ((k,), min(vocab, 4) - 1), ((None, half), most - 1), ((None, None, half), -1)):
        assert sample_tokens(z, heat, uniform, *given).tokens.tolist() == [0, last % vocab]
    assert sample_tokens(z, heat * 0, uniform, k).tokens.tolist() == [0, 0]


def test_greedy_takes_the_lowest_id_of_the_largest_logits(device: torch.device) -> None:
    z = normal(16, 1000, device=device).clamp(max=1.0)
    z[8:] -= 2
    tied = [(row * 97 % 700, row * 97 % 700 + 1 + row * 17) for row in range(16)]
    for row, ids in enumerate(tied):
        z[row, list(ids)] = 3.0 if row < 8 else -0.0
        z[row, ids[1]] = 3.0 if row < 8 else 0.0  # the two zeros are equal
    z[8:] = torch.where(z[8:] > 0, -1.0, z[8:])
    heat, uniform = torch.zeros(16, device=device), torch.full((16,), TOP, device=device)
    assert sample_tokens(z, heat, uniform).tokens.tolist() == [first for first, _ in tied]
    banned = torch.zeros_like(z, dtype=torch.bool)
    for row, (first, _) in enumerate(tied):
        banned[row, first] = True
    out = sample_tokens(z, heat, uniform, banned=banned)
    assert out.tokens.tolist() == [second for _, second in tied]
    check_columns(out, Case(z, heat, banned=banned), ~banned)
    warm = sample_tokens(z, heat + 1, uniform, torch.full((16,), 2, device=device))  # top-k leaves the two
    assert warm.tokens.tolist() == [second for _, second in tied]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
def test_a_damaged_row_says_so_and_leaves_its_neighbours_alone(device: torch.device) -> None:
    z = normal(6, 600, device=device)
    heat, uniform = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0], device=device), torch.full((6,), 0.4, device=device)
    right = sample_tokens(z, heat, uniform, torch.full((6,), 5, device=device))
    z[0, 300], z[1, 3], z[2, 3], z[3], z[4] = torch.nan, torch.inf, torch.nan, -torch.inf, torch.nan
    out = sample_tokens(z, heat, uniform, torch.full((6,), 5, device=device))
    assert out.logprobs[:5].isnan().all()
    assert ((out.tokens >= 0) & (out.tokens < 600)).all()
    for name, column in vars(out).items():
        assert torch.equal(column[5], getattr(right, name)[5])


def test_a_banned_token_with_all_the_mass_leaves_the_others_their_proportions(device: torch.device) -> None:
    z = normal(1, 40, device=device).expand(64, 40).clone()
    z[:, 5] = 300.0
    banned = torch.zeros(40, dtype=torch.bool, device=device)
    banned[5] = True
    case = Case(z, torch.ones(64, device=device), banned=banned.expand(64, 40))
    uniform = (torch.arange(64, device=device) + 0.5) / 64
    out = sample_tokens(**case.arguments(uniform))
    check_tokens(out.tokens, case.allowed(), uniform)
    check_columns(out, case, torch.ones_like(z, dtype=torch.bool))


@triton.jit
def _draw_kernel(mass, threshold, out, SIZE: tl.constexpr):
    found, before = sampling._draw(tl.load(mass + tl.arange(0, SIZE)), tl.load(threshold), SIZE)
    tl.store(out, found.to(tl.float32))
    tl.store(out + 1, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has running sums of its own")
@pytest.mark.parametrize("threshold, found", [(0.0, 0), (1.0, 2), (2.0, 4), (3.0, 4)])
def test_running_sums_that_rise_where_nothing_is_added(
    threshold: float, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU's do at the border of two threads: the entry there has no mass, and isn't drawn."""
    step = 2.0**-22
    cdf = np.array([1, 1 + step, 2, 2 + step, 3, 3, 3 + step, 3], dtype=np.float32)
    monkeypatch.setattr(interpreter.ScanOps, "cumsum", lambda self, x: [self.to_tensor(cdf, dtype=x.dtype)])
    out = torch.zeros(2)
    _draw_kernel[(1,)](torch.tensor([1.0, 0, 1, 0, 1, 0, 0, 0]), torch.tensor([threshold]), out, SIZE=8)
    assert out.tolist() == [found, cdf[found - 1] if found else 0]
