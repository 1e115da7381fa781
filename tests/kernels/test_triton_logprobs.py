"""The log-prob kernels' forward against float64: vocabularies around the tiles, odd widths, padding, huge logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accuracy import assert_close_to_truth, normal
from heads import DTYPES, SOFTCAPS, LargestNew, forms, make_rows, true_logprobs
from torch import Tensor

from kernels import dispatch, reference
from kernels.triton import logprobs, logprobs_backward

pytestmark = pytest.mark.usefixtures("poisoned")
FORMS = ["shipped", "other"]
#  rows, width, vocabulary, num_tokens
SIZES = [(1, 16, 1, 1), (3, 80, 17, 17), (21, 80, 1024, 1000), (37, 64, 771, 771), (130, 33, 129, 129)]
REAL = pytest.param((2000, 1024, 32064, 32000), marks=pytest.mark.gpu)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("size", [*SIZES, REAL])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_matches_float64(
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
    softcap: float | None,
    form: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of 16-bit numbers are exact in fp32, so that their log-probs are as good as those of fp32 numbers."""
    monkeypatch.setattr(logprobs_backward, "CHUNK_BYTES", 0)
    monkeypatch.setattr(logprobs_backward, "CHUNK_COLUMNS", 256)
    monkeypatch.setitem(logprobs.MERGED, "PIECES", 2)  # so that several groups of pieces are merged
    num_tokens = size[-1]
    inputs = make_rows(*size, dtype, device)
    found = logprobs.token_logprobs_by(forms(inputs[1])[form], *inputs, num_tokens, softcap)
    for ours, expected in zip(found, true_logprobs(*inputs, num_tokens, softcap), strict=True):
        assert ours.dtype == torch.float32
        assert_close_to_truth(ours, expected)


def test_no_rows(device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(0, 64, 300, 300, torch.float32, device)
    assert all(column.shape == (0,) for column in logprobs.token_logprobs(hidden, weight, targets, heat, 300))


def test_many_row_tiles_are_all_computed(device: torch.device) -> None:
    """Over one group of row tiles, the last group and the last tile incomplete."""
    inputs = make_rows(16 * 128 + 3, 16, 257, 257, torch.bfloat16, device)
    for ours, expected in zip(logprobs.token_logprobs(*inputs, 257), true_logprobs(*inputs, 257), strict=True):
        assert_close_to_truth(ours, expected)


def test_padding_rows_of_the_head_change_nothing(device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(9, 32, 300, 290, torch.float32, device)
    huge = weight.clone()
    huge[290:] = 1e4 * hidden[0]  # would win the softmax
    huge[295:] = torch.nan
    for form in forms(weight).values():
        found = logprobs.token_logprobs_by(form, hidden, huge, targets, heat, 290)
        without = logprobs.token_logprobs_by(form, hidden, weight, targets, heat, 290)
        assert all(map(torch.equal, found, without))
    outside = torch.full_like(targets, 291)
    assert (logprobs.token_logprobs(hidden, huge, outside, heat, 290)[0] == -torch.inf).all()


@pytest.mark.parametrize("form", FORMS)
def test_huge_logits_lose_no_precision(form: str, device: torch.device) -> None:
    """Logits around +-10,000, exact in fp32, with the spread of ordinary ones: log-probs and entropies are those of
    the spread alone."""
    vocabulary = 600
    spread = torch.randint(-64, 1, (vocabulary,), generator=torch.Generator().manual_seed(0)) / 8
    weight = torch.zeros(vocabulary, 16)
    weight[:, 0], weight[:, 1] = 10_000, spread
    hidden = torch.zeros(4, 16)
    hidden[:, 0] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    hidden[:, 1] = 1.0
    targets, heat = torch.tensor([0, 255, 256, 599]), torch.ones(4)
    expected = true_logprobs(hidden, weight, targets, heat, vocabulary)
    small = [column.max() - column.min() for column in expected]
    assert small[1] < 1e-9 and expected[0].abs().max() < 16  # the large part cancels
    inputs = [t.to(device) for t in (hidden, weight, targets, heat)]
    found = logprobs.token_logprobs_by(forms(weight)[form], *inputs, vocabulary)
    for ours, wanted in zip(found, expected, strict=True):
        assert_close_to_truth(ours, wanted.to(device))


def test_wide_spreads_underflow_to_zero_probability(device: torch.device) -> None:
    """Logits from -10,000 to 10,000: one token has all the mass, and 0 * log 0 is 0."""
    hidden, weight, targets, heat = make_rows(8, 32, 600, 600, torch.float32, device)
    inputs = hidden, weight * 2000, targets, heat
    expected = true_logprobs(*inputs, 600)
    assert expected[0].min() < -1e4
    logprob, entropy = logprobs.token_logprobs(*inputs, 600)
    assert_close_to_truth(logprob, expected[0])
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_minus_infinity_do_not_count(form: str, device: torch.device) -> None:
    """Not even where a whole tile has no others."""
    hidden, weight, targets, heat = make_rows(8, 16, 700, 700, torch.float32, device)
    hidden[:, 0] = 1.0
    gone = slice(100, 620)
    kept = torch.cat((weight[: gone.start], weight[gone.stop :]))
    targets = targets % 100
    weight[gone, 0] = -torch.inf
    found = logprobs.token_logprobs_by(forms(weight)[form], hidden, weight, targets, heat, 700)
    for ours, expected in zip(found, true_logprobs(hidden, kept, targets, heat, len(kept)), strict=True):
        assert_close_to_truth(ours, expected)


def test_damage_shows(device: torch.device) -> None:
    """A logit that is NaN or +inf makes its row NaN, and no other."""
    hidden, weight, targets, heat = make_rows(5, 16, 300, 300, torch.float32, device)
    hidden[1, 3] = torch.nan
    hidden[3] = 3e38  # overflows
    for form in forms(weight).values():
        for column in logprobs.token_logprobs_by(form, hidden, weight, targets, heat, 300):
            assert torch.isnan(column[[1, 3]]).all() and torch.isfinite(column[[0, 2, 4]]).all()


def test_temperature_zero_is_scored_at_one(device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(9, 32, 300, 300, torch.bfloat16, device)
    zero = logprobs.token_logprobs(hidden, weight, targets, torch.zeros_like(heat), 300)
    one = logprobs.token_logprobs(hidden, weight, targets, torch.ones_like(heat), 300)
    assert all(map(torch.equal, zero, one))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_their_bits_in_any_company(dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(140, 80, 300, 290, dtype, device)
    whole = logprobs.token_logprobs(hidden, weight, targets, heat, 290)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 127, 128, 129, 140):
        chosen = torch.randperm(140, generator=generator)[:count].to(device)
        part = logprobs.token_logprobs(hidden[chosen], weight, targets[chosen], heat[chosen], 290)
        assert all(torch.equal(a, b[chosen]) for a, b in zip(part, whole, strict=True)), f"{count} rows"


def test_twenty_repeats_are_equal(device: torch.device) -> None:
    inputs = make_rows(9, 64, 300, 300, torch.bfloat16, device)
    first = logprobs.token_logprobs(*inputs, 300)
    for _ in range(20):
        assert all(map(torch.equal, logprobs.token_logprobs(*inputs, 300), first))


def test_logits_are_never_in_memory(device: torch.device) -> None:
    inputs = make_rows(140, 16, 600, 600, torch.bfloat16, device)
    inputs[0].requires_grad_()
    with LargestNew(*inputs) as largest:
        logprobs.token_logprobs(*inputs, 600)
    assert 0 < largest.elements < 140 * 600 / 10
    with LargestNew(*inputs) as largest:  # the check itself: the other form holds them
        logprobs.token_logprobs_by(forms(inputs[1])["other"], *inputs, 600)
    assert largest.elements >= 140 * 600


def test_rows_may_lie_further_apart_than_int32_reaches(device: torch.device) -> None:
    """Storage that is never touched in between costs no memory."""
    apart, width = (1 << 30) + 8, 16
    rows, vocabulary = 3, 3
    wide = torch.from_numpy(np.empty(2 * apart + width, dtype=np.uint16)).view(torch.bfloat16).to(device)
    inputs = make_rows(rows, width, vocabulary, vocabulary, torch.bfloat16, device)
    strided = wide.as_strided((rows, width), (apart, 1))
    for which in (0, 1):
        strided.copy_(inputs[which])
        moved = [*inputs[:which], strided, *inputs[which + 1 :]]
        found = logprobs.token_logprobs(*moved, vocabulary)
        assert all(map(torch.equal, found, logprobs.token_logprobs(*inputs, vocabulary)))


def test_arguments_may_be_strided(device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(6, 32, 300, 300, torch.float32, device)
    expected = logprobs.token_logprobs(hidden, weight, targets, heat, 300)
    found = logprobs.token_logprobs(
        hidden.T.contiguous().T, normal(300, 40, device=device)[:, 4:36].copy_(weight),
        targets.repeat_interleave(2)[::2], heat.repeat_interleave(2)[::2], 300,
    )  # fmt: skip
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": lambda t: t[:, :-1]}, r"\[rows, H\] and \[vocabulary, H\], but are \[4, 31\] and \[40, 32\]"),
        ({"hidden": lambda t: t[0]}, r"\[rows, H\]"),
        ({"weight": lambda t: t.T.contiguous().T}, "weight's rows must be contiguous"),
        ({"targets": lambda t: t[:3]}, r"targets must be torch.int64 \[4\]"),
        ({"targets": lambda t: t.int()}, "targets must be torch.int64"),
        ({"temperature": lambda t: t[:, None]}, r"temperature must be torch.float32 \[4\]"),
        ({"temperature": lambda t: t.double()}, "temperature must be torch.float32"),
        ({"num_tokens": lambda n: 41}, "num_tokens must be from 1 to 40"),
        ({"num_tokens": lambda n: 0}, "num_tokens must be from 1 to 40"),
        ({"softcap": lambda c: -1.0}, "softcap must be positive"),
        ({"hidden": lambda t: t.to("meta")}, "hidden is on meta, but weight on"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str, device: torch.device) -> None:
    names = ("hidden", "weight", "targets", "temperature")
    arguments = dict(zip(names, make_rows(4, 32, 40, 40, torch.float32, device), strict=True))
    arguments |= {"num_tokens": 40, "softcap": None}
    for name, spoil in change.items():
        arguments[name] = spoil(arguments[name])
    with pytest.raises(ValueError, match=f"^token_logprobs: .*{message}"):
        logprobs.token_logprobs(**arguments)


def test_what_the_kernels_do_not_take_goes_to_plain_torch(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    hidden, weight, targets, heat = make_rows(8, 32, 40, 40, torch.float32, device)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return 2 * x @ w.T

    cases = [
        ((hidden.double(), weight.double()), {}, "torch.float64"),
        ((hidden.bfloat16(), weight), {}, "torch.bfloat16 under a head in torch.float32"),
        ((hidden, weight), {"product": product}, "have their own"),
    ]
    for head, named, why in cases:
        dispatch.warn_once.cache_clear()
        caplog.clear()
        found = logprobs.token_logprobs(*head, targets, heat, 40, **named)
        assert all(map(torch.equal, found, reference.token_logprobs(*head, targets, heat, 40, **named)))
        assert "token_logprobs runs in plain torch" in caplog.text and why in caplog.text
