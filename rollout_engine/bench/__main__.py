"""``python -m rollout_engine.bench``: tokens/s of the engine, beside transformers and the machine's own limit.

The load is RL-shaped: groups of samples with skewed, prescribed lengths (``load.py``), log-probs on. Every sample
is a request of its own (``n=1``), since that is how both engines give each its own length; equal prompts still share
their full pages. transformers runs at the best of the given page sizes and thread counts, each tried once; then
everybody takes turns, ``--repeats`` times, and medians are compared. Only useful tokens count: up to a sample's length.
Continuous against static batching is also measured on lengths with a longer tail.

``--shape nano`` instead serves a model of Qwen3-0.6B's shape on this machine's device, by itself: tokens/s, and
their share of what reading weights and KV allows. With ``--decode 1 8 32``, a model of that shape decodes in batches of
these sizes instead, with CUDA graphs and without.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP: see rlhf.__main__

import torch
import transformers

from kernels.bench.report import write
from kernels.device import default_device
from kernels.dispatch import uses_triton
from rollout_engine.bench import ours, serving, theirs
from rollout_engine.bench.load import Load, random_model, threads
from rollout_engine.models.checkpoint import Model, save_model


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rollout_engine.bench", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=("tiny", "3M", "25M"), default=["3M", "25M"])
    parser.add_argument("--repeats", type=int, default=5, help="turns of each engine; medians are reported")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1, 2], help="counts to try; each engine keeps its best"
    )
    parser.add_argument("--page-sizes", nargs="+", type=int, default=[64, 128, 256], help="of transformers, to try")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--mean", type=int, default=70, help="answer length before the cap, tokens")
    parser.add_argument("--cap", type=int, default=256, help="longest answer, tokens")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    parser.add_argument("--shape", choices=sorted(serving.SHAPES), help="serve this one shape instead, on a GPU if any")
    parser.add_argument("--requests", type=int, default=256, help="of --shape")
    parser.add_argument("--kv-cache-gib", type=float, default=40, help="of --shape")
    parser.add_argument("--decode", nargs="+", type=int, metavar="BATCH", help="of --shape: what CUDA graphs gain")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="of --shape: launch every kernel by itself")
    args = parser.parse_args(argv)
    if args.shape:
        device = default_device()
        if args.decode and not (device.type == "cuda" and uses_triton(device)):
            parser.error(f"--decode compares CUDA graphs, which a GPU and the Triton kernels make; here is {device}")
        return of_one_shape(args, device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report: dict[str, Any] = {
        "machine": {
            "cpus": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "load": {key: getattr(args, key) for key in ("prompts", "samples", "mean", "cap", "repeats")},
        "models": {},
    }
    for size in args.models:
        found = report["models"][size] = bench(size, args)
        print(table(size, found), flush=True)
    if args.json:
        write(args.json, json.dumps(report, indent=1))
    return 0


def of_one_shape(args: argparse.Namespace, device: torch.device) -> int:
    """What ``--shape`` asks for."""
    if args.decode:
        found = serving.decode(args.shape, args.decode, kv_cache_gib=args.kv_cache_gib, device=device)
        print(serving.decode_table(found))
    else:
        found = serving.serve(
            args.shape,
            requests=args.requests,
            kv_cache_gib=args.kv_cache_gib,
            device=device,
            cuda_graphs=not args.no_cuda_graphs,
        )
        print(serving.table(found))
    if args.json:
        write(args.json, json.dumps(found, indent=1))
    return 0


def bench(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """All engines on one model; rates in useful tokens per second."""
    model = random_model(size)
    load = Load.make(
        model.decoder.config.vocab_size, prompts=args.prompts, samples=args.samples, mean=args.mean, cap=args.cap
    )
    peer = as_transformers(model)
    llm = ours.make_engine(model)

    def rate(seconds: float) -> float:
        return load.useful_tokens / seconds

    def at(count: int, run: Any, *rest: Any) -> Any:
        with threads(count):
            return run(*rest)

    # Each setting once, which also warms everybody up.
    our_trials = {n: at(n, ours.continuous, llm, load).total for n in args.threads}
    trials = {(n, p): at(n, theirs.continuous, peer, load, p) for n in args.threads for p in args.page_sizes}
    padded_trials = {n: at(n, theirs.padded, peer, load) for n in args.threads}
    our_threads = min(our_trials, key=our_trials.__getitem__)
    their_threads, page_size = min(trials, key=trials.__getitem__)
    padded_threads = min(padded_trials, key=padded_trials.__getitem__)

    steps, static, peers, padded = [], [], [], []
    for _ in range(args.repeats):
        steps.append(at(our_threads, ours.continuous, llm, load))
        static.append(rate(at(our_threads, ours.static, llm, load).total))
        peers.append(rate(at(their_threads, theirs.continuous, peer, load, page_size)))
        padded.append(rate(at(padded_threads, theirs.padded, peer, load)))
    middle = sorted(steps, key=lambda s: s.total)[len(steps) // 2]
    own = statistics.median(rate(s.total) for s in steps)
    limit = rate(at(our_threads, ours.matmul_seconds, model, middle))
    skewed = Load.skewed(model.decoder.config.vocab_size, prompts=args.prompts, samples=args.samples, mean=args.mean)
    skewed_turns = [
        [at(our_threads, serve, llm, skewed).total for serve in (ours.continuous, ours.static)]
        for _ in range(args.repeats)
    ]
    rates = {
        "onpolicy": own,
        "onpolicy, static batch": statistics.median(static),
        "transformers, continuous": statistics.median(peers),
        "transformers, padded": statistics.median(padded),
        "matmuls alone": limit,
    }
    return {
        "parameters": sum(p.numel() for p in model.decoder.parameters()),
        "vocabulary": model.decoder.config.vocab_size,
        "useful_tokens": load.useful_tokens,
        "tokens_per_s": rates,
        "spread": {"onpolicy": [rate(s.total) for s in steps], "transformers, continuous": peers},
        "ratio": {name: own / value for name, value in rates.items() if name != "onpolicy"},
        "settings": {
            "onpolicy": {"threads": our_threads},
            "transformers, continuous": {"threads": their_threads, "page_size": page_size},
            "transformers, padded": {"threads": padded_threads},
        },
        "tried": [{"threads": n, "page_size": p, "tokens_per_s": rate(seconds)} for (n, p), seconds in trials.items()],
        "skewed": {
            "useful_tokens": skewed.useful_tokens,
            "longest": skewed.longest,
            "tokens_per_s": skewed.useful_tokens / statistics.median(turn[0] for turn in skewed_turns),
            "static_ratio": statistics.median(static / own for own, static in skewed_turns),
        },
        "share_outside_layers": 1 - sum(middle.layers) / middle.total,
        "by_live_rows": ours.by_rows(middle),
    }


def as_transformers(model: Model) -> Any:
    """The same weights in transformers' own model."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model")
        return transformers.Qwen3ForCausalLM.from_pretrained(Path(folder) / "model").eval()


def table(size: str, found: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [
        f"\n{size}: {found['parameters'] / 1e6:.1f} M parameters, vocabulary {found['vocabulary']}, "
        f"{found['useful_tokens']} useful tokens",
        f"  {'':<28}{'tokens/s':>10}{'onpolicy is':>14}",
    ]
    for name, value in found["tokens_per_s"].items():
        ratio = f"{found['ratio'][name]:.2f} x" if name in found["ratio"] else ""
        setting = ", ".join(f"{k} {v}" for k, v in found["settings"].get(name, {}).items())
        lines.append(f"  {name:<28}{value:>10.0f}{ratio:>14}  {setting}")
    skewed = found["skewed"]
    lines.append(
        f"  exponential lengths up to {skewed['longest']}: {skewed['tokens_per_s']:.0f} tokens/s, "
        f"{skewed['static_ratio']:.2f} x a static batch"
    )
    lines.append(f"  outside the layers (head, sampling, scheduling): {found['share_outside_layers']:.0%} of the time")
    lines.append(f"  {'live rows':<12}{'steps':>6}{'ms/step':>10}{'tokens/s':>10}")
    for row in found["by_live_rows"]:
        span = f"{row['from_rows']}-{row['to_rows']}"
        lines.append(f"  {span:<12}{row['steps']:>6}{row['ms_per_step']:>10.2f}{row['tokens_per_s']:>10.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
