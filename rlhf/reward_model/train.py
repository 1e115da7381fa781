"""The loop of a reward model: a minibatch of pairs, an optimizer step, now and then the held-out pairs."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rlhf.checkpoint import Checkpoints
from rlhf.cluster import Cluster
from rlhf.metrics import timing
from rlhf.reward_model.config import RewardModelConfig
from rlhf.reward_model.metrics import PairEvaluation
from rlhf.reward_model.pairs import Pair, PairData, Pairs
from rlhf.roles.reward_model import RewardLearner
from rlhf.run_folder import RunFolder, write_atomic
from rlhf.tracking import MetricLog
from rlhf.tracking.console import clock, short


@dataclass(frozen=True)
class State:
    """What the loop knows after ``step`` steps; minibatches follow from the step. before, latest: evaluations."""

    step: int
    before: PairEvaluation
    latest: PairEvaluation
    elapsed_s: float


def train_reward_model(
    config: RewardModelConfig, cluster: Cluster, tracker: MetricLog, run: RunFolder, checkpoint: Path, data: PairData
) -> tuple[PairEvaluation, PairEvaluation]:
    """Train from ``checkpoint`` until the run's last step; held-out evaluations before and after.

    Goes on from the run's newest whole checkpoint, if it has one.
    """
    steps = config.pairs.num_steps(len(data.train))
    learner = cluster.spawn(
        "reward_model",
        RewardLearner,
        ranks=config.ranks["reward_model"],
        checkpoint=checkpoint,
        run_folder=run.path,
        model=config.model,
        train=config.train,
        section=config.pairs,
        total_updates=steps,
        timeout_s=config.cluster.timeout_s,
    )
    learners = {"reward_model": learner}
    held_out = Pairs.mean(data.held_out)
    checkpoints = Checkpoints(run.path, config.checkpoint)
    state: State | None = checkpoints.load(learners)
    if state is None:
        before = evaluate(learner, held_out, run, 0)
        state = State(0, before, before, 0.0)
    before, latest = state.before, state.latest
    tracker.forget_after(state.step)
    batches = islice(minibatches(data.train, config.pairs.batch_size, config.run.seed), state.step, None)
    started = time.perf_counter() - state.elapsed_s
    for step in range(state.step + 1, steps + 1):
        times: dict[str, float] = {}
        pairs = next(batches)
        with tracker.phase(step, times, "train"):
            metrics = learner.update(pairs)
        last = step == steps
        save = last or (config.checkpoint.every and step % config.checkpoint.every == 0)
        if save or (config.eval.every and step % config.eval.every == 0):  # a checkpoint says how good it is
            with tracker.phase(step, times, "evaluate"):
                latest = evaluate(learner, held_out, run, step)
        found = {f"eval/{name}": value for name, value in latest.metrics.items()}
        row = {
            "step": step,
            **metrics,
            **found,
            "eval/step": latest.step,
            **timing(times, started, step, steps, sum(pairs.sizes)),
            "progress/samples": step * config.pairs.batch_size,
        }
        tracker.record(row, step_line(row, steps))
        if save:
            folder = checkpoints.write(
                State(step, before, latest, time.perf_counter() - started), learners, "reward_model"
            )
            write_atomic(folder / "hf" / "calibration.json", json.dumps(latest.metrics, indent=1))
            checkpoints.finish(folder, {"step": step, "eval/step": latest.step, **found})
    return before, latest


def minibatches(pairs: Sequence[Pair], size: int, seed: int) -> Iterator[Pairs]:
    """Endless; each pass over the pairs in an order of its own, which depends on the seed alone. Pairs with the same
    chosen answer stay together, as in InstructGPT (arXiv 2203.02155, sec. 3.5): it is then forwarded once."""
    same: dict[tuple[int, ...], list[Pair]] = {}
    for pair in pairs:
        same.setdefault(pair.chosen, []).append(pair)
    groups = list(same.values())
    waiting: list[Pair] = []
    epoch = 0
    while True:
        while len(waiting) < size:
            shuffled = random.Random(f"{seed}/{epoch}").sample(groups, len(groups))
            waiting += [pair for group in shuffled for pair in group]
            epoch += 1
        yield Pairs.mean(waiting[:size])
        waiting = waiting[size:]


def evaluate(learner: RewardLearner, held_out: Pairs, run: RunFolder, step: int) -> PairEvaluation:
    """Score the held-out pairs; metrics and tables go to ``eval/<step>.json``."""
    evaluation = PairEvaluation(step, learner.score(held_out), tuple(pair.kind for pair in held_out.pairs))
    table = [asdict(row) for row in evaluation.table]
    kept = {**evaluation.metrics, "kinds": evaluation.by_kind, "reliability": table}
    run.write(f"eval/{step:06d}.json", json.dumps(kept, indent=1))
    return evaluation


def step_line(row: dict[str, float], steps: int) -> str:
    """One line for a step's metrics."""
    parts = [
        f"step {row['step']}/{steps}",
        f"loss {short(row['reward_model/loss'])}",
        f"accuracy {row['reward_model/accuracy']:.1%}",
        f"margin {short(row['reward_model/margin'])}",
        f"| eval {row['eval/accuracy']:.1%} auc {row['eval/auc']:.3f} ece {short(row['eval/ece'])}@{row['eval/step']}",
        f"| {row['time/step']:.2f} s  {row['throughput/tokens_per_s']:.0f} tok/s | ETA {clock(row['time/eta'])}",
    ]
    if row["reward_model/skipped_updates"]:
        parts.append(f"SKIPPED {row['reward_model/skipped_updates']:.0f} updates")
    return "  ".join(parts)
