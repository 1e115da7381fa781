"""Reward servers on the loopback that are slow, down or wrong: each gets its treatment, and the step isn't lost."""

from __future__ import annotations

import threading
from datetime import date
from typing import Any

import pytest
from reward_http import Make, Serve, judged, numbers, scores, values

from rlhf.cluster.worker import free_port
from rlhf.metrics import rollout_metrics
from rlhf.reward_server import RewardServer
from rlhf.types import Completion, Prompt, Score

LONG_S = 60
NUMBER = "def reward(completion): return float(completion.text)"


def test_a_server_is_told_the_group_and_asked_once(make_judges: Make, serve: Serve) -> None:
    server = serve(numbers)
    assert values(judged(make_judges("", servers={"s": server.url}), "1", "2.5")) == [1.0, 2.5]
    assert server.requests == [
        {
            "prompt": "p",
            "messages": [],
            "columns": {"answer": "42"},
            "completions": [
                {"text": "1", "token_ids": [1], "finish_reason": "stop"},
                {"text": "2.5", "token_ids": [2], "finish_reason": "stop"},
            ],
        }
    ]


def test_a_server_sees_the_conversation_and_columns_that_json_does_not_know(make_judges: Make, serve: Serve) -> None:
    server = serve(lambda r: {"scores": [1.0]})
    asked = {"role": "user", "content": "hi"}
    prompt = Prompt(0, "rendered", (1,), {"day": date(2026, 1, 2)}, (asked,))
    make_judges("", servers={"s": server.url}).score([prompt], [[Completion("rendered", "x", (7,), "stop", (-1.0,))]])
    (request,) = server.requests
    assert (request["messages"], request["columns"]) == ([asked], {"day": "2026-01-02"})


WRONG = {
    "status": ((503, "overloaded"), "returned status 503: 'overloaded'"),
    "redirect": ((302, ""), "returned status 302"),
    "html": ((200, "<html>"), "returned what is no JSON: '<html>'"),
    "no scores": (
        {"score": [1, 1]},
        r"returned '\{\"score\".*for 2 answers it must return \{\"scores\": \[...\]\} with 2",
    ),
    "list": ([1, 1], "for 2 answers it must return"),
    "short": ({"scores": [1]}, "for 2 answers it must return"),
    "long": ({"scores": [1, 1, 1]}, "for 2 answers it must return"),
    "number": ({"scores": 2}, "for 2 answers it must return"),
}


@pytest.mark.parametrize(("answer", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_named_or_penalised(make_judges: Make, serve: Serve, answer: Any, said: str) -> None:
    server = serve(lambda r: answer)
    title = rf"^reward server s \({server.url}\) "
    with pytest.raises(ValueError, match=rf"(?s){title}.*{said}.*for prompt 'p' and answer '1'.*on_error=penalty$"):
        judged(make_judges(NUMBER, servers={"s": server.url}), "1", "2")
    judges = make_judges(NUMBER, servers={"s": server.url}, on_error="penalty", penalty=-2.0, weights={"s": 0.5})
    found = judged(judges, "1", "2")
    assert [t.score for t in found] == [
        Score(1.0 - 1.0, {"function": 1.0, "s": -2.0}),
        Score(2.0 - 1.0, {"function": 2.0, "s": -2.0}),
    ]
    assert rollout_metrics(found)["reward/errors"] == 2
    assert all(t.problem and t.problem.message.startswith("reward server s (http") for t in found)


@pytest.mark.parametrize(
    "bad",
    ["NaN", "Infinity", "1e999", "1" + "0" * 400, '"good"', '"0.5"', "[1.0]", "{}", '{"value": null}',
     '{"value": NaN}', '{"value": 1, "parts": {"a": NaN}}', '{"value": 1, "parts": [1]}', '{"value": 1, "part": {}}'],
)  # fmt: skip
def test_one_bad_score_costs_its_answer_alone(make_judges: Make, serve: Serve, bad: str) -> None:
    server = serve(lambda r: (200, f'{{"scores": [1.0, {bad}, {{"value": 2, "parts": null}}]}}'))
    with pytest.raises(ValueError, match=r"(?s)^reward server s .*returned.* and answer 'b'"):
        judged(make_judges("", servers={"s": server.url}), "a", "b", "c")
    found = judged(make_judges("", servers={"s": server.url}, on_error="penalty", penalty=-1), "a", "b", "c")
    assert values(found) == [1.0, -1.0, 2.0]
    assert [t.problem is None for t in found] == [True, False, True]


@pytest.mark.parametrize("way", ["says nothing", "never ends"])
def test_a_slow_server_is_given_up_and_the_step_is_not_lost(make_judges: Make, serve: Serve, way: str) -> None:
    go = threading.Event()

    def slow(request: dict[str, Any]) -> Any:
        if request["prompt"] == "slow" and way == "never ends":
            return 200, (" " for _ in iter(lambda: go.wait(0.05), True))
        if request["prompt"] == "slow":
            assert go.wait(LONG_S)
        return numbers(request)

    server = serve(slow)
    prompts = [Prompt(0, "slow", (1,)), Prompt(1, "fast", (1,))]
    answers = [[Completion(p.text, "1", (7,), "stop", (-1.0,))] * 2 for p in prompts]
    try:
        judges = make_judges(NUMBER, servers={"s": server.url}, timeout_s=1, on_error="penalty", penalty=-3)
        for _ in range(2):  # the next step finds the server's caller whole
            found = judges.score(prompts, answers)
            assert values(found) == [-2.0, -2.0, 2.0, 2.0]
            assert rollout_metrics(found)["reward/timeouts"] == 2 and rollout_metrics(found)["reward/errors"] == 0
        judges = make_judges(NUMBER, servers={"s": server.url}, timeout_s=1)
        with pytest.raises(ValueError, match=rf"^reward server s \({server.url}\) did not return within 1 s, for"):
            judges.score(prompts, answers)
    finally:
        go.set()


def test_a_server_that_is_down_is_named_or_penalised(make_judges: Make, serve: Serve) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ValueError, match=rf"^reward server s \({url}\) gave no answer: ConnectError .*for prompt 'p'"):
        judged(make_judges(NUMBER, servers={"s": url}), "1")
    found = judged(make_judges(NUMBER, servers={"s": url}, on_error="penalty", penalty=-1), "1")
    assert (values(found), rollout_metrics(found)["reward/errors"]) == ([0.0], 1)


def test_a_server_that_hangs_up_is_asked_again_but_not_for_ever(make_judges: Make, serve: Serve) -> None:
    server = serve(numbers, hang_up=2)
    assert values(judged(make_judges("", servers={"s": server.url}), "4")) == [4.0]
    assert len(server.requests) == 3
    server = serve(numbers, hang_up=3)
    with pytest.raises(ValueError, match=r"^reward server s .*gave no answer: RemoteProtocolError"):
        judged(make_judges("", servers={"s": server.url}), "4")
    assert len(server.requests) == 3


def test_a_server_that_comes_back_is_used_again(make_judges: Make, serve: Serve) -> None:
    """Nothing of a failed step stays, and no connection of an earlier step is relied upon."""
    state = {"up": True}
    server = serve(lambda r: numbers(r) if state["up"] else (500, ""))
    judges = make_judges("", servers={"s": server.url}, on_error="penalty", penalty=-1)
    seen = []
    for up in (True, False, True):
        state["up"] = up
        seen += values(judged(judges, "4"))
    assert seen == [4.0, -1.0, 4.0]


def test_a_function_that_hangs_does_not_hold_up_the_server(make_judges: Make, serve: Serve) -> None:
    server = serve(numbers)
    source = "import threading\nGO = threading.Event()\ndef reward(completion): GO.wait(60); return 1.0"
    section = {"servers": {"s": server.url}, "timeout_s": 0.5, "on_error": "penalty", "penalty": -1, "concurrency": 1}
    judges = make_judges(source, **section)
    try:
        assert scores(judges, "4", "5") == [Score(v - 1, {"function": -1.0, "s": v}) for v in (4.0, 5.0)]
    finally:
        judges.function.recipe.module.GO.set()


@pytest.mark.parametrize(
    ("answer", "said"),
    [((500, "no"), "returned status 500: 'no', for an empty answer"), ({"scores": []}, "for 1 answers it must return")],
)
def test_the_check_at_start_names_a_server_that_is_wrong(serve: Serve, answer: Any, said: str) -> None:
    server = serve(lambda r: answer)
    with pytest.raises(ValueError, match=rf"(?s)^reward server s \({server.url}\) .*{said}"):
        RewardServer("s", server.url).check(Prompt(0, "p", (1,)), LONG_S)


def test_the_check_at_start_accepts_any_proper_answer(serve: Serve) -> None:
    for score in (0.0, None, {"value": 1.5}):
        RewardServer("s", serve(lambda r, score=score: {"scores": [score]}).url).check(Prompt(0, "p", (1,)), LONG_S)
