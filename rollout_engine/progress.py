"""How far a generation has come, on stderr: a bar for a person at a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 30.0  # without a terminal


class Progress:
    """Counts answers and tokens.

    Args:
        label: what is under way; None shows nothing. total: answers to come; None is a stream's.
        clock: seconds.

    Where stderr is no terminal (nohup, Slurm) a line is written with the first count that comes ``LINE_EVERY_S`` after
    the start or the last line; so a short run writes none.
    """

    def __init__(self, label: str | None, total: int | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._total, self._clock = label, total, clock
        self._on_terminal = sys.stderr.isatty()
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} tok/s"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=label is None or not self._on_terminal,
        )
        self._task = self._bar.add_task(label or "", total=total, rate="-")
        self._answers = self._tokens = 0
        self._begin = self._last_line = clock()

    def advance(self, answers: int, tokens: int) -> None:
        self._answers += answers
        self._tokens += tokens
        now = self._clock()
        elapsed = now - self._begin
        rate = f"{self._tokens / elapsed:,.0f}" if elapsed else "-"
        self._bar.update(self._task, completed=self._answers, rate=rate)
        if self._label is not None and not self._on_terminal and now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            print(self._line(rate, elapsed), file=sys.stderr, flush=True)

    def _line(self, rate: str, elapsed: float) -> str:
        """Done, tokens/s and time left, if all goes on as since the start."""
        if self._total is None:
            return f"{self._label}  {self._answers:,}  {rate} tok/s"
        left = self._total - self._answers
        eta = timedelta(seconds=round(left * elapsed / self._answers)) if self._answers else "-"
        return f"{self._label}  {self._answers:,}/{self._total:,}  {rate} tok/s  ETA {eta}"

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()
