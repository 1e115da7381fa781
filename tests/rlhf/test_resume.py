"""A resumed run is the uninterrupted one, bit by bit; one whose role dies goes on by itself; bad input is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deepspeed_contract import STAGES, weights
from test_training_exactness import rollout

from rlhf.config import Config, load_config
from rlhf.launch import launch, resume
from rlhf.roles.policy import Policy
from rlhf.tracking import Tracker

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"
MOVING = ("time/", "throughput/", "memory/", "swap/gib_per_s")

# An untrained model earns nothing on sums; this pays for every 5. Sixteen prompts: an epoch is four steps.
RECIPE = """
import itertools
from recipes import arithmetic
from recipes.arithmetic import initial_model, warm_start

def prompts(split):
    return itertools.islice(arithmetic.prompts(split), 16 if split == "train" else 4)

def reward(completion):
    return completion.text.count("5") / 5
"""

GRPO = ["algorithm.kl_coef=0.05", "algorithm.updates_per_rollout=2", "reward.shuffle=true"]
PPO = ["algorithm.name=ppo", "algorithm.kl_target=0.001", "algorithm.kl_coef=0.05", "train.zero_stage=0"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "fives.py"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def make_config(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        return load_config(
            CONFIG,
            [
                f"recipe.path={recipe}",
                f"run.dir={tmp_path_factory.mktemp('runs')}",
                "run.steps=6",
                "warm_start.steps=0",
                "rollout.prompts_per_step=4",
                "rollout.samples_per_prompt=3",
                "rollout.kv_cache_gib=0.02",
                "train.lr=3e-3",
                "eval.every=4",
                "eval.prompts=4",
                "checkpoint.every=1",
                "cluster.kind=local",
                "cluster.threads=1",
                "tracking.wandb=disabled",
                *overrides,
            ],
        )

    return make


class Killed(BaseException):
    """Nothing in the run expects it."""


def run_until(config: Config, step: int) -> Path:
    """The folder of a run that is ended in the middle of ``step``."""
    log = Tracker.log

    def killing(self: Tracker, now: int, metrics: dict[str, float]) -> None:
        log(self, now, metrics)
        if now == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log", killing)
        with pytest.raises(Killed):
            launch(config)
    return max((config.run.dir / config.run.name).iterdir())


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MOVING)} for row in rows]


def files_of(folder: Path) -> dict[str, bytes]:
    """The weights that the run ended with, and the answers of every step."""
    kept = [*folder.glob("checkpoints/latest/**/*.safetensors"), *folder.glob("rollouts/*"), *folder.glob("eval/*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in kept}


# ---------------------------------------------------------------- a role


@STAGES
def test_a_loaded_policy_goes_on_bit_by_bit(make_policy: Callable[..., Policy], tmp_path: Path, stage: int) -> None:
    """Same answers, same gradient, same step, same versions: optimizer, masters, schedule and engine are all there."""
    settings = {"zero_stage": stage, "lr": 1e-3, "schedule": "linear", "warmup_steps": 5}
    first = make_policy(**settings)
    for seed in range(2):
        first.update(rollout(first, seed))
        first.publish()
    first.save_state(tmp_path / "state")
    second = make_policy(**settings)
    second.load_state(tmp_path / "state")
    assert second.llm.weight_version == 2
    found = []
    for policy in (first, second):
        batch = rollout(policy, 5)
        metrics = policy.update(batch)
        found.append((batch.tokens, batch.rollout_logprobs, metrics, policy.publish().version, weights(policy)))
    (tokens, logprobs, metrics, version, moved), again = found
    assert torch.equal(tokens, again[0]) and torch.equal(logprobs, again[1])
    assert metrics == again[2] and version == again[3] == 3
    assert all(torch.equal(moved[name], again[4][name]) for name in moved)
    second.llm.check_integrity()


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def whole(request: pytest.FixtureRequest, make_config: Callable[..., Config]) -> Iterator[tuple[list[str], Path]]:
    """Overrides, and the folder of a run that nothing has interrupted."""
    overrides = {"grpo": GRPO, "ppo": PPO}[request.param]
    yield overrides, launch(make_config(*overrides)).folder


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(
    whole: tuple[list[str], Path], make_config: Callable[..., Config], step: int
) -> None:
    """Killed in step 3, amid an epoch, or 5, the first of the next one; the checkpoint is of the step before."""
    overrides, uninterrupted = whole
    folder = run_until(make_config(*overrides), step)
    assert [row["step"] for row in metrics_of(folder)][-1] == step
    assert (folder / "checkpoints" / "latest").readlink() == Path(f"{step - 1:06d}")
    assert resume(folder).folder == folder
    assert metrics_of(folder) == metrics_of(uninterrupted)
    assert files_of(folder) == files_of(uninterrupted)
    assert f"goes on after step {step - 1}" in (folder / "train.log").read_text()
