"""A reward server on the loopback, and a reward model that isn't one, for tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf.judging import Judges
from rlhf.types import Completion, Prompt, Score, Trajectory

# A request's JSON -> the answer's JSON, or the whole answer: (status, body or its pieces).
Answer = Callable[[dict[str, Any]], Any]
Make = Callable[..., Judges]  # the fixture make_judges
Serve = Callable[..., "RewardHttp"]  # the fixture serve


class Server(ThreadingHTTPServer):
    def handle_error(self, *args: Any) -> None:
        """A client that has gone away is what some tests are about."""


class RewardHttp:
    """Answers each POST with ``answer(request)``; ``requests`` keeps what came. ``hang_up``: as many requests are
    dropped without an answer."""

    def __init__(self, answer: Answer, hang_up: int = 0) -> None:
        self.answer = answer
        self.hang_up = hang_up
        self.requests: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                if len(outer.requests) <= outer.hang_up:
                    self.close_connection = True
                    return
                found = outer.answer(request)
                status, body = found if isinstance(found, tuple) else (200, json.dumps(found))
                self.send_response(status)
                if isinstance(body, str):
                    self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                for piece in [body] if isinstance(body, str) else body:
                    self.wfile.write(piece.encode())

            def log_message(self, *args: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/judge"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Nobody listens on the port any longer."""
        self.server.shutdown()
        self.server.server_close()


class FakeModel:
    """Scores a sequence by the value of its last token over ten, or as told."""

    def __init__(self, scores: list[float] | None = None) -> None:
        self.told = scores
        self.seen: list[list[tuple[int, ...]]] = []

    def judge(self, token_ids: list[tuple[int, ...]]) -> list[float]:
        self.seen.append(token_ids)
        return self.told or [tokens[-1] / 10 for tokens in token_ids]


def judged(judges: Judges, *texts: str) -> list[Trajectory]:
    """Answers to one prompt; answer i is token i + 1."""
    answers = [Completion("p", text, (i + 1,), "stop", (-1.0,)) for i, text in enumerate(texts)]
    return judges.score([Prompt(0, "p", (9, 8), {"answer": "42"})], [answers])


def scores(judges: Judges, *texts: str) -> list[Score | None]:
    return [t.score for t in judged(judges, *texts)]


def values(found: list[Trajectory]) -> list[float | None]:
    return [t.score.value if t.score else None for t in found]


def numbers(request: dict[str, Any]) -> dict[str, Any]:
    """A server's answer: each text is the number that it is worth."""
    return {"scores": [float(c["text"]) for c in request["completions"]]}
