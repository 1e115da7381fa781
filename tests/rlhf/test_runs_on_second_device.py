"""Whole runs with every weight on another device than the driver's tensors, as on a GPU: the same numbers, to the bit.

DeepSpeed would move the weights to the CPU that it finds, so a plain backend stands in for it here, on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from second_device import DEVICE, second_device
from torch import Tensor, nn

from kernels import dispatch, reference
from rlhf.backends.deepspeed import StepResult
from rlhf.config import Train, load_config
from rlhf.launch import launch
from rlhf.reward_model.config import load_config as load_reward_model_config
from rlhf.reward_model.launch import launch as launch_reward_model
from rlhf.roles import critic, frozen, learner, policy, reward_model

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = ["run.steps=2", "warm_start.steps=2", "rollout.prompts_per_step=4", "cluster.threads=1", "eval.prompts=4",
         "rollout.kv_cache_gib=0.02", "cluster.kind=local", "cluster.placement=colocated",
         "tracking.wandb=disabled", "train.tokens_per_microbatch=64", "warm_start.batch_size=8"]  # fmt: skip


class PlainBackend:
    """One rank, torch's own autograd and AdamW."""

    rank, world_size, stage = 0, 1, 0

    def __init__(self, module: nn.Module, train: Train, dtype: torch.dtype, timeout_s: float) -> None:
        self.engine = self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), foreach=False)

    def microbatches(self, batch: Any, max_tokens: int) -> list[Any]:
        return list(batch.microbatches(max_tokens))

    def reduce(self, values: Sequence[float], op: str) -> list[float]:
        return list(values)

    def step(
        self, batch: Any, max_tokens: int, loss_fn: Callable[[nn.Module, Any], Tensor], lr: float,
        before_step: Callable[[], None], *, first: bool = False,
    ) -> StepResult:  # fmt: skip
        total = 0.0
        for micro in self.microbatches(batch, max_tokens):
            loss = loss_fn(self.engine, micro)
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0, foreach=False)
        self.optimizer.param_groups[0]["lr"] = lr
        before_step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(total, float(norm), skipped=False)

    def save_state(self, folder: Path, extra: dict[str, Any]) -> None:
        """Nobody goes on from here."""

    @contextmanager
    def gathered(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        yield {name: self.module.get_parameter(name).detach() for name in names}


RECIPE = """
from recipes.arithmetic import initial_model, prompts, warm_start

def reward(completion):
    return float(sum(completion.token_ids) % 7)
"""
PAIRS = """
from itertools import islice
from recipes import arithmetic_ppo
from recipes.arithmetic_ppo import initial_model, prompts, reward, warm_start

def preferences(split):
    return islice(arithmetic_ppo.preferences(split), 40)
"""
CPU = torch.device("cpu")
MEASURED = ("time/", "throughput/", "memory/")
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(device, prepare)``: the metrics of a run with its roles there; ``prepare(words)`` gives what starts it."""
    monkeypatch.setattr(learner, "DeepSpeedBackend", PlainBackend)
    monkeypatch.setattr(dispatch, "forced", lambda: "torch")  # the C++ ops are the CPU's alone
    monkeypatch.setattr(dispatch, "implementation", lambda device: reference)

    def train(device: torch.device, prepare: Callable[[Sequence[str]], Callable[[], Any]]) -> list[dict[str, Any]]:
        for module in (policy, critic, frozen, reward_model):
            monkeypatch.setattr(module, "default_device", lambda: device)
        start = prepare([f"run.dir={tmp_path / device.type}"])
        with second_device() if device == DEVICE else nullcontext() as visits:
            result = start()
        assert visits is None or visits.uploads > 100
        lines = (result.folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)} for line in lines]

    return train


def training(config: str, *overrides: str) -> Callable[[Sequence[str]], Callable[[], Any]]:
    return lambda words: partial(launch, load_config(CONFIGS / config, [*SMALL, *overrides, *words]))


@pytest.fixture
def task(tmp_path: Path) -> str:
    """A task whose answers differ in reward from the start."""
    (tmp_path / "task.py").write_text(RECIPE)
    return f"recipe.path={tmp_path / 'task.py'}"


@pytest.mark.parametrize("algorithm", ["grpo", "remax"])
def test_a_policy(algorithm: str, run: Run, task: str) -> None:
    grpo = training("arithmetic_grpo_cpu.yaml", task, f"algorithm.name={algorithm}")
    assert run(CPU, grpo) == run(DEVICE, grpo)


def test_all_roles(run: Run, task: str, random_judge: Path) -> None:
    ppo = training("arithmetic_ppo_cpu.yaml", task, f"reward.models={{preference: {random_judge}}}")
    assert run(CPU, ppo) == run(DEVICE, ppo)


def test_a_reward_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text(PAIRS)
    small = ["warm_start.steps=2", "warm_start.batch_size=8", "pairs.steps=2", "pairs.batch_size=16", "eval.pairs=16",
             "eval.every=1", "train.tokens_per_microbatch=64", "cluster.kind=local", "cluster.threads=1",
             "tracking.wandb=disabled", f"recipe.path={tmp_path / 'pairs.py'}"]  # fmt: skip
    config = CONFIGS / "arithmetic_reward_model_cpu.yaml"

    def judge(words: Sequence[str]) -> Callable[[], Any]:
        return partial(launch_reward_model, load_reward_model_config(config, [*small, *words]))

    assert run(CPU, judge) == run(DEVICE, judge)
