"""Where the loop's trajectories come from: prompts, answers by the policy, judged while more are being sampled."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from rlhf.algorithms import Algorithm
from rlhf.config import Config
from rlhf.data import PromptStream
from rlhf.functional import overlong_penalty
from rlhf.judging import Judges
from rlhf.roles.policy import Policy
from rlhf.types import Completion, Problem, Prompt, Score, Trajectory
from rollout_engine import SamplingParams

log = logging.getLogger(__name__)

Phase = Callable[[str], AbstractContextManager[None]]  # shows and times what goes on
Group = list[Trajectory]  # the answers to one prompt

FIRST_GREEDY_ID = 1 << 41  # greedy answers draw no noise; their numbers are nobody else's


class Rollouts:
    """Batches of judged answers, step after step. ``metrics`` are the last one's."""

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        policy: Policy,
        reward: Judges,
        prompts: Sequence[Prompt],
    ) -> None:
        rollout = config.rollout
        self.algorithm = algorithm
        self.policy = policy
        self.reward = reward
        self.prompts_per_step = rollout.prompts_per_step
        self.stream = PromptStream(prompts, config.run.seed)
        self.params = SamplingParams(
            n=rollout.samples_per_prompt,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            min_p=rollout.min_p,
            max_tokens=rollout.max_tokens,
        )
        self.surplus: list[Group] = []  # sampled, not trained on yet
        self.metrics: dict[str, float] = {}

    def take(self, phase: Phase) -> list[Trajectory]:
        """Answers to ``prompts_per_step`` prompts, in the order in which those were asked.

        Under dynamic sampling (DAPO) groups of equal rewards are left out, and more are sampled until there are enough
        or ``max_rollouts_per_step`` rounds are over; then the step has fewer. What is too many is the next step's.
        A step without any other group has the last round's flat ones: a task that is solved is no error.
        """
        ready, self.surplus = self.surplus, []
        if not self.algorithm.dynamic_sampling:
            return self._numbered(self._round(phase))
        rounds = dropped = 0
        while len(ready) < self.prompts_per_step and rounds < self.algorithm.max_rollouts_per_step:
            rounds += 1
            groups = self._round(phase)
            uneven = [group for group in groups if not _is_flat(group)]
            dropped += len(groups) - len(uneven)
            ready += uneven
        if len(ready) < self.prompts_per_step:
            log.warning(
                "%d of %d prompts have answers of unequal reward after %d rounds (algorithm.max_rollouts_per_step)%s",
                len(ready), self.prompts_per_step, rounds, "" if ready else "; this step has nothing to learn from",
            )  # fmt: skip
        if not ready:
            ready = groups
        self.surplus = ready[self.prompts_per_step :]
        self.metrics = {
            "rollout/generated_groups": rounds * self.prompts_per_step,
            "rollout/dropped_groups": dropped,
            "rollout/surplus": len(self.surplus),
        }
        return self._numbered(ready[: self.prompts_per_step])

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on from here: plain data, as JSON holds it."""
        return {
            "position": self.stream.position,
            "surplus": [[_plain(answer) for answer in group] for group in self.surplus],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken, over the same prompts."""
        self.stream.position = state["position"]
        prompts = {prompt.index: prompt for prompt in self.stream.prompts} if state["surplus"] else {}
        self.surplus = [[_restored(row, prompts) for row in group] for group in state["surplus"]]

    def _round(self, phase: Phase) -> list[Group]:
        """Judged answers to the next prompts. An answer's number, and so its noise, follows from the prompts handed
        out before."""
        first = self.stream.position
        asked = self.stream.take(self.prompts_per_step)
        with phase("generate"):
            self._answer(asked, self.params, first * self.params.n, 0)
            if self.algorithm.greedy_baseline:
                greedy = SamplingParams(temperature=0, max_tokens=self.params.max_tokens)
                self._answer(asked, greedy, FIRST_GREEDY_ID + first, len(asked))
        with phase("reward"):  # what is left of it: judging began with the first answers
            judged = self.reward.collect(control=True)
        groups = [list(group) for _, group in itertools.groupby(judged, key=lambda t: t.group)]
        if self.algorithm.greedy_baseline:
            answers, greedy_answers = groups[: len(asked)], groups[len(asked) :]
            groups = [
                _compared(group, self._shaped(one)) for group, (one,) in zip(answers, greedy_answers, strict=True)
            ]
        return groups

    def _answer(self, asked: Sequence[Prompt], params: SamplingParams, first_sample_id: int, first_group: int) -> None:
        """Generate, and hand answers over to the reward as they finish; prompt i is group ``first_group`` + i."""
        for finished in self.policy.generate(asked, params, first_sample_id=first_sample_id):
            self.reward.submit([(first_group + i, asked[i], answers) for i, answers in finished])

    def _shaped(self, t: Trajectory) -> Trajectory:
        """Less what its length costs, which is a part ``overlong`` of the score."""
        buffer = self.algorithm.overlong_buffer * self.params.max_tokens
        if buffer == 0 or t.score is None:
            return t
        cost = self.algorithm.overlong_penalty * overlong_penalty(
            len(t.completion.token_ids), self.params.max_tokens, buffer
        )
        return replace(t, score=Score(t.score.value - cost, {**t.score.parts, "overlong": -cost}))

    def _numbered(self, groups: Iterable[Group]) -> list[Trajectory]:
        """All answers, as the loop gets them; groups of different rounds get different numbers."""
        return [replace(self._shaped(t), group=number) for number, group in enumerate(groups) for t in group]


def _is_flat(group: Group) -> bool:
    """All rewards are equal, before what length costs: the answers teach nothing about each other."""
    return len({t.score.value for t in group if t.score is not None}) < 2


def _compared(group: Group, greedy: Trajectory) -> Group:
    """With the greedy answer's reward as baseline; where that wasn't judged, neither are they."""
    if greedy.score is None:
        return [replace(t, score=None) for t in group]
    return [replace(t, baseline=greedy.score.value) for t in group]


def _plain(t: Trajectory) -> dict[str, Any]:
    return {
        "prompt": t.prompt.index,
        "completion": asdict(t.completion),
        "score": asdict(t.score) if t.score else None,
        "problem": asdict(t.problem) if t.problem else None,
        "baseline": t.baseline,
    }


def _restored(row: dict[str, Any], prompts: dict[int, Prompt]) -> Trajectory:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row["completion"].items()
    }
    score, problem = row["score"], row["problem"]
    trajectory = Trajectory.from_completion(
        prompts[row["prompt"]],
        Completion(**fields),
        0,
        Score(**score) if score else None,
        Problem(**problem) if problem else None,
    )
    return replace(trajectory, baseline=row["baseline"])
