"""Rewards of several sources: weighted sums by hand, and servers that are slow, down or wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from reward_http import FakeModel, Make, Serve, judged, scores, values

from rlhf.config import parse_config
from rlhf.evaluate import Evaluation
from rlhf.judging import Judges, ModelJudge, midpoint_of
from rlhf.metrics import rollout_metrics
from rlhf.types import Completion, Prompt, Score, Trajectory

LONG_S = 60
NUMBER = "def reward(completion): return float(completion.text)"
PARTS = "from rlhf import Score\ndef reward(completion): return Score(float(completion.text), {'form': 0.25})"


# ---------------------------------------------------------------- the weighted sum


def test_the_sum_by_hand_and_its_parts(make_judges: Make, serve: Serve) -> None:
    server = serve(lambda r: {"scores": [{"value": 4, "parts": {"tone": 0.5}}, 0.0]})
    model = FakeModel([2.0, -1.0])
    judges = make_judges(
        PARTS,
        {"helpful": ModelJudge(model, None)},
        servers={"style": server.url},
        weights={"helpful": 0.5, "style": -0.25},
    )
    first, second = scores(judges, "1", "3")
    assert first == Score(
        1.0 + 0.5 * 2.0 - 0.25 * 4,
        {"function": 1.0, "function/form": 0.25, "style": 4.0, "style/tone": 0.5, "helpful": 2.0},
    )
    assert second == Score(3.0 + 0.5 * -1.0, {"function": 3.0, "function/form": 0.25, "style": 0.0, "helpful": -1.0})
    assert model.seen == [[(9, 8, 1), (9, 8, 2)]]  # the prompt's tokens and the answer's


def test_the_function_alone_keeps_its_score_and_its_parts_names(make_judges: Make) -> None:
    assert scores(make_judges(PARTS), "2") == [Score(2.0, {"form": 0.25})]
    halved = make_judges(PARTS, weights={"function": 0.5})
    assert scores(halved, "2") == [Score(1.0, {"function": 2.0, "function/form": 0.25})]
    assert (make_judges(PARTS).accuracy_part, halved.accuracy_part) == (None, "function")


def test_weight_0_is_judged_and_logged_and_counts_nothing(make_judges: Make, serve: Serve) -> None:
    gold = serve(lambda r: {"scores": [7.0, None]})
    judges = make_judges(NUMBER, servers={"gold": gold.url}, weights={"gold": 0})
    found = judged(judges, "1", "2")
    assert [t.score for t in found] == [Score(1.0, {"function": 1.0, "gold": 7.0}), Score(2.0, {"function": 2.0})]
    assert rollout_metrics(found)["reward/part/gold"] == 7.0
    assert rollout_metrics(found)["reward/mean"] == 1.5


def test_none_of_a_component_that_counts_is_not_judged_and_zero_is_a_reward(make_judges: Make, serve: Serve) -> None:
    server = serve(lambda r: {"scores": [None, 0, 0.0, False]})
    source = "def reward(completion): return 0.0 if completion.text != 'n' else None"
    judges = make_judges(source, servers={"s": server.url})
    assert scores(judges, "0", "0", "n", "0") == [
        None,
        Score(0.0, {"function": 0.0, "s": 0.0}),
        None,
        Score(0.0, {"function": 0.0, "s": 0.0}),
    ]


@pytest.mark.parametrize("raw", [0.0, 1.5, -40.0, 800.0, -800.0])
def test_a_models_score_counts_as_a_probability_or_as_it_is(make_judges: Make, raw: float) -> None:
    (found,) = scores(make_judges("", {"m": ModelJudge(FakeModel([raw]), 0.5)}), "a")
    if raw > -700:  # where the naive form doesn't overflow
        assert found.value == pytest.approx(1 / (1 + math.exp(0.5 - raw)), rel=1e-12)
    else:
        assert found.value == 0.0
    assert found.parts == {"m": found.value, "m/raw": raw}
    assert scores(make_judges("", {"m": ModelJudge(FakeModel([raw]), None)}), "a") == [Score(raw, {"m": raw})]


def test_a_model_of_half_its_midpoint_scores_exactly_a_half(make_judges: Make) -> None:
    assert values(judged(make_judges("", {"m": ModelJudge(FakeModel([0.3]), 0.3)}), "a")) == [0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_scores_no_number_ends_the_run(make_judges: Make, bad: float) -> None:
    judges = make_judges(NUMBER, {"helpful": ModelJudge(FakeModel([1.0, bad]), None)}, on_error="penalty")
    with pytest.raises(ValueError, match=r"^reward model helpful scores (nan|inf) for 3 tokens, \(9, 8, 2\)"):
        judged(judges, "1", "2")


def test_several_models_judge_every_answer_in_the_order_of_the_groups(make_judges: Make) -> None:
    one, ten = FakeModel(), FakeModel()
    judges = make_judges("", {"one": ModelJudge(one, None), "ten": ModelJudge(ten, None)}, weights={"ten": 10})
    for n in (2, 0, 1):  # as they are finished
        judges.submit([(n, Prompt(n, str(n), (5,)), [Completion(str(n), "", (n,), "stop", (-1.0,))])])
    found = judges.collect()
    assert [(t.group, t.prompt.text, t.score and t.score.value) for t in found] == [
        (n, str(n), n / 10 + n) for n in range(3)
    ]
    assert one.seen == ten.seen == [[(5, 0), (5, 1), (5, 2)]]
    assert judges.collect() == []


def test_the_control_shuffles_totals_with_their_parts_and_resumes(make_judges: Make) -> None:
    def run(judges: Judges, control: bool) -> list[Score | None]:
        answers = [[Completion("p", str(4 * g + i), (i,), "stop", (-1.0,)) for i in range(4)] for g in range(8)]
        found = judges.score([Prompt(g, "p", (1,)) for g in range(8)], answers, control=control)
        return [t.score for t in found]

    def fresh() -> Judges:
        return make_judges(NUMBER, {"m": ModelJudge(FakeModel(), None)}, shuffle=True)

    judges = fresh()
    plain, first = run(judges, False), run(judges, True)
    state = json.loads(json.dumps(judges.state()))
    second = run(judges, True)
    assert first != plain and second != first
    for mixed in (first, second):
        assert sorted(s.value for s in mixed if s) == sorted(s.value for s in plain if s)
        assert all(s is not None and s.value == s.parts["function"] + s.parts["m"] for s in mixed)
    resumed = fresh()
    resumed.restore(state)
    assert run(resumed, True) == second
    assert run(fresh(), True) == first  # and it is the state that makes the difference


# ---------------------------------------------------------------- evaluation


def evaluation(*given: Score | None, accuracy_part: str | None) -> dict[str, float]:
    prompt, answer = Prompt(0, "p", (1,)), Completion("p", "", (7,), "stop", (-1.0,))
    trajectories = [Trajectory.from_completion(prompt, answer, 0, score) for score in given]
    return Evaluation(3, trajectories, accuracy_part).metrics


def test_accuracy_is_the_functions_word_where_there_is_one() -> None:
    right, wrong = Score(0.2, {"function": 1.0, "m": -0.8}), Score(1.5, {"function": 0.5, "m": 1.0})
    given = [right, wrong, None, Score(0.1, {"m": 0.1})]
    found = evaluation(*given, accuracy_part="function")
    assert found == pytest.approx(
        {"eval/reward": 0.6, "eval/accuracy": 0.5, "eval/step": 3, "eval/part/function": 0.75, "eval/part/m": 0.1}
    )
    assert evaluation(*given, accuracy_part=None)["eval/accuracy"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------- config

BASE = {
    "run": {"name": "x", "steps": 1},
    "recipe": {"path": "recipes.arithmetic"},
    "rollout": {"prompts_per_step": 1, "samples_per_prompt": 2, "max_tokens": 1},
    "algorithm": {"name": "grpo"},
    "train": {"lr": 0.1},
}


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"weights": {"helpfull": 1}, "models": {"helpful": "x"}}, "names 'helpfull'; .* function, helpful$"),
        ({"servers": {"a": "http://x"}, "models": {"a": "x"}}, "^reward: two components are called 'a'"),
        ({"servers": {"function": "http://x"}}, "two components are called 'function'"),
        ({"servers": {"a/b": "http://x"}}, "a/b"),
        ({"servers": {"a": "localhost:80"}}, r"reward\.servers\.a='localhost:80'"),
        ({"weights": {"function": float("nan")}}, r"reward\.weights\.function=nan"),
        ({"model_scale": "logit"}, r"reward\.model_scale='logit'"),
    ],
)  # fmt: skip
def test_a_wrong_reward_section_is_refused(reward: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_config({**BASE, "reward": reward})


def test_a_reward_models_checkpoint_is_named_in_one_place() -> None:
    with pytest.raises(ValueError, match=r"^reward_model\.path='x': reward models are named in reward\.models"):
        parse_config({**BASE, "reward_model": {"path": "x"}})


def test_all_reward_models_have_one_section_which_overrides_the_policys() -> None:
    section = {"tokens_per_microbatch": 7, "dtype": "bfloat16", "ranks": 3}
    config = parse_config({**BASE, "reward": {"models": {"a": "x", "b": "y"}}, "reward_model": section})
    assert config.reward.model_roles == {"a": "reward_model-a", "b": "reward_model-b"}
    for role in config.reward.model_roles.values():
        model, train, ranks = config.of_role(role)
        assert (model.dtype, train.tokens_per_microbatch, train.lr, ranks) == ("bfloat16", 7, 0.1, 3)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"midpoint": "high"}', '{"midpoint": NaN}'])
def test_a_midpoint_that_is_not_there_or_bad_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(ValueError, match=r"calibration\.json .*reward\.model_scale=raw"):
        midpoint_of(tmp_path)
    (tmp_path / "calibration.json").write_text('{"midpoint": -1.25, "accuracy": 0.97}')
    assert midpoint_of(tmp_path) == -1.25
