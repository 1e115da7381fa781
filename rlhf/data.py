"""Prompts in an order that depends on the seed alone, and where in it we are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rlhf.types import Prompt


def tokenize(rows: Sequence[dict[str, Any]], tokenizer: Any, max_tokens: int) -> tuple[list[Prompt], int]:
    """Rows as prompts, and how many were dropped for being longer than ``max_tokens``.

    Raises ValueError for an empty prompt, and when nothing is left.
    """
    prompts = []
    for index, row in enumerate(rows):
        token_ids = tuple(tokenizer(row["prompt"])["input_ids"])
        if not token_ids:
            raise ValueError(f"row {index} has an empty prompt ({row['prompt']!r} gives no tokens)")
        if len(token_ids) <= max_tokens:
            columns = {name: value for name, value in row.items() if name != "prompt"}
            prompts.append(Prompt(index, row["prompt"], token_ids, columns))
    if not prompts:
        raise ValueError(f"all {len(rows)} prompts are longer than data.max_prompt_tokens={max_tokens}; raise it")
    return prompts, len(rows) - len(prompts)


class PromptStream:
    """Endless prompts: each epoch a fresh shuffle. ``position`` counts prompts handed out, and is all its state."""

    def __init__(self, prompts: Sequence[Prompt], seed: int, position: int = 0) -> None:
        self.prompts = prompts
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._shuffled: list[int] = []

    def take(self, count: int) -> list[Prompt]:
        taken = []
        for position in range(self.position, self.position + count):
            epoch, offset = divmod(position, len(self.prompts))
            taken.append(self.prompts[self._order(epoch)[offset]])
        self.position += count
        return taken

    def _order(self, epoch: int) -> list[int]:
        if self._epoch != epoch:
            self._epoch = epoch
            self._shuffled = random.Random(f"{self.seed}/{epoch}").sample(range(len(self.prompts)), len(self.prompts))
        return self._shuffled
