"""The command line ``rollout generate``: a file of prompts in, a file of answers out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait slow down whatever else wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

STATUS = """exit status: 0 every row is answered; 1 ended early, 130 interrupted: the same command goes on from there;
2 refused, nothing was generated; 3 finished, but some rows failed (see the errors file)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(prog="rollout", description="The rollout engine by itself.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands.add_parser("generate", help="answer a file of prompts", epilog=STATUS))
    args = parser.parse_args(argv)
    try:
        return _generate(args)
    except ValueError as error:
        print(f"rollout generate: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:  # a dead process, damaged weights or files, a full disk
        print(f"rollout generate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("rollout generate: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _add_generate(parser: argparse.ArgumentParser) -> None:
    def add(name: str, kind: Callable[[str], Any], help: str, default: Any = None, **more: Any) -> None:
        parser.add_argument(f"--{name}", type=kind, default=default, help=help, **more)

    add("model", str, "checkpoint folder or Hub id", required=True)
    add("input", str, ".jsonl, .jsonl.gz or .parquet file, data set folder, or Hub id of a data set", required=True)
    add("output", str, "JSON lines; failures go to NAME.errors.jsonl, settings to NAME.jsonl.run.json", required=True)
    add("subset", str, "of a data set")
    add("split", str, "of a data set (train)", "train")
    add("limit", int, "answer the first so many rows only")
    add("prompt-column", str, "column with text, messages or token ids (prompt, messages or prompt_token_ids)")
    parser.add_argument("--chat", action="store_true", help="text prompts are a user's message")
    add("system", str, "system message for each conversation; implies --chat")
    add("chat-template", str, "auto (the tokenizer's), none (messages are refused), or a Jinja file", "auto")
    add("chat-template-args", json.loads, "JSON object for the template, such as '{\"enable_thinking\": false}'")
    add("num-samples", int, "answers per row (1)", 1)
    add("max-tokens", int, "longest answer (512)", 512)
    add("min-tokens", int, "shortest answer (0)", 0)
    add("temperature", float, "0 is greedy (1)", 1.0)
    add("top-p", float, "keep the smallest set with this mass", 1.0)
    add("top-k", int, "keep the k likeliest tokens; 0 keeps all", 0)
    add("min-p", float, "keep tokens at least this fraction as likely as the likeliest", 0.0)
    add("seed", int, "of the sampling noise (0)", 0)
    add("stop", str, "string that ends an answer; may be given several times", [], action="append")
    add("stop-token-ids", int, "tokens that end an answer, beside the model's own", [], nargs="+")
    parser.add_argument("--token-ids", action="store_true", help="write the answers' token ids")
    parser.add_argument("--logprobs", action="store_true", help="write the log-prob of every token")
    add("revision", str, "of a Hub model (main)", "main")
    add("dtype", str, "float32, bfloat16 or float16 (float32 on the CPU, else bfloat16)")
    add("numerics", str, "exact or fast (exact for float32 on the CPU, else fast)", choices=("exact", "fast"))
    add("threads", int, "CPU threads of each process (all, shared among the processes)")
    add("kv-cache-gib", float, "memory for the KV cache of each process")
    add("max-num-seqs", int, "answers in flight at once, in each process")
    add("data-parallel", int, "processes, each with an engine of its own (1)", 1)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where there is an output")


def _generate(args: argparse.Namespace) -> int:
    import torch

    from kernels.device import default_device
    from rollout_engine.batch import Job, PromptForm, Source, generate
    from rollout_engine.batch.plan import plan
    from rollout_engine.batch.prompts import load_template
    from rollout_engine.types import SamplingParams

    on_cpu = default_device().type == "cpu"
    dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    sizes = {"kv_cache_gib": args.kv_cache_gib, "max_num_seqs": args.max_num_seqs}
    job = Job(
        model=args.model,
        source=Source(args.input, args.subset, args.split),
        params=SamplingParams(
            n=args.num_samples,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            seed=args.seed,
            max_tokens=args.max_tokens,
            min_tokens=args.min_tokens,
            stop=args.stop,
            stop_token_ids=args.stop_token_ids,
        ),
        form=PromptForm(
            column=args.prompt_column,
            chat=args.chat,
            system=args.system,
            template=load_template(args.chat_template),
            template_args=args.chat_template_args,
        ),
        revision=args.revision,
        dtype=dtype,
        numerics=args.numerics or ("exact" if on_cpu and dtype == "float32" else "fast"),
        threads=args.threads or max(1, torch.get_num_threads() // args.data_parallel),
        token_ids=args.token_ids,
        logprobs=args.logprobs,
        limit=args.limit,
        engine={name: size for name, size in sizes.items() if size is not None},
    )
    if args.dry_run:
        print(plan(job, args.output, data_parallel=args.data_parallel))
        return 0
    summary = generate(
        job, args.output, data_parallel=args.data_parallel, overwrite=args.overwrite, progress="generate"
    )
    print(f"{args.output}: {summary}")
    return 3 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
