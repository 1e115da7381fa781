"""The bench's ratios as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of each case's share of the machine's limit, with its ratio to the best peer written beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(reversed(report["cases"]))
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.35 * len(rows)))
    axes.barh(range(len(rows)), [row["of_limit"] for row in rows], color="#4477aa")
    axes.set_yticks(range(len(rows)), [f"{row['op']}: {row['case']}" for row in rows], fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the machine's measured limit (copy bandwidth or matmul rate)")
    axes.set_title(f"{report['device']}, {report['dtype']}", fontsize=9)
    for i, row in enumerate(rows):
        if row["ratio"]:
            axes.text(row["of_limit"] + 0.01, i, f"{row['ratio']:.2f} x {row['best_peer']}", va="center", fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
