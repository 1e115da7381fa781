"""Answer tokens become text, and the text is searched for stop strings while it grows. No torch here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rollout_engine.types import SamplingParams

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders show for bytes that are no character
CHARACTER = 4  # byte tokens that the longest character takes
# Tokens at a window's edge that may read differently than in the whole answer: a character cut in two, or a first
# token whose leading space some decoders drop.
MARGIN = 2 * CHARACTER


class Detokenizer:
    """Text of answers, for one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {token for token, entry in added.items() if entry.special} | set(tokenizer.all_special_ids)

    def text(self, answer: Sequence[int], params: SamplingParams) -> tuple[str, str | None]:
        """The answer's text, ended by its first stop string, and that string. Of two at one place, the first listed.

        A stop string counts when it ends beyond the text of the first ``min_tokens`` tokens.
        """
        text = self._decode(answer, params)
        if not params.stop_strings:
            return text, None
        settled = len(self._decode(answer[: params.min_tokens], params)) if params.min_tokens else 0
        found = [(text.find(stop, max(0, settled - len(stop) + 1)), stop) for stop in params.stop_strings]
        at, stop = min((hit for hit in found if hit[0] >= 0), key=lambda hit: hit[0], default=(-1, None))
        if stop is None:
            return text, None
        return text[: at + len(stop) if params.include_stop_str_in_output else at], stop

    def stop_string(self, token_ids: Sequence[int], start: int, params: SamplingParams) -> str | None:
        """The stop string that the newest token of the answer ``token_ids[start:]`` completed.

        Looks at as many of the last tokens as could hold one (each has a byte at least), so that the work doesn't grow
        with the answer.
        """
        if len(token_ids) - start <= params.min_tokens:
            return None
        if not self._may_stop(self._tail(token_ids, start, params), params):
            return None
        return self.text(token_ids[start:], params)[1]  # a window's edge may deceive; the whole answer doesn't

    def _may_stop(self, window: Sequence[int], params: SamplingParams) -> bool:
        # Some decoders show a whole run of byte tokens as broken when its first character is cut in two, so a window
        # with something broken is read from the next tokens as well: one of them begins a character.
        for first in range(CHARACTER):
            tail = self._decode(window[first:], params)
            if any(stop in tail for stop in params.stop_strings):
                return True
            if REPLACEMENT not in tail:
                return False
        return False

    def _tail(self, token_ids: Sequence[int], start: int, params: SamplingParams) -> Sequence[int]:
        """The last tokens that can have a part in a stop string ending now."""
        count = max(len(stop.encode("utf-8", "surrogatepass")) for stop in params.stop_strings) + MARGIN
        window = token_ids[max(start, len(token_ids) - count) :]
        if not params.skip_special_tokens or self._special.isdisjoint(window):
            return window
        # Special tokens leave no trace in the text, so what is left and right of them may form a stop string.
        answer = (token_ids[i] for i in range(len(token_ids) - 1, start - 1, -1))
        visible = list(itertools.islice((token for token in answer if token not in self._special), count))
        return visible[::-1]

    def _decode(self, answer: Sequence[int], params: SamplingParams) -> str:
        return self._tokenizer.decode(answer, skip_special_tokens=params.skip_special_tokens)
