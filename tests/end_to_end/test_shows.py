"""The long claims of the README: three seeds reach 0.9 on held-out sums, and two controls learn nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import metrics_of

pytestmark = pytest.mark.slow


def before_and_after(folder: Path) -> tuple[float, float]:
    rows = metrics_of(folder)
    assert max(row["rollout/logprob_gap_max"] for row in rows) == 0.0
    print(f"\n{folder.name}: held-out {rows[0]['eval/accuracy']:.3f} -> {rows[-1]['eval/accuracy']:.3f}")
    print(f"{rows[-1]['time/elapsed']:.0f} s of training, {rows[-1]['time/step']:.2f} s the last step")
    return rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_accuracy_rises(run_training: Callable[..., Path], seed: int) -> None:
    before, after = before_and_after(run_training(f"run.seed={seed}", timeout=1800))
    assert before <= 0.4 and after >= 0.9


@pytest.mark.parametrize("control", ["reward.shuffle=true", "train.lr=0"])
def test_controls_gain_nothing(run_training: Callable[..., Path], control: str) -> None:
    before, after = before_and_after(run_training(control, timeout=1800))
    assert after - before < 0.05
