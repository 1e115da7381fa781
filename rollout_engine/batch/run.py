"""A whole run: what is done already, the rest answered and written, and a summary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rollout_engine.batch.job import Job
from rollout_engine.batch.output import Output, Record
from rollout_engine.batch.parallel import answer_in_parallel
from rollout_engine.progress import Progress


@dataclass
class Summary:
    """Counts of one run; ``failed`` includes the rows that failed in the runs it continues."""

    done_before: int
    failed: int
    rows: int = 0
    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, record: Record) -> None:
        self.rows += 1
        self.failed += record.failed
        self.answers += record.answers
        self.tokens += record.tokens

    def __str__(self) -> str:
        before = f" after {self.done_before:,} done before" if self.done_before else ""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return (
            f"{self.rows:,} rows{before}, {self.failed:,} failed; {self.answers:,} answers, {self.tokens:,} tokens "
            f"in {self.seconds:.1f} s = {rate:,.0f} tok/s"
        )


def generate(
    job: Job, output: str | Path, *, data_parallel: int = 1, overwrite: bool = False, progress: str | None = None
) -> Summary:
    """Answer a file's rows into ``output``, from where an earlier run was ended. ``progress`` labels a
    :class:`Progress`.

    Rows that fail go to the errors file and end nothing. Raises ValueError for settings that can't work or that aren't
    those of the run to continue, and what ended the run early (``WorkerDied``, FloatingPointError, OSError): started
    again, it goes on.
    """
    if data_parallel < 1:
        raise ValueError(f"data_parallel={data_parallel}: must be at least 1")
    begin = time.monotonic()
    with Output(output, job.params.n) as target:
        done = target.open(job.settings(), job.source.rows(), overwrite=overwrite)
        summary = Summary(done.rows, done.failed)
        if done.complete or (job.limit is not None and done.rows >= job.limit):
            return summary
        total = _rows_left(job, done.rows) if progress else None
        with Progress(progress, total) as bar, _records(job, done.rows, data_parallel) as records:
            for record in records:
                target.write(record)
                summary.add(record)
                bar.advance(1, record.tokens)
    summary.seconds = time.monotonic() - begin
    return summary


def _rows_left(job: Job, done: int) -> int | None:
    count = job.source.count()
    return None if count is None else min(count, count if job.limit is None else job.limit) - done


@contextmanager
def _records(job: Job, done: int, data_parallel: int) -> Iterator[Iterator[Record]]:
    if data_parallel > 1:
        with answer_in_parallel(job, done, data_parallel) as records:
            yield records
    else:
        yield job.answer(job.load(), job.rows(done))
