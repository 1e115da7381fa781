"""The logits kernel against float64: masks, softcap, odd shapes, gradients, and rows in any company."""

from __future__ import annotations

import pytest
import torch
from accuracy import BACKWARD, assert_close_to_truth, normal
from heads import DTYPES, SOFTCAPS, make_rows, true_logits

from kernels import dispatch, reference
from kernels.triton.logits import add_mm, logits, mm

pytestmark = pytest.mark.usefixtures("poisoned")
#  rows, width, vocabulary, num_tokens
SIZES = [(1, 16, 1, 1), (3, 80, 17, 17), (21, 80, 1024, 1000), (130, 33, 300, 257)]


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(
    dtype: torch.dtype, size: tuple[int, int, int, int], softcap: float | None, device: torch.device
) -> None:
    rows, _, vocabulary, num_tokens = size
    hidden, weight, *_ = make_rows(*size, dtype, device)
    upstream = normal(rows, vocabulary, seed=5, device=device)

    def run(wide: bool, of: object) -> list[torch.Tensor]:
        """Logits of the vocabulary proper, and gradients."""
        leaves = [t.double().requires_grad_() if wide else t.clone().requires_grad_() for t in (hidden, weight)]
        z = true_logits(*leaves, softcap) if wide else of(*leaves, num_tokens, softcap)
        if not wide:
            assert z.shape == (rows, vocabulary) and z.dtype == torch.float32
            assert (z[:, num_tokens:] == -torch.inf).all()
        z = z[:, :num_tokens]
        return [z.detach(), *torch.autograd.grad((z * upstream[:, :num_tokens].to(z.dtype)).sum(), leaves)]

    found, plain, truth = run(False, logits), run(False, reference.logits), run(True, None)
    assert_close_to_truth(found[0], truth[0])
    for ours, theirs, expected in zip(found[1:], plain[1:], truth[1:], strict=True):
        assert ours.dtype == dtype
        assert_close_to_truth(ours, expected, None if dtype == torch.float32 else theirs, BACKWARD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_their_bits_in_any_company(dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight, *_ = make_rows(140, 80, 700, 690, dtype, device)
    whole = logits(hidden, weight, 690)
    for count in (1, 7, 64, 129):
        chosen = torch.randperm(140, generator=torch.Generator().manual_seed(count))[:count].to(device)
        assert torch.equal(logits(hidden[chosen], weight, 690), whole[chosen])


def test_no_rows(device: torch.device) -> None:
    hidden, weight, *_ = make_rows(0, 32, 40, 40, torch.float32, device)
    assert logits(hidden, weight, 40).shape == (0, 40)


def test_bad_input_is_named_and_other_dtypes_go_to_plain_torch(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    hidden, weight, *_ = make_rows(8, 32, 40, 40, torch.float32, device)
    with pytest.raises(ValueError, match=r"^logits: num_tokens must be from 1 to 40"):
        logits(hidden, weight, 41)
    dispatch.warn_once.cache_clear()
    found = logits(hidden.double(), weight.double(), 40)
    assert torch.equal(found, reference.logits(hidden.double(), weight.double(), 40))
    assert "logits runs in plain torch" in caplog.text and "torch.float64" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_added_up_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    a, b = (normal(9, 9, seed=i, dtype=dtype, device=device) for i in range(2))
    exact = a.double() @ b.double()
    assert_close_to_truth(mm(a, b), exact)
    total = torch.ones(9, 9, device=device)
    add_mm(total, a, b)
    assert_close_to_truth(total, exact + 1)
