"""What to look at when a run ends: the curve, and answers before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.evaluate import Evaluation


def draw_curve(history: list[dict[str, Any]], before: Evaluation, path: Path) -> None:
    """Training reward and held-out accuracy over steps, and the log-prob gap below, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(8, 6), height_ratios=(3, 1), sharex=True, layout="constrained"
    )
    top.plot(
        [row["step"] for row in history], [row["reward/mean"] for row in history], color="0.7", label="training reward"
    )
    marks = {before.step: before.metrics["eval/accuracy"]}
    marks.update({row["eval/step"]: row["eval/accuracy"] for row in history if "eval/accuracy" in row})
    top.plot(list(marks), list(marks.values()), "o-", color="tab:blue", label="held-out accuracy")
    top.set(ylim=(0, 1.02), ylabel="share")
    top.legend(loc="lower right")
    top.grid(alpha=0.3)
    gaps = {row["step"]: row["rollout/logprob_gap_max"] for row in history if "rollout/logprob_gap_max" in row}
    bottom.plot(list(gaps), list(gaps.values()), color="tab:red")  # none while a critic warms up alone
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
                _marked(old.completion.text, old.score),
                _marked(new.completion.text, new.score),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _line(text: str) -> str:
    return text.replace("\n", " ")[:60]


def _marked(text: str, score: Any) -> str:
    return f"{_line(text)} {'✓' if score is not None and score.value >= 1 else '✗'}"
