"""A recipe is a task: prompts, a reward, and where there is no model to download, how to make one.

A module (by name or as a .py file) with

* ``reward(completion, **columns) -> float | Score | None``, or ``reward(completions, **columns) -> list`` for
  the whole group at once; further parameters are columns of the prompt rows, matched by name;
* ``prompts(split)``: rows ``{"prompt": text, **columns}`` for split "train" and "eval";
* optional ``initial_model(folder, seed)``: write a Hugging Face checkpoint to start from;
* optional ``warm_start(seed)``: an endless iterable of (prompt, answer) texts to train on before the RL.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.types import Completion, Prompt, Score


@dataclass(frozen=True)
class Recipe:
    module: ModuleType
    columns: tuple[str, ...]  # that the reward can't do without
    takes: tuple[str, ...]  # that it has a parameter for
    takes_any: bool  # it has **columns
    per_group: bool

    def prompts(self, split: str) -> list[dict[str, Any]]:
        """Rows of a split. Raises ValueError where a row lacks the prompt or a column that the reward wants."""
        rows = list(self.module.prompts(split))
        if not rows:
            raise ValueError(f"{self.module.__name__}.prompts({split!r}) gave no rows")
        for i, row in enumerate(rows):
            missing = [name for name in ("prompt", *self.columns) if name not in row]
            if missing:
                has = ", ".join(row)
                raise ValueError(f"reward() wants {missing[0]!r}; row {i} of split {split!r} has {has}")
        return rows

    def judge(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score | None]:
        """Scores of one prompt's answers."""
        row = {"prompt": prompt.text, **prompt.columns}
        columns = {name: value for name, value in row.items() if self.takes_any or name in self.takes}
        if self.per_group:
            given = self.module.reward(list(completions), **columns)
        else:
            given = [self.module.reward(completion, **columns) for completion in completions]
        if not isinstance(given, (list, tuple)) or len(given) != len(completions):
            raise ValueError(
                f"reward() gave {given!r}; it must return a list of {len(completions)} scores, one an answer"
            )
        return [_score(value, prompt) for value in given]

    @property
    def initial_model(self) -> Any:
        return self._optional("initial_model", "give model.path, or write initial_model(folder, seed)")

    @property
    def warm_start(self) -> Any:
        return self._optional("warm_start", "set warm_start.steps=0, or write warm_start(seed)")

    def _optional(self, name: str, way_out: str) -> Any:
        found = vars(self.module).get(name)
        if found is None:
            raise ValueError(f"recipe {self.module.__name__} has no {name}; {way_out}")
        return found


def _score(value: Any, prompt: Prompt) -> Score | None:
    if value is None:
        return None
    try:
        if isinstance(value, Score):  # its numbers may be numpy's or torch's, which no log can hold
            score = Score(float(value.value), {name: float(part) for name, part in value.parts.items()})
        else:
            score = Score(float(value))
    except (TypeError, ValueError):
        raise ValueError(
            f"reward() returned {value!r} for prompt {prompt.text!r}; return a number, a Score or None"
        ) from None
    if not math.isfinite(score.value):
        raise ValueError(
            f"reward() returned {score.value} for prompt {prompt.text!r}; a reward is a finite number, or None"
        )
    return score


def load_recipe(path: str) -> Recipe:
    """Import a recipe by module name or .py file. Raises ValueError when it isn't there or has no reward."""
    if path.endswith(".py"):
        file = Path(path).resolve()
        if not file.exists():
            raise ValueError(f"recipe.path={path!r}: no such file")
        # Under a name of its own: a recipe called random.py must not become everybody's `random`.
        spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"recipe.path={path!r}: {error}; give a module such as recipes.arithmetic, or a .py file"
            ) from error
    for name in ("reward", "prompts"):
        if not callable(vars(module).get(name)):
            raise ValueError(f"recipe {path!r} has no function {name}()")
    parameters = list(inspect.signature(module.reward).parameters.values())
    if not parameters:
        raise ValueError(f"recipe {path!r}: reward() takes no parameter; its first one is the completion")
    named = [p for p in parameters[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return Recipe(
        module,
        columns=tuple(p.name for p in named if p.default is p.empty),
        takes=tuple(p.name for p in named),
        takes_any=any(p.kind is p.VAR_KEYWORD for p in parameters),
        per_group=parameters[0].name == "completions",
    )
