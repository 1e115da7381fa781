"""Rewards from the recipe's function, which runs in the background while answers are still being sampled."""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf import config
from rlhf.calls import Overdue, make_caller
from rlhf.recipe import Verdict, load_recipe
from rlhf.types import Completion, Problem, Prompt, Score, Trajectory

log = logging.getLogger(__name__)

POLL_S = 0.25  # between looks for calls that hang


@dataclass(frozen=True)
class _Call:
    """A call of ``reward``, and the answers that it judges: one, or a whole group."""

    answers: Sequence[Completion]
    future: Future[Any]


@dataclass(frozen=True)
class _Group:
    index: int
    prompt: Prompt
    calls: list[_Call]


class RewardFunction:
    """Args:
    recipe: module name or .py file with ``reward``. section: what a failure means, timeouts, the control ``shuffle``.
    seed: of the control.
    """

    def __init__(self, *, recipe: str, section: config.Reward, seed: int) -> None:
        self.recipe = load_recipe(recipe)
        self.section = section
        self.random = random.Random(seed)
        self.caller = make_caller(self.recipe.reward, section.timeout_s, section.concurrency)
        self.groups: list[_Group] = []

    def submit(self, finished: Sequence[tuple[int, Prompt, Sequence[Completion]]]) -> None:
        """Start to judge finished groups (number, prompt, answers); returns at once."""
        self.caller.watch()
        for group, prompt, completions in finished:
            self.groups.append(_Group(group, prompt, self._start(prompt, completions)))

    def _start(self, prompt: Prompt, completions: Sequence[Completion]) -> list[_Call]:
        columns = self.recipe.arguments(prompt)
        seen = [_with_messages(prompt, completion) for completion in completions]
        if self.recipe.per_group:
            return [_Call(completions, self.caller.start(partial(self.recipe.reward, seen, **columns)))]
        futures = [self.caller.start(partial(self.recipe.reward, answer, **columns)) for answer in seen]
        return [_Call([answer], future) for answer, future in zip(completions, futures, strict=True)]

    def collect(self, *, control: bool = False) -> list[Trajectory]:
        """Everything submitted since the last time, judged, in the order of the groups.

        Bounded: a call has ``reward.timeout_s`` from its start. ``control`` applies ``reward.shuffle`` (training does,
        evaluation never). Raises ValueError when too many calls hang, and, under ``reward.on_error: fail``, for the
        first one that went wrong.
        """
        groups, self.groups = sorted(self.groups, key=lambda group: group.index), []
        futures = [call.future for group in groups for call in group.calls]
        while not _settled(futures, at_first_failure=self.section.on_error == "fail"):
            self.caller.watch()
        judged = [(group, answer, verdict) for group in groups for answer, verdict in self._verdicts(group)]
        self._report([(group.prompt, answer, v) for group, answer, v in judged if isinstance(v, Problem)], len(judged))
        verdicts = [verdict for _, _, verdict in judged]
        if control and self.section.shuffle:
            self.random.shuffle(verdicts)
        return [
            self._trajectory(group, answer, verdict)
            for (group, answer, _), verdict in zip(judged, verdicts, strict=True)
        ]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], *, control: bool = False
    ) -> list[Trajectory]:
        """Judge the answers to these prompts: :meth:`submit` and :meth:`collect`."""
        self.submit([(group, *pair) for group, pair in enumerate(zip(prompts, completions, strict=True))])
        return self.collect(control=control)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would: the control's random state."""
        return {"random": self.random.getstate()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.random.setstate(state["random"])

    def _verdicts(self, group: _Group) -> Iterator[tuple[Completion, Verdict]]:
        for call in group.calls:
            if not call.future.done():  # another one failed, and under `fail` that is the end
                continue
            error = call.future.exception()
            if error is None:
                verdicts = self.recipe.verdicts(call.future.result(), len(call.answers))
            elif isinstance(error, Overdue):
                verdicts = [Problem("timeout", str(error))] * len(call.answers)
            else:
                verdicts = [Problem("error", f"raised {self._described(error)}")] * len(call.answers)
            yield from zip(call.answers, verdicts, strict=True)

    def _described(self, error: BaseException) -> str:
        """Type and message of an exception, and the recipe's line that it comes from."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == self.recipe.module.__file__]
        place = f" ({Path(str(self.recipe.module.__file__)).name}, line {lines[-1]})" if lines else ""
        return f"{type(error).__name__}: {error}{place}"

    def _report(self, failed: list[tuple[Prompt, Completion, Problem]], count: int) -> None:
        """Raise for the first answer without a reward, or log it."""
        if not failed:
            return
        prompt, answer, problem = failed[0]
        what = f"reward() {problem.message}, for prompt {prompt.question!r:.300} and answer {answer.text!r:.300}"
        if self.section.on_error == "fail":
            raise ValueError(f"{what}. Mend it, or set reward.on_error=penalty")
        log.warning("%d of %d answers score the penalty %g: %s", len(failed), count, self.section.penalty, what)

    def _trajectory(self, group: _Group, answer: Completion, verdict: Verdict) -> Trajectory:
        if isinstance(verdict, Problem):
            penalty = Score(self.section.penalty)
            return Trajectory.from_completion(group.prompt, answer, group.index, penalty, verdict)
        return Trajectory.from_completion(group.prompt, answer, group.index, verdict)


def _settled(futures: Sequence[Future[Any]], *, at_first_failure: bool) -> bool:
    state = wait(futures, POLL_S)
    return not state.not_done or (at_first_failure and any(future.exception() for future in state.done))


def _with_messages(prompt: Prompt, completion: Completion) -> Completion:
    if not prompt.messages:
        return completion
    return replace(completion, messages=(*prompt.messages, {"role": "assistant", "content": completion.text}))
