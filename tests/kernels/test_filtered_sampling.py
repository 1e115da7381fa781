"""Draws under every combination of filters and bans, on a vocabulary small enough to enumerate in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kernels import SampledTokens, philox_uniform, sample_tokens

VOCAB, DRAWS = 24, 100_000
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)) * 0.9
UNIFORM = philox_uniform(torch.full((DRAWS,), 5), torch.arange(DRAWS), torch.arange(DRAWS) % 7)
BANNED = torch.zeros(VOCAB, dtype=torch.bool)
BANNED[[int(LOGITS.argmax()), 3, 11]] = True  # the likeliest, so that every filter has to look past it

SETTINGS: list[dict[str, float]] = [
    {name: value for name, value in zip(("top_k", "top_p", "min_p", "banned"), chosen, strict=True) if value}
    for chosen in itertools.product((0, 9), (0, 0.8), (0, 0.12), (0, 1))
]


def truth(heat: float, top_k: int = 0, top_p: float = 0, min_p: float = 0, banned: int = 0) -> tuple[Tensor, Tensor]:
    """Full and sampled-from distribution [V], float64, by the documented order, one token at a time."""
    full = torch.softmax(LOGITS.double() / heat, -1)
    p = {i: full[i].item() for i in range(VOCAB) if not (banned and BANNED[i])}
    order = sorted(p, key=lambda i: (-p[i], i))
    order = [i for i in order if p[i] >= min_p * p[order[0]]]
    order = order[: top_k or VOCAB]
    mass, kept, before = sum(p[i] for i in order), [], 0.0
    for i in order:
        if top_p and before >= top_p * mass:
            break
        kept.append(i)
        before += p[i]
    processed = torch.zeros(VOCAB, dtype=torch.float64)
    processed[kept] = full[kept] / full[kept].sum()
    return full, processed


def draw(heat: float, top_k: int = 0, top_p: float = 0, min_p: float = 0, banned: int = 0) -> SampledTokens:
    rows = 10_000  # at a time
    parts = [
        sample_tokens(
            LOGITS.expand(rows, VOCAB).contiguous(),
            torch.full((rows,), heat),
            uniform,
            torch.full((rows,), top_k) if top_k else None,
            torch.full((rows,), top_p) if top_p else None,
            torch.full((rows,), min_p) if min_p else None,
            BANNED.expand(rows, VOCAB) if banned else None,
        )
        for uniform in UNIFORM.split(rows)
    ]
    return SampledTokens(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))


def p_value(tokens: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-squared test that the draws come from ``expected`` [V]; 0 for a draw that can't be."""
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    if counts[expected == 0].any():
        return 0.0
    alive = expected > 0
    wanted = expected[alive] * len(tokens)
    assert wanted.min() > 5
    statistic = ((counts[alive] - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((alive.sum().item() - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "+".join(setting) or "plain")
def test_draws_follow_the_reported_distribution(setting: dict[str, float]) -> None:
    heat = (0.7, 1.3)[SETTINGS.index(setting) % 3 % 2]
    full, processed = truth(heat, **setting)
    out = draw(heat, **setting)
    assert p_value(out.tokens, processed) > 1e-3
    drawn = {int(t): i for i, t in enumerate(out.tokens)}  # every kept token, and one draw of it
    assert sorted(drawn) == processed.nonzero()[:, 0].tolist()
    rows = torch.tensor(list(drawn.values()))
    reported = out.processed_logprobs[rows].double().exp()
    assert abs(reported.sum().item() - 1) < 1e-6
    assert (reported - processed[out.tokens[rows]]).abs().max() < 1e-6
    assert (out.logprobs.double() - full[out.tokens].log()).abs().max() < 1e-6
    assert (out.log_kept_mass.double() - full[processed > 0].sum().log()).abs().max() < 1e-6


def test_the_test_would_notice_a_wrong_distribution() -> None:
    tokens = draw(1.0, top_k=9, min_p=0.12).tokens
    assert p_value(tokens, truth(1.0, top_k=9, min_p=0.12)[1]) > 1e-3
    for wrong in (truth(1.06, top_k=9, min_p=0.12), truth(1.0, top_k=9, min_p=0.2), truth(1.0, top_k=8, min_p=0.12)):
        assert p_value(tokens, wrong[1]) < 1e-3


def test_filters_come_in_the_documented_order() -> None:
    """Top-p of what min-p and top-k kept: of all tokens, half the mass takes more of them."""
    for first in ({"top_k": 6}, {"min_p": 0.4}):
        sizes = [(truth(1.0, **setting)[1] > 0).sum() for setting in ({**first, "top_p": 0.6}, {"top_p": 0.6}, first)]
        assert sizes[0] < sizes[1] <= sizes[2]
        assert draw(1.0, **first, top_p=0.6).tokens.unique().numel() == sizes[0]


@pytest.mark.parametrize("heat", [0.0, 1.0])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_banned_token_with_all_the_mass_leaves_the_others_their_proportions(heat: float, filtered: bool) -> None:
    z = LOGITS.expand(1024, VOCAB).clone()
    z[:, 5] = 300.0
    banned = torch.zeros(1024, VOCAB, dtype=torch.bool)
    banned[:512, 5] = True
    filters = (torch.full((1024,), 9), torch.full((1024,), 0.9)) if filtered else ()
    uniform = (torch.arange(1024) % 512 + 0.5) / 512
    out = sample_tokens(z, torch.full((1024,), heat), uniform, *filters, banned=banned)
    without = sample_tokens(
        z.index_fill(1, torch.tensor([5]), -torch.inf), torch.full((1024,), heat), uniform, *filters
    )
    assert torch.equal(out.tokens[:512], without.tokens[:512])
    assert (out.processed_logprobs - without.processed_logprobs)[:512].abs().max() < 1e-4  # of numbers near 300
    assert (out.logprobs[:512] < -250).all() and torch.isfinite(out.log_kept_mass).all()
    assert torch.equal(out.processed_logprobs, out.logprobs - out.log_kept_mass)
    assert (out.tokens[512:] == 5).all()  # rows without a ban in the same block
    assert torch.equal(out.logprobs[512:], torch.zeros(512))


def test_rows_that_ban_leave_their_neighbours_bits_alone() -> None:
    z = torch.randn(16, 1000, generator=torch.Generator().manual_seed(1))
    heat, uniform = torch.full((16,), 0.9), torch.linspace(0.02, 0.98, 16)
    filters = (
        torch.tensor([0, 7] * 8),
        torch.tensor([1.0, 0.9, 0.8, 1.0] * 4),
        torch.tensor([0.0, 0.0, 0.01, 0.1] * 4),
    )
    plain = sample_tokens(z, heat, uniform, *filters)
    banned = torch.zeros(16, 1000, dtype=torch.bool)
    banned[3, plain.tokens[3]] = True
    mixed = sample_tokens(z, heat, uniform, *filters, banned=banned)
    others = torch.arange(16) != 3
    for name, column in vars(mixed).items():
        assert torch.equal(column[others], getattr(plain, name)[others]), name
    assert mixed.tokens[3] != plain.tokens[3]
