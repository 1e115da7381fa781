"""The output and what belongs to it: answers, failures, and the settings they were made with.

Rows are written in the input's order, one after the other, each to one of two files. So what a killed process leaves
is a prefix of the rows plus at most one torn row, and the files say themselves how far it came.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from rollout_engine.batch.rows import Row

SYNC_SECONDS = 10  # at most this much work is lost with the machine; with the process alone, none that was written


@dataclass(frozen=True)
class Record:
    """What comes of one row: ``data`` is its ``answers`` lines of the output, or its one line of the errors file."""

    data: bytes
    failed: bool
    answers: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Done:
    """Rows that earlier runs have finished, the failed ones among them, and where the files end with them."""

    rows: int = 0
    failed: int = 0
    output_bytes: int = 0
    errors_bytes: int = 0
    complete: bool = False  # these are all rows of the input


class Output:
    """``out.jsonl``, ``out.errors.jsonl`` and ``out.jsonl.run.json``.

    Args:
        path: of the answers, named ``.jsonl``. num_samples: lines per answered row.
    """

    def __init__(self, path: str | Path, num_samples: int) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(f"output {str(path)!r}: JSON lines are written, so its name must end in .jsonl")
        self.errors = self.path.with_suffix(".errors.jsonl")
        self.sidecar = self.path.with_name(self.path.name + ".run.json")
        self.num_samples = num_samples
        self._files: dict[Path, BinaryIO] = {}
        self._synced = time.monotonic()

    def check(self, settings: dict[str, Any]) -> None:
        """Raise ValueError, naming the difference, unless what is there was made with the same settings."""
        if not self.sidecar.exists():
            if any(file.exists() and file.stat().st_size for file in (self.path, self.errors)):
                raise ValueError(
                    f"{self.path} is there, but not {self.sidecar.name}, which says how it was made; choose another "
                    "output, or --overwrite it"
                )
            return
        before = json.loads(self.sidecar.read_text())
        now = json.loads(json.dumps(settings))
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{self.path} was begun with {key}={before.get(key)!r}, and now it is {now.get(key)!r}"
                f"{f' (also changed: {changed[1:]})' if changed[1:] else ''}; go on with the settings of "
                f"{self.sidecar.name}, choose another output, or --overwrite"
            )

    def open(self, settings: dict[str, Any], rows: Iterable[Row], *, overwrite: bool) -> Done:
        """Make ready to write after what is done, and say what that is. ``rows`` are those of the whole input.

        Raises ValueError as :meth:`check` and :meth:`done` do, and when another process is writing here.
        """
        if not overwrite:
            self.check(settings)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fcntl.flock(self._file(self.path), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {self.path}; wait for it, or end it") from None
        done = Done() if overwrite else self.done(rows)
        os.truncate(self.path, done.output_bytes)
        if self.errors.exists():
            os.truncate(self.errors, done.errors_bytes)
            if not done.failed:
                self.errors.unlink()
        write_atomic(self.sidecar, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return done

    def done(self, rows: Iterable[Row]) -> Done:
        """How far the files have come: the longest run of whole rows from the input's beginning.

        Raises ValueError where they belong to another input.
        """
        answered, failed = self._answered(), self._failed()
        answer, failure = next(answered, None), next(failed, None)
        done = Done()
        for row in rows:
            if failure is not None and failure[0] == row.line:
                done = replace(done, rows=done.rows + 1, failed=done.failed + 1, errors_bytes=failure[1])
                failure = next(failed, None)
            elif answer is None:
                return done
            elif answer[0] != row.id:
                raise ValueError(
                    f"{self.path} has answers to id {answer[0]!r} where line {row.line} of the input has id "
                    f"{row.id!r}; it belongs to another input. Choose another output, or --overwrite"
                )
            else:
                done = replace(done, rows=done.rows + 1, output_bytes=answer[1])
                answer = next(answered, None)
        if answer is not None:
            raise ValueError(f"{self.path} has answers to more rows than the input has; choose another output")
        return replace(done, complete=True)

    def write(self, record: Record) -> None:
        """Append the next row. What is written outlives this process at once, and the machine after a sync."""
        file = self._file(self.errors if record.failed else self.path)
        file.write(record.data)
        file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        for file in self._files.values():
            os.fsync(file)
        self._synced = time.monotonic()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        """Give the files and the lock back."""
        self.sync()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, path: Path) -> BinaryIO:
        if path not in self._files:
            self._files[path] = path.open("ab")
        return self._files[path]

    def _answered(self) -> Iterator[tuple[str | int, int]]:
        """(id, end in bytes) of each row whose answers are all there."""
        name: Any = None
        for number, end, line in _whole_lines(self.path):
            index = (number - 1) % self.num_samples
            if line.get("index") != index or (index and line.get("id") != name):
                raise ValueError(f"{self.path}, line {number}: expected answer {index} of a row, found {line!r:.120}")
            name = line.get("id")
            if index == self.num_samples - 1:
                yield name, end

    def _failed(self) -> Iterator[tuple[int, int]]:
        """(line of the input, end in bytes) of each failure."""
        for _, end, line in _whole_lines(self.errors):
            yield line["line"], end


def _whole_lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(number, end in bytes, content) of a file's lines, but for a torn last one."""
    if not path.exists():
        return
    end = 0
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                return
            end += len(text)
            try:
                yield number, end, json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged ({error}); repair it, or --overwrite") from error


def write_atomic(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)
