"""Where a step's answers come from: dynamic sampling and its surplus, greedy baselines, what length costs."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from rlhf import algorithms
from rlhf.config import Config, parse_config
from rlhf.packing import pack
from rlhf.rollouts import FIRST_GREEDY_ID, Rollouts
from rlhf.types import Completion, Problem, Prompt, Score, Trajectory
from rollout_engine import SamplingParams

NUM_PROMPTS, PER_STEP, SAMPLES, MAX_TOKENS = 11, 4, 3, 10
PROMPTS = [Prompt(2 * i, f"question {i}", (1, 2 + i), {"row": i}) for i in range(NUM_PROMPTS)]
Call = tuple[list[int], SamplingParams, int]  # prompt indices, how, first sample id


class FakePolicy:
    """Answers with tokens that follow from the sample's number, groups out of order; ``version`` is stamped on them."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.version = 0
        self.yielded = 0

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, first_sample_id: int
    ) -> Iterator[list[tuple[int, list[Completion]]]]:
        self.calls.append(([p.index for p in prompts], params, first_sample_id))
        for group in random.Random(first_sample_id).sample(range(len(prompts)), len(prompts)):
            answers = []
            for j in range(params.n):
                number = first_sample_id + group * params.n + j
                rng = random.Random(number)
                tokens = tuple(rng.randrange(50) for _ in range(rng.randint(1, MAX_TOKENS)))
                noise = tuple(-rng.random() for _ in tokens)
                kept = tuple(-rng.random() / 9 for _ in tokens)
                versions, prompt = (self.version,) * len(tokens), prompts[group].text
                answers.append(
                    Completion(prompt, str(tokens), tokens, "stop", noise, versions, number, 0.9, log_kept_mass=kept)
                )
            self.yielded += 1
            yield [(group, answers)]


class FakeReward:
    """Judges by a rule of (prompt, sample id); in the order of the groups, as the role does."""

    def __init__(self, rule: Any, policy: FakePolicy) -> None:
        self.rule = rule
        self.policy = policy
        self.submitted: list[tuple[int, Prompt, list[Completion]]] = []
        self.yielded: list[int] = []  # by the policy, at each submit

    def submit(self, finished: Any) -> None:
        self.submitted += finished
        self.yielded.append(self.policy.yielded)

    def collect(self, *, control: bool = False) -> list[Trajectory]:
        assert control
        groups, self.submitted = sorted(self.submitted, key=lambda item: item[0]), []
        result = []
        for group, prompt, answers in groups:
            for answer in answers:
                score = self.rule(prompt, answer)
                problem = Problem("timeout", "late") if score is not None and score.value == -3.0 else None
                result.append(Trajectory.from_completion(prompt, answer, group, score, problem))
        return result


def configured(**algorithm: Any) -> Config:
    rollout = {"prompts_per_step": PER_STEP, "samples_per_prompt": SAMPLES, "max_tokens": MAX_TOKENS, "top_p": 0.9}
    return parse_config(
        {
            "run": {"name": "x", "steps": 1, "seed": 5},
            "recipe": {"path": "recipes.arithmetic"},
            "rollout": rollout,
            "algorithm": {"name": "dapo", "overlong_buffer": 0.0, **algorithm},
            "train": {"lr": 1e-3},
        }
    )


def made(rule: Any, **algorithm: Any) -> tuple[Rollouts, FakePolicy]:
    """Rollouts over the fakes."""
    config, policy = configured(**algorithm), FakePolicy()
    reward: Any = FakeReward(rule, policy)
    rollouts = Rollouts(config, config.make_algorithm(), policy, reward, PROMPTS)  # type: ignore[arg-type]
    return rollouts, policy


@contextmanager
def phase(name: str) -> Iterator[None]:
    assert name in ("generate", "reward")
    yield


def uneven_when(teaches: Any) -> Any:
    """Rewards 0, 1, 2, ... of a group whose prompt teaches at this sample number, else 0.5 for all."""

    def rule(prompt: Prompt, answer: Completion) -> Score:
        place = answer.sample_id // SAMPLES
        return Score(float(answer.sample_id % SAMPLES) if teaches(prompt, place) else 0.5)

    return rule


def places(trajectories: Sequence[Trajectory]) -> list[int]:
    """Of each group, how many prompts were handed out before its own; checks that groups are whole and numbered."""
    groups = [list(g) for _, g in itertools.groupby(trajectories, key=lambda t: t.group)]
    assert [g[0].group for g in groups] == list(range(len(groups)))
    for group in groups:
        ids = [t.completion.sample_id for t in group]
        assert ids == list(range(ids[0], ids[0] + SAMPLES)) and ids[0] % SAMPLES == 0
        assert {t.prompt.index for t in group} == {group[0].prompt.index}
    return [g[0].completion.sample_id // SAMPLES for g in groups]


# ---------------------------------------------------------------- one round per step


def test_without_dynamic_sampling_a_step_is_one_round_flat_or_not() -> None:
    rollouts, policy = made(uneven_when(lambda prompt, place: place == 2), name="grpo", tis_clip=2.0)
    assert [places(rollouts.take(phase)) for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [first for _, _, first in policy.calls] == [0, 12, 24] and rollouts.metrics == {}
    (_, params, _), *_ = policy.calls
    assert (params.n, params.top_p, params.temperature, params.max_tokens) == (SAMPLES, 0.9, 1.0, MAX_TOKENS)
    assert sorted(policy.calls[0][0] + policy.calls[1][0] + policy.calls[2][0][:3]) == [p.index for p in PROMPTS]


@pytest.mark.parametrize(("name", "answered"), [("grpo", 4), ("remax", 8)])
def test_answers_are_judged_as_they_finish_and_not_when_all_have(name: str, answered: int) -> None:
    rollouts, _ = made(uneven_when(lambda prompt, place: True), name=name, tis_clip=2.0)
    rollouts.take(phase)
    assert rollouts.reward.yielded == list(range(1, answered + 1))


# ---------------------------------------------------------------- dynamic sampling


def test_flat_groups_are_replaced_and_the_surplus_comes_first_in_the_next_step() -> None:
    """Prompts 0, 2, 3, 5, 6, 7, 9, ... (by order of asking) teach; 1, 4, 8 and 13 don't."""
    rollouts, policy = made(uneven_when(lambda prompt, place: place not in (1, 4, 8, 13)))
    assert places(rollouts.take(phase)) == [0, 2, 3, 5]
    metrics = {"rollout/generated_groups": 8, "rollout/dropped_groups": 2, "rollout/surplus": 2}
    assert rollouts.metrics == metrics
    policy.version = 1
    second = rollouts.take(phase)
    assert places(second) == [6, 7, 9, 10]
    assert [t.completion.weight_versions[0] for t in second] == [0] * 6 + [1] * 6
    assert rollouts.metrics == {"rollout/generated_groups": 4, "rollout/dropped_groups": 1, "rollout/surplus": 1}
    assert places(rollouts.take(phase)) == [11, 12, 14, 15]
    assert rollouts.metrics == {"rollout/generated_groups": 4, "rollout/dropped_groups": 1, "rollout/surplus": 0}
    assert [first for _, _, first in policy.calls] == [0, 12, 24, 36]


def test_versions_reach_the_batch_token_by_token() -> None:
    rollouts, policy = made(uneven_when(lambda prompt, place: place not in (1, 4)))
    rollouts.take(phase)
    policy.version = 7
    trajectories = rollouts.take(phase)
    batch = pack(trajectories)
    expected = [v for t in trajectories for v in (-1, -1, *t.completion.weight_versions)]
    assert batch.weight_versions is not None and batch.weight_versions.tolist() == expected
    assert {0, 7} <= set(expected)


def test_rounds_are_bounded_and_a_step_may_have_fewer_groups(caplog: pytest.LogCaptureFixture) -> None:
    rollouts, policy = made(uneven_when(lambda prompt, place: place in (3, 5, 30)), max_rollouts_per_step=3)
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert places(rollouts.take(phase)) == [3, 5]
    assert "2 of 4 prompts" in caplog.text and "after 3 rounds" in caplog.text
    assert len(policy.calls) == 3
    assert rollouts.metrics == {"rollout/generated_groups": 12, "rollout/dropped_groups": 10, "rollout/surplus": 0}


def test_a_step_without_any_uneven_group_has_the_last_rounds_and_learns_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rollouts, _ = made(uneven_when(lambda prompt, place: False), max_rollouts_per_step=2)
    with caplog.at_level(logging.WARNING, "rlhf"):
        flat = rollouts.take(phase)
    assert places(flat) == [4, 5, 6, 7] and "nothing to learn from" in caplog.text
    batch = algorithms.load({"name": "dapo"}).advantages(pack(flat))
    assert batch.column("advantages").tolist() == [0.0] * batch.num_tokens
    assert rollouts.metrics["rollout/surplus"] == 0 and rollouts.surplus == []


def test_unjudged_answers_count_for_nothing() -> None:
    """Of group 0 one answer was judged, of group 1 two unequal ones, of group 2 none; equal ones differ by nothing."""
    rewards: dict[int, list[float | None]] = {
        0: [1.0, None, None],
        1: [None, 0.0, 1.0],
        2: [None] * 3,
        3: [0.0, 0.0, 0.0],
    }

    def rule(prompt: Prompt, answer: Completion) -> Score | None:
        place, j = divmod(answer.sample_id, SAMPLES)
        value = rewards.get(place, [0.0, 1.0, 2.0])[j]
        return None if value is None else Score(value)

    rollouts, _ = made(rule)
    assert places(rollouts.take(phase)) == [1, 4, 5, 6]
    assert rollouts.metrics["rollout/dropped_groups"] == 3


def random_rule(prompt: Prompt, answer: Completion) -> Score | None:
    rng = random.Random(answer.sample_id)
    if rng.random() < 0.1:
        return None
    if rng.random() < 0.1:
        return Score(-3.0)  # the penalty for a problem
    flat = random.Random(answer.sample_id // SAMPLES).random() < 0.5
    return Score(0.1 if flat else rng.random(), {"third": 1 / 3})


@pytest.mark.parametrize("axes", [{}, {"name": "remax", "dynamic_sampling": True, "tis_clip": 2.0}], ids=str)
@pytest.mark.parametrize("cut", range(6))
def test_restored_rollouts_go_on_bitwise_with_the_surplus(cut: int, axes: dict[str, Any]) -> None:
    """Through JSON, as a checkpoint on disk holds it."""
    straight, policy = made(random_rule, overlong_buffer=0.5, **axes)
    expected, surplus = [], []
    for step in range(8):
        policy.version = step
        expected.append(straight.take(phase))
        surplus.append(len(straight.surplus))
        if step == cut:
            state = json.loads(json.dumps(straight.state()))
    assert max(surplus[:6]) > 0
    resumed, policy = made(random_rule, overlong_buffer=0.5, **axes)
    resumed.restore(state)
    assert json.loads(json.dumps(resumed.state())) == state and len(resumed.surplus) == surplus[cut]
    for step in range(cut + 1, 8):
        policy.version = step
        got = resumed.take(phase)
        assert got == expected[step]
        ours, theirs = pack(got), pack(expected[step])
        assert torch.equal(ours.rollout_logprobs, theirs.rollout_logprobs)
        assert torch.equal(ours.column("log_kept_mass"), theirs.column("log_kept_mass"))
    assert resumed.state() == straight.state()


def test_sample_numbers_are_never_used_twice() -> None:
    rollouts, _ = made(random_rule)
    numbers = [t.completion.sample_id for _ in range(10) for t in rollouts.take(phase)]
    assert len(set(numbers)) == len(numbers)


# ---------------------------------------------------------------- what length costs


def test_length_costs_reward_as_a_part_and_after_the_choice_of_groups() -> None:
    """At most 10 tokens, the last 4 cost up to 2: half a point each. Equal rewards stay flat whatever the lengths."""
    rollouts, _ = made(
        uneven_when(lambda prompt, place: place % 2 == 0), overlong_buffer=0.4, overlong_penalty=2.0
    )  # fmt: skip
    trajectories = rollouts.take(phase)
    assert places(trajectories) == [0, 2, 4, 6]
    costs = set()
    for t in trajectories:
        cost = 0.5 * max(0, len(t.completion.token_ids) - 6)
        assert t.score is not None and t.score.parts["overlong"] == pytest.approx(-cost)
        assert t.score.value == pytest.approx(t.completion.sample_id % SAMPLES - cost)
        costs.add(cost)
    assert 0.0 in costs and len(costs) > 2


# ---------------------------------------------------------------- greedy baselines


def test_remax_compares_with_the_greedy_answer_to_the_same_prompt() -> None:
    """A greedy answer to prompt i scores i; the sampled ones 10, 11, 12."""

    def rule(prompt: Prompt, answer: Completion) -> Score:
        greedy = answer.sample_id >= FIRST_GREEDY_ID
        return Score(float(prompt.index) if greedy else 10.0 + answer.sample_id % SAMPLES)

    rollouts, policy = made(rule, name="remax", tis_clip=2.0)
    trajectories = rollouts.take(phase)
    assert places(trajectories) == [0, 1, 2, 3]
    assert [t.baseline for t in trajectories] == [float(t.prompt.index) for t in trajectories]
    rollouts.take(phase)
    sampled, greedy, _, later = policy.calls
    assert greedy[0] == sampled[0]
    assert (greedy[1].n, greedy[1].temperature, greedy[1].top_p, greedy[1].max_tokens) == (1, 0, 1.0, MAX_TOKENS)
    assert (greedy[2], later[2]) == (FIRST_GREEDY_ID, FIRST_GREEDY_ID + PER_STEP)
    batch = algorithms.load({"name": "remax"}).advantages(pack(trajectories))
    expected = [10.0 + i % SAMPLES - t.prompt.index for i, t in enumerate(trajectories)]
    parts = zip(batch.column("advantages").split(batch.lengths), trajectories, expected, strict=True)
    for column, t, advantage in parts:
        assert column.tolist() == [0.0, 0.0] + [advantage] * len(t.completion.token_ids)


def test_a_greedy_answer_pays_for_its_length_too() -> None:
    lengths = {}

    def rule(prompt: Prompt, answer: Completion) -> Score:
        if answer.sample_id >= FIRST_GREEDY_ID:
            lengths[prompt.index] = len(answer.token_ids)
        return Score(5.0)

    rollouts, _ = made(rule, name="remax", tis_clip=2.0, overlong_buffer=1.0)
    trajectories = rollouts.take(phase)
    assert len(set(lengths.values())) > 1
    for t in trajectories:
        assert t.baseline == pytest.approx(5.0 - lengths[t.prompt.index] / MAX_TOKENS)


def test_answers_whose_greedy_one_was_not_judged_are_left_out() -> None:
    def rule(prompt: Prompt, answer: Completion) -> Score | None:
        first = answer.sample_id in (FIRST_GREEDY_ID + 1, 2)  # the second prompt's greedy, and a sample of the first
        return None if first else Score(1.0)

    rollouts, _ = made(rule, name="remax", tis_clip=2.0)
    trajectories = rollouts.take(phase)
    assert [t.score is None for t in trajectories] == [False, False, True, *[True] * 3, *[False] * 6]
    assert pack(trajectories).num_sequences == 8
