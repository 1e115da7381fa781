"""``python -m kernels.bench [op ...] [--json F] [--plot F]``: every op, its error and its speed.

On a GPU the Triton kernels stand beside cuBLAS, cuDNN, torch's own kernels and torch.compile; on a CPU the C++ ops
beside plain torch. ``ratio`` is the best peer's time over ours; ``of the limit`` is the time that the op's unavoidable
bytes or products take at this machine's measured copy bandwidth or matmul rate, over ours. Errors are the largest
against float64, relative to the largest value.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.bench import attention_cases, cases
from kernels.bench.timing import Limits, input_sets, limits, seconds
from kernels.device import default_device

FAMILIES = {
    "rms_norm": cases.norm_cases,
    "swiglu": cases.gated_cases,
    "rope": cases.rope_cases,
    "decode": attention_cases.decode_cases,
    "cascade": attention_cases.cascade_cases,
    "packed_attention": attention_cases.packed_cases,
    "token_logprobs": cases.logprob_cases,
    "sampling": cases.sampling_cases,
    "invariant_linear": cases.matmul_cases,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", choices=[[], *FAMILIES], help=f"which; all by default: {', '.join(FAMILIES)}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds spent timing each implementation of a case")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("--plot", type=Path, help="draw the ratios there (PNG)")
    args = parser.parse_args(argv)
    device = default_device()
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    reached = limits(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {dtype}")
    print(f"limits: copy {reached.bytes_per_s / 1e9:.1f} GB/s, matmul {reached.flops / 1e12:.2f} TFLOP/s\n")
    print(f"{'op':<18}{'case':<58}{'error':>9}{'peer':>9}{'ms':>9}{'rate':>14}{'ratio':>8}  best peer, of the limit")
    rows = []
    for case in chosen(args.ops or list(FAMILIES), device, dtype):
        rows.append(measured(case, device, reached, args.budget))
        print(line(rows[-1]), flush=True)
    report = {"device": name, "torch": torch.__version__, "dtype": str(dtype), "limits": vars(reached), "cases": rows}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot:
        from kernels.bench.plot import draw

        draw(report, args.plot)
    return 0


def chosen(ops: Sequence[str], device: torch.device, dtype: torch.dtype) -> Iterator[cases.Case]:
    for op in ops:
        yield from FAMILIES[op](device, dtype)


def measured(case: cases.Case, device: torch.device, reached: Limits, budget_s: float) -> dict[str, Any]:
    """Errors, times and ratios of one case."""
    inputs = input_sets(case.make, case.bytes, device)
    best = ""
    errors: dict[str, float] = {}
    times = {"ours": seconds(case.ours, inputs, device, budget_s)}
    for name, peer in case.peers.items():
        try:
            times[name] = seconds(peer, inputs, device, budget_s)
        except RuntimeError as refused:  # a library without a kernel for this
            print(f"  {name} doesn't take {case.op}, {case.name}: {str(refused).splitlines()[0]}")
    if len(times) > 1:
        best = min(times.keys() - {"ours"}, key=times.__getitem__)
        if case.peers_agree:
            errors["peer"] = error(case, case.peers[best], inputs[0])
    errors["ours"] = error(case, case.ours, inputs[0])
    needed = max(case.bytes / reached.bytes_per_s, case.flops / reached.flops)
    return {
        "op": case.op,
        "case": case.name,
        "error": errors,
        "seconds": times,
        "best_peer": best,
        "ratio": times[best] / times["ours"] if best else None,
        "of_limit": needed / times["ours"],
        "bytes_per_s": case.bytes / times["ours"],
        "flops": case.flops / times["ours"],
    }


def error(case: cases.Case, run: Any, inputs: tuple[torch.Tensor, ...]) -> float:
    """Largest, against float64, in units of the largest true value."""
    with torch.enable_grad():
        found = run(*inputs)[: case.rows].detach().double()
        wide = [
            (t[: case.rows] if i in case.cut else t).detach().to(torch.float64 if t.is_floating_point() else t.dtype)
            for i, t in enumerate(inputs)
        ]
        wide = [w.requires_grad_(t.requires_grad) for w, t in zip(wide, inputs, strict=True)]
        truth = case.truth(*wide).detach()[: case.rows]
    return ((found - truth).abs().max() / truth.abs().max()).item()


def line(row: dict[str, Any]) -> str:
    """One row of the table, for a person."""
    by_flops = row["flops"] > 0
    rate = f"{row['flops'] / 1e12:.2f} TFLOP/s" if by_flops else f"{row['bytes_per_s'] / 1e9:.1f} GB/s"
    ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
    peer = f"{row['error']['peer']:.1e}" if "peer" in row["error"] else "-"
    return (
        f"{row['op']:<18}{row['case']:<58}{row['error']['ours']:>9.1e}{peer:>9}{1e3 * row['seconds']['ours']:>9.3f}"
        f"{rate:>14}{ratio:>8}  {row['best_peer'] or 'none'}, {row['of_limit']:.0%}"
    )


if __name__ == "__main__":
    sys.exit(main())
