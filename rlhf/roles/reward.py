"""Rewards from the recipe's function."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlhf.recipe import load_recipe
from rlhf.types import Completion, Prompt, Score, Trajectory


class RewardFunction:
    """Args:
    recipe: module name or .py file with ``reward``. shuffle: the control of ``config.Reward``. seed: of it.
    """

    def __init__(self, *, recipe: str, shuffle: bool, seed: int) -> None:
        self.recipe = load_recipe(recipe)
        self.shuffle = shuffle
        self.random = random.Random(seed)

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], *, control: bool = False
    ) -> list[Trajectory]:
        """Judge every answer. ``control`` applies ``shuffle`` (training does, evaluation never).

        Raises ValueError when the reward returns something that isn't a finite number, a Score or None.
        """
        judged = [self.recipe.judge(p, answers) for p, answers in zip(prompts, completions, strict=True)]
        if control and self.shuffle:
            judged = self._shuffled(judged)
        return [
            Trajectory.from_completion(prompt, answer, group, score)
            for group, (prompt, answers, scores) in enumerate(zip(prompts, completions, judged, strict=True))
            for answer, score in zip(answers, scores, strict=True)
        ]

    def _shuffled(self, judged: list[list[Score | None]]) -> list[list[Score | None]]:
        flat = [score for scores in judged for score in scores]
        self.random.shuffle(flat)
        rest = iter(flat)
        return [[next(rest) for _ in scores] for scores in judged]
