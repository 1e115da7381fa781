"""The long claims about PPO: a reward model that ranks held-out pairs, and a policy that it teaches, three times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, environment, metrics_of

pytestmark = pytest.mark.slow
CONFIGS = ROOT / "configs"


def rlhf(folder: Path, *words: str) -> str:
    """A command that must succeed; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *words],
        capture_output=True, text=True, timeout=1800, env=environment(), cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reward model has been trained, as `make quickstart-ppo` does."""
    folder = tmp_path_factory.mktemp("ppo")
    print(rlhf(folder, "reward-model", str(CONFIGS / "arithmetic_reward_model_cpu.yaml"))[-1500:])
    return folder


def test_the_reward_model_ranks_held_out_pairs(folder: Path) -> None:
    rows = metrics_of(folder / "runs" / "arithmetic-reward-model" / "latest")
    assert rows[-1]["eval/accuracy"] >= 0.95


def before_and_after(folder: Path, *overrides: str) -> tuple[float, float]:
    """Held-out reward, from 0 to 1."""
    rlhf(folder, "train", str(CONFIGS / "arithmetic_ppo_cpu.yaml"), *overrides)
    rows = metrics_of((folder / "runs" / "arithmetic-ppo" / "latest").resolve())
    assert max(row.get("rollout/logprob_gap_max", 0.0) for row in rows) == 0.0
    assert max(row["policy/kl"] for row in rows if "policy/kl" in row) < 3.0
    first, last = rows[0], rows[-1]
    print(
        f"\n{overrides}: held-out reward {first['eval/reward']:.3f} -> {last['eval/reward']:.3f}, "
        f"right answers {first['eval/accuracy']:.3f} -> {last['eval/accuracy']:.3f}, "
        f"KL {last.get('policy/kl', 0.0):.3f} nats a token, {last['time/elapsed']:.0f} s of training"
    )
    return first["eval/reward"], last["eval/reward"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_reward_rises(folder: Path, seed: int) -> None:
    before, after = before_and_after(folder, f"run.seed={seed}")
    assert before <= 0.2 and after >= 0.8


@pytest.mark.parametrize("control", [("reward.shuffle=true",), ("train.lr=0", "critic.lr=0")])
def test_controls_gain_nothing(folder: Path, control: tuple[str, ...]) -> None:
    before, after = before_and_after(folder, *control)
    assert after - before < 0.05
