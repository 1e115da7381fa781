"""Scores from the recipe's function and from reward servers, which work while answers are still being sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from rlhf import config
from rlhf.calls import Overdue, make_caller
from rlhf.recipe import Verdict, load_recipe
from rlhf.types import Completion, Problem, Prompt

log = logging.getLogger(__name__)

POLL_S = 0.25  # between looks for calls that hang


class Source(Protocol):
    """Who judges: a recipe, or a reward server."""

    @property
    def name(self) -> str:
        """Of its component of the reward."""

    @property
    def title(self) -> str:
        """In messages."""

    @property
    def per_group(self) -> bool:
        """A call judges all answers to a prompt, not one."""

    @property
    def reward(self) -> Callable[..., Any]:
        """``reward(answer or answers, **arguments)``; ``def`` or ``async def``."""

    def arguments(self, prompt: Prompt) -> dict[str, Any]: ...

    def verdicts(self, given: Any, count: int) -> list[Verdict]:
        """What a call returned, as scores of the ``count`` answers that it judged."""

    def described(self, error: BaseException) -> str:
        """What a call that raised this did."""


@dataclass(frozen=True)
class _Call:
    """A call of a source, and the numbers of the group's answers that it judges: one, or all."""

    source: Source
    answers: range
    future: Future[Any]


@dataclass(frozen=True)
class _Group:
    index: int
    prompt: Prompt
    answers: Sequence[Completion]
    calls: list[_Call]


class RewardFunction:
    """Args:
    recipe: module name or .py file; its ``reward`` is the source ``function``. section: servers, what a failure means,
    timeouts.
    """

    def __init__(self, *, recipe: str, section: config.Reward) -> None:
        self.section = section
        self.recipe = load_recipe(recipe, needs_reward=section.needs_function)
        self.sources: list[Source] = [self.recipe] if self.recipe.has_reward else []
        if section.servers:
            from rlhf.reward_server import RewardServer  # an HTTP client is loaded where it is used

            self.sources += [RewardServer(name, url) for name, url in section.servers.items()]
        # Each has a caller of its own, so that one that hangs doesn't hold up the others.
        self.callers = {
            source.name: make_caller(source.reward, section.timeout_s, section.concurrency) for source in self.sources
        }
        self.groups: list[_Group] = []

    def names(self) -> list[str]:
        """Of the components that it judges."""
        return [source.name for source in self.sources]

    def submit(self, finished: Sequence[tuple[int, Prompt, Sequence[Completion]]]) -> None:
        """Start to judge finished groups (number, prompt, answers); returns at once."""
        self._watch()
        for group, prompt, completions in finished:
            calls = [call for source in self.sources for call in self._start(source, prompt, completions)]
            self.groups.append(_Group(group, prompt, completions, calls))

    def _start(self, source: Source, prompt: Prompt, completions: Sequence[Completion]) -> list[_Call]:
        start, arguments = self.callers[source.name].start, source.arguments(prompt)
        seen = [_with_messages(prompt, completion) for completion in completions]
        if source.per_group:
            return [_Call(source, range(len(seen)), start(partial(source.reward, seen, **arguments)))]
        return [
            _Call(source, range(i, i + 1), start(partial(source.reward, answer, **arguments)))
            for i, answer in enumerate(seen)
        ]

    def _watch(self) -> None:
        for caller in self.callers.values():
            caller.watch()

    def collect(self) -> list[dict[str, Verdict]]:
        """Of everything submitted since the last time, by component, the answers in the order of the groups.

        Bounded: a call has ``reward.timeout_s`` from its start. Raises ValueError when too many calls hang, and, under
        ``reward.on_error: fail``, for the first one that went wrong.
        """
        groups, self.groups = sorted(self.groups, key=lambda group: group.index), []
        futures = [call.future for group in groups for call in group.calls]
        while not _settled(futures, at_first_failure=self.section.on_error == "fail"):
            self._watch()
        verdicts = [_verdicts(group) for group in groups]
        answers = [(group.prompt, answer) for group in groups for answer in group.answers]
        found = [by_component for of_group in verdicts for by_component in of_group]
        self._report(answers, found)
        return found

    def _report(self, answers: list[tuple[Prompt, Completion]], found: list[dict[str, Verdict]]) -> None:
        """Raise for the first answer that lacks a score, or log it."""
        failed = [
            (*answer, problems[0])
            for answer, verdicts in zip(answers, found, strict=True)
            if (problems := [verdict for verdict in verdicts.values() if isinstance(verdict, Problem)])
        ]
        if not failed:
            return
        prompt, answer, problem = failed[0]
        what = f"{problem.message}, for prompt {prompt.question!r:.300} and answer {answer.text!r:.300}"
        if self.section.on_error == "fail":
            raise ValueError(f"{what}. Mend it, or set reward.on_error=penalty")
        log.warning("%d of %d answers score the penalty %g: %s", len(failed), len(answers), self.section.penalty, what)


def _verdicts(group: _Group) -> list[dict[str, Verdict]]:
    """Of each answer, by component."""
    found: list[dict[str, Verdict]] = [{} for _ in group.answers]
    for call in group.calls:
        if not call.future.done():  # another one failed, and under `fail` that is the end
            continue
        source, count = call.source, len(call.answers)
        error = call.future.exception()
        if error is None:
            verdicts = source.verdicts(call.future.result(), count)
        elif isinstance(error, Overdue):
            verdicts = [Problem("timeout", str(error))] * count
        else:
            verdicts = [Problem("error", source.described(error))] * count
        for answer, verdict in zip(call.answers, verdicts, strict=True):
            if isinstance(verdict, Problem):
                verdict = replace(verdict, message=f"{source.title} {verdict.message}")
            found[answer][source.name] = verdict
    return found


def _settled(futures: Sequence[Future[Any]], *, at_first_failure: bool) -> bool:
    state = wait(futures, POLL_S)
    return not state.not_done or (at_first_failure and any(future.exception() for future in state.done))


def _with_messages(prompt: Prompt, completion: Completion) -> Completion:
    if not prompt.messages:
        return completion
    return replace(completion, messages=(*prompt.messages, {"role": "assistant", "content": completion.text}))
