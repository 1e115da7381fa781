"""Accuracy, AUC and calibration by hand and against naive definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.reward_model.metrics import PairEvaluation, accuracy, auc, expected_calibration_error, reliability

numbers = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_a_tie_is_half_right() -> None:
    assert accuracy(torch.tensor([0.5, -0.5, 0.0, 0.0])) == 0.5
    assert accuracy(torch.tensor([0.0])) == 0.5
    assert accuracy(torch.tensor([2.0, 1e-30, -1.0])) == pytest.approx(2 / 3)


@given(numbers, numbers)
def test_auc_counts_all_comparisons(right: list[float], wrong: list[float]) -> None:
    won = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
    assert auc(torch.tensor(right), torch.tensor(wrong)) == pytest.approx(won / len(right) / len(wrong))


def test_calibration_by_hand() -> None:
    """Two preferences of 0.82, one of them wrong; three of 0.97, all right; a tie, which counts half at 0.5."""
    margins = torch.tensor([logit(0.82), -logit(0.82), *[logit(0.97)] * 3, 0.0])
    table = reliability(margins)
    assert [row.count for row in table] == [1, 0, 0, 0, 0, 0, 2, 0, 0, 3]
    assert [(row.low, row.high) for row in table][::9] == [(0.5, 0.55), (0.95, 1.0)]
    found = [(row.confidence, row.accuracy) for row in table if row.count]
    assert [x for pair in found for x in pair] == pytest.approx([0.5, 0.5, 0.82, 0.5, 0.97, 1.0], abs=1e-6)
    ece = 2 / 6 * abs(0.82 - 0.5) + 3 / 6 * abs(0.97 - 1)
    assert expected_calibration_error(table) == pytest.approx(ece, abs=1e-6)


def test_certainty_falls_into_the_last_bin() -> None:
    table = reliability(torch.tensor([800.0, -800.0]))
    assert table[-1].count == 2 and (table[-1].confidence, table[-1].accuracy) == (1.0, 0.5)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_error_is_small_where_probabilities_are_true(scale: float) -> None:
    """Preferences drawn with the probability that the margin says; a model that is too sure of itself is found out."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(200_000, generator=generator) * 2
    label = torch.rand(len(truth), generator=generator) < truth.sigmoid()
    margins = torch.where(label, truth, -truth) * scale
    ece = expected_calibration_error(reliability(margins))
    assert (ece < 0.01) == (scale == 1.0)


def test_an_evaluation() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, -1.0], [1.0, 1.0]])
    found = PairEvaluation(7, scores, ("a", "a", "b", "b"))
    metrics = found.metrics
    ece = metrics.pop("ece")
    # chosen 2 0 3 1 against rejected 1 1 -1 1: 3 + 1 wins at -1, and against 1: 2 wins, a tie
    assert metrics == {
        "midpoint": 1.0, "chosen": 1.5, "rejected": 0.5, "accuracy": 2.5 / 4, "auc": (4 + 3 * 2.5) / 16
    }  # fmt: skip
    sure, very_sure = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-4))
    assert ece == pytest.approx((2 * (sure - 0.5) + (1 - very_sure) + 0) / 4)
    assert found.by_kind == {
        "a": {"pairs": 2, "accuracy": 0.5, "auc": 2.5 / 4},
        "b": {"pairs": 2, "accuracy": 0.75, "auc": (4 + 2.5) / 8},
    }
    assert [line.split() for line in str(found).splitlines()[-2:]] == [
        ["a", "2", "0.500", "0.625"],
        ["b", "2", "0.750", "0.812"],
    ]
    assert "kind" not in str(PairEvaluation(7, scores, ("",) * 4))
