"""The packaged reward model, as a user trains it: Ray, DeepSpeed, made pairs, and no held-out sum in training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ROOT, environment

from recipes import arithmetic_ppo
from rlhf.config import Data, ModelSection, Train
from rlhf.data import Renderer
from rlhf.reward_model.config import load_config
from rlhf.reward_model.metrics import auc
from rlhf.reward_model.pairs import tokenize_pairs
from rlhf.roles.reward_model import RewardModel
from rollout_engine.models.checkpoint import load_tokenizer

CONFIG = ROOT / "configs" / "arithmetic_reward_model_cpu.yaml"


@pytest.mark.slow
def test_the_packaged_reward_model_tells_right_from_wrong(tmp_path: Path) -> None:
    words = ["-m", "rlhf", "reward-model", str(CONFIG), f"run.dir={tmp_path}", "tracking.wandb=disabled"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=1200, env=environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "arithmetic-reward-model" / "latest" / "checkpoints" / "latest" / "hf"
    calibration = json.loads((folder / "calibration.json").read_text())
    assert calibration["accuracy"] >= 0.95, calibration

    # All held-out pairs, judged as PPO will have them judged: right from wrong across prompts, for every kind.
    render = Renderer(Data(), load_tokenizer(folder))
    pairs, _ = tokenize_pairs(list(arithmetic_ppo.preferences("eval")), render, load_config(CONFIG).pairs)
    judge = RewardModel(checkpoint=folder, model=ModelSection(), train=Train(lr=0))
    right = torch.tensor(judge.judge(sorted({pair.chosen for pair in pairs})))
    for kind in arithmetic_ppo.KINDS:
        wrong = torch.tensor(judge.judge([pair.rejected for pair in pairs if pair.kind == kind]))
        found = auc(right, wrong)
        print(f"{kind:<12} {len(wrong):>5} wrong answers  AUC {found:.3f}")
        assert found >= 0.9, kind
    assert (right > calibration["midpoint"]).double().mean() >= 0.9
