"""Every preset and any choice of axes against the naive code, and what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_policy_gradient import Answer, Axes, Step, naive_steps, random_answers, steps_of
from pydantic import ValidationError

from rlhf import algorithms
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.policy_gradient import PolicyGradient
from rlhf.packing import pack
from rlhf.types import Completion, Prompt, Score, Trajectory

# Spelled out, so that a changed default is seen here.
LOSS: Axes = {
    "dynamic_sampling": False,
    "max_rollouts_per_step": 8,
    "overlong_buffer": 0.0,
    "overlong_penalty": 1.0,
    "reward_norm": "none",
    "reward_clip": None,
    "ratio": "token",
    "proximal": "trainer",
    "clip": "ppo",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "aggregation": "token_mean",
    "entropy_coef": 0.0,
    "tis_clip": None,
    "importance": "token",
    "reject": "none",
    "reject_low": 0.5,
    "reject_high": 5.0,
    "kl_coef": 0.0,
    "kl_target": None,
    "kl_estimator": "k3",
    "kl_in": "loss",
    "updates_per_rollout": 1,
    "epochs": 1,
    "truncated": "score",
}
COMMON: Axes = {**LOSS, "returns": "sequence", "baseline": "group", "leave_one_out": False, "std": "group"}
IN_REWARD = {"kl_estimator": "k1", "kl_in": "reward"}
SUMMED = {"std": "none", "clip": "none", "aggregation": "constant_length", **IN_REWARD}
PRESETS: dict[str, Axes] = {
    "grpo": {},
    "dr_grpo": {"std": "none", "aggregation": "constant_length"},
    "rloo": {"leave_one_out": True, **SUMMED},
    "remax": {"returns": "token", "baseline": "greedy", **SUMMED},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean"},
    "cispo": {"clip": "cispo", "clip_low": 1.0, "clip_high": 4.0},
    "dapo": {"dynamic_sampling": True, "overlong_buffer": 0.2, "clip_high": 0.28, "tis_clip": 2.0},
    "reinforce_pp": {"returns": "token", "baseline": "batch", "std": "batch", **IN_REWARD},
}
PPO: Axes = {
    **LOSS,
    **IN_REWARD,
    "kl_coef": 0.02,
    "gamma": 1.0,
    "lam": 0.95,
    "value_clip": 0.2,
    "whiten": True,
    "updates_per_rollout": 2,
    "epochs": 2,
    "critic_warmup_steps": 0,
}
# Log-ratios of a size at which the preset's clip acts on some tokens and leaves others alone.
SPREAD = {"gspo": 1e-3, "cispo": 3.0}


def load(name: str, axes: Axes) -> Any:
    return algorithms.load({"name": name, **axes})


def assert_same(got: list[Step], expected: list[Step]) -> None:
    """Losses, gradients and diagnostics of the same tokens, to float32."""
    assert len(got) == len(expected)
    for ours, naive in zip(got, expected, strict=True):
        scale = max(map(abs, naive.gradient.values()))
        assert ours.loss == pytest.approx(naive.loss, rel=1e-5, abs=1e-5 * max(1.0, scale))
        assert ours.gradient == pytest.approx(naive.gradient, rel=1e-5, abs=1e-5 * scale)
        assert ours.entropy_gradient == pytest.approx(naive.entropy_gradient, rel=1e-5, abs=0)
        assert set(ours.diagnostics) == {"entropy", *naive.diagnostics}
        for name, column in naive.diagnostics.items():
            assert ours.diagnostics[name] == pytest.approx(column, rel=1e-5, abs=1e-6), name


def test_the_defaults_of_presets_are_these() -> None:
    assert algorithms.names() == sorted([*PRESETS, "ppo"])
    expected = {"ppo": PPO, **{name: {**COMMON, **axes} for name, axes in PRESETS.items()}}
    for name, axes in expected.items():
        assert {k: v for k, v in vars(load(name, {})).items() if k[0] != "_"} == {"name": name, **axes}


@pytest.mark.parametrize("max_micro", [1, 13, 1000])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kl_coef": 0.3},
        {"tis_clip": 1.1},
        {"updates_per_rollout": 3, "kl_coef": 0.3},
        {"updates_per_rollout": 2, "tis_clip": 1.1, "reject": "token", "reject_low": 0.8, "reject_high": 1.5},
    ],
)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_computes_what_naive_code_does(name: str, change: Axes, max_micro: int) -> None:
    axes = {**COMMON, **PRESETS[name], **change}
    answers = random_answers(random.Random(8), [4, 3, 5, 1], SPREAD.get(name, 0.5))
    got = steps_of(load(name, change), answers, axes, 7, max_micro)
    assert_same(got, naive_steps(answers, axes, 7))
    clipped = [c for step in got for c in step.diagnostics["clip_fraction"].values()]
    acts = axes["clip"] != "none" and axes["updates_per_rollout"] > 1  # with one update the ratio is 1
    assert (0 < sum(clipped) < len(clipped)) if acts else sum(clipped) == 0


valid_axes = st.fixed_dictionaries(
    {
        "returns": st.sampled_from(["sequence", "token"]),
        "baseline": st.sampled_from(["group", "batch", "greedy", "none"]),
        "leave_one_out": st.booleans(),
        "std": st.sampled_from(["group", "batch", "none"]),
        "reward_norm": st.sampled_from(["none", "batch"]),
        "reward_clip": st.sampled_from([None, 0.75]),
        "proximal": st.sampled_from(["trainer", "sampler"]),
        "entropy_coef": st.sampled_from([0.0, 0.1]),
        "importance": st.sampled_from(["token", "sequence"]),
        "reject": st.sampled_from(["none", "token", "sequence", "geometric"]),
        "reject_low": st.sampled_from([0.0, 0.7]),
        "reject_high": st.sampled_from([1.0, 1.3]),
        "ratio": st.sampled_from(["token", "sequence"]),
        "clip": st.sampled_from(["ppo", "cispo", "none"]),
        "clip_low": st.sampled_from([0.0, 0.1, 0.3, 1.0]),
        "clip_high": st.sampled_from([0.05, 0.3, 4.0]),
        "dual_clip": st.sampled_from([None, 1.1, 1.5]),
        "aggregation": st.sampled_from(["token_mean", "sequence_mean", "constant_length"]),
        "kl_coef": st.sampled_from([0.0, 0.2]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "kl_in": st.sampled_from(["loss", "reward"]),
        "tis_clip": st.sampled_from([None, 0.9, 1.2]),
        "updates_per_rollout": st.integers(1, 3),
        "epochs": st.integers(1, 2),
    }
).filter(lambda a: contradiction(a) is None and 1 in (a["updates_per_rollout"], a["epochs"]))


def contradiction(axes: Axes) -> str | None:
    """The rule that a choice of axes breaks, if any."""
    a = {**COMMON, **axes}
    if a["dual_clip"] is not None and a["clip"] != "ppo":
        return "dual_clip"
    if a["proximal"] == "sampler" and (a["tis_clip"] is not None or a["reject"] != "none"):
        return "the sampler corrected for twice"
    if a["dynamic_sampling"] and a["tis_clip"] is None and a["proximal"] == "trainer":
        return "stale answers"
    if a["kl_coef"] > 0 and a["kl_in"] == "loss" and a["kl_estimator"] == "k1":
        return "k1 in the loss"
    if a["kl_coef"] > 0 and a["kl_in"] == "reward" and a["truncated"] == "mask":
        return "penalties of masked answers"
    if a["leave_one_out"] and a["baseline"] != "group":
        return "leave_one_out"
    if (a["baseline"], a["std"]) in {(b, s) for b in ("batch", "greedy", "none") for s in ("group", "batch") if b != s}:
        return "std"
    if a["returns"] == "token" and "group" in (a["baseline"], a["std"]):
        return "returns"
    return None


@settings(max_examples=80, deadline=None)
@given(axes=valid_axes, seed=st.integers(0, 999), max_micro=st.sampled_from([1, 9, 1000]))
def test_any_choice_of_axes_computes_what_naive_code_does(axes: Axes, seed: int, max_micro: int) -> None:
    rng = random.Random(seed)
    answers = random_answers(rng, [rng.randint(1, 4) for _ in range(rng.randint(2, 3))])
    answers += random_answers(rng, [2])[:1]  # a mate, or an answer of its own
    assert_same(
        steps_of(GRPO(**axes), answers, {**COMMON, **axes}, 5, max_micro), naive_steps(answers, {**COMMON, **axes}, 5)
    )


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(PRESETS)), seed=st.integers(0, 999))
def test_the_order_of_answers_does_not_matter(name: str, seed: int) -> None:
    """Every answer's tokens get the same gradient wherever it stands among the others and in whichever micro-batch."""
    rng = random.Random(seed)
    axes = {**COMMON, **PRESETS[name], "kl_coef": 0.2}
    answers = random_answers(rng, [3, 2, 4])
    order = rng.sample(range(9), 9)

    def gradients(chosen: list[Answer], max_micro: int) -> list[list[float]]:
        (step,) = steps_of(load(name, {"kl_coef": 0.2}), chosen, axes, 6, max_micro)
        flat = iter(step.gradient[token] for token in sorted(step.gradient))
        return [[next(flat) for _ in a.now] for a in chosen]

    straight, shuffled = gradients(answers, 1000), gradients([answers[i] for i in order], 11)
    for place, i in enumerate(order):
        assert shuffled[place] == pytest.approx(straight[i], rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------- refusals, roles


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"leave_one_out": True, "baseline": "batch", "std": "none"}, r"leave_one_out=true.*baseline=batch; set "),
        ({"baseline": "batch"}, r"std=group with baseline=batch.*set std=none or batch, or baseline=group"),
        ({"baseline": "none"}, r"std=group with baseline=none.*set std=none, or baseline=group"),
        ({"baseline": "none", "std": "batch"}, r"std=batch with baseline=none.*set std=none, or baseline=batch"),
        ({"returns": "token"}, r"returns=token.*baseline=group with std=group.*or returns=sequence"),
        ({"dual_clip": 3.0, "clip": "cispo"}, r"dual_clip=3\.0.*clip=cispo; set clip=ppo or dual_clip=null"),
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, r"kl_estimator=k1 with kl_in=loss.*set kl_estimator to k2 or k3, or"),
        ({"baseline": "greedy"}, r"std=group with baseline=greedy.*set std=none, or baseline=group"),
        (
            {"proximal": "sampler", "tis_clip": 2.0},
            r"proximal=sampler.*tis_clip=2\.0.*set proximal=trainer, or tis_clip",
        ),
        (
            {"proximal": "sampler", "reject": "token"},
            r"proximal=sampler.*reject=token.*set proximal=trainer, or .*none",
        ),
        ({"dynamic_sampling": True}, r"dynamic_sampling=true.*older policy.*set tis_clip .*or proximal=sampler"),
        ({"kl_coef": 0.1, "kl_in": "reward", "truncated": "mask"}, r"kl_in=reward with truncated=mask.*set truncated="),
    ],
)
def test_contradictions_say_both_axes_and_the_way_out(axes: Axes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GRPO(**axes)


@settings(max_examples=200, deadline=None)
@given(
    axes=st.fixed_dictionaries(
        {
            "returns": st.sampled_from(["sequence", "token"]),
            "baseline": st.sampled_from(["group", "batch", "greedy", "none"]),
            "leave_one_out": st.booleans(),
            "std": st.sampled_from(["group", "batch", "none"]),
            "proximal": st.sampled_from(["trainer", "sampler"]),
            "tis_clip": st.sampled_from([None, 2.0]),
            "reject": st.sampled_from(["none", "sequence"]),
            "dynamic_sampling": st.booleans(),
            "clip": st.sampled_from(["ppo", "cispo", "none"]),
            "dual_clip": st.sampled_from([None, 3.0]),
            "kl_coef": st.sampled_from([0.0, 0.2]),
            "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
            "kl_in": st.sampled_from(["loss", "reward"]),
            "truncated": st.sampled_from(["score", "mask"]),
        }
    )
)
def test_exactly_the_contradictions_are_refused(axes: Axes) -> None:
    try:
        GRPO(**axes)
        refused = False
    except ValidationError:
        refused = True
    assert refused == (contradiction(axes) is not None)


@pytest.mark.parametrize("name", PRESETS)
def test_only_a_kl_needs_the_reference_and_only_a_group_baseline_several_samples(name: str) -> None:
    assert load(name, {}).roles == () and load(name, {"kl_coef": 0.1}).roles == ("reference",)
    assert load(name, {}).min_samples_per_prompt == (1 if name in ("reinforce_pp", "remax") else 2)


def test_a_kl_in_the_reward_without_a_coefficient_needs_no_reference_column() -> None:
    axes = {**COMMON, **PRESETS["rloo"]}
    answers = random_answers(random.Random(0), [3, 3])
    (step,) = steps_of(load("rloo", {}), answers, axes, 5, 1000)
    assert "kl" not in step.diagnostics and max(map(abs, step.gradient.values())) > 0


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_which_token_pays(name: str) -> None:
    """Two tokens of five, one pays: a table of logits trained by plain gradient descent, two updates a rollout."""
    torch.manual_seed(0)
    algorithm: PolicyGradient = load(name, {"updates_per_rollout": 2, "kl_coef": 0.01})
    logits = torch.zeros(2, 5, requires_grad=True)
    before = logits.detach().log_softmax(1)
    for _ in range(60):
        table = logits.detach().log_softmax(1)
        trajectories = []
        for group in range(4):
            for _ in range(6):
                a, b = (int(torch.multinomial(row.exp(), 1)) for row in table)
                logprobs = (table[0, a].item(), table[1, b].item())
                answer = Completion("p", "", (a, b), "stop", logprobs)
                paid = Score(float(a == 3) + 0.1 * group)
                trajectories.append(Trajectory.from_completion(Prompt(0, "p", (0,)), answer, group, paid))
        best = table[0].argmax().item() == 3
        batch = pack([replace(t, baseline=float(best) + 0.1 * t.group) for t in trajectories])
        (scored,) = torch.nonzero(batch.loss_mask, as_tuple=True)

        def look(rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return rows[torch.arange(len(tokens)) % 2, tokens]

        ref, old = torch.zeros(batch.num_tokens), torch.zeros(batch.num_tokens)
        ref[scored], old[scored] = look(before, batch.tokens[scored]), look(table, batch.tokens[scored])
        batch = algorithm.advantages(batch.replace(ref_logprobs=ref, old_logprobs=old))
        for minibatch in algorithm.minibatches(batch, 2):
            (scored,) = torch.nonzero(minibatch.loss_mask, as_tuple=True)
            logprobs_now = look(logits.log_softmax(1), minibatch.tokens[scored])
            loss, _ = algorithm.policy_loss(logprobs_now, torch.zeros_like(logprobs_now), minibatch, scored)
            (gradient,) = torch.autograd.grad(loss, logits)
            with torch.no_grad():
                logits -= 1.0 * gradient
    after = logits.detach().softmax(1)
    assert after[0, 3].item() > 0.8, after
    assert after[1].max().item() < 0.5, "the second token pays nothing and should not have been decided"
