"""What callers ask for becomes requests that the engine can finish, or a ValueError."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence as Seq
from typing import Any

from rollout_engine import chat
from rollout_engine.config import EngineConfig
from rollout_engine.models.checkpoint import Model
from rollout_engine.types import Group, SamplingParams, fits_int64

Prompt = str | dict[str, Any] | list[int]
PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")


class Admission:
    """Checks requests against one engine's model, settings and pages."""

    def __init__(self, model: Model, config: EngineConfig, num_pages: int) -> None:
        self.tokenizer = model.tokenizer
        self.config = config
        self.num_pages = num_pages
        self.context = model.decoder.config.max_position
        self.vocab = model.decoder.head.num_tokens
        self.eos_ids = model.eos_ids
        self._request_ids = itertools.count()

    def check(self, params: SamplingParams, prompt_tokens: int = 1) -> int:
        """Longest sequence, in tokens, that a prompt and an answer to it may make.

        Raises ValueError where this engine can't run ``params`` on a prompt of that length.
        """
        if prompt_tokens >= self.context:
            raise ValueError(
                f"the prompt has {prompt_tokens} tokens; the context of {self.context} must hold at least one more"
            )
        if params.n > self.config.max_num_seqs:
            limit = self.config.max_num_seqs
            raise ValueError(f"n={params.n} answers at once, but max_num_seqs={limit}; raise it or lower n")
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this engine was built without; give stop_token_ids")
        if params.min_tokens and len(self.stop_ids(params)) >= self.vocab:
            raise ValueError("min_tokens needs a token that doesn't stop the answer, and all are in stop_token_ids")
        max_len = min(prompt_tokens + params.max_tokens, self.context)
        pages = -(-max_len // self.config.page_size)
        if pages > self.num_pages:
            raise ValueError(
                f"one answer may need {max_len} tokens = {pages} KV pages, but kv_cache_gib={self.config.kv_cache_gib} "
                f"holds {self.num_pages}; raise kv_cache_gib or lower max_tokens"
            )
        return max_len

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Tokens that end an answer, of those that can be drawn."""
        ids = {*params.stop_token_ids, *(() if params.ignore_eos else self.eos_ids)}
        return frozenset(token for token in ids if 0 <= token < self.vocab)

    def group(self, prompt: Prompt, params: SamplingParams, sample_ids: Seq[int] | None) -> Group:
        """The request for one prompt. Raises ValueError for a prompt or params that the engine can't serve."""
        text, ids = self._encode(prompt)
        if not ids:
            raise ValueError("empty prompt: give at least one token")
        if not 0 <= min(ids) <= max(ids) < self.vocab:
            raise ValueError(f"prompt token ids span {min(ids)}..{max(ids)}; the tokenizer has ids 0..{self.vocab - 1}")
        max_len = self.check(params, len(ids))
        if sample_ids is not None and len(sample_ids) != params.n:
            raise ValueError(f"{len(sample_ids)} sample ids for n={params.n} answers; give one for each answer")
        if not all(map(fits_int64, sample_ids or ())):
            raise ValueError(f"sample_ids={list(sample_ids or ())}: must be integers of 64 bits")
        seed = self.config.seed if params.seed is None else params.seed
        named = list(sample_ids or ())
        return Group(next(self._request_ids), text, ids, params, seed, named, max_len, self.stop_ids(params))

    def _encode(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, dict):
            if len(prompt) != 1 or not set(prompt) <= set(PROMPT_KEYS):
                raise ValueError(f"a prompt dict has one key, of {list(PROMPT_KEYS)}, not {sorted(prompt)}")
            ((key, prompt),) = prompt.items()
            if isinstance(prompt, str) != (key == "prompt"):
                raise ValueError(
                    f"{key!r} can't be {prompt!r:.80}; text goes under 'prompt', a list of role and content under "
                    "'messages', integers under 'prompt_token_ids'"
                )
            if key == "messages":
                return None, chat.encode_chat(self._need_tokenizer(), prompt)
        if isinstance(prompt, str):
            try:
                return prompt, chat.encode(self._need_tokenizer(), prompt)
            except TypeError as error:  # half a surrogate pair is no text
                raise ValueError(f"the tokenizer refuses the prompt {prompt!r:.80}: {error}") from None
        try:
            return None, [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(f"prompt token ids must be integers, not {prompt!r:.80}") from None

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and this engine was built without; give token ids")
        return self.tokenizer
