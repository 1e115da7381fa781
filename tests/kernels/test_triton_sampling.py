"""Triton's sampling against float64 and the reference: Philox, all combinations of filters and bans, edges, company."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from accuracy import normal
from sampling_truth import ROUNDING, Case, check_columns, check_kept, check_tokens, near_step
from torch import Tensor

from kernels import SampledTokens, reference
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


def case_of(vocab: int, setting: tuple[bool, ...], device: torch.device, seed: int = 0) -> Case:
    """Rows of all kinds: cold, greedy and hot, filtered and not, with and without bans; one with many ties."""
    z = normal(8, vocab, seed=seed, device=device) * 2.5
    z[6] = z[6].round()
    heat = torch.tensor([0.0, 0.7, 1.0, 1.6, 1e-3, 1.0, 1.3, 1e-30])
    top_k = torch.tensor([3, 0, 1, 40, 5, 300, 20, 2])
    top_p = torch.tensor([0.5, 0.9, 1.0, 0.6, 0.9, 0.05, 0.8, 1.0])
    min_p = torch.tensor([0.1, 0.0, 0.0, 0.02, 0.5, 0.01, 1e-4, 1.0])
    banned = normal(8, vocab, seed=seed + 1, device=device) > 0.8
    banned[5] = False
    banned[:, vocab // 2] = False  # at least one is left
    banned[1] |= z[1] == z[1].max() if vocab > 1 else False
    banned[:, vocab // 2] &= vocab > 1
    given = [x.to(device) if wanted else None for x, wanted in zip((top_k, top_p, min_p, banned), setting, strict=True)]
    return Case(z, heat.to(device), *given)


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


# ---------------------------------------------------------------- company, layout, arguments


def columns_equal(a: SampledTokens, b: SampledTokens) -> bool:
    return all(torch.equal(x, getattr(b, name)) for name, x in vars(a).items())


@pytest.mark.parametrize("setting", [(False,) * 4, (True,) * 4])
def test_bits_depend_neither_on_company_nor_on_the_run(setting: tuple[bool, ...], device: torch.device) -> None:
    case = case_of(1000, setting, device)
    uniform = philox_uniform(*torch.arange(24, device=device).view(3, 8))
    out = sample_tokens(**case.arguments(uniform))
    for rows in ([3], [6], [5, 1, 2], [0]):
        part = sample_tokens(**case.rows(rows).arguments(uniform[rows]))
        assert columns_equal(part, SampledTokens(*(column[rows] for column in vars(out).values())))
    one = case.rows([1])
    first = sample_tokens(**one.arguments(uniform[:1]))
    assert all(columns_equal(first, sample_tokens(**one.arguments(uniform[:1]))) for _ in range(20))


def test_rows_that_filter_or_ban_leave_their_neighbours_bits_alone(device: torch.device) -> None:
    z = normal(4, 1000, device=device)
    heat, uniform = torch.full((4,), 0.9, device=device), torch.linspace(0.05, 0.95, 4, device=device)
    plain = sample_tokens(z, heat, uniform)
    banned = torch.zeros_like(z, dtype=torch.bool)
    banned[0, plain.tokens[0]] = True
    top_k, top_p = torch.tensor([0, 5, 0, 0], device=device), torch.tensor([1.0, 1.0, 0.5, 1.0], device=device)
    mixed = sample_tokens(z, heat, uniform, top_k, top_p, torch.zeros(4, device=device), banned)
    for name, column in vars(mixed).items():
        assert torch.equal(column[3], getattr(plain, name)[3]), name
    assert mixed.tokens[0] != plain.tokens[0]
    assert (mixed.log_kept_mass[:3] < 0).all() and mixed.log_kept_mass[3] == 0


def test_rows_that_lie_apart_need_no_copy(device: torch.device) -> None:
    wide = normal(5, 700, device=device)
    case = case_of(300, (True,) * 4, device).rows([1, 2, 3, 5, 6])
    out = [
        sample_tokens(**{**case.arguments(torch.full((5,), 0.6, device=device)), "z": z})
        for z in (wide[:, 17:317], wide[:, 17:317].contiguous(), wide[:, 17:317].T.contiguous().T)
    ]
    assert columns_equal(out[0], out[1]) and columns_equal(out[0], out[2])
    assert len(sample_tokens(wide[:0], wide[:0, 0], wide[:0, 0]).tokens) == 0


def test_bad_arguments_are_named(device: torch.device) -> None:
    z, row = normal(3, 20, device=device), torch.ones(3, device=device)
    mask = torch.zeros(3, 20, dtype=torch.bool, device=device)
    for wrong, named in (
        ({"z": z[0]}, "z is"),
        ({"z": z[:, :0]}, "z is"),
        ({"temperature": row[:2]}, "temperature"),
        ({"uniform": row.double()}, "uniform"),
        ({"top_k": row}, "top_k"),
        ({"top_p": row[:, None]}, "top_p"),
        ({"min_p": row.long()}, "min_p"),
        ({"banned": mask[:, :10]}, "banned"),
        ({"banned": mask.int()}, "banned"),
    ):
        with pytest.raises(ValueError, match=f"sample_tokens: {named}.*expected"):
            sample_tokens(**{"z": z, "temperature": row, "uniform": row * 0, **wrong})
    with pytest.raises(ValueError, match=r"philox_uniform: position is torch.int32 \[3\]"):
        philox_uniform(row.long(), row.long(), row.int())


def test_float64_goes_to_plain_torch_with_a_warning(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    z, row = normal(8, 20, device=device).double(), torch.full((8,), 0.5, device=device)
    out = sample_tokens(z, row, row)
    assert columns_equal(out, reference.sample_tokens(z, row, row))


# ---------------------------------------------------------------- compilations


def test_nothing_is_compiled_anew_because_a_batch_is_larger() -> None:
    """50 random numbers of rows, and two vocabularies: at most one form of each kernel for each of these."""
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    code = "import shipped.sampling as s; s.count_compilations()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == {
        "_philox_uniform_kernel": 1,
        "_sample_tiles_kernel": 2,
        "_sample_draw_kernel": 2,
        "_filter_kernel": 2,
    }
