"""``python -m kernels.bench [op ...] [--json F] [--markdown F] [--plot F]``: every op, its error and its speed.

On a GPU the Triton kernels stand beside cuBLAS, cuDNN, FlexAttention, torch's own kernels and torch.compile; on a CPU
the C++ ops beside plain torch. ``ratio`` is the best peer's time over ours; ``of limit`` is the time that the op's
unavoidable bytes or products take at this machine's measured copy bandwidth or matmul rate, over ours. Errors are the
largest against float64, relative to the largest value. On a GPU also: the memory taken beyond inputs and results, and
how the figure stands to what is asked of it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.bench import attention_cases, memory_cases, product_cases
from kernels.bench.case import Case
from kernels.bench.measure import measured
from kernels.bench.report import COLUMNS, cells, draw, line, markdown, write
from kernels.bench.timing import limits
from kernels.device import default_device

FAMILIES = {
    "norms": memory_cases.norm_cases,
    "gates": memory_cases.gated_cases,
    "rope": memory_cases.rope_cases,
    "store": memory_cases.store_cases,
    "sampling": memory_cases.sampling_cases,
    "paged_attention": attention_cases.paged_cases,
    "quantised_kv": attention_cases.quantised_cases,
    "cascade": attention_cases.cascade_cases,
    "packed_attention": attention_cases.packed_cases,
    "logits": product_cases.logit_cases,
    "token_logprobs": product_cases.logprob_cases,
    "invariant_linear": product_cases.linear_cases,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", choices=[[], *FAMILIES], help=f"which; all by default: {', '.join(FAMILIES)}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds spent timing each implementation of a case")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; where others work, too, one is steadier")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("--markdown", type=Path, help="write the table there, too")
    parser.add_argument("--plot", type=Path, help="draw the ratios there (PNG)")
    args = parser.parse_args(argv)
    device = default_device()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    reached = limits(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {dtype}")
    print(f"limits: copy {reached.bytes_per_s / 1e9:.1f} GB/s, matmul {reached.flops / 1e12:.2f} TFLOP/s\n")
    print(line(COLUMNS))
    report: dict[str, Any] = {
        "device": name, "torch": torch.__version__, "dtype": str(dtype), "date": str(datetime.date.today()),
        "limits": vars(reached), "cases": [],
    }  # fmt: skip
    for case in chosen(args.ops or list(FAMILIES), device, dtype):
        row = measured(case, device, reached, args.budget)
        report["cases"].append(row)
        print(line(cells(row)), flush=True)
        for peer, why in row["refused"].items():
            print(f"  {peer} doesn't take it: {why}")
        if args.json:  # after each: what is measured is kept, whatever comes of the rest
            write(args.json, json.dumps(report, indent=1))
        if args.markdown:
            write(args.markdown, markdown(report))
    if args.plot:
        draw(report, args.plot)
    return 0


def chosen(ops: Sequence[str], device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for op in ops:
        yield from FAMILIES[op](device, dtype)


if __name__ == "__main__":
    sys.exit(main())
