"""What the filters keep, against a sort in float64: ties, borders at zero, any k and p, tiles without a live entry."""

from __future__ import annotations

import pytest
import torch
from accuracy import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_truth import Case, check_kept
from torch import Tensor

from kernels.reference.sampling import CDF_TILE
from kernels.triton.filters import kept_prefixes

pytestmark = pytest.mark.usefixtures("poisoned")


def prefixes(case: Case) -> tuple[Tensor, Tensor]:
    """Mask of the kept [R, V], and their sums by tile, relative to the tile's largest entry."""
    z = case.z if case.banned is None else case.z.masked_fill(case.banned, -torch.inf)
    rows, vocab = z.shape
    tiles = torch.nn.functional.pad(z.double(), (0, -vocab % CDF_TILE), value=-torch.inf).view(rows, -1, CDF_TILE)
    maxima = tiles.amax(-1)
    heat = torch.where(case.temperature > 0, case.temperature, 1.0).double()[:, None, None]
    weights = torch.exp((tiles - maxima.nan_to_num(neginf=0)[..., None]) / heat)
    kept, border, last = kept_prefixes(
        case.z,
        case.temperature,
        maxima.float(),
        weights.sum(-1).float(),
        case.top_k,
        case.top_p,
        case.min_p,
        case.banned,
    )
    ids = torch.arange(vocab, device=z.device)
    mask = (z > border[:, None]) | ((z == border[:, None]) & (ids <= last[:, None]))
    padded = torch.nn.functional.pad(mask, (0, -vocab % CDF_TILE)).view(tiles.shape)
    true = torch.where(padded, weights, 0).sum(-1)
    assert (kept.double() - true).abs().max() <= 2e-6 * CDF_TILE
    assert torch.equal(kept == 0, true == 0)
    return mask, kept


def column(*values: float) -> Tensor:
    return torch.tensor(values)


def test_top_p_keeps_the_smallest_set_that_reaches_it(device: torch.device) -> None:
    z = torch.log(torch.tensor([[0.125, 0.5, 0.25, 0.125]], device=device)).repeat(8, 1)
    top_p = column(0.25, 0.51, 0.74, 0.76, 0.01, 0.9, 1.0, 0.49).to(device)
    mask, _ = prefixes(Case(z, torch.ones(8, device=device), top_p=top_p))
    assert mask.sum(-1).tolist() == [1, 2, 2, 3, 1, 4, 4, 1]
    assert mask[3].tolist() == [True, True, True, False]  # of the two equal ones, the lower id


@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, -7.0, 1e-42, -3e38])
def test_of_many_equal_logits_the_lowest_ids_are_kept(value: float, device: torch.device) -> None:
    """Over several tiles; k and the share hit the middle of the ties, above which are a few other logits, or none."""
    vocab = 17 * CDF_TILE + 3
    z = torch.full((3, vocab), value, device=device)
    z[:, 1::7] = -value if value == 0 else max(value - 1, -3.2e38)  # zeros of both signs are ties
    z[:2, 40] = z[:2, 4200] = 3.0
    top_k = torch.tensor([700, 0, 3000], device=device)
    top_p = column(1.0, 0.4, 1.0).to(device)
    case = Case(z, torch.full((3,), 1e38 if value == -3e38 else 4.0, device=device), top_k, top_p)
    mask, _ = prefixes(case)
    check_kept(mask, case)
    for row in (0, 2):
        order = torch.argsort(z[row].double() + 0.0, descending=True, stable=True)
        assert set(mask[row].nonzero()[:, 0].tolist()) == set(order[: top_k[row]].tolist())


def test_equal_weights_are_counted_exactly(device: torch.device) -> None:
    """Sums of ones have no rounding: half of 600 is 300 tokens, and of the 100 that top-k leaves 50."""
    z, heat = torch.full((3, 600), 0.75, device=device), torch.ones(3, device=device)
    top_k, half = torch.tensor([0, 100, 100], device=device), column(0.5, 0.5, 1.0).to(device)
    mask, kept = prefixes(Case(z, heat, top_k, half))
    assert mask.sum(-1).tolist() == [300, 50, 100] and kept.sum(-1).tolist() == [300, 50, 100]
    assert all(mask[row, : mask[row].sum()].all() for row in range(3))


def test_filters_at_their_limits(device: torch.device) -> None:
    z = normal(8, 300, device=device)
    heat = torch.ones(8, device=device)
    case = Case(
        z,
        heat,
        torch.tensor([0, 300, 299, 1, 2**40, -1, 0, 0], device=device),
        column(1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 0.0, 1e-30).to(device),
        column(0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0).to(device),
    )
    mask, _ = prefixes(case)
    assert mask.sum(-1).tolist() == [300, 300, 299, 1, 300, 1, 1, 1]  # at least one stays
    assert not mask[2, z[2].argmin()] and all(mask[row, z[row].argmax()] for row in range(8))


def test_a_row_without_filters_keeps_its_sums_bits(device: torch.device) -> None:
    z = normal(3, 700, device=device)
    sums = normal(3, 3, seed=1, device=device).exp()
    maxima = torch.nn.functional.pad(z, (0, -700 % CDF_TILE), value=-torch.inf).view(3, 3, CDF_TILE).amax(-1)
    off = torch.tensor([0, 0, 9], device=device), torch.ones(3, device=device), torch.zeros(3, device=device)
    kept, *_ = kept_prefixes(z, column(1.0, 0.7, 0.0).to(device), maxima, sums, *off)  # the last is greedy
    assert torch.equal(kept, sums)


def test_tiles_below_the_border_are_not_read(device: torch.device) -> None:
    """One tile has all that top-k may keep; the others' entries, but for what the tiles' maxima say, are replaced."""
    z = normal(1, 16 * CDF_TILE, device=device)
    z[:, CDF_TILE : 2 * CDF_TILE] += 20
    heat, top_k = torch.ones(1, device=device), torch.tensor([30], device=device)
    tiles = z.view(1, 16, CDF_TILE)
    maxima = tiles.amax(-1)
    sums = torch.exp(tiles - maxima[..., None]).sum(-1)
    right = kept_prefixes(z, heat, maxima, sums, top_k)
    damaged = z.clone()
    damaged[:, :CDF_TILE], damaged[:, 2 * CDF_TILE :] = torch.nan, torch.nan
    assert all(torch.equal(a, b) for a, b in zip(right, kept_prefixes(damaged, heat, maxima, sums, top_k), strict=True))


@given(
    vocab=st.sampled_from((1, 2, 100, 256, 300, 513, 700)),
    seed=st.integers(0, 1 << 16),
    steps=st.sampled_from((0.0, 0.25, 1.0)),
    spread=st.sampled_from((0.1, 2.0, 10.0)),
    heat=st.sampled_from((0.3, 1.0, 2.0)),
    top_k=st.integers(0, 800),
    top_p=st.floats(1 / 64, 1.0, width=32),
    min_p=st.sampled_from((0.0, 1e-6, 0.01, 0.3, 1.0)),
    bans=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_filters_keep_what_a_sort_keeps(
    vocab: int, seed: int, steps: float, spread: float, heat: float, top_k: int, top_p: float, min_p: float, bans: bool
) -> None:
    z = normal(2, vocab, seed=seed) * spread
    z = (z / steps).round() * steps if steps else z
    banned = normal(2, vocab, seed=seed + 1) > 0.5
    banned[:, 0] = False
    case = Case(
        z,
        torch.full((2,), heat),
        torch.full((2,), top_k),
        torch.full((2,), top_p),
        torch.full((2,), min_p),
        banned if bans else None,
    )
    mask, _ = prefixes(case)
    check_kept(mask, case)
    exact = case.kept() & case.allowed().isfinite()
    assert top_k == 0 or (mask & case.allowed().isfinite()).sum(-1).max() <= top_k
    if top_p == 1 and min_p in (0, 1e-6):  # nothing is rounded: counts only
        assert torch.equal(mask & case.allowed().isfinite(), exact) or min_p
