"""The long claims about PPO: a reward model that ranks held-out pairs, and a policy that it teaches, three times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch
from command_line import ROOT, environment, metrics_of

from recipes import arithmetic_ppo
from rlhf.config import Data, ModelSection, Train, load_config
from rlhf.data import Renderer
from rlhf.reward_model.config import load_config as load_pairs_config
from rlhf.reward_model.metrics import auc
from rlhf.reward_model.pairs import tokenize_pairs
from rlhf.roles.reward_model import RewardModel
from rollout_engine.models.checkpoint import load_tokenizer

pytestmark = pytest.mark.slow
REWARD_MODEL, PPO = (ROOT / "configs" / f"arithmetic_{name}_cpu.yaml" for name in ("reward_model", "ppo"))
SETTLED = 50  # last steps, over which the KL is taken


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
    print(rlhf(folder, "reward-model", str(REWARD_MODEL))[-1500:])
    return folder


def test_the_reward_model_tells_right_from_wrong(folder: Path) -> None:
    run = folder / "runs" / "arithmetic-reward-model" / "latest"
    assert metrics_of(run)[-1]["eval/accuracy"] >= 0.95
    # All held-out pairs, judged as PPO will have them judged: right from wrong across prompts, for every kind.
    checkpoint = run / "checkpoints" / "latest" / "hf"
    render = Renderer(Data(), load_tokenizer(checkpoint))
    section = load_pairs_config(REWARD_MODEL).pairs
    pairs, _ = tokenize_pairs(list(arithmetic_ppo.preferences("eval")), render, section)
    judge = RewardModel(checkpoint=checkpoint, model=ModelSection(), train=Train(lr=0), timeout_s=60)
    right = torch.tensor(judge.judge(sorted({pair.chosen for pair in pairs})))
    for kind in arithmetic_ppo.KINDS:
        wrong = torch.tensor(judge.judge([pair.rejected for pair in pairs if pair.kind == kind]))
        found = auc(right, wrong)
        print(f"{kind:<12} {len(wrong):>5} wrong answers  AUC {found:.3f}")
        assert found >= 0.9, kind
    midpoint = json.loads((checkpoint / "calibration.json").read_text())["midpoint"]
    assert (right > midpoint).double().mean() >= 0.9


def before_and_after(folder: Path, *overrides: str) -> tuple[float, float]:
    """Held-out reward, from 0 to 1."""
    rlhf(folder, "train", str(PPO), *overrides)
    rows = metrics_of((folder / "runs" / "arithmetic-ppo" / "latest").resolve())
    assert max(row.get("rollout/logprob_gap_max", 0.0) for row in rows) == 0.0
    kl = mean(row["rollout/kl"] for row in rows[-SETTLED:])
    first, last = rows[0], rows[-1]
    print(
        f"\n{overrides}: held-out reward {first['eval/reward']:.3f} -> {last['eval/reward']:.3f}, "
        f"right answers {first['eval/accuracy']:.3f} -> {last['eval/accuracy']:.3f}, "
        f"KL {kl:.3f} nats a token over the last {SETTLED} steps, coefficient {last['rollout/kl_coef']:.2g}, "
        f"{last['time/elapsed']:.0f} s of training"
    )
    target = load_config(PPO).algorithm["kl_target"]  # the controller holds back what is above 1.5 x target
    assert kl <= 1.5 * target
    return first["eval/reward"], last["eval/reward"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_reward_rises(folder: Path, seed: int) -> None:
    before, after = before_and_after(folder, f"run.seed={seed}")
    assert before <= 0.2 and after >= 0.8


@pytest.mark.parametrize("control", [("reward.shuffle=true",), ("train.lr=0", "critic.lr=0")])
def test_controls_gain_nothing(folder: Path, control: tuple[str, ...]) -> None:
    before, after = before_and_after(folder, *control)
    assert after - before < 0.05
