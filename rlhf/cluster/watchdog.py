"""What a process is doing, in a file that can be read when the process answers no more."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")

EARLY_S = 10.0  # a late call writes its stacks this much before the caller gives it up, or a tenth of its time
DUMPED = "Timeout ("  # faulthandler's first word
REPORT_CHARS = 6000
STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a device",
    "T": "STOPPED by a signal (kill -CONT lets it go on)",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "dead",
    None: "dead",
}


class Watchdog:
    """Keeps the phase of this process, and since when, in ``file``; below it, once the phase takes too long, the Python
    stacks of all threads. One phase at a time."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("wb", buffering=0)
        self._write("starting")

    @contextmanager
    def phase(self, name: str, timeout_s: float) -> Iterator[None]:
        """``timeout_s``: when the caller gives up. The stacks are written by a C thread, which needs no GIL."""
        self._write(name)
        faulthandler.dump_traceback_later(max(0.9 * timeout_s, timeout_s - EARLY_S), file=self.file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._write(f"idle after {name}")

    def each(self, name: str, items: Iterator[Item], timeout_s: float) -> Iterator[Item]:
        """The items of a generator; making each is a phase."""
        end = object()
        with closing(items):  # type: ignore[type-var]
            while True:
                with self.phase(name, timeout_s):
                    item = next(items, end)
                if item is end:
                    return
                yield item  # type: ignore[misc]

    def _write(self, what: str) -> None:
        line = f"{what} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode()
        self.file.seek(0)
        self.file.write(line)
        self.file.truncate()  # after the line is there, so that whoever reads finds one


def has_dumped(file: Path) -> bool:
    return file.exists() and DUMPED in file.read_text(errors="replace")


def account(file: Path) -> str:
    """The phase that ``file`` holds, and the stacks below it, where there are any."""
    if not file.exists():
        return "it has not started, or is on a node whose files can't be read here\n"
    phase, _, stacks = file.read_text(errors="replace").partition("\n")
    cut = "...\n" if len(stacks) > REPORT_CHARS else ""
    return f"{phase}\n{cut}{stacks[-REPORT_CHARS:]}"


def process_state(pid: int) -> str | None:
    """The letter of proc(5) for a process on this node; None: there is none."""
    stat = _stat(pid)
    return stat[0] if stat else None


def start_time(pid: int) -> str | None:
    """Clock ticks after boot; with the process id it names a process for good."""
    stat = _stat(pid)
    return stat[19] if stat else None


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; what comes before may hold blanks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def resident_bytes() -> tuple[int, int]:
    """Of this process: now, and at its peak."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) << 10, int(fields["VmHWM"].split()[0]) << 10


def kill_if_alive(pid: int, started: str | None) -> None:
    """End a process on this node, unless its number has gone to another one."""
    if started is not None and start_time(pid) == started:
        os.kill(pid, 9)
