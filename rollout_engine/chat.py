"""Text and conversations become token ids, with exactly the special tokens that the checkpoint wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a plain prompt. A text that already begins with the BOS token doesn't get a second one."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not begins)["input_ids"])


def render_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, chat_template: str | None = None, **template_args: Any
) -> str:
    """A conversation up to where the assistant speaks, as the text that the template makes of it.

    Args:
        messages: ``{"role": ..., "content": ...}`` each. chat_template: Jinja text; None takes the tokenizer's own.
        template_args: passed through to the template (``enable_thinking``, ``tools``, ...).

    Raises ValueError without a template, and for messages that the template refuses.
    """
    if chat_template is None and tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; give chat_template (Jinja text), or prompts as text or token ids"
        )
    arguments = {"add_generation_prompt": True, **template_args}
    try:
        return tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False, **arguments)
    except Exception as error:  # Jinja has many kinds
        raise ValueError(f"the chat template refuses the messages {list(messages)!r:.200}: {error}") from error


def encode_chat(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, chat_template: str | None = None, **template_args: Any
) -> list[int]:
    """Ids of a conversation; see :func:`render_chat`."""
    return encode_rendered(tokenizer, render_chat(tokenizer, messages, chat_template=chat_template, **template_args))


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """Ids of what a template made: it wrote the special tokens itself, the tokenizer adds none."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
