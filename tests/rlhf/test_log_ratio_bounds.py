"""Log-ratios beyond all bounds: values and gradients are finite, and those of a log-ratio of 20."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.functional import importance_ratio, kl_estimate, sequence_ratio, token_ratio

FAR = [200.0, -200.0]  # exp(200) is infinite in fp32
HELD = [math.exp(20), math.exp(-20)]


def value_and_gradient(function: Callable[[Tensor], Tensor]) -> tuple[list[float], list[float]]:
    """Of log-probs 0, by fp32 autograd."""
    logprobs = torch.zeros(len(FAR), requires_grad=True)
    values = function(logprobs)
    values.sum().backward()
    assert logprobs.grad is not None
    return values.tolist(), logprobs.grad.tolist()


def test_a_token_ratio_is_held_within_e_to_the_20() -> None:
    values, gradients = value_and_gradient(lambda logprobs: token_ratio(logprobs, -torch.tensor(FAR)))
    assert values == pytest.approx(HELD, rel=1e-6) and gradients == [0.0, 0.0]


def test_a_sequence_ratio_is_held_within_e_to_the_20() -> None:
    """One token each; the gradient by a token's log-prob is the ratio, held or not."""
    values, gradients = value_and_gradient(lambda logprobs: sequence_ratio(logprobs, -torch.tensor(FAR), (1, 1)))
    assert values == pytest.approx(HELD, rel=1e-6) and gradients == pytest.approx(HELD, rel=1e-6)


@pytest.mark.parametrize("unit", ["token", "sequence", "geometric"])
def test_an_importance_ratio_is_held_within_e_to_the_20(unit: str) -> None:
    ratio = importance_ratio(torch.tensor(FAR), torch.zeros(2), (1, 1), unit)
    assert ratio.tolist() == pytest.approx(HELD, rel=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [-20.0, 20.0]),
        ("k2", [200.0, 200.0]),
        ("k3", [math.exp(20) - 21, math.exp(-20) + 19]),  # r - 1 - log r
    ],
)
def test_a_kl_estimate_takes_a_log_ratio_of_20_at_most(estimator: str, expected: list[float]) -> None:
    values, gradients = value_and_gradient(lambda logprobs: kl_estimate(logprobs, torch.tensor(FAR), estimator))
    assert values == pytest.approx(expected, rel=1e-6) and gradients == [0.0, 0.0]
