"""What to look at when a run ends: the curve, and answers before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.evaluate import Evaluation
from rlhf.types import Trajectory


def draw_curve(history: list[dict[str, Any]], before: Evaluation, path: Path) -> None:
    """Over steps: training reward, held-out accuracy and, where it differs, held-out reward; the policy's entropy and
    KL to the reference; the log-prob gap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(
        3, 1, figsize=(8, 7.5), height_ratios=(3, 1, 1), sharex=True, layout="constrained"
    )
    top.plot(
        [row["step"] for row in history], [row["reward/mean"] for row in history], color="0.7", label="training reward"
    )
    rows = [before.metrics, *(row for row in history if "eval/accuracy" in row)]
    steps, accuracy = [row["eval/step"] for row in rows], [row["eval/accuracy"] for row in rows]
    top.plot(steps, accuracy, "o-", color="tab:blue", label="held-out accuracy")
    rewards = [row["eval/reward"] for row in rows]
    if rewards != accuracy:
        top.plot(steps, rewards, "s--", color="tab:orange", label="held-out reward")
    shown = [*rewards, *(row["reward/mean"] for row in history)]
    top.set(ylim=(min(0, *shown), max(1.02, *shown)), ylabel="share, reward")
    top.legend(loc="lower right")
    top.grid(alpha=0.3)

    def plot(axes: Any, key: str, **style: Any) -> None:
        """Of the steps that have it: a run without a reference has no KL, a critic that warms up alone no gap."""
        points = {row["step"]: row[key] for row in history if key in row}
        if points:
            axes.plot(list(points), list(points.values()), **style)

    plot(middle, "policy/entropy", color="tab:green", label="entropy")
    plot(middle, "rollout/kl", color="tab:purple", label="KL to the reference")
    middle.set(ylabel="nats a token")
    if middle.lines:
        middle.legend(loc="center right")
    middle.grid(alpha=0.3)
    plot(bottom, "rollout/logprob_gap_max", color="tab:red")
    bottom.set(xlabel="step", ylabel="max |Δ log p|\nsampler - trainer")
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def before_and_after(before: Evaluation, after: Evaluation, count: int = 8) -> str:
    """The same held-out prompts answered by the starting and the trained policy, as a table."""
    rows = [("prompt", "before", "after")]
    for old, new in list(zip(before.trajectories, after.trajectories, strict=True))[:count]:
        rows.append(
            (
                _line(old.prompt.question),
                _marked(before, old),
                _marked(after, new),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _line(text: str) -> str:
    return text.replace("\n", " ")[:60]


def _marked(evaluation: Evaluation, t: Trajectory) -> str:
    return f"{_line(t.completion.text)} {'✓' if t.score is not None and evaluation.is_right(t.score) else '✗'}"
