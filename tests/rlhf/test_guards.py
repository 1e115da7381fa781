"""What a run watches by itself: the gap between sampler and trainer, a first step that moves nothing, and time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from test_deepspeed_contract import STAGES, weights
from test_resume import metrics_of
from test_training_exactness import rollout

from rlhf.config import load_config
from rlhf.launch import launch
from rlhf.metrics import gap_alarm
from rlhf.roles.policy import Policy
from rlhf.rollouts import Rollouts
from rlhf.run_folder import RunFolder
from rlhf.train import spawn_roles
from rlhf.types import Trajectory

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"
SMALL = ["run.steps=3", "warm_start.steps=0", "rollout.prompts_per_step=4", "cluster.threads=1", "eval.prompts=4",
         "rollout.kv_cache_gib=0.02", "eval.every=0", "cluster.kind=local", "tracking.wandb=disabled"]  # fmt: skip
NAME = "layers.1.mlp.down_proj.weight"


# ---------------------------------------------------------------- the gap


@pytest.mark.parametrize(
    ("exact", "largest", "mean", "said"),
    [
        (True, 0.0, 0.0, None),
        (True, 1e-7, 1e-9, "LOG-PROB GAP at step 7: sampler and trainer differ by up to 1e-07 nats"),
        (True, math.nan, math.nan, "LOG-PROB GAP at step 7: sampler and trainer differ by up to nan nats"),
        (True, -math.inf, 0.0, None),  # the largest of no token
        (False, 3.0, 0.0499, None),
        (False, 3.0, 0.0501, "LOG-PROB GAP at step 7: sampler and trainer differ by 0.0501 nats a token in the mean"),
        (False, math.nan, math.nan, "LOG-PROB GAP at step 7: sampler and trainer differ by nan nats"),
    ],
)
def test_an_alarm_names_step_and_gap(exact: bool, largest: float, mean: float, said: str | None) -> None:
    alarm = gap_alarm(7, {"rollout/logprob_gap_max": largest, "rollout/logprob_gap_mean": mean}, exact)
    assert alarm is None if said is None else alarm is not None and alarm.startswith(said)


def test_without_a_policy_update_there_is_no_gap() -> None:
    assert gap_alarm(1, {"critic/loss": 1.0}, exact=True) is None


def test_a_run_whose_sampler_strays_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on, the sampler reports what it didn't sample with."""
    take, steps = Rollouts.take, []

    def straying(self: Rollouts, phase: Any) -> list[Trajectory]:
        steps.append(1)
        found = take(self, phase)
        off = 1e-3 * (len(steps) > 1)
        return [
            replace(t, logprobs=tuple(x - off * m for x, m in zip(t.logprobs, t.loss_mask, strict=True))) for t in found
        ]

    monkeypatch.setattr(Rollouts, "take", straying)
    folder = launch(load_config(CONFIG, [*SMALL, f"run.dir={tmp_path}"])).folder
    assert [row["rollout/logprob_gap_max"] > 0 for row in metrics_of(folder)] == [False, True, True]
    lines = (folder / "train.log").read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if "LOG-PROB GAP" in line]
    assert lines[at].startswith("LOG-PROB GAP at step 2: sampler and trainer differ by up to 0.001 nats")
    assert lines[at - 1].startswith("step 2/3")


# ---------------------------------------------------------------- the first step


def hold_still(policy: Policy, monkeypatch: pytest.MonkeyPatch, name: str | None = None) -> None:
    """The optimizer's steps leave the masters of one weight, or of all, where they are."""
    engine, step = policy.backend.engine, policy.backend.engine.step
    if name is None:
        monkeypatch.setattr(engine, "step", lambda: None)
        return
    p, stage = policy.model.decoder.get_parameter(name), policy.backend.stage

    def stepping() -> None:
        if stage == 0:
            before = p.detach().clone()
            step()
            p.data.copy_(before)
        else:
            get, put = (
                (safe_get_local_fp32_param, safe_set_local_fp32_param)
                if stage == 3
                else (safe_get_full_fp32_param, safe_set_full_fp32_param)
            )
            before = get(p).clone()
            step()
            put(p, before)

    monkeypatch.setattr(engine, "step", stepping)


@STAGES
def test_a_first_step_that_moves_nothing_is_an_error(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    policy = make_policy(zero_stage=stage)
    hold_still(policy, monkeypatch)
    with pytest.raises(RuntimeError, match=r"the first optimizer step, at a rate of 0\.001, left") as caught:
        policy.update(rollout(policy))
    assert all(name in str(caught.value) for name, _ in policy.model.decoder.named_parameters())


@STAGES
def test_the_weight_that_did_not_move_is_named(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    policy = make_policy(zero_stage=stage)
    hold_still(policy, monkeypatch, NAME)
    with pytest.raises(RuntimeError, match=f"left 1 weights where they were although they have gradients: {NAME}\\."):
        policy.update(rollout(policy))


def test_a_weight_that_the_optimizer_lost_is_named(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(zero_stage=0)
    lost = policy.model.decoder.get_parameter(NAME)
    for group in policy.backend.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not lost]
    with pytest.raises(RuntimeError, match=f"have gradients: {NAME}\\."):
        policy.update(rollout(policy))


def test_a_skipped_step_is_no_first_one(make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(zero_stage=0)
    batch = rollout(policy)
    advantages = batch.column("advantages").clone()
    advantages[batch.loss_mask.nonzero()[0]] = math.nan
    assert policy.update(batch.replace(advantages=advantages))["policy/skipped_updates"] == 1
    hold_still(policy, monkeypatch)
    with pytest.raises(RuntimeError, match="the first optimizer step"):
        policy.update(batch)


def test_later_steps_may_be_too_small_to_see(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(zero_stage=0)
    policy.update(rollout(policy))
    policy.publish()
    hold_still(policy, monkeypatch)
    assert policy.update(rollout(policy))["policy/skipped_updates"] == 0


@STAGES
def test_a_rate_that_fp32_rounds_away_is_no_error(make_policy: Callable[..., Policy], stage: int) -> None:
    """Norms of 1 don't move by 1e-9."""
    policy = make_policy(zero_stage=stage, lr=1e-9)
    before = weights(policy)
    policy.update(rollout(policy))
    still = {name for name, p in weights(policy).items() if torch.equal(p, before[name])}
    assert "norm.weight" in still and len(still) < len(before)


# ---------------------------------------------------------------- time


class Spawns:
    """A cluster that notes what roles are told."""

    def __init__(self) -> None:
        self.told: dict[str, dict[str, Any]] = {}

    def spawn(self, name: str, role: object, *, ranks: int = 1, **arguments: Any) -> object:
        self.told[name] = arguments
        return SimpleNamespace(names=lambda: ["function"])


@pytest.mark.parametrize("numerics", ["exact", "fast", "auto"])
def test_a_reference_is_as_exact_as_the_policy(numerics: str, tmp_path: Path) -> None:
    words = ["algorithm.kl_coef=0.1", f"rollout.numerics={numerics}"]
    config, cluster = load_config(CONFIG, words), Spawns()
    spawn_roles(config, config.make_algorithm(), cluster, RunFolder(tmp_path), {"policy": tmp_path})  # type: ignore[arg-type]
    assert cluster.told["reference"]["exact"] == (numerics == "exact")


def test_every_role_that_meets_others_knows_the_bound_of_a_call(tmp_path: Path) -> None:
    """tests/rlhf/test_ranks.py has what it is in torch.distributed."""
    words = ["algorithm.name=ppo", "cluster.timeout_s=77", "reward.models={m: x}", "reward.model_scale=raw"]
    config, cluster = load_config(CONFIG, words), Spawns()
    weights = {"policy": tmp_path, "reward_model": tmp_path}
    spawn_roles(config, config.make_algorithm(), cluster, RunFolder(tmp_path), weights)  # type: ignore[arg-type]
    told = {name: arguments.get("timeout_s") for name, arguments in cluster.told.items()}
    assert told == {"policy": 77, "reward": None, "reward_model": 77, "reference": 77, "critic": 77}
