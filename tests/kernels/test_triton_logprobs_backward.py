"""Gradients of log-probs and entropies against autograd of the formulas in float64: every form, chunks, and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import BACKWARD, assert_close_to_truth, normal
from heads import DTYPES, SOFTCAPS, LargestNew, forms, make_rows, true_logprobs
from torch import Tensor

from kernels import reference
from kernels.triton import logprobs, logprobs_backward
from kernels.triton.logits import Form, form_of
from kernels.triton.logprobs_backward import CHUNK_BYTES, CHUNK_COLUMNS, column_chunks

pytestmark = pytest.mark.usefixtures("poisoned")
#  rows, width, vocabulary, num_tokens
SIZES = [(1, 16, 1, 1), (3, 80, 17, 17), (21, 48, 640, 600), (130, 33, 129, 129)]
REAL = pytest.param((2000, 1024, 32064, 32000), marks=pytest.mark.gpu)
UPSTREAM = {"log-prob": (True, False), "entropy": (False, True), "both": (True, True)}
CASES = [(dtype, which) for dtype in DTYPES for which in UPSTREAM if dtype != torch.float16 or which == "both"]


def gradients(op: Any, inputs: tuple[Tensor, ...], which: str, wide: bool = False) -> list[Tensor]:
    """Of the columns' sum weighted row by row, for hidden and weight; a column left out reaches no gradient."""
    hidden, weight, targets, heat = inputs
    leaves = [t.double().requires_grad_() if wide else t.clone().requires_grad_() for t in (hidden, weight)]
    columns = op(*leaves, targets, heat)
    rows = len(hidden)
    upstream = [normal(rows, seed=i + 1, device=hidden.device).to(columns[0].dtype) for i in range(2)]
    total = sum((c * u).sum() for c, u, on in zip(columns, upstream, UPSTREAM[which], strict=True) if on)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves))


def scorer(form: Form, num_tokens: int, softcap: float | None = None) -> Any:
    return lambda *x: logprobs.token_logprobs_by(form, *x, num_tokens, softcap)


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 256 columns."""
    monkeypatch.setattr(logprobs_backward, "CHUNK_BYTES", 0)
    monkeypatch.setattr(logprobs_backward, "CHUNK_COLUMNS", 256)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("form", ["shipped", "other"])
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("size", [*SIZES, REAL])
@pytest.mark.parametrize("dtype, which", CASES)
def test_backward_matches_float64(
    dtype: torch.dtype,
    size: tuple[int, int, int, int],
    softcap: float | None,
    which: str,
    form: str,
    device: torch.device,
) -> None:
    num_tokens = size[-1]
    inputs = make_rows(*size, dtype, device)
    rest = (num_tokens, softcap)
    found = gradients(scorer(forms(inputs[1])[form], *rest), inputs, which)
    plain = gradients(lambda *x: reference.token_logprobs(*x, *rest), inputs, which)
    truth = gradients(lambda *x: true_logprobs(*x, *rest), inputs, which, wide=True)
    for ours, theirs, expected in zip(found, plain, truth, strict=True):
        assert ours.dtype == dtype
        if num_tokens == 1:  # nothing to choose from: the gradient is 0
            assert ours.abs().max() < 1e-6 and not expected.any()
        else:
            assert_close_to_truth(ours, expected, None if dtype == torch.float32 else theirs, BACKWARD)
    assert not found[1][num_tokens:].any()


def test_the_fused_form_is_for_narrow_aligned_heads_of_16_bits() -> None:
    def fused(vocabulary: int, width: int, dtype: torch.dtype) -> bool:
        return form_of(torch.empty(vocabulary, width, dtype=dtype)).fused_backward

    assert fused(32, 896, torch.bfloat16) and fused(48, 2048, torch.float16) and fused(32, 80, torch.bfloat16)
    assert not fused(32, 2304, torch.bfloat16) and not fused(33, 896, torch.bfloat16)
    assert not fused(32, 896, torch.float32)


def test_no_rows_have_no_gradient(device: torch.device) -> None:
    inputs = make_rows(0, 32, 300, 300, torch.bfloat16, device)
    dhidden, dweight = gradients(lambda *x: logprobs.token_logprobs(*x, 300), inputs, "both")
    assert dhidden.shape == (0, 32) and dweight.shape == (300, 32) and not dweight.any()


@pytest.mark.parametrize("form", ["shipped", "other"])
def test_underflowing_probabilities_have_finite_gradients(form: str, device: torch.device) -> None:
    """At temperature 0.001 nearly all probabilities are exactly 0 in fp32, and 0 * log 0 must not become NaN."""
    hidden, weight, targets, heat = make_rows(8, 32, 300, 290, torch.bfloat16, device)
    inputs = hidden, weight, targets, torch.full_like(heat, 1e-3)
    found = gradients(scorer(forms(weight)[form], 290), inputs, "both")
    truth = gradients(lambda *x: true_logprobs(*x, 290), inputs, "both", wide=True)
    for ours, expected in zip(found, truth, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours.double() - expected).abs().max() < 0.01 * expected.abs().max()


def test_padding_rows_of_the_head_reach_no_gradient(device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(9, 32, 300, 290, torch.float32, device)
    huge = weight.clone()
    huge[290:] = 1e4 * hidden[0]
    for form in forms(weight).values():
        found = gradients(scorer(form, 290), (hidden, huge, targets, heat), "both")
        without = gradients(scorer(form, 290), (hidden, weight, targets, heat), "both")
        assert all(map(torch.equal, found, without))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("form", ["shipped", "other"])
def test_twenty_repeats_are_equal(form: str, device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(8, 32, 270, 270, torch.bfloat16, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logprob, entropy = logprobs.token_logprobs_by(forms(weight)[form], *leaves, targets, heat, 270)
    first, *again = (torch.autograd.grad((logprob + entropy).sum(), leaves, retain_graph=True) for _ in range(21))
    assert len(again) == 20 and all(torch.equal(a, b) for grads in again for a, b in zip(grads, first, strict=True))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("form", ["shipped", "other"])
def test_memory_holds_a_chunk_at_a_time(form: str, device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(100, 16, 1100, 1100, torch.bfloat16, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    logprob, _ = logprobs.token_logprobs_by(forms(weight)[form], *leaves, targets, heat, 1100)
    with LargestNew(*leaves) as largest:
        logprob.sum().backward()
    assert largest.elements == 100 * 256


def test_only_what_is_asked_for_is_computed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, heat = make_rows(5, 32, 300, 300, torch.float32, device)
    asked: list[tuple[bool, ...]] = []

    def watch(scored: Any, dlogprob: Any, dentropy: Any, form: Any, *wanted: bool) -> Any:
        asked.append((dentropy is not None, *wanted))
        return logprobs_backward.gradients(scored, dlogprob, dentropy, form, *wanted)

    monkeypatch.setattr(logprobs, "gradients", watch)
    both = gradients(lambda *x: logprobs.token_logprobs(*x, 300), (hidden, weight, targets, heat), "log-prob")
    for frozen, leaf, expected in ((weight, hidden, both[0]), (hidden, weight, both[1])):
        leaf.requires_grad_()
        upstream = normal(5, seed=1, device=device)
        (logprobs.token_logprobs(hidden, weight, targets, heat, 300)[0] * upstream).sum().backward()
        assert torch.equal(leaf.grad, expected) and frozen.grad is None
        leaf.grad = None
        leaf.requires_grad_(False)
    logprob, entropy = logprobs.token_logprobs(hidden.requires_grad_(), weight, targets, heat, 300)
    (logprob.sum() + entropy.sum()).backward()
    assert asked == [(False, True, True), (False, True, False), (False, False, True), (True, True, False)]


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    hidden, weight, targets, heat = make_rows(5, 32, 300, 300, torch.float32, device)
    logprob, _ = logprobs.token_logprobs(hidden.requires_grad_(), weight, targets, heat, 300)
    upstream = torch.ones_like(logprob).requires_grad_()
    (slope,) = torch.autograd.grad((logprob * upstream).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("logit_bytes", [2, 6])
@pytest.mark.parametrize(
    "rows, width, vocabulary", [(1, 896, 151936), (4096, 1024, 151936), (16384, 4096, 128256), (8192, 8192, 128256)]
)
def test_chunks_stay_within_a_gibibyte(rows: int, width: int, vocabulary: int, logit_bytes: int) -> None:
    weight = torch.empty(vocabulary, width, device="meta")
    chunks = column_chunks(rows, weight, logit_bytes)
    assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])] and chunks[-1].stop == vocabulary
    widest = max(c.stop - c.start for c in chunks)
    assert rows * (widest * logit_bytes + 4 * width) + 4 * width * widest <= CHUNK_BYTES == 2**30
    assert all(c.stop - c.start >= CHUNK_COLUMNS for c in chunks[:-1]) and all(c.start % 256 == 0 for c in chunks)


def test_huge_batches_do_not_make_thin_products() -> None:
    chunks = column_chunks(1 << 20, torch.empty(128256, 4096, device="meta"), 6)
    assert len(chunks) == -(-128256 // CHUNK_COLUMNS)
