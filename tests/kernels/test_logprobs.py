"""Token log-probs and entropies against float64, their gradients, padding, chunks and independence of the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.reference.logprobs as logprobs
from kernels import distribution, logits, token_logprobs

FORWARD, BACKWARD = 2e-6, 1e-5
HEATS = (0.0, 0.3, 1.0, 1.7)
ROWS, HIDDEN = 21, 24


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest error in units of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def make(vocab: int, num_tokens: int, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    weight = torch.randn(vocab, HIDDEN, generator=generator) * 0.5
    targets = torch.randint(num_tokens, (rows,), generator=generator)
    return hidden, weight, targets, torch.tensor(HEATS).repeat(rows)[:rows]


def naive(
    hidden: Tensor, weight: Tensor, targets: Tensor, heat: Tensor, num_tokens: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """In float64 and one row at a time: the rows of the head beyond the tokenizer do not exist."""
    logprob, entropy = [], []
    for x, target, t in zip(hidden.double(), targets.tolist(), heat.double().tolist(), strict=True):
        z = weight.double()[:num_tokens] @ x
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / (t if t > 0 else 1.0)
        logp = z - torch.log(torch.exp(z - z.max()).sum()) - z.max()
        logprob.append(logp[target])
        entropy.append(-(torch.exp(logp) * logp).sum())
    return torch.stack(logprob), torch.stack(entropy)


def gradients(columns: tuple[Tensor, Tensor], leaves: list[Tensor], upstream: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of the two columns' sum, weighted row by row; an upstream of zeros leaves a column out."""
    total = sum((c * u.to(c.dtype)).sum() for c, u in zip(columns, upstream, strict=True))
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves))


SOFTCAPS = [None, 3.0]  # logits reach 8
SIZES = [(17, 17), (24, 17), (1000, 1000), (1024, 1000)]


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("vocab, num_tokens", SIZES)
def test_forward_matches_float64(vocab: int, num_tokens: int, softcap: float | None) -> None:
    inputs = (*make(vocab, num_tokens), num_tokens, softcap)
    for ours, expected in zip(token_logprobs(*inputs), naive(*inputs), strict=True):
        assert ours.dtype == torch.float32
        assert gap(ours, expected) < FORWARD


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("which", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("vocab, num_tokens", SIZES)
def test_backward_matches_float64(
    vocab: int,
    num_tokens: int,
    which: str,
    chunked: bool,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunked:
        monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 8 * vocab)
    hidden, weight, targets, heat = make(vocab, num_tokens)
    generator = torch.Generator().manual_seed(3)
    on = torch.tensor([which != "entropy", which != "logprob"]).float()
    upstream = (torch.randn(ROWS, generator=generator) * on[0], torch.randn(ROWS, generator=generator) * on[1])
    mine = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    wide = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    rest = (targets, heat, num_tokens, softcap)
    grads = gradients(token_logprobs(mine[0], mine[1], *rest), mine, upstream)
    expected = gradients(naive(wide[0], wide[1], *rest), wide, upstream)
    for got, want in zip(grads, expected, strict=True):
        assert gap(got, want) < BACKWARD
    assert torch.count_nonzero(grads[1][num_tokens:]) == 0
    assert torch.count_nonzero(grads[1][:num_tokens]) > 0


def test_padding_rows_of_the_head_change_nothing() -> None:
    hidden, weight, targets, heat = make(24, 17)
    huge = weight.clone()
    huge[17:] = 1e4 * hidden[:7]  # would win every softmax
    for a, b in zip(
        token_logprobs(hidden, weight, targets, heat, 17), token_logprobs(hidden, huge, targets, heat, 17), strict=True
    ):
        assert torch.isfinite(a).all() and torch.equal(a, b)
    z = logits(hidden, huge, 17)
    assert z.shape == (ROWS, 24) and z.dtype == torch.float32
    assert torch.isinf(z[:, 17:]).all() and torch.isfinite(z[:, :17]).all()


def test_temperature_zero_is_scored_at_one() -> None:
    hidden, weight, targets, _ = make(1000, 1000)
    zero = token_logprobs(hidden, weight, targets, torch.zeros(ROWS), 1000)
    one = token_logprobs(hidden, weight, targets, torch.ones(ROWS), 1000)
    cold = token_logprobs(hidden, weight, targets, torch.full((ROWS,), 0.5), 1000)
    for a, b, c in zip(zero, one, cold, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_underflowing_probabilities_have_finite_gradients() -> None:
    """At temperature 0.001 nearly all probabilities are exactly 0 in fp32, and 0 * log 0 must not become NaN."""
    hidden, weight, targets, _ = make(1000, 1000)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    heat = torch.full((ROWS,), 1e-3)
    columns = token_logprobs(leaves[0], leaves[1], targets, heat, 1000)
    assert (distribution(logits(hidden.detach(), weight.detach(), 1000), heat).exp() == 0).float().mean() > 0.9
    ones = torch.ones(ROWS)
    for tensor in (*columns, *gradients(columns, leaves, (ones, ones))):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("elements", [1, 8 * 1000, 16 * 1000 + 5])
def test_chunks_give_the_bits_of_one_piece(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(1000, 990, rows=45)
    whole = token_logprobs(*inputs, 990)
    seen: list[int] = []
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(logprobs, "distribution", lambda z, t: seen.append(len(z)) or distribution(z, t))
    for a, b in zip(token_logprobs(*inputs, 990), whole, strict=True):
        assert torch.equal(a, b)
    assert len(seen) >= 3 and max(seen) <= max(8, elements // 1000)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [17, 1000, 50257])
def test_rows_keep_their_bits_in_any_company(vocab: int, threads: int, set_threads: Callable[[int], None]) -> None:
    hidden, weight, targets, heat = make(vocab, vocab, rows=45)
    set_threads(1)
    whole = token_logprobs(hidden, weight, targets, heat, vocab)
    set_threads(threads)
    generator = torch.Generator().manual_seed(vocab)
    for count in (*[1] * 8, 2, 7, 8, 9, 16, 31, 44, 45):
        chosen = torch.randperm(45, generator=generator)[:count]
        part = token_logprobs(hidden[chosen], weight, targets[chosen], heat[chosen], vocab)
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[chosen]), f"{count} rows"


def test_half_precision_weights_give_fp32_logits() -> None:
    hidden, weight, targets, heat = make(1000, 1000)
    half = (hidden.bfloat16(), weight.bfloat16())
    expected = token_logprobs(half[0].float(), half[1].float(), targets, heat, 1000)
    assert all(map(torch.equal, token_logprobs(*half, targets, heat, 1000), expected))
    leaves = [x.requires_grad_() for x in half]
    grads = gradients(token_logprobs(leaves[0], leaves[1], targets, heat, 1000), leaves, (torch.ones(ROWS),) * 2)
    wide = [x.detach().double().requires_grad_() for x in half]
    want = gradients(naive(wide[0], wide[1], targets, heat, 1000), wide, (torch.ones(ROWS),) * 2)
    assert all(g.dtype == torch.bfloat16 and gap(g, w) < 2**-8 for g, w in zip(grads, want, strict=True))


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("vocab", [17, 1000])
def test_the_sampler_and_the_loss_agree_bit_for_bit(vocab: int, softcap: float | None) -> None:
    """The engine reads its log-probs off ``distribution(logits(...))``, the trainer off ``token_logprobs``."""
    hidden, weight, targets, heat = make(vocab, vocab, rows=40)
    logp = distribution(logits(hidden[8:24], weight, vocab, softcap), heat[8:24])
    trained, _ = token_logprobs(hidden, weight, targets, heat, vocab, softcap)
    assert torch.equal(logp.gather(1, targets[8:24, None])[:, 0], trained[8:24])
