"""A recipe is a task: a reward, maybe prompts, and where there is no model to download, how to make one.

A module (by name or as a .py file) with

* ``reward(completion, **columns) -> float | Score | None`` (may be left out where the config names reward models or
  servers), or ``reward(completions, **columns) -> list`` for
  the whole group at once; further parameters are columns of the prompt rows, matched by name; ``def`` or ``async def``;
* optional ``prompts(split)`` for splits "train" and "eval", or ``prompts()`` for training rows alone: rows
  ``{"prompt": text or messages, **columns}``, for configs without ``data.path``;
* optional ``preferences(split)``, as ``prompts``: rows ``{"prompt", "chosen", "rejected"}`` for a reward model;
* optional ``initial_model(folder, seed)``: write a Hugging Face checkpoint to start from;
* optional ``warm_start(seed)``: an endless iterable of (prompt, answer) texts to train on before the RL.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.types import Problem, Prompt, Score

Verdict = Score | Problem | None  # None: not judged


@dataclass(frozen=True)
class Recipe:
    module: ModuleType
    columns: tuple[str, ...]  # that the reward can't do without
    takes: tuple[str, ...]  # that it has a parameter for
    takes_any: bool  # it has **columns
    per_group: bool

    name = "function"  # of its component of the reward
    title = "reward()"  # in messages

    @property
    def has_reward(self) -> bool:
        return callable(vars(self.module).get("reward"))

    @property
    def reward(self) -> Callable[..., Any]:
        return self.module.reward

    def prompts(self, split: str) -> list[dict[str, Any]] | None:
        """Rows of "train" or "eval"; None where the recipe leaves it to the caller to hold rows out."""
        return self._rows("prompts", split)

    def preferences(self, split: str) -> list[dict[str, Any]] | None:
        """Preference pairs of "train" or "eval"; None as :meth:`prompts`."""
        return self._rows("preferences", split)

    def _rows(self, name: str, split: str) -> list[dict[str, Any]] | None:
        function = self._optional(name, f"set data.path, or write {name}(split)")
        if inspect.signature(function).parameters:
            return list(function(split))
        return list(function()) if split == "train" else None

    def check_columns(self, rows: Sequence[dict[str, Any]], prompt: str) -> None:
        """Raises ValueError where a row lacks the prompt (column ``prompt``) or a column that the reward wants."""
        for i, row in enumerate(rows):
            for who, name in (("data.prompt", prompt), *(("reward()", column) for column in self.columns)):
                if name not in row:
                    raise ValueError(f"{who} wants {name!r}; the data has {', '.join(row)} (row {i})")

    def arguments(self, prompt: Prompt) -> dict[str, Any]:
        """The columns of a row that the reward takes."""
        return {name: value for name, value in prompt.columns.items() if self.takes_any or name in self.takes}

    def verdicts(self, given: Any, count: int) -> list[Verdict]:
        """What a call of the reward returned, as scores of the ``count`` answers that it judged."""
        if not self.per_group:
            return [verdict(given)]
        if not isinstance(given, (list, tuple)) or len(given) != count:
            wrong = f"returned {given!r:.300}; for {count} answers it must return a list of {count} scores"
            return [Problem("error", wrong)] * count
        return [verdict(value) for value in given]

    def described(self, error: BaseException) -> str:
        """What a call that raised this did, with the recipe's line that it comes from."""
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == self.module.__file__]
        place = f" ({Path(str(self.module.__file__)).name}, line {lines[-1]})" if lines else ""
        return f"raised {type(error).__name__}: {error}{place}"

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


def verdict(value: Any) -> Verdict:
    """A score as a reward may give it: a number, a Score or None."""
    if value is None:
        return None
    try:
        if isinstance(value, Score):  # its numbers may be numpy's or torch's, which no log can hold
            score = Score(float(value.value), {name: float(part) for name, part in value.parts.items()})
        else:
            score = Score(float(value))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return Problem("error", f"returned {value!r:.300}; it must return a number, a Score or None")
    if not all(map(math.isfinite, (score.value, *score.parts.values()))):
        return Problem("error", f"returned {value!r:.300}; rewards and their parts are finite numbers")
    return score


def load_recipe(path: str, *, needs_reward: bool = True) -> Recipe:
    """Import a recipe by module name or .py file.

    Raises ValueError when it isn't there, or has no reward and ``needs_reward``.
    """
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
    if not callable(vars(module).get("reward")):
        if needs_reward:
            raise ValueError(f"recipe {path!r} has no function reward(); write one, or name reward.models or .servers")
        return Recipe(module, columns=(), takes=(), takes_any=False, per_group=False)
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
