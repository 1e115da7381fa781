"""What a person watching a run sees: a line per step, and a bar."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def short(value: float) -> str:
    """Three significant digits, without the leading zero: .481, 8e-4, 12.3."""
    if value == 0:
        return ".0"
    if abs(value) < 0.01:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    text = f"{value:.3g}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def clock(seconds: float) -> str:
    """1:05:12, or 5:12 under an hour."""
    minutes, sec = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{sec:02d}" if hours else f"{minutes}:{sec:02d}"


def step_line(row: dict[str, Any], steps: int) -> str:
    """One line for a step's metrics; what the run doesn't have is left out."""
    parts = [f"step {row['step']}/{steps}", f"reward {short(row['reward/mean'])}"]
    if "eval/accuracy" in row:
        parts.append(f"eval {short(row['eval/accuracy'])}@{row['eval/step']}")
    parts.append(f"| len {row['length/mean']:.0f} cut {row['length/truncated']:.0%} |")
    if "policy/kl" in row:
        parts.append(f"kl {short(row['policy/kl'])}")
    if "policy/entropy" in row:  # not while a critic warms up alone
        parts.append(f"ent {short(row['policy/entropy'])} clip {row['policy/clip_fraction']:.1%}")
        parts.append(f"gap {short(row['rollout/logprob_gap_max'])}")
    if "critic/explained_variance" in row:
        parts.append(f"critic {row['critic/explained_variance']:z.0%}")
    if row.get("policy/skipped_updates"):
        parts.append(f"SKIPPED {row['policy/skipped_updates']:.0f} updates")
    if failed := row.get("reward/errors", 0) + row.get("reward/timeouts", 0):
        parts.append(f"REWARD FAILED on {failed:.0f} answers")
    times = " ".join(f"{name} {row[f'time/{name}']:.1f}" for name in ("generate", "reward", "score", "train", "swap"))
    parts.append(f"| {times.replace('generate', 'gen')} = {row['time/step']:.1f} s")
    parts.append(f"| {_count(row['throughput/tokens_per_s'])} tok/s | ETA {clock(row['time/eta'])}")
    return "  ".join(parts)


class Console:
    """Lines for the record, and below them, on a terminal, a bar that says what is going on and until when."""

    def __init__(self, log_file: Path) -> None:
        self.rich = RichConsole(highlight=False, soft_wrap=True)
        self._log = log_file.open("a", buffering=1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.rich,
            transient=True,
            disable=not self.rich.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._bar.start()

    def line(self, text: str) -> None:
        """Print a line and keep it in ``train.log``."""
        self._log.write(text + "\n")
        self.rich.print(text, markup=False)

    def phase(self, done: int, total: int, name: str) -> None:
        """The bar: ``done`` of ``total`` are behind us but one, which is busy with ``name``."""
        self._bar.update(self._task, description=f"{name:<10}", completed=done - 1, total=total)

    def close(self) -> None:
        self._bar.stop()
        self._log.close()


class ConsoleHandler(logging.Handler):
    """Log records of the package go to the console's record."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.line(record.getMessage())
