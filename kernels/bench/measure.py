"""One case becomes one row: errors, times, ratios, memory."""

from __future__ import annotations

from typing import Any

import torch

from kernels.bench.case import LIMIT, Case, Op, Tensors
from kernels.bench.timing import Limits, input_sets, seconds

REFUSALS = (RuntimeError, TypeError, ValueError)  # of a library without a kernel for this, or of another version


def measured(case: Case, device: torch.device, reached: Limits, budget_s: float) -> dict[str, Any]:
    """Errors, times, ratios and, on a GPU, memory of one case."""
    inputs = input_sets(case.make, device)

    def time(op: Op) -> float:
        return seconds([case.call(op, given) for given in inputs], device, budget_s)

    times, errors = {"ours": time(case.ours)}, {"ours": error(case, case.ours, inputs[0])}
    refused = {}
    for name, op in (case.peers | case.yardsticks).items():
        try:
            times[name] = time(op)
            if name in case.peers:
                errors[name] = error(case, op, inputs[0])
        except REFUSALS as why:
            refused[name] = f"{type(why).__name__}: {why}".splitlines()[0]
    best = min(times.keys() & case.peers or times.keys() - {"ours"}, key=times.__getitem__, default=None)
    return {
        "op": case.op,
        "case": case.label,
        "error": errors,
        "seconds": times,
        "refused": refused,
        "best_peer": best,
        "ratio": times[best] / times["ours"] if best else None,
        "bound": "flops" if case.flops / reached.flops > case.bytes / reached.bytes_per_s else "bytes_per_s",
        "of_limit": reached.seconds(case.bytes, case.flops) / times["ours"],
        "bytes_per_s": case.bytes / times["ours"],
        "flops": case.flops / times["ours"],
        "extra_bytes": extra_bytes(case, inputs[0]) if device.type == "cuda" else None,
        "bars": bars(case, times, reached) if device.type == "cuda" else None,
    }


def bars(case: Case, times: dict[str, float], reached: Limits) -> dict[str, Any] | None:
    """What was asked of a case, None if nothing, and what it reached, None if the peer refused."""
    if case.bar is None:
        return None
    theirs = reached.seconds(case.bytes, case.flops) if case.bar.of == LIMIT else times.get(case.bar.of)
    share = None if theirs is None else theirs / times["ours"] / case.bar.unit
    return {**vars(case.bar), "reached": share, "extra_bytes": case.extra_bytes}


def error(case: Case, op: Op, inputs: Tensors) -> float:
    """Largest, against float64, in units of the largest true value."""
    inputs = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in inputs)  # some ops write into them
    found = case.shown(inputs, case.result(op, inputs)[0])[: case.rows].detach().double()
    cut = [t[: case.rows] if i in case.cut else t for i, t in enumerate(inputs)]
    wide = tuple(
        t.detach().to(torch.float64 if t.is_floating_point() else t.dtype).requires_grad_(t.requires_grad) for t in cut
    )
    truth = case.result(case.truth, wide)[0].detach()[: case.rows]
    return ((found - truth).abs().max() / truth.abs().max()).item()


def extra_bytes(case: Case, inputs: Tensors) -> int:
    """Memory that our op takes at most, beyond its inputs and what it returns."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = case.result(case.ours, inputs)
    peak = torch.cuda.max_memory_allocated()
    return peak - before - sum(t.numel() * t.element_size() for t in results)
