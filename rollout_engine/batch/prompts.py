"""What prompt a row holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_engine import chat
from rollout_engine.admission import PROMPT_KEYS
from rollout_engine.batch.rows import Row


def load_template(choice: str) -> str:
    """``auto``, ``none``, or the text of a Jinja file. Raises ValueError where there is no such file."""
    if choice in ("auto", "none"):
        return choice
    try:
        return Path(choice).read_text()
    except OSError as error:
        raise ValueError(f"chat template {choice!r} is neither auto, none nor a readable file: {error}") from None


@dataclass(frozen=True)
class PromptForm:
    """How a row's columns become a prompt.

    Args:
        column: the column with the prompt: text, messages or token ids; None looks for the usual names.
        chat: wrap text as a user's message. system: a system message to put first, which implies ``chat``.
        template: "auto" is the tokenizer's own, "none" refuses messages, else it is Jinja text.
        template_args: passed to the template.

    Raises ValueError where these contradict each other.
    """

    column: str | None = None
    chat: bool = False
    system: str | None = None
    template: str = "auto"
    template_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.template == "none" and (self.chat or self.system is not None or self.template_args):
            raise ValueError("chat, a system message and template arguments need a chat template, and it is 'none'")
        if not isinstance(self.template_args, dict | None):
            raise ValueError(f"template arguments are a JSON object, not {self.template_args!r}")

    def prompt(self, row: Row, tokenizer: Any) -> dict[str, Any]:
        """The row's prompt as ``LLM.generate`` takes it. Raises ValueError saying what is wrong with the row."""
        value = row.columns.get(self._column(row.columns))
        if not isinstance(row.columns.get("id", ""), str | int | None):
            raise ValueError(f"'id' is text or an integer, not {row.columns['id']!r:.80}")
        if not value:
            raise ValueError("the prompt is empty")
        if isinstance(value, list) and not any(isinstance(part, dict) for part in value):
            return {"prompt_token_ids": value}
        if isinstance(value, str):
            if not self.chat and self.system is None:
                return {"prompt": value}
            value = [{"role": "user", "content": value}]
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise ValueError(f"a prompt is text, messages or token ids, not {value!r:.80}")
        if self.template == "none":
            raise ValueError("messages need a chat template, and it is 'none'")
        if self.system is not None and value[0].get("role") != "system":
            value = [{"role": "system", "content": self.system}, *value]
        template = None if self.template == "auto" else self.template
        ids = chat.encode_chat(tokenizer, value, chat_template=template, **(self.template_args or {}))
        return {"prompt_token_ids": ids}

    def _column(self, columns: dict[str, Any]) -> str:
        if self.column is not None:
            if self.column not in columns:
                raise ValueError(f"no column {self.column!r}; there are {sorted(columns)}")
            return self.column
        found = [key for key in PROMPT_KEYS if columns.get(key) is not None]
        if len(found) != 1:
            has = " and ".join(map(repr, found)) or f"only {sorted(columns)}"
            raise ValueError(f"a row needs one of {list(PROMPT_KEYS)} and has {has}; --prompt-column names another")
        return found[0]
