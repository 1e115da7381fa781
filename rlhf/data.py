"""From the config's ``data`` to prompts, in an order that depends on the seed alone, and where in it we are."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config
from rlhf.recipe import Recipe
from rlhf.types import Message, Prompt
from rollout_engine.chat import encode, encode_rendered, render_chat

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows, and where they are from."""

    train: list[Row]
    eval: list[Row]
    source: str


def load_rows(section: config.Data, recipe: Recipe, num_eval: int) -> Rows:
    """Rows of ``data.path``, or else of the recipe's ``prompts``.

    Where nothing names held-out rows, ``num_eval`` of the training rows are, or a tenth of them if that is less.
    Raises ValueError where there are none, or where the prompt or a column that the reward wants is missing.
    """
    if section.path is None:
        source = f"{recipe.module.__name__}.prompts"
        train, held_out = recipe.prompts("train"), recipe.prompts("eval")
    else:
        source = section.path
        train = read_split(section, "train_split", section.train_split)
        held_out = read_split(section, "eval_split", section.eval_split) if section.eval_split else None
    if train and held_out is None:
        if len(train) < 2:
            raise ValueError(f"{source} has 1 row; give more, so that one can be held out, or name a data.eval_split")
        train, held_out = _hold_out(train, num_eval)
    for split, rows in (("train", train), ("eval", held_out)):
        if not rows:
            raise ValueError(f"{source} has no rows for split {split!r}")
        recipe.check_columns(rows, section.prompt)
    assert train and held_out
    return Rows(train, held_out, source)


def _hold_out(rows: list[Row], at_most: int) -> tuple[list[Row], list[Row]]:
    """The same rows for every seed of a run, so that runs compare."""
    count = min(at_most, max(1, len(rows) // 10))
    chosen = set(random.Random(0).sample(range(len(rows)), count))
    kept = [row for i, row in enumerate(rows) if i not in chosen]
    return kept, [rows[i] for i in sorted(chosen)]


def read_split(section: config.Data, key: str, split: str) -> list[Row]:
    """Rows of one split of ``data.path``. Raises ValueError naming the path, and of a bad JSONL line the number."""
    path = Path(section.path or "")
    if path.suffix in (".jsonl", ".parquet"):
        only = "train" if key == "train_split" else None
        for name, given, fitting in ((key, split, only), ("subset", section.subset, None)):
            if given != fitting:
                raise ValueError(
                    f"data.{name}={given!r}, but {path} is one file, which has no splits and subsets; "
                    f"set data.{name}={fitting or 'null'}, or give a folder with a file for each split"
                )
        if not path.is_file():
            raise ValueError(f"data.path={section.path!r}: no such file")
        if path.suffix == ".jsonl":
            return read_jsonl(path)
    try:
        return _load(section, path, split)
    except Exception as error:  # `datasets` has many kinds
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else ():
            read_jsonl(file)  # names the line where `datasets` doesn't
        said = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ValueError(f"data.path={section.path!r}, data.{key}={split!r}: {said}") from error


def _load(section: config.Data, path: Path, split: str) -> list[Row]:
    import datasets

    if path.suffix == ".parquet":
        return list(datasets.Dataset.from_parquet(str(path)))
    if (path / "dataset_dict.json").exists() and section.subset is None:
        return list(datasets.load_from_disk(str(path))[split])
    if (path / "state.json").exists() and split == "train":
        return list(datasets.load_from_disk(str(path)))
    return list(datasets.load_dataset(str(section.path), section.subset, split=split))


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line; empty lines are skipped. Raises ValueError naming the line."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except ValueError as error:  # JSON's and Unicode's errors are both
            raise ValueError(f"{path} line {number} is not JSON: {error}; it begins {line[:80]!r}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is no object ({line[:80]!r}); give one {{...}} a line")
        rows.append(row)
    return rows


class Renderer:
    """Turns a text or a conversation into what the model sees, as the ``data`` section says.

    Raises ValueError where that calls for a chat template, and there is none.
    """

    def __init__(self, section: config.Data, tokenizer: Any) -> None:
        self.section = section
        self.tokenizer = tokenizer
        self.template: str | None = None  # None: the tokenizer's own
        self.uses_template = section.chat_template != "none"
        if section.chat_template == "auto":
            self.uses_template = tokenizer.chat_template is not None
        elif self.uses_template:
            file = Path(section.chat_template)
            if not file.is_file():
                raise ValueError(f"data.chat_template={section.chat_template!r}: no such file")
            self.template = file.read_text()
        for key in ("system", "template_args"):
            if getattr(section, key) and not self.uses_template:
                raise ValueError(f"data.{key} needs a chat template, and {self._why_none}")

    @property
    def _why_none(self) -> str:
        if self.section.chat_template == "none":
            return "data.chat_template is none; set auto, or a .jinja file"
        return "the tokenizer has none; set data.chat_template to a .jinja file"

    def __call__(self, given: Any) -> tuple[str, tuple[int, ...], tuple[Message, ...]]:
        """Text, token ids and messages (none without a template) of a cell of the prompt column."""
        if isinstance(given, str) and not self.uses_template:
            return given, tuple(encode(self.tokenizer, given)), ()
        if not self.uses_template:
            raise ValueError(f"messages need a chat template, and {self._why_none}; they are {given!r:.200}")
        messages = _messages(given)
        if self.section.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.section.system}, *messages]
        text = render_chat(self.tokenizer, messages, chat_template=self.template, **self.section.template_args)
        return text, tuple(encode_rendered(self.tokenizer, text)), tuple(messages)

    def answer(self, text: str, *, finished: bool = True) -> list[int]:
        """Ids of an answer as the model would write it: by itself, so that nothing is tokenised across its border to
        the prompt, and with the end-of-sequence token, unless it was cut off. Raises ValueError where there is none."""
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token, which ends every answer; give it one")
        end = [self.tokenizer.eos_token_id] if finished else []
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], *end]


def _messages(given: Any) -> list[Message]:
    if isinstance(given, str) and given.strip():
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given or not all(isinstance(m, dict) and "role" in m for m in given):
        raise ValueError(f"the prompt is {given!r:.200}; give a text, or a list of messages with role and content")
    if given[-1]["role"] == "assistant":
        raise ValueError(f"the messages end with the assistant's answer, not with a question to it: {given!r:.200}")
    return given


def tokenize(rows: Sequence[Row], render: Renderer) -> tuple[list[Prompt], int]:
    """Rows as prompts, and how many were dropped for being longer than ``data.max_prompt_tokens``.

    Raises ValueError for an empty prompt and for one that can't be rendered, and when nothing is left.
    """
    section, prompts = render.section, []
    for index, row in enumerate(rows):
        try:
            text, token_ids, messages = render(row[section.prompt])
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from error
        if not token_ids:
            raise ValueError(f"row {index}: the prompt is empty ({text!r} gives no tokens)")
        if len(token_ids) <= section.max_prompt_tokens:
            prompts.append(Prompt(index, text, token_ids, row, messages))
    if not prompts:
        raise ValueError(
            f"all {len(rows)} prompts are longer than data.max_prompt_tokens={section.max_prompt_tokens}; raise it"
        )
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
