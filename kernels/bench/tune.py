"""``python -m kernels.bench.tune [op ...] [--write]``: the fastest tiles on this GPU, by trying.

Of every tile that a case of the bench asks for, one number at a time is replaced by those of
``kernels.triton.tables.CHOICES``. What is over 2 % faster than the best so far, and no less right, stays.
``--write`` puts what was found into ``kernels/triton/tables/``, where the kernels read it from then on. A trial takes
seconds, since a kernel is compiled for each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.errors import TritonError

from kernels.bench.__main__ import FAMILIES, chosen, write
from kernels.bench.case import Case
from kernels.bench.measure import error
from kernels.bench.timing import input_sets, seconds
from kernels.device import default_device
from kernels.triton import tables

GAIN = 0.98  # of the best time so far, at most
Timed = Callable[[Case], tuple[float, float]]  # seconds and error


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
    for case in chosen(args.ops or list(FAMILIES), device, torch.bfloat16):
        inputs = input_sets(case.make, device)

        def timed(case: Case, inputs: list[Any] = inputs) -> tuple[float, float]:
            calls = [case.call(case.ours, given) for given in inputs]
            return seconds(calls, device, args.budget), error(case, case.ours, inputs[0])

        for said in tune(case, tables.table(name), timed):
            print(f"{case.op}, {case.label}: {said}", flush=True)
        if args.write:
            save(name)
    return 0


def tune(case: Case, table: dict[tables.Key, dict[str, int]], timed: Timed) -> list[str]:
    """Put into ``table`` what makes a case faster; what was found, in words."""
    tables.asked.clear()
    best, wrong = timed(case)
    found = []
    for key, formula in list(tables.asked.items()):
        before = best
        for field, values in tables.CHOICES[key[0]].items():
            for value in values:
                kept = table.get(key, {})
                if value == kept.get(field, getattr(formula, field)):
                    continue
                table[key] = kept | {field: value}
                try:
                    took, error_now = timed(case)
                except (TritonError, RuntimeError):  # more than a multiprocessor has
                    took, error_now = float("inf"), 0.0
                if took < GAIN * best and error_now <= 2 * wrong:
                    best = took
                else:
                    table[key] = kept
        if not table.get(key):
            table.pop(key, None)
        if best < before:
            found.append(f"{' '.join(key)} with {table[key]}: {1e3 * before:.3f} -> {1e3 * best:.3f} ms")
    return found


def save(name: str) -> None:
    """Write the table of a device."""
    rows = [{"key": list(key), "tile": tile} for key, tile in sorted(tables.table(name).items())]
    report = {"device": name, "torch": torch.__version__, "date": str(datetime.date.today()), "tiles": rows}
    tables.FOLDER.mkdir(exist_ok=True)
    write(tables.path_of(name), json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
