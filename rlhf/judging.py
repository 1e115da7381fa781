"""The reward of an answer: the weighted sum of what the recipe's function, reward servers and reward models say."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config
from rlhf.cluster import Cluster
from rlhf.config import Config
from rlhf.recipe import Recipe, Verdict
from rlhf.roles.reward import RewardFunction
from rlhf.roles.reward_model import RewardModel
from rlhf.types import Completion, Problem, Prompt, Score, Trajectory
from rlhf.weights import CALIBRATION, Weights, named


@dataclass(frozen=True)
class ModelJudge:
    """A reward model as a component. ``midpoint``: the score that counts as 1/2; None: scores count as they are."""

    role: RewardModel
    midpoint: float | None

    def scores(self, token_ids: list[tuple[int, ...]]) -> list[Score]:
        """Of prompts with their answers. Raises ValueError for a score that is no finite number."""
        raw = self.role.judge(token_ids) if token_ids else []
        for tokens, score in zip(token_ids, raw, strict=True):
            if not math.isfinite(score):
                raise ValueError(f"scores {score} for {len(tokens)} tokens, {tokens[:20]} ...: its weights are bad")
        if self.midpoint is None:
            return [Score(score) for score in raw]
        return [Score(_sigmoid(score - self.midpoint), {"raw": score}) for score in raw]


class Judges:
    """What the loop asks for rewards.

    Args:
        function: the role of the recipe's function and of reward servers. models: by name. seed: of the control
            ``shuffle``.
    """

    def __init__(
        self, section: config.Reward, function: RewardFunction, models: dict[str, ModelJudge], seed: int
    ) -> None:
        self.section = section
        self.function = function
        self.models = models
        self.seed = seed
        self.num_shuffled = 0
        self.names = [*function.names(), *models]
        self.groups: list[tuple[int, Prompt, Sequence[Completion]]] = []

    @property
    def is_plain(self) -> bool:
        """The function alone judges: its scores are the rewards, and their parts keep their names."""
        return self.names == ["function"] and self.section.weight("function") == 1

    @property
    def accuracy_part(self) -> str | None:
        """The part of a score that says whether an answer is right; None: its value does."""
        return "function" if "function" in self.names and not self.is_plain else None

    def submit(self, finished: Sequence[tuple[int, Prompt, Sequence[Completion]]]) -> None:
        """Start to judge finished groups (number, prompt, answers); returns at once."""
        self.groups += finished
        self.function.submit(finished)

    def collect(self, *, control: bool = False) -> list[Trajectory]:
        """Everything submitted since the last time, judged, in the order of the groups.

        ``control`` applies ``reward.shuffle`` (training does, evaluation never). Raises ValueError as
        :meth:`RewardFunction.collect`, and for a reward model with a score that is no finite number.
        """
        groups, self.groups = sorted(self.groups, key=lambda group: group[0]), []
        answers = [(group, prompt, answer) for group, prompt, group_answers in groups for answer in group_answers]
        token_ids = [(*prompt.token_ids, *answer.token_ids) for _, prompt, answer in answers]
        by_model = {}
        for name, model in self.models.items():  # while function and servers are still at work
            try:
                by_model[name] = model.scores(token_ids)
            except ValueError as error:
                raise ValueError(f"reward model {name} {error}") from None
        verdicts = [
            {**others, **{name: scores[i] for name, scores in by_model.items()}}
            for i, others in enumerate(self.function.collect())
        ]
        totals = [self._total(by_component) for by_component in verdicts]
        if control and self.section.shuffle:
            random.Random(f"{self.seed} {self.num_shuffled}").shuffle(totals)
            self.num_shuffled += 1
        return [
            Trajectory.from_completion(prompt, answer, group, *total)
            for (group, prompt, answer), total in zip(answers, totals, strict=True)
        ]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], *, control: bool = False
    ) -> list[Trajectory]:
        """Judge the answers to these prompts: :meth:`submit` and :meth:`collect`."""
        self.submit([(group, *pair) for group, pair in enumerate(zip(prompts, completions, strict=True))])
        return self.collect(control=control)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on as this one would."""
        return {"num_shuffled": self.num_shuffled}

    def restore(self, state: dict[str, Any]) -> None:
        self.num_shuffled = state["num_shuffled"]

    def _total(self, verdicts: dict[str, Verdict]) -> tuple[Score | None, Problem | None]:
        """The weighted sum, None where a component that counts didn't judge; and the first problem.

        Parts are what the sum is made of: each component by name, and its own parts as ``component/part``.
        """
        problem = next((verdict for verdict in verdicts.values() if isinstance(verdict, Problem)), None)
        scores = {
            name: Score(self.section.penalty) if isinstance(verdict, Problem) else verdict
            for name, verdict in verdicts.items()
        }
        if self.is_plain:
            return scores["function"], problem
        value = 0.0
        parts: dict[str, float] = {}
        for name, score in scores.items():
            weight = self.section.weight(name)
            if score is not None:
                value += weight * score.value if weight else 0.0
                parts[name] = score.value
                parts.update({f"{name}/{part}": amount for part, amount in score.parts.items()})
            elif weight:
                return None, problem
        return Score(value, parts), problem


def _sigmoid(x: float) -> float:
    e = math.exp(-abs(x))  # at most 1
    return 1 / (1 + e) if x >= 0 else e / (1 + e)


def spawn_judges(run: Config, cluster: Cluster, weights: Weights) -> Judges:
    """The role ``reward`` (function and servers), and one role per reward model."""
    section = run.reward
    function = cluster.spawn("reward", RewardFunction, recipe=run.recipe.path, section=section)
    models = {}
    for name, role_name in section.model_roles.items():
        model, train, ranks = run.of_role(role_name)
        checkpoint = weights[role_name]
        role = cluster.spawn(
            role_name,
            RewardModel,
            ranks=ranks,
            checkpoint=checkpoint,
            model=model,
            train=train,
            timeout_s=run.cluster.timeout_s,
        )
        models[name] = ModelJudge(role, midpoint_of(checkpoint) if section.model_scale == "probability" else None)
    return Judges(section, function, models, run.run.seed)


def midpoint_of(checkpoint: Path) -> float:
    """The score of a reward model that counts as 1/2. Raises ValueError where its calibration isn't there or is bad."""
    file = checkpoint / CALIBRATION
    way_out = "train the model with `rlhf reward-model`, which writes it, or set reward.model_scale=raw"
    if not file.is_file():
        raise ValueError(f"{checkpoint} has no {CALIBRATION} with the midpoint of the model's scores; {way_out}")
    try:
        midpoint = float(json.loads(file.read_text())["midpoint"])
    except (ValueError, KeyError, TypeError):
        midpoint = math.nan
    if not math.isfinite(midpoint):
        raise ValueError(f'{file} is not {{"midpoint": number, ...}} with a finite number; {way_out}')
    return midpoint


def check_judges(run: Config, weights: Weights, recipe: Recipe, prompt: Prompt) -> list[str]:
    """Everybody who judges, in words, for the plan; each reward server judges an empty answer to ``prompt``.

    Raises ValueError for what can't work, whatever ``reward.on_error`` says.
    """
    section = run.reward
    told = {"function": f"reward() of {Path(run.recipe.path).name}"} if recipe.has_reward else {}
    models = {name: weights[role] for name, role in section.model_roles.items()}
    told.update({name: f"reward model {folder}, {section.model_scale}" for name, folder in models.items()})
    told.update({name: f"server {url}" for name, url in section.servers.items()})
    if "function" in section.weights and not recipe.has_reward:
        raise ValueError(f"reward.weights names the function, but recipe {run.recipe.path!r} has no reward()")
    if not any(section.weight(name) for name in told):
        raise ValueError(f"reward.weights: every component ({', '.join(told)}) has weight 0; nothing would be learnt")
    if section.model_scale == "probability":
        for name, folder in models.items():
            with named(f"reward.models.{name}"):
                midpoint_of(folder)
    if section.servers:
        from rlhf.reward_server import RewardServer

        for name, url in section.servers.items():
            RewardServer(name, url).check(prompt, section.timeout_s)
    return [
        f"{section.weight(name):g} x {name} ({what})" if section.weight(name) else f"{name}, only watched ({what})"
        for name, what in told.items()
    ]
