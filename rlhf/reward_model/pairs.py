"""Preference pairs: from rows of text to token ids, and to the minibatches of an optimizer step."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rlhf.config import Data
from rlhf.data import Renderer, Row, read_split
from rlhf.division import runs
from rlhf.recipe import Recipe
from rlhf.reward_model.config import Compare, PairsSection, RewardModelConfig

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt in token form: prompt and answer, which ends as a finished completion does."""

    chosen: Ids
    rejected: Ids
    margin: float = 0.0
    kind: str = ""  # by which evaluations are broken down

    @property
    def size(self) -> int:
        """Tokens of both."""
        return len(self.chosen) + len(self.rejected)

    def compared(self, where: Compare) -> list[tuple[int, int]]:
        """Positions in the chosen and in the rejected sequence whose scores the loss compares, the last ones last."""
        last = (len(self.chosen) - 1, len(self.rejected) - 1)
        if where == "last":
            return [last]
        ends = min(len(self.chosen), len(self.rejected))
        first = next((i for i in range(ends) if self.chosen[i] != self.rejected[i]), ends)
        return [*((i, i) for i in range(first, ends) if (i, i) != last), last]


def _chosen(pair: Pair) -> Ids:
    return pair.chosen


@dataclass(frozen=True)
class Pairs:
    """Some pairs, and what each weighs in the loss: weight x loss adds up, however they are divided."""

    pairs: tuple[Pair, ...]
    weights: tuple[float, ...]

    @classmethod
    def mean(cls, pairs: Sequence[Pair]) -> Pairs:
        """For the mean loss over these pairs."""
        return cls(tuple(pairs), (1 / len(pairs),) * len(pairs))

    @property
    def sequences(self) -> list[Ids]:
        """Chosen and rejected ones by turns."""
        return [ids for pair in self.pairs for ids in (pair.chosen, pair.rejected)]

    @property
    def groups(self) -> list[int]:
        """Of the sequences: pairs in a row with the same chosen answer are compared with one forward of it."""
        return [group for group, (_, run) in enumerate(groupby(self.pairs, _chosen)) for _ in run for _ in range(2)]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each pair."""
        return [pair.size for pair in self.pairs]

    def select(self, index: Sequence[int]) -> Pairs:
        return Pairs(tuple(self.pairs[i] for i in index), tuple(self.weights[i] for i in index))

    def filler(self) -> Pairs:
        """A pair of single tokens that weighs nothing."""
        token = self.pairs[0].chosen[:1]
        return Pairs((Pair(token, token),), (0.0,))

    def microbatches(self, max_tokens: int) -> Iterator[Pairs]:
        """Runs of whole pairs of at most ``max_tokens`` tokens (or one pair, if that alone is longer)."""
        for part in runs(self.sizes, max_tokens):
            yield self.select(part)


@dataclass(frozen=True)
class PairData:
    """Training and held-out pairs, where they are from, and how many rows were left out, by the reason."""

    train: list[Pair]
    held_out: list[Pair]
    source: str
    dropped: dict[str, int]


def load_pair_rows(config: RewardModelConfig, recipe: Recipe | None) -> tuple[list[Row], list[Row], str]:
    """Training rows, held-out rows and their source: ``data.path``, or else the recipe's ``preferences``.

    Where nothing names held-out rows, those of some prompts are held out. Raises ValueError where there are none.
    """
    data = config.data
    train: list[Row] | None
    held_out: list[Row] | None = None
    if data.path is not None:
        source = data.path
        train = read_split(data, "train_split", data.train_split)
        if data.eval_split:
            held_out = read_split(data, "eval_split", data.eval_split)
    elif recipe is not None:
        source = f"{recipe.module.__name__}.preferences"
        train, held_out = recipe.preferences("train"), recipe.preferences("eval")
    else:
        raise ValueError("data.path and recipe.path are both missing; one of them gives the preference pairs")
    if train and held_out is None:
        train, held_out = _hold_out(train, config)
    for split, rows in (("train", train), ("eval", held_out)):
        if not rows:
            raise ValueError(f"{source} has no rows for split {split!r}")
    assert train and held_out
    return train, held_out[: config.eval.pairs], source


def _hold_out(rows: list[Row], config: RewardModelConfig) -> tuple[list[Row], list[Row]]:
    """All pairs of some prompts: at most ``eval.pairs`` pairs or a tenth, the same for every seed of a run."""
    of_prompt: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        of_prompt.setdefault(repr(_conversation(row, config.data, config.pairs)), []).append(i)
    if len(of_prompt) < 2:
        raise ValueError("all preference pairs have the same prompt, so none can be held out; name a data.eval_split")
    count, chosen = min(config.eval.pairs, max(1, len(rows) // 10)), set[int]()
    for prompt in random.Random(0).sample(list(of_prompt), len(of_prompt) - 1):
        if len(chosen) >= count:
            break
        chosen.update(of_prompt[prompt])
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _conversation(row: Row, data: Data, section: PairsSection) -> Any:
    """The prompt of a row: the messages before the answers, where these bring some, else the prompt column."""
    before = []
    for column in (section.chosen, section.rejected):
        if column not in row:
            raise ValueError(f"pairs want the column {column!r}; the data has {', '.join(row)}")
        given = row[column]
        before.append(given[:-1] if isinstance(given, list) else [])
    if before[0] != before[1]:
        raise ValueError(f"{section.chosen} and {section.rejected} answer different conversations: {before!r:.200}")
    if before[0]:
        return before[0]
    if data.prompt not in row:
        raise ValueError(f"data.prompt wants {data.prompt!r}; the data has {', '.join(row)}")
    return row[data.prompt]


def _answer(row: Row, column: str) -> str:
    """Its text: the cell, or the last message of it."""
    given = row[column]
    if isinstance(given, str):
        return given
    last = given[-1] if isinstance(given, list) and given else None
    if isinstance(last, dict) and last.get("role") == "assistant" and isinstance(last.get("content"), str):
        return str(last["content"])
    raise ValueError(
        f"{column} is {given!r:.200}; give a text, or a list of messages that ends with the assistant's answer"
    )


def _answer_ids(row: Row, column: str, render: Renderer) -> list[int]:
    """With its end, unless ``<column>_finish_reason`` says that it was cut off, as a policy's answers are."""
    reason = row.get(f"{column}_finish_reason") or "stop"
    if reason not in ("stop", "length"):
        raise ValueError(f"{column}_finish_reason is {reason!r}; give stop or length")
    return render.answer(_answer(row, column), finished=reason == "stop")


def tokenize_pairs(rows: Sequence[Row], render: Renderer, section: PairsSection) -> tuple[list[Pair], dict[str, int]]:
    """Rows as pairs, and how many were dropped, by the reason: too long, equal answers, an empty chosen one.

    Raises ValueError that names the row for a missing column, what is no text or message list, and a margin that is
    no finite number.
    """
    pairs = []
    dropped = {"too long": 0, "equal": 0, "empty": 0}
    for index, row in enumerate(rows):
        try:
            _, prompt, _ = render(_conversation(row, render.section, section))
            chosen, rejected = (_answer_ids(row, column, render) for column in (section.chosen, section.rejected))
            margin = row.get(section.margin)
            margin = 0.0 if margin is None else float(margin)
            if not math.isfinite(margin):
                raise ValueError(f"{section.margin} is {margin}; give a finite number")
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {index}: {error}") from error
        longest = len(prompt) + max(len(chosen), len(rejected))
        if len(prompt) > render.section.max_prompt_tokens or longest > section.max_tokens:
            dropped["too long"] += 1
        elif chosen == rejected:
            dropped["equal"] += 1
        elif chosen in ([], render.answer("")):
            dropped["empty"] += 1
        else:
            pairs.append(Pair((*prompt, *chosen), (*prompt, *rejected), margin, str(row.get(section.kind) or "")))
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise ValueError(
            f"none of {len(rows)} preference pairs is left: {reasons} "
            f"(pairs.max_tokens={section.max_tokens}, data.max_prompt_tokens={render.section.max_prompt_tokens})"
        )
    return pairs, dropped
