"""Keys of the role sections: those that the role has no use for are refused, with the reason; others reach it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import RoleSection, load_config

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"
PPO = ["algorithm.name=ppo", "reward.models={helpful: somewhere}"]
VALUES = {
    "path": "elsewhere",
    "revision": "v2",
    "dtype": "bfloat16",
    "gradient_checkpointing": "true",
    "lr": "0.5",
    "warmup_steps": "7",
    "schedule": "linear",
    "max_grad_norm": "3.5",
    "weight_decay": "0.25",
    "betas": "[0.5, 0.75]",
    "zero_stage": "3",
    "tokens_per_microbatch": "77",
    "ranks": "2",
}
LEARNING = ("gradient_checkpointing", "lr", "warmup_steps", "schedule", "max_grad_norm", "weight_decay", "betas")


def test_every_key_has_a_value_here() -> None:
    assert set(VALUES) == set(RoleSection.model_fields)


@pytest.mark.parametrize("key", VALUES)
@pytest.mark.parametrize("role", ["critic", "reference", "reward_model"])
def test_a_key_reaches_the_role_or_is_refused(role: str, key: str) -> None:
    words = [*PPO, f"{role}.{key}={VALUES[key]}"]
    if key == "revision":
        words.append(f"{role}.path=elsewhere" if role != "reward_model" else "run.seed=0")
    refused = (role != "critic" and key in LEARNING) or (role, key) == ("reward_model", "path")
    if refused:
        with pytest.raises(ValueError, match=rf"^{role}\.{key}="):
            load_config(CONFIG, words)
        return
    config = load_config(CONFIG, words)
    model, train, ranks = config.of_role(role)
    found = {**model.model_dump(), **train.model_dump(), "ranks": ranks}[key]
    assert found == getattr(config.section_of(role), key) is not None
    usual = load_config(CONFIG, PPO).of_role(role)
    assert found != {**usual[0].model_dump(), **usual[1].model_dump(), "ranks": usual[2]}[key]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [*PPO, "reference.lr=1e-3"],
            r"^reference\.lr=0\.001: the role doesn't learn; .* use for dtype, zero_stage, tok",
        ),
        ([*PPO, "reward_model.betas=[0.5, 0.5]"], r"^reward_model\.betas=.*0\.5.*: the role doesn't learn; "),
        ([*PPO, "reference.zero_stage=1"], r"^reference\.zero_stage=1: stages 1 and 2 .* set 0, or 3, which divides"),
        ([*PPO, "reward_model.zero_stage=2"], r"^reward_model\.zero_stage=2: stages 1 and 2 divide an optimizer"),
        ([*PPO, "reward_model.path=x"], r"^reward_model\.path='x': reward models are named in reward\.models, such as"),
        (["reward_model.ranks=2"], r"^reward_model\.ranks=2: there is no reward model; name one in reward\.models"),
        (["critic.lr=1e-3"], r"^critic\.lr=0\.001: algorithm\.name=grpo has no critic; leave this out, or change"),
        (["critic.path=x"], r"^critic\.path='x': algorithm\.name=grpo has no critic"),
        (["reference.ranks=2"], r"^reference\.ranks=2: algorithm\.name=grpo with kl_coef=0 measures no KL to a ref"),
        (["algorithm.name=ppo", "algorithm.kl_coef=0", "reference.dtype=bfloat16"], r"=ppo with kl_coef=0 measures no"),
        ([*PPO, "critic.revision=v2"], r"^critic\.revision='v2': there is no critic\.path; .* model\.revision"),
        ([*PPO, "reference.revision=v2"], r"^reference\.revision='v2': there is no reference\.path"),
        (["critic.lr=1e-3", "algorithm.name=gpro"], r"algorithm\.name='gpro': choose one of"),
    ],
)
def test_a_refusal_names_key_and_reason(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_config(CONFIG, overrides)


def test_a_role_without_a_section_of_its_own_goes_with_the_policy() -> None:
    """Its weights are as large as the policy's: where these don't fit a device, neither do they."""
    config = load_config(CONFIG, [*PPO, "train.zero_stage=3"])
    assert {config.of_role(role)[1].zero_stage for role in ("critic", "reference", "reward_model")} == {3}
    assert load_config(CONFIG, [*PPO, "train.zero_stage=2"]).reference.zero_stage is None  # no refusal
