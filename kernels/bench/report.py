"""The table for a person, in a terminal or as Markdown, and the picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kernels.bench.case import LIMIT

COLUMNS = ("op", "case", "error", "peers'", "ms", "rate", "of limit", "ratio", "best peer", "extra MB", "asked")
WIDTHS = (18, 62, 9, 9, 9, 14, 10, 7, 27, 10, 0)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table."""
    theirs = [value for name, value in row["error"].items() if name != "ours"]
    rate = f"{row['flops'] / 1e12:.2f} TFLOP/s" if row["bound"] == "flops" else f"{row['bytes_per_s'] / 1e9:.1f} GB/s"
    return [
        row["op"],
        row["case"],
        f"{row['error']['ours']:.1e}",
        f"{min(theirs):.1e}" if theirs else "-",
        f"{1e3 * row['seconds']['ours']:.3f}",
        rate,
        f"{row['of_limit']:.0%}",
        f"{row['ratio']:.2f}" if row["ratio"] else "-",
        row["best_peer"] or "-",
        "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}",
        asked(row),
    ]


def asked(row: dict[str, Any]) -> str:
    """How what was reached stands to what was asked."""
    bars = row["bars"]
    if bars is None:
        return "-"
    reached, wanted = bars["reached"], f"{bars['of']}, floor {bars['floor']:.2f}, aim {bars['aim']:.2f}"
    if reached is None:
        text = f"of {wanted}: not judged, it refused"
    else:
        verdict = "aim reached" if reached >= bars["aim"] else "floor reached" if reached >= bars["floor"] else "MISSED"
        text = f"{reached:.2f} of {wanted}: {verdict}"
    if bars["extra_bytes"] is not None and row["extra_bytes"] > bars["extra_bytes"]:
        text += f"; memory MISSED, {bars['extra_bytes'] / 1e6:.0f} MB at most"
    return text


def line(values: list[str] | tuple[str, ...]) -> str:
    """Cells of a row, in columns: words to the left, numbers to the right."""
    padded = [
        f"{value:<{width}}" if i < 2 else f"{value:>{width}}"
        for i, (value, width) in enumerate(zip(values, WIDTHS, strict=True))
    ]
    return " ".join(padded[:-3]) + f"  {padded[-3]} {padded[-2]}  {padded[-1]}"


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    limits = report["limits"]
    text = [
        f"{report['device']}, torch {report['torch']}, {report['dtype']}, {report['date']}: copy "
        f"{limits['bytes_per_s'] / 1e9:.1f} GB/s, matmul {limits['flops'] / 1e12:.2f} TFLOP/s.\n",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(cells(row)) + " |" for row in report["cases"]),
        "",
        *(
            f"{row['op']}, {row['case']}: {peer} refused, {why}\n"
            for row in report["cases"]
            for peer, why in row["refused"].items()
        ),
    ]
    return "\n".join(text).rstrip() + "\n"


def write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def draw(report: dict[str, Any], path: Path) -> None:
    """Bars of each case's share of the machine's limit, with its ratio to the best peer beside, and a mark where the
    floor is that is asked of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(reversed(report["cases"]))
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.22 * len(rows)))
    axes.barh(range(len(rows)), [row["of_limit"] for row in rows], color="#4477aa")
    axes.set_yticks(range(len(rows)), [f"{row['op']}: {row['case']}" for row in rows], fontsize=6)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.15, y=0.01)
    axes.set_xlabel("share of the machine's measured limit (copy bandwidth or matmul rate)", fontsize=7)
    axes.set_title(f"{report['device']}, {report['dtype']}, {report['date']}", fontsize=8)
    for i, row in enumerate(rows):
        if row["ratio"]:
            axes.text(row["of_limit"] + 0.01, i, f"{row['ratio']:.2f} x {row['best_peer']}", va="center", fontsize=5)
        if row["bars"] and row["bars"]["of"] == LIMIT:
            axes.plot([row["bars"]["floor"]] * 2, [i - 0.4, i + 0.4], color="#cc3311", linewidth=1.5)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
