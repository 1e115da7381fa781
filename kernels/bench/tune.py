"""``python -m kernels.bench.tune [op ...] [--write]``: the fastest tiles on this GPU, by trying.

Of every tile that cases of the bench ask for, one number at a time is replaced by those of
``kernels.triton.tables.CHOICES``. What is over 2 % faster in all, slower in none of its cases, and gives what the
formula's tile gives, up to rounding, stays. ``--write`` puts it into ``kernels/triton/tables/``, where the kernels read
it from then on. A trial takes seconds, since a kernel is compiled for each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence

import torch
from triton.errors import TritonError

from kernels.bench.__main__ import FAMILIES, chosen
from kernels.bench.case import Case
from kernels.bench.report import write
from kernels.bench.timing import input_sets, seconds
from kernels.device import default_device
from kernels.triton import tables

GAIN = 0.98  # of the time of all cases of a tile, at most
LOSS = 1.01  # of the time of any
ROUNDING = 0.02  # of the largest value
Timed = Callable[[Case], float]  # seconds; infinity for what is wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", choices=[[], *FAMILIES], help="of which; all by default")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds spent timing a trial")
    parser.add_argument("--write", action="store_true", help="let the kernels use what was found")
    args = parser.parse_args(argv)
    device = default_device()
    if device.type != "cuda":
        parser.error("tiles are tuned on a GPU, and there is none here")
    name = tables.device_name(device)
    for key, cases in by_tile(list(chosen(args.ops or list(FAMILIES), device, torch.bfloat16))).items():
        print(tune(key, cases, tables.table(name), Timer(cases, device, args.budget)), flush=True)
        if args.write:
            save(name)
    return 0


def by_tile(cases: Sequence[Case]) -> dict[tables.Key, list[Case]]:
    """The cases that ask for a tile."""
    found: dict[tables.Key, list[Case]] = {}
    for case in cases:
        tables.forget()
        case.result(case.ours, case.make(0))
        for key in tables.asked:
            found.setdefault(key, []).append(case)
    return found


class Timer:
    """Times of cases, for as long as they give what they gave at first."""

    def __init__(self, cases: Sequence[Case], device: torch.device, budget_s: float) -> None:
        self.device, self.budget_s = device, budget_s
        self.inputs = {case.label: input_sets(case.make, device) for case in cases}
        self.wanted = {case.label: case.result(case.ours, self.inputs[case.label][0]) for case in cases}

    def __call__(self, case: Case) -> float:
        inputs, wanted = self.inputs[case.label], self.wanted[case.label]
        for found, right in zip(case.result(case.ours, inputs[0]), wanted, strict=True):
            if not (found.double() - right.double()).abs().max() <= ROUNDING * right.double().abs().max():
                return float("inf")
        return seconds([case.call(case.ours, given) for given in inputs], self.device, self.budget_s)


def tune(key: tables.Key, cases: Sequence[Case], table: dict[tables.Key, dict[str, int]], timed: Timed) -> str:
    """Put into ``table`` the tile that serves the cases best; what was found, in words."""

    def times() -> list[float]:
        tables.forget()
        return [timed(case) for case in cases]

    best = first = times()
    formula = tables.asked[key]
    for field, values in tables.CHOICES[key[0]].items():
        for value in values:
            kept = table.get(key, {})
            if value == kept.get(field, getattr(formula, field)):
                continue
            table[key] = kept | {field: value}
            try:
                took = times()
            except (TritonError, RuntimeError):  # more than a multiprocessor has
                took = [float("inf")]
            if sum(took) < GAIN * sum(best) and all(a <= LOSS * b for a, b in zip(took, best, strict=True)):
                best = took
            else:
                table[key] = kept
    tables.forget()
    tile = table[key] if table.get(key) else table.pop(key, {})
    changed = ", ".join(f"{field} {value}" for field, value in tile.items()) or "as the formula has it"
    return f"{' '.join(key)}, {len(cases)} cases: {changed}; {1e3 * sum(first):.3f} -> {1e3 * sum(best):.3f} ms"


def save(name: str) -> None:
    """Write the table of a device."""
    rows = [{"key": list(key), "tile": tile} for key, tile in sorted(tables.table(name).items())]
    report = {"device": name, "torch": torch.__version__, "date": str(datetime.date.today()), "tiles": rows}
    tables.FOLDER.mkdir(exist_ok=True)
    write(tables.path_of(name), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
