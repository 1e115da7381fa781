"""A progress bar with a token rate, for a person at a terminal; silent elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Counts answers and tokens. ``label`` None shows nothing; ``total`` None is a stream's."""

    def __init__(self, label: str | None, total: int | None) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]} tok/s"),
            TimeRemainingColumn(),
            transient=True,
            disable=label is None,
        )
        self._task = self._bar.add_task(label or "", total=total, rate="-")
        self._tokens = 0

    def advance(self, answers: int, tokens: int) -> None:
        self._tokens += tokens
        task = self._bar.tasks[0]
        rate = f"{self._tokens / task.elapsed:,.0f}" if task.elapsed else "-"
        self._bar.update(self._task, advance=answers, rate=rate)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()
