"""Returns and advantages against hand-computed numbers, naive loops and their invariances."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_policy_gradient import Answer, Axes, batch_of, naive_advantages, random_answers

from rlhf import algorithms
from rlhf.functional import relative_advantages, sequence_sums, sums_to_go
from rlhf.packing import pack
from rlhf.types import Completion, Prompt, Score, Trajectory


def advantages(returns: Sequence[float], groups: Sequence[int], **levels: Any) -> list[float]:
    column = relative_advantages(torch.tensor(returns), torch.tensor(groups), **levels)
    assert column.dtype == torch.float32
    return column.tolist()


GROUP = {"baseline": "group", "std": "none"}
GROUP_STD = {"baseline": "group", "std": "group"}
LEAVE_ONE_OUT = {"baseline": "group", "std": "none", "leave_one_out": True}
BATCH = {"baseline": "batch", "std": "none"}
BATCH_STD = {"baseline": "batch", "std": "batch"}
MIXED = {"baseline": "group", "std": "batch"}

HALVES = ([1.0, 0.0, 0.0, 1.0, 2.0], [0, 0, 0, 0, 7])  # the last has a group of its own
UNSORTED = ([1.0, 10.0, 3.0, 30.0], [5, 2, 5, 2])
SEVENS = ([1.0, 2.0, 6.0, 4.0, 4.0], [0, 0, 0, 1, 1])

HAND = [
    # mean 1/2; then 2 - 2
    (HALVES, GROUP, [0.5, -0.5, -0.5, 0.5, 0.0]),
    # mean 2 and mean 20
    (UNSORTED, GROUP, [-1.0, -10.0, 1.0, 10.0]),
    # mean 3; then equal rewards
    (SEVENS, GROUP, [-2.0, -1.0, 3.0, 0.0, 0.0]),
    # sample variance 4 * 1/4 / 3 = 1/3
    (HALVES, GROUP_STD, [x * 3**0.5 for x in (0.5, -0.5, -0.5, 0.5, 0.0)]),
    # deviations sqrt(2) and sqrt(200)
    (UNSORTED, GROUP_STD, [-(2**-0.5), -(2**-0.5), 2**-0.5, 2**-0.5]),
    # squares 4 + 1 + 9 over n - 1 = 2: deviation sqrt(7)
    (SEVENS, GROUP_STD, [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, 0.0, 0.0]),
    # the others of a 1: 0, 0, 1, mean 1/3; of a 0: 1, 0, 1, mean 2/3; the last has no others
    (HALVES, LEAVE_ONE_OUT, [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0.0]),
    # one other each
    (UNSORTED, LEAVE_ONE_OUT, [-2.0, -20.0, 2.0, 20.0]),
    # means of the others: (2 + 6)/2, (1 + 6)/2, (1 + 2)/2, 4, 4
    (SEVENS, LEAVE_ONE_OUT, [-3.0, -1.5, 4.5, 0.0, 0.0]),
    # mean 4/5
    (HALVES, BATCH, [0.2, -0.8, -0.8, 0.2, 1.2]),
    # mean 11
    (UNSORTED, BATCH, [-10.0, -1.0, -8.0, 19.0]),
    # mean 17/5
    (SEVENS, BATCH, [-2.4, -1.4, 2.6, 0.6, 0.6]),
    # squares 0.04 + 0.64 + 0.64 + 0.04 + 1.44 = 2.8 over 4
    (HALVES, BATCH_STD, [x / 0.7**0.5 for x in (0.2, -0.8, -0.8, 0.2, 1.2)]),
    # squares 100 + 1 + 64 + 361 = 526 over 3
    (UNSORTED, BATCH_STD, [x / (526 / 3) ** 0.5 for x in (-10.0, -1.0, -8.0, 19.0)]),
    # squares 5.76 + 1.96 + 6.76 + 0.36 + 0.36 = 15.2 over 4
    (SEVENS, BATCH_STD, [x / 3.8**0.5 for x in (-2.4, -1.4, 2.6, 0.6, 0.6)]),
    # of what the groups' means leave: squares 4 * 1/4 + 0 = 1 over 4
    (HALVES, MIXED, [1.0, -1.0, -1.0, 1.0, 0.0]),
    # squares 1 + 100 + 1 + 100 = 202 over 3
    (UNSORTED, MIXED, [x / (202 / 3) ** 0.5 for x in (-1.0, -10.0, 1.0, 10.0)]),
    # squares 4 + 1 + 9 + 0 + 0 = 14 over 4
    (SEVENS, MIXED, [x / 3.5**0.5 for x in (-2.0, -1.0, 3.0, 0.0, 0.0)]),
    (SEVENS, {"baseline": "none", "std": "none"}, [1.0, 2.0, 6.0, 4.0, 4.0]),
]


@pytest.mark.parametrize(("data", "levels", "expected"), HAND)
def test_advantages_by_hand(data: Any, levels: dict[str, Any], expected: list[float]) -> None:
    assert advantages(*data, **levels) == pytest.approx(expected, abs=3e-6)  # eps is 1e-6


@pytest.mark.parametrize("std", ["group", "none"])
def test_advantages_match_a_naive_loop(std: str) -> None:
    rng = random.Random(3)
    rewards = torch.tensor([rng.uniform(-2, 2) for _ in range(90)]).tolist()  # rounded to fp32
    groups = [rng.choice([-4, 3, 17, 1000, 2**40]) for _ in rewards]
    expected = []
    for reward, group in zip(rewards, groups, strict=True):
        mates = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        expected.append((reward - statistics.fmean(mates)) / (statistics.stdev(mates) if std == "group" else 1.0))
    got = advantages(rewards, groups, baseline="group", std=std)
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("levels", [GROUP, GROUP_STD, LEAVE_ONE_OUT, BATCH, BATCH_STD, MIXED])
@pytest.mark.parametrize("reward", [0.0, 1.0, -3.0, 0.1, 0.7, 1 / 3, 12.3, 1000.1])
def test_equal_rewards_and_groups_of_one_get_exactly_zero(reward: float, levels: dict[str, Any]) -> None:
    for size in range(1, 10):
        assert advantages([reward] * size, [0] * size, **levels) == [0.0] * size, size


@pytest.mark.parametrize("axes", [{"reward_norm": "batch"}, {"reward_norm": "batch", "reward_clip": 0.3}], ids=str)
def test_a_flat_groups_advantages_stay_exactly_zero_when_rewards_are_normalised(axes: Axes) -> None:
    for size in range(2, 10):
        flat = [Answer(1, 0, 0.7, [-1.0], [-1.0], [-1.0], [-1.0])] * size
        others = [Answer(1, 1, x, [-1.0], [-1.0], [-1.0], [-1.0]) for x in (0.1, 0.9, 0.25)]
        got = token_advantages("grpo", flat + others, **axes)
        assert got[:size] == [[0.0]] * size and got[-1] != [0.0], size


returns = st.lists(st.integers(-40, 40).map(lambda x: x / 8), min_size=2, max_size=9)
levels = st.sampled_from([GROUP, GROUP_STD, LEAVE_ONE_OUT, BATCH, BATCH_STD, MIXED])


@settings(max_examples=80, deadline=None)
@given(returns=returns, levels=levels, shift=st.integers(-64, 64), seed=st.integers(0, 99))
def test_a_constant_added_to_all_returns_changes_nothing(
    returns: list[float], levels: dict[str, Any], shift: int, seed: int
) -> None:
    groups = [random.Random(seed + i).randint(0, 2) for i in range(len(returns))]
    moved = advantages([x + shift for x in returns], groups, **levels)
    assert moved == pytest.approx(advantages(returns, groups, **levels), rel=1e-5, abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(returns=returns, shifts=st.lists(st.integers(-64, 64), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_baseline_over_the_group_forgives_prompts_that_pay_more(
    returns: list[float], shifts: list[int], seed: int
) -> None:
    groups = [random.Random(seed + i).randint(0, 2) for i in range(len(returns))]
    moved = [x + shifts[g] for x, g in zip(returns, groups, strict=True)]
    for levels in (GROUP, GROUP_STD, LEAVE_ONE_OUT, MIXED):
        expected = advantages(returns, groups, **levels)
        assert advantages(moved, groups, **levels) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@settings(max_examples=80, deadline=None)
@given(returns=returns, levels=levels, scale=st.sampled_from([0.25, 3.0, 100.0]), seed=st.integers(0, 99))
def test_returns_in_another_unit_change_only_undivided_advantages(
    returns: list[float], levels: dict[str, Any], scale: float, seed: int
) -> None:
    groups = [random.Random(seed + i).randint(0, 2) for i in range(len(returns))]
    expected = [x * (scale if levels["std"] == "none" else 1.0) for x in advantages(returns, groups, **levels)]
    got = advantages([x * scale for x in returns], groups, **levels)
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(max_examples=80, deadline=None)
@given(returns=returns, levels=levels, seed=st.integers(0, 99))
def test_advantages_move_with_their_answers_and_groups_may_be_renamed(
    returns: list[float], levels: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    groups = [rng.randint(0, 2) for _ in returns]
    order = rng.sample(range(len(returns)), len(returns))
    names = [rng.randint(-(2**40), 2**40) for _ in range(3)]
    straight = advantages(returns, groups, **levels)
    moved = advantages([returns[i] for i in order], [names[groups[i]] for i in order], **levels)
    assert moved == pytest.approx([straight[i] for i in order], rel=1e-6, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(returns=returns)
def test_divided_advantages_have_mean_zero_and_variance_one(returns: list[float]) -> None:
    got = advantages(returns, [0] * len(returns), **BATCH_STD)
    if len(set(returns)) > 1:
        assert statistics.fmean(got) == pytest.approx(0.0, abs=1e-5)
        assert statistics.stdev(got) == pytest.approx(1.0, rel=1e-4)


# ---------------------------------------------------------------- sums over sequences


@pytest.mark.parametrize(
    ("lengths", "values", "sums", "to_go"),
    [
        ((3,), [1, 2, 4], [7], [7, 6, 4]),
        ((1, 2), [5, -1, 3], [5, 2], [5, 2, 3]),
        ((2, 1, 3), [1, 1, 8, 0, 0.5, 0], [2, 8, 0.5], [2, 1, 8, 0.5, 0.5, 0]),
    ],
)
def test_sums_by_hand(lengths: tuple[int, ...], values: list[float], sums: list[float], to_go: list[float]) -> None:
    column = torch.tensor(values, dtype=torch.float64)
    assert sequence_sums(column, lengths).tolist() == sums
    assert sums_to_go(column, lengths).tolist() == to_go


# ---------------------------------------------------------------- the KL in the reward

# A prompt token each; k1 is log(policy / reference), given per token as the answer's log-prob over a reference of 0.
TWO = [
    Answer(1, 0, 1.0, now=[-9.0] * 2, old=[-9.0] * 2, ref=[-3.0] * 2, rollout=[-2.0, -1.0]),  # k1: 1, 2
    Answer(1, 0, 0.0, now=[-9.0], old=[-9.0], ref=[-3.0], rollout=[-5.0]),  # k1: -2
]


def token_advantages(name: str, answers: list[Answer], **axes: Any) -> list[list[float]]:
    algorithm: Any = algorithms.load({"name": name, **axes})
    batch = algorithm.advantages(batch_of(answers, vars(algorithm)))
    assert batch.advantages.dtype == torch.float32
    parts = batch.column("advantages").split(batch.lengths)
    return [part[a.given :].tolist() for part, a in zip(parts, answers, strict=True)]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # returns 1 - 0.1 * 3 = 0.7 and 0 + 0.1 * 2 = 0.2, each less the other
        ("k1", 0.5),
        # halves of squares 1/2, 2 and 2: 1 - 0.1 * 2.5 = 0.75 and -0.2
        ("k2", 0.95),
        # r - 1 - log r with log r = -1, -2 and 2: e^-1, 1 + e^-2 and e^2 - 3
        ("k3", 1 - 0.1 * (0.36787944 + 1.13533528) + 0.1 * 4.38905610),
    ],
)
def test_a_whole_answer_pays_for_all_its_tokens_before_the_baseline(estimator: str, expected: float) -> None:
    got = token_advantages("rloo", TWO, kl_coef=0.1, kl_estimator=estimator)
    assert got == [pytest.approx([expected] * 2, abs=1e-6), pytest.approx([-expected], abs=1e-6)]


def test_reward_to_go_by_hand() -> None:
    """Returns 1 - 0.1 * (1 + 2), 1 - 0.1 * 2 and 0 + 0.1 * 2: 0.7, 0.8, 0.2. Mean 17/30, squares 0.62/3 over 2."""
    got = token_advantages("reinforce_pp", TWO, kl_coef=0.1)
    mean, deviation = 17 / 30, (0.49 + 0.64 + 0.04 - 3 * (17 / 30) ** 2) / 2
    expected = [(x - mean) / deviation**0.5 for x in (0.7, 0.8, 0.2)]
    assert got == [pytest.approx(expected[:2], abs=1e-5), pytest.approx(expected[2:], abs=1e-5)]


def test_without_a_kl_tokens_of_long_answers_weigh_more_in_the_batch_mean() -> None:
    """Returns 1, 1, 0: mean 2/3, squares 1/9 + 1/9 + 4/9 = 2/3 over 2."""
    got = token_advantages("reinforce_pp", TWO)
    assert got == [pytest.approx([3**-0.5] * 2, abs=1e-5), pytest.approx([-2 * 3**-0.5], abs=1e-5)]


def test_the_penalty_is_that_of_the_policy_that_sampled() -> None:
    """With several updates the trainer's old log-probs are there; with one, the engine's are the only ones."""
    moved = [Answer(a.given, a.group, a.reward, a.now, [x + 1 for x in a.rollout], a.ref, a.rollout) for a in TWO]
    one, two = (token_advantages("rloo", moved, kl_coef=0.1, updates_per_rollout=n)[1][0] for n in (1, 2))
    assert one == pytest.approx(-0.5, abs=1e-6)
    assert two == pytest.approx(-0.4, abs=1e-6)  # k1: 2, 3 and -1; returns 0.5 and 0.1


def test_a_kl_in_the_loss_leaves_the_advantages_alone() -> None:
    assert token_advantages("grpo", TWO, kl_coef=5.0) == token_advantages("grpo", TWO)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["grpo", "dr_grpo", "rloo", "reinforce_pp"]),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    updates=st.integers(1, 2),
    seed=st.integers(0, 999),
)
def test_advantages_of_presets_match_naive_code(name: str, estimator: str, updates: int, seed: int) -> None:
    answers = random_answers(random.Random(seed), [3, 1, 4])
    axes: Axes = {"kl_coef": 0.3, "kl_estimator": estimator, "kl_in": "reward", "updates_per_rollout": updates}
    got = token_advantages(name, answers, **axes)
    expected = naive_advantages(answers, vars(algorithms.load({"name": name, **axes})))
    assert got == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in expected]


# ---------------------------------------------------------------- masked answers


def test_tokens_of_masked_answers_have_no_part_in_a_baseline_over_tokens() -> None:
    def answer(n: int, reason: str, reward: float) -> Trajectory:
        completion = Completion("p", "", (7,) * n, reason, (-0.5,) * n)
        return Trajectory.from_completion(Prompt(0, "p", (1,)), completion, 0, Score(reward))

    algorithm = algorithms.load({"name": "reinforce_pp", "truncated": "mask"})
    batch = pack([answer(1, "stop", 1.0), answer(3, "length", 50.0), answer(1, "stop", 0.0)], mask_truncated=True)
    root = 2**-0.5  # mean 1/2, squares 1/4 + 1/4 over 1
    expected = [0.0, root, 0.0, 0.0, 0.0, 0.0, 0.0, -root]
    assert algorithm.advantages(batch).column("advantages").tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", algorithms.names())
def test_a_batch_of_masked_answers_alone_trains_nothing_and_is_finite(name: str) -> None:
    completion = Completion("p", "", (7, 7), "length", (-0.5, -0.5))
    trajectories = [Trajectory.from_completion(Prompt(0, "p", (1,)), completion, 0, Score(r)) for r in (0.0, 1.0)]
    axes = {"kl_coef": 0.0, "updates_per_rollout": 1, "epochs": 1}
    algorithm = algorithms.load({"name": name, "truncated": "mask", **axes})
    batch = pack([replace(t, baseline=0.5) for t in trajectories], mask_truncated=True)
    batch = algorithm.advantages(batch.replace(values=torch.ones(6)))
    (step,) = algorithm.minibatches(batch, 2)
    nothing = torch.zeros(0, requires_grad=True)
    loss, _ = algorithm.policy_loss(nothing, nothing, step, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0 and torch.isfinite(batch.column("advantages")).all()
