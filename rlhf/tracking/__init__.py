"""What a run shows while it goes: a line per step, metrics.jsonl, and W&B. wandb is imported in ``wandb.py`` alone."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf.config import Config
from rlhf.evaluate import Evaluation
from rlhf.metrics import gap_alarm
from rlhf.plan import numerics
from rlhf.reward_model.config import RewardModelConfig
from rlhf.run_folder import RunFolder
from rlhf.tracking.console import Console, step_line
from rlhf.types import Batch, Trajectory


class MetricLog:
    """A row of scalars per step: a line in metrics.jsonl and on the console, and the scalars in W&B."""

    def __init__(self, config: Config | RewardModelConfig, steps: int, run: RunFolder, console: Console) -> None:
        self.run = run
        self.steps = steps
        self.console = console
        self._file = (run.path / "metrics.jsonl").open("a", buffering=1)
        self._wandb = None
        if config.tracking.wandb != "disabled":
            from rlhf.tracking.wandb import WandbTracker

            self._wandb = WandbTracker(config, run.path)

    @contextmanager
    def phase(self, step: int, times: dict[str, float], name: str) -> Iterator[None]:
        """Show what is going on, and add its seconds to ``times``."""
        self.console.phase(step, self.steps, name)
        begin = time.perf_counter()
        yield
        times[name] = times.get(name, 0.0) + time.perf_counter() - begin

    def record(self, row: dict[str, Any], line: str) -> None:
        """Keep a step's scalars, and print its line."""
        # JSON has no NaN: what isn't finite is null.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        self.console.line(line)
        if self._wandb:
            self._wandb.log_metrics(row)

    def forget_after(self, step: int) -> list[dict[str, Any]]:
        """The run goes on after ``step``: later rows go. Those that stay, as they are in the file."""
        path = self.run.path / "metrics.jsonl"
        kept = list(itertools.takewhile(lambda line: _step_of(line) <= step, path.read_text().splitlines()))
        self._file.close()
        self.run.write("metrics.jsonl", "".join(line + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        return [json.loads(line) for line in kept]

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.close(failed)


class Tracker(MetricLog):
    """Fans metrics and samples of an RL run out. ``history`` keeps every step's metrics for the curve."""

    def __init__(self, config: Config, run: RunFolder, console: Console) -> None:
        super().__init__(config, config.run.steps, run, console)
        self.config = config
        self.history: list[dict[str, Any]] = []
        self.progress = {"samples": 0, "tokens": 0}
        self.alarmed = False  # of the gap between sampler and trainer

    def rewind(self, step: int, progress: dict[str, int]) -> None:
        """The run goes on after ``step``: forget the steps that came later. ``progress``: the counters as of then."""
        rows = self.forget_after(step)
        self.history = [{n: math.nan if value is None else value for n, value in row.items()} for row in rows]
        self.progress = dict(progress)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record a step, and say so where it wasn't sampled from what is trained."""
        self.progress["samples"] += int(metrics["length/answers"])
        self.progress["tokens"] += int(metrics["length/answer_tokens"])
        row = {"step": step, **metrics, **{f"progress/{axis}": count for axis, count in self.progress.items()}}
        self.history.append(row)
        self.record(row, step_line(row, self.steps))
        alarm = None if self.alarmed else gap_alarm(step, metrics, exact=numerics(self.config) == "exact")
        if alarm:
            self.alarmed = True
            self.console.line(alarm)

    def samples(self, step: int, trajectories: list[Trajectory], batch: Batch) -> None:
        """Keep a step's answers: all in the run folder, the first few in the W&B table ``samples``."""
        parts = zip(batch.column("advantages").split(batch.lengths), batch.loss_mask.split(batch.lengths), strict=True)
        left = iter([float((part[mask] if mask.any() else part[-1:]).mean()) for part, mask in parts])
        advantages = [next(left) if t.score is not None else None for t in trajectories]
        rows = [_row(step, t, advantage) for t, advantage in zip(trajectories, advantages, strict=True)]
        self.run.write_rows(f"rollouts/{step:06d}.jsonl.gz", rows)
        if self._wandb and self.config.tracking.samples_per_step:
            self._wandb.log_samples("samples", rows[: self.config.tracking.samples_per_step])

    def evaluated(self, evaluation: Evaluation) -> None:
        """Keep a held-out evaluation: all answers in the run folder, the first few in ``eval/samples``."""
        rows = [_row(evaluation.step, t, None) for t in evaluation.trajectories]
        self.run.write_rows(f"eval/{evaluation.step:06d}.jsonl", rows)
        if self._wandb and self.config.tracking.samples_per_step:
            self._wandb.log_samples("eval/samples", rows[: self.config.tracking.samples_per_step])


def _step_of(line: str) -> float:
    """Of a line of metrics.jsonl; of one that a kill cut short, infinity."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return math.inf


def _row(step: int, t: Trajectory, advantage: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": t.prompt.text,
        "answer": t.completion.text,
        "reward": t.score.value if t.score else None,
        "parts": t.score.parts if t.score else {},
        "advantage": advantage,
        "finish_reason": t.completion.finish_reason,
        "version": t.completion.weight_versions[-1] if t.completion.weight_versions else None,
        "logprob": sum(t.completion.logprobs),
        "token_ids": t.completion.token_ids,
        "problem": t.problem.message if t.problem else None,
    }
