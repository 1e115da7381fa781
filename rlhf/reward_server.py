"""Rewards from an HTTP server: one POST a group of answers.

Request: ``{"prompt": text, "messages": [...], "columns": {...}, "completions": [{"text", "token_ids",
"finish_reason"}, ...]}``; ``messages`` is the prompt's conversation, empty where it is plain text. Answer, with status
200: ``{"scores": [...]}``, for each completion a number, null (not judged) or ``{"value": number, "parts": {...}}``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import httpx2

from rlhf.calls import make_caller
from rlhf.recipe import Verdict, verdict
from rlhf.types import Completion, Problem, Prompt, Score

logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line a request would bury the role's log

ATTEMPTS = 3
RETRY_AFTER_S = 0.2  # doubled each time
HEADERS = {"Content-Type": "application/json"}


class RewardServer:
    """A source of rewards, as a recipe is one: see ``rlhf.roles.reward.Source``."""

    per_group = True

    def __init__(self, name: str, url: str) -> None:
        self.name = name
        self.url = url
        self.title = f"reward server {name} ({url})"
        # Every call opens a connection of its own: one that is kept from the last step, minutes ago, is likely dead.
        # Time is bounded by whoever calls.
        self.client = httpx2.AsyncClient(timeout=None, limits=httpx2.Limits(max_keepalive_connections=0))

    def arguments(self, prompt: Prompt) -> dict[str, Any]:
        return {"prompt": prompt}

    async def reward(self, completions: Sequence[Completion], prompt: Prompt) -> tuple[int, str]:
        """Status and text of the server's answer. Raises httpx2.HTTPError when there is none.

        A server that can't be reached, or hangs up, is asked again.
        """
        question = {
            "prompt": prompt.text,
            "messages": prompt.messages,
            "columns": prompt.columns,
            "completions": [
                {"text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason} for c in completions
            ],
        }
        content = json.dumps(question, default=str)  # a column may hold a date
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = await self.client.post(self.url, content=content, headers=HEADERS)
                return response.status_code, response.text
            except (httpx2.NetworkError, httpx2.RemoteProtocolError):
                if attempt == ATTEMPTS:
                    raise
            await asyncio.sleep(RETRY_AFTER_S * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def verdicts(self, given: tuple[int, str], count: int) -> list[Verdict]:
        """The server's answer as scores of the ``count`` answers that it judged."""
        status, text = given
        if status != 200:
            return [Problem("error", f"returned status {status}: {text!r:.300}")] * count
        try:
            answer = json.loads(text)
        except ValueError:
            return [Problem("error", f"returned what is no JSON: {text!r:.300}")] * count
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            wanted = f'for {count} answers it must return {{"scores": [...]}} with {count} of them'
            return [Problem("error", f"returned {text!r:.300}; {wanted}")] * count
        return [_verdict(score) for score in scores]

    def described(self, error: BaseException) -> str:
        """What a call that raised this did."""
        if isinstance(error, httpx2.HTTPError):
            return f"gave no answer: {type(error).__name__} {error}".rstrip()
        return f"could not be asked: {type(error).__name__}: {error}"

    def check(self, prompt: Prompt, timeout_s: float) -> None:
        """Have an empty answer judged. Raises ValueError where the server doesn't do it properly, in time."""
        caller = make_caller(self.reward, timeout_s, concurrency=1)
        try:
            given = caller.start(partial(self.reward, [Completion(prompt.text, "", (), "stop")], prompt)).result()
        except Exception as error:
            what = str(error) if isinstance(error, TimeoutError) else self.described(error)
            raise ValueError(f"{self.title} {what}. Start it, or mend reward.servers") from None
        (found,) = self.verdicts(given, 1)
        if isinstance(found, Problem):
            raise ValueError(f"{self.title} {found.message}, for an empty answer. Mend it, or reward.servers")


def _verdict(score: Any) -> Verdict:
    """One of the scores of an answer."""
    if isinstance(score, dict) and "value" in score and score.keys() <= {"value", "parts"}:
        return verdict(Score(score["value"], score.get("parts") or {}))
    if score is None or isinstance(score, (int, float)):
        return verdict(score)
    return Problem("error", f'returned the score {score!r:.300}; it is a number, null or {{"value", "parts"}}')
