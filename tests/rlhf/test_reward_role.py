"""Rewards in the background: they overlap with the caller, keep their order; one that fails is named or penalised."""

from __future__ import annotations

import gc
import logging
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import calls
from rlhf.config import Reward
from rlhf.judging import Judges
from rlhf.metrics import rollout_metrics
from rlhf.roles.reward import RewardFunction
from rlhf.types import Completion, Problem, Prompt, Score, Trajectory

LONG_S = 60  # nothing takes so long unless it hangs
HEAD = """
import asyncio, sys, threading, time
from rlhf import Score
GO, STARTED, LOCK = threading.Event(), threading.Event(), threading.Lock()
under_way = most = begun = 0

def enter():
    global under_way, most, begun
    with LOCK:
        under_way, begun = under_way + 1, begun + 1
        most = max(most, under_way)
    STARTED.set()

def leave():
    global under_way
    with LOCK:
        under_way -= 1

"""

Make = Callable[..., Judges]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(source, **section)``: judges with the role on a recipe file ``mine.py`` of this source alone."""

    def run(source: str, **settings: Any) -> Judges:
        (tmp_path / "mine.py").write_text(HEAD + source)
        section = Reward(**settings)
        return Judges(section, RewardFunction(recipe=str(tmp_path / "mine.py"), section=section), {}, seed=0)

    return run


def group(*texts: str, name: str = "p") -> tuple[Prompt, list[Completion]]:
    answers = [Completion(name, text, (7,), "stop", (-1.0,)) for text in texts]
    return Prompt(0, name, (1,), {"answer": "42"}), answers


def values(found: list[Trajectory]) -> list[float | None]:
    return [t.score.value if t.score else None for t in found]


def module(role: Judges) -> Any:
    return role.function.recipe.module


WAITS = {
    "def": (
        "def reward(completion):\n    enter()\n    assert GO.wait(60)\n    leave()\n    return float(completion.text)"
    ),
    "async def": (
        "async def reward(completion):\n    enter()\n    while not GO.is_set():\n        await asyncio.sleep(0.001)\n"
        "    leave()\n    return float(completion.text)"
    ),
}


@pytest.fixture(params=WAITS.values(), ids=WAITS)
def waits(request: pytest.FixtureRequest) -> str:
    """A reward that returns once GO is set."""
    return request.param


# ---------------------------------------------------------------- overlap, bounds and order


def test_submit_returns_while_the_reward_works(make: Make, waits: str) -> None:
    role = make(waits, timeout_s=LONG_S)
    role.submit([(0, *group("1", "2"))])
    assert module(role).STARTED.wait(LONG_S)  # nobody has called collect
    role.submit([(1, *group("3"))])
    assert not any(call.future.done() for g in role.function.groups for call in g.calls)
    module(role).GO.set()
    assert values(role.collect()) == [1.0, 2.0, 3.0]
    assert role.collect() == []


def test_calls_run_together_but_not_more_than_allowed(make: Make, waits: str) -> None:
    role = make(waits, timeout_s=LONG_S, concurrency=3)
    role.submit([(0, *group(*map(str, range(12))))])
    while module(role).under_way < 3:
        assert module(role).STARTED.wait(LONG_S)
    module(role).GO.set()
    assert values(role.collect()) == list(map(float, range(12)))
    assert (module(role).most, module(role).begun) == (3, 12)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_the_order_is_the_groups_not_that_of_submission_or_of_finishing(make: Make, kind: str) -> None:
    wait = "assert DONE[n + 1].wait(60)" if kind == "def" else "while not DONE[n + 1].is_set(): await asyncio.sleep(0)"
    role = make(
        f"DONE = [threading.Event() for _ in range(4)]\nDONE[3].set()\n{kind} reward(completion):\n"
        f"    n = int(completion.text)\n    {wait}\n    DONE[n].set()\n    return n",
        timeout_s=LONG_S,
    )
    for n in (1, 0, 2):
        role.submit([(n, *group(str(n), name=str(n)))])
    found = role.collect()
    assert [(t.group, t.prompt.text) for t in found] == [(0, "0"), (1, "1"), (2, "2")]
    assert values(found) == [0.0, 1.0, 2.0]


def test_an_async_reward_may_keep_a_client_of_one_loop(make: Make) -> None:
    role = make(
        "seen = set()\nasync def reward(completion):\n    seen.add(id(asyncio.get_running_loop()))\n    return 1"
    )
    for _ in range(3):
        role.score(*([x] for x in group("a", "b")))
    assert len(module(role).seen) == 1


def test_the_reward_sees_the_conversation_with_the_answer(make: Make) -> None:
    role = make("def reward(completion):\n    return len(completion.messages) * (completion.prompt == 'rendered')")
    asked = {"role": "user", "content": "hi"}
    prompt = Prompt(0, "rendered", (1,), {}, (asked,))
    answer = Completion("rendered", "hello", (7,), "stop", (-1.0,))
    assert values(role.score([prompt], [[answer]])) == [2.0]
    role = make("def reward(completion):\n    global last\n    last = completion.messages\n    return 1")
    (found,) = role.score([prompt], [[answer]])
    assert module(role).last == (asked, {"role": "assistant", "content": "hello"})
    assert found.completion is answer  # what goes on to the trainer isn't made heavier


# ---------------------------------------------------------------- what goes wrong


FAILURES = [
    ("import json; json.loads('{')", r"raised JSONDecodeError: .* \(mine\.py, line \d+\)"),
    ("return 1 / 0", r"raised ZeroDivisionError: division by zero \(mine\.py, line \d+\)"),
    ("sys.exit(3)", r"raised \w+: (SystemExit: )?3"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("raise TimeoutError('of its own')", "raised TimeoutError: of its own"),
    ("return float('nan')", "returned nan; rewards and their parts are finite"),
    ("return Score(1.0, {'a': float('inf')})", "returned Score.*finite"),
    ("return 'good'", "returned 'good'; it must return a number"),
    ("return Score(1.0, None)", "it must return a number, a Score or None"),
]


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize(("body", "said"), FAILURES)
def test_a_failing_reward_is_named_or_penalised(make: Make, kind: str, body: str, said: str) -> None:
    source = f"{kind} reward(completion):\n    if completion.text != 'bad':\n        return 1.0\n    {body}"
    role = make(source)
    with pytest.raises(ValueError, match=rf"(?s)^reward\(\) .*{said}.*, for prompt 'p' and answer 'bad'\. .*penalty$"):
        role.score(*([x] for x in group("good", "bad")))
    assert values(role.score(*([x] for x in group("good")))) == [1.0]  # the failed step left nothing behind

    role = make(source, on_error="penalty", penalty=-0.5)
    found = role.score(*([x] for x in group("good", "bad", "good")))
    assert values(found) == [1.0, -0.5, 1.0]
    assert [t.problem and t.problem.kind for t in found] == [None, "error", None]
    assert pickle.loads(pickle.dumps(found)) == found
    assert (rollout_metrics(found)["reward/errors"], rollout_metrics(found)["reward/timeouts"]) == (1, 0)


@pytest.mark.parametrize("given", ["[1.0]", "[1.0] * 3", "1.0", "None", "(x for x in '12')"])
def test_a_wrong_count_costs_the_whole_group(make: Make, given: str) -> None:
    source = f"def reward(completions):\n    return {given} if completions[0].prompt == 'bad' else [2.0, None]"
    asked = [group("a", "b"), group("c", "d", name="bad")]
    with pytest.raises(ValueError, match=r"for 2 answers it must return a list of 2 scores, for prompt 'bad'"):
        make(source).score(*zip(*asked, strict=True))
    found = make(source, on_error="penalty", penalty=-1.0).score(*zip(*asked, strict=True))
    assert values(found) == [2.0, None, -1.0, -1.0]
    assert rollout_metrics(found)["reward/errors"] == 2 and rollout_metrics(found)["reward/unjudged"] == 0.25


def test_one_bad_score_of_a_group_costs_its_answer_alone(make: Make) -> None:
    source = "def reward(completions):\n    return [1.0, float('nan'), None]"
    found = make(source, on_error="penalty").score(*([x] for x in group("a", "b", "c")))
    assert values(found) == [1.0, 0.0, None]
    assert [t.problem is None for t in found] == [True, False, True]


HANGS = {
    "def": (
        "def reward(completion):\n    if completion.text == 'hang':\n        enter()\n        GO.wait(60)\n"
        "    return 1.0"
    ),
    "async def": (
        "async def reward(completion):\n    while completion.text == 'hang' and not GO.is_set():\n"
        "        enter()\n        await asyncio.sleep(1)\n    return 1.0"
    ),
    "swallows its cancellation": (
        "async def reward(completion):\n    while completion.text == 'hang' and not GO.is_set():\n"
        "        enter()\n        try:\n            await asyncio.sleep(0.01)\n"
        "        except asyncio.CancelledError:\n            pass\n    return 1.0"
    ),
}


@pytest.mark.parametrize("source", HANGS.values(), ids=HANGS)
def test_a_hanging_reward_is_given_up_and_the_others_judged(make: Make, source: str) -> None:
    texts = ["a", "hang", "b", "hang", "hang", "c"]
    role = make(source, timeout_s=0.3, on_error="penalty", penalty=-2.0, concurrency=2)
    for n in range(2):  # the second step finds whole threads
        role.submit([(0, *group(*texts))])
        found = role.collect()
        assert values(found) == [1.0, -2.0, 1.0, -2.0, -2.0, 1.0], n
        assert rollout_metrics(found)["reward/timeouts"] == 3
    module(role).GO.set()
    assert values(role.score(*([x] for x in group("a", "hang")))) == [1.0, 1.0]

    role = make(source, timeout_s=0.3)
    try:
        said = r"^reward\(\) did not return within 0\.3 s.*for prompt 'p' and answer 'hang'"
        with pytest.raises(ValueError, match=said):
            role.score(*([x] for x in group(*texts)))
    finally:
        module(role).GO.set()


def test_an_async_call_that_is_given_up_is_cancelled(make: Make) -> None:
    role = make(
        "async def reward(completion):\n    try:\n        await asyncio.sleep(60)\n    finally:\n        GO.set()",
        timeout_s=0.1,
        on_error="penalty",
    )
    assert values(role.score(*([x] for x in group("a")))) == [0.0]
    assert module(role).GO.wait(LONG_S / 2)


def test_an_async_reward_that_blocks_its_loop_is_given_up_with_the_loop(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "BLOCKED_S", 0.2)
    source = "async " + HANGS["def"]
    role = make(source, timeout_s=0.3, on_error="penalty", penalty=-2.0, concurrency=1)
    for n in range(2):
        assert values(role.score(*([x] for x in group("a", "hang", "b", "hang", "c")))) == [
            1.0,
            -2.0,
            1.0,
            -2.0,
            1.0,
        ], n
    module(role).GO.set()
    assert values(role.score(*([x] for x in group("a", "hang")))) == [1.0, 1.0]
    assert module(role).begun == 5  # none was called twice
    role = make(source, timeout_s=0.3)
    try:
        with pytest.raises(ValueError, match=r"did not return within 0\.3 s: .*blocks the event loop; await"):
            role.score(*([x] for x in group("hang")))
    finally:
        module(role).GO.set()


def test_a_failure_does_not_wait_for_what_hangs(make: Make) -> None:
    role = make(HANGS["def"] + " / (completion.text != 'bad')", timeout_s=LONG_S)
    with pytest.raises(ValueError, match=r"ZeroDivisionError.*answer 'bad'"):
        role.score(*([x] for x in group("hang", "a", "bad")))
    assert module(role).begun == 1 and not module(role).GO.is_set()
    module(role).GO.set()


def test_a_thread_that_was_left_behind_ends_when_it_wakes(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    role = make(HANGS["def"], timeout_s=0.2, on_error="penalty", concurrency=1)
    caller = role.function.callers["function"]
    assert isinstance(caller, calls.Threads)
    (hung,) = caller.workers
    with caplog.at_level(logging.WARNING):
        assert values(role.score(*([x] for x in group("hang", "a")))) == [0.0, 1.0]
    assert "a call hangs; its thread is left behind" in caplog.text
    assert "1 of 2 answers score the penalty 0: reward() did not return within 0.2 s" in caplog.text
    assert hung.is_alive() and hung is not caller.workers[0]
    module(role).GO.set()
    hung.join(LONG_S)
    assert not hung.is_alive()


def test_too_many_hanging_calls_end_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MAX_HUNG", 3)
    role = make(HANGS["def"], timeout_s=0.05, on_error="penalty")
    try:
        with pytest.raises(ValueError, match="3 calls of the function hang"):
            role.score(*([x] for x in group(*["hang"] * 20)))
    finally:
        module(role).GO.set()


@pytest.mark.parametrize("source", [HANGS["def"], "async " + HANGS["def"]], ids=["def", "async def"])
def test_what_hangs_does_not_keep_the_process_alive(tmp_path: Path, source: str) -> None:
    (tmp_path / "mine.py").write_text(HEAD + source.replace("60", "3600"))
    code = (
        "from rlhf.config import Reward\nfrom rlhf.roles.reward import RewardFunction\n"
        "from rlhf.types import Completion, Prompt\n"
        f"role = RewardFunction(recipe={str(tmp_path / 'mine.py')!r}, section=Reward())\n"
        "role.submit([(0, Prompt(0, 'p', (1,)), [Completion('p', 'hang', (), 'stop')])])\n"
        "assert role.recipe.module.STARTED.wait(60)\nprint('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_role_that_is_dropped_takes_its_threads_along(make: Make, kind: str) -> None:
    before = set(threading.enumerate())
    role = make(f"{kind} reward(completion): return 1.0")
    role.score(*([x] for x in group("a")))
    started = set(threading.enumerate()) - before
    assert started
    del role
    gc.collect()
    for thread in started:
        thread.join(LONG_S)
        assert not thread.is_alive()


# ---------------------------------------------------------------- against the plain loop

OUTCOMES = ["0.25", "1", "None", "1/0", "float('nan')", "Score(0.5, {'mean': 9.0})", "'text'"]


def plain(expression: str) -> Score | Problem | None:
    """What an answer with this expression for a reward is worth."""
    if expression in ("1/0", "float('nan')", "'text'"):
        return Problem("error", "")
    value = eval(expression, {"Score": Score})
    return value if value is None or isinstance(value, Score) else Score(float(value))


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_any_step_is_judged_as_a_plain_loop_would(make: Make, kind: str) -> None:
    role = make(f"{kind} reward(completion): return eval(completion.text)", on_error="penalty", penalty=-3.0)
    texts = st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=4)
    steps = st.lists(texts, min_size=1, max_size=5).flatmap(
        lambda groups: st.tuples(st.just(groups), st.permutations(range(len(groups))))
    )

    @settings(max_examples=40, deadline=None)
    @given(steps)
    def check(step: tuple[list[list[str]], list[int]]) -> None:
        groups, order = step
        for n in order:
            role.submit([(n, *group(*groups[n]))])
        found = role.collect()
        flat = [(n, text) for n, texts in enumerate(groups) for text in texts]
        assert [(t.group, t.completion.text) for t in found] == flat
        wanted = [plain(text) for _, text in flat]
        assert [t.score for t in found] == [Score(-3.0) if isinstance(w, Problem) else w for w in wanted]
        metrics = rollout_metrics(found)
        assert metrics["reward/errors"] == sum(isinstance(w, Problem) for w in wanted)
        judged = [t.score.value for t in found if t.score]
        assert metrics["reward/mean"] == pytest.approx(sum(judged) / max(1, len(judged)))  # a part is called mean

    check()
