"""Who sits where: bundles by role, ranks by default, what doesn't fit, and what the plan says of it."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from rlhf import algorithms
from rlhf.cluster.placement import num_bundles, seats, share
from rlhf.config import Config, load_config
from rlhf.launch import prepare
from rlhf.plan import check_placement

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"
RANKS = {"policy": 4, "critic": 2, "reference": 1}


def ppo(*overrides: str) -> Config:
    return load_config(CONFIG, ["algorithm.name=ppo", *overrides])


def test_colocated_roles_share_the_first_bundles() -> None:
    taken = seats("colocated", RANKS)
    assert {role: list(bundles) for role, bundles in taken.items()} == {
        "policy": [0, 1, 2, 3],
        "critic": [0, 1],
        "reference": [0],
        "warm_start": [0, 1, 2, 3],
    }
    assert num_bundles(taken) == 4


def test_separate_ranks_share_nothing_but_the_warm_start_which_is_over() -> None:
    taken = seats("separate", RANKS)
    assert {role: list(bundles) for role, bundles in taken.items()} == {
        "policy": [0, 1, 2, 3],
        "critic": [4, 5],
        "reference": [6],
        "warm_start": [0, 1, 2, 3],
    }
    assert num_bundles(taken) == 7


@pytest.mark.parametrize("count", range(1, 65))
def test_any_number_of_roles_share_a_device(count: int) -> None:
    """In whole ten-thousandths, which are what Ray counts."""
    taken = seats("colocated", {f"role-{i}": 1 for i in range(count)})
    asked = share("colocated", taken) * 1e4
    assert asked == pytest.approx(round(asked), abs=1e-6) and 1e4 - count < count * round(asked) <= 1e4
    assert share("separate", taken) == 1.0


def test_the_warm_starts_policy_has_a_share_too() -> None:
    """It may still be ending when the policy starts."""
    assert share("colocated", seats("colocated", {"policy": 1, "critic": 1})) == 0.3333


def test_without_a_role_on_a_device_there_is_one_bundle() -> None:
    assert seats("separate", {}) == {} and num_bundles({}) == 1


@pytest.mark.parametrize(
    ("overrides", "policy", "reference", "critic"),
    [
        ([], 1, 1, 1),
        (["cluster.ranks=4"], 4, 4, 4),
        (["cluster.gpus=4"], 4, 4, 4),
        (["cluster.ranks=4", "critic.ranks=2", "reference.ranks=1"], 4, 1, 2),
        (["cluster.placement=separate"], 1, 1, 1),
        (["cluster.placement=separate", "cluster.ranks=4"], 4, 1, 1),
        (["cluster.placement=separate", "cluster.gpus=8"], 6, 1, 1),
        (["cluster.placement=separate", "cluster.gpus=8", "critic.ranks=3"], 4, 1, 3),
    ],
)
def test_ranks_by_default(overrides: list[str], policy: int, reference: int, critic: int) -> None:
    config = ppo(*overrides)
    assert config.ranks == {"policy": policy, "reference": reference, "critic": critic}
    assert [config.of_role(role)[2] for role in config.ranks] == [policy, reference, critic]


def test_only_the_roles_of_the_algorithm_are_placed() -> None:
    assert load_config(CONFIG).ranks == {"policy": 1}
    assert load_config(CONFIG, ["algorithm.kl_coef=0.1", "cluster.ranks=2"]).ranks == {"policy": 2, "reference": 2}


SEPARATE = "cluster.placement=separate"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [SEPARATE, "cluster.gpus=8", "cluster.ranks=4"],
            r"cluster\.ranks=4, reference\.ranks=1, critic\.ranks=1 make 6, and cluster\.gpus=8; .*=colocated",
        ),
        ([SEPARATE, "cluster.gpus=2"], r"cluster\.ranks=1, reference\.ranks=1, critic\.ranks=1 make 3, .*gpus=2"),
        ([SEPARATE, "cluster.kind=local"], r"placement=separate: cluster\.kind=local .*set cluster\.kind=ray"),
        (["cluster.kind=local", "critic.ranks=2"], r"critic\.ranks=2: cluster\.kind=local runs one rank"),
        (
            ["cluster.gpus=2", "cluster.ranks=1", "critic.ranks=1"],
            r"cluster\.ranks=1, reference\.ranks=1, critic\.ranks=1 do not divide over cluster\.gpus=2",
        ),
        (["cluster.gpus=2", "critic.ranks=3"], r"critic\.ranks=3 do not divide over cluster\.gpus=2"),
        ([SEPARATE, "cluster.gpus=5", "rollout.prompts_per_step=128"], r"128 does not divide over cluster\.ranks=3"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare(ppo(*overrides), tmp_path / "run")


def test_reward_models_are_placed_and_named_by_their_key() -> None:
    models = ["reward.models={kind: a, short: b}", "cluster.placement=separate"]
    config = ppo(*models, "cluster.gpus=8", "reward_model.ranks=2")
    assert config.ranks == {"policy": 2, "reference": 1, "critic": 1, "reward_model-kind": 2, "reward_model-short": 2}
    check_placement(config)
    with pytest.raises(ValueError, match=r"reward_model\.ranks=2: cluster\.kind=local runs one rank"):
        check_placement(ppo(models[0], "reward_model.ranks=2", "cluster.kind=local"))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "colocated on 1 bundle: policy 0, reference 0, critic 0; reward function on none"),
        (["cluster.gpus=2", "critic.ranks=1"], "colocated on 2 GPUs: policy 0-1, reference 0-1, critic 0; .*"),
        ([SEPARATE, "cluster.gpus=8"], "separate on 8 GPUs: policy 0-5, reference 6, critic 7; .*"),
    ],
)
def test_the_plan_says_who_sits_where(tmp_path: Path, overrides: list[str], line: str) -> None:
    plan = str(prepare(ppo("rollout.prompts_per_step=12", *overrides), tmp_path / "run").plan)
    assert re.search(rf"^placement   {line}$", plan, re.MULTILINE)


def test_the_plan_says_every_axis_of_the_algorithm(tmp_path: Path) -> None:
    plan = prepare(load_config(CONFIG), tmp_path / "run").plan
    for name in algorithms.names():
        config = load_config(CONFIG, [f"algorithm.name={name}", "algorithm.clip_high=0.3"])
        _, _, axes = str(replace(plan, config=config)).partition(f"algorithm   {name}: ")
        printed = {key: yaml.safe_load(value) for key, _, value in (axis.partition("=") for axis in axes.split())}
        assert {"name": name, **printed} == asdict(config.make_algorithm())  # type: ignore[call-overload]
        assert printed["clip_high"] == 0.3
