"""One model of a real size by itself.

Under a mixed load: tokens/s, and how near that is to reading weights and KV once a step. And decoding in batches of one
size: what CUDA graphs gain.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from kernels.bench.timing import copy_bandwidth
from rollout_engine.bench.load import random_model
from rollout_engine.llm import LLM
from rollout_engine.types import SamplingParams

PROMPT = ANSWER = (100, 1024)  # tokens, uniform
SHAPES = {"nano": "0.6B", "1B": "1B", "tiny": "tiny"}  # of Qwen3-0.6B; of Llama-3.2-1B; for tests
WARM_UP = 4  # requests that aren't counted


def dtype_on(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def serve(
    shape: str,
    *,
    requests: int,
    kv_cache_gib: float,
    device: torch.device,
    cuda_graphs: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Answer ``requests`` random prompts of 100 to 1024 tokens with 100 to 1024 tokens each, all at once.

    ``of_bandwidth``: the time that reading all weights once a step and every context's KV once a token takes at this
    device's measured copy bandwidth, as a share of the time taken. Prompts' own products aren't in it.
    """
    dtype = dtype_on(device)
    model = random_model(SHAPES[shape], dtype=dtype, device=device)
    llm = LLM(
        model,
        kv_cache_gib=kv_cache_gib,
        max_num_seqs=requests,
        max_batch_tokens=8192,
        cuda_graphs=cuda_graphs,
        seed=seed,
    )
    rng = random.Random(seed)
    vocabulary = model.decoder.config.vocab_size

    def load(count: int) -> list[tuple[list[int], int]]:
        return [
            ([rng.randrange(1, vocabulary) for _ in range(rng.randint(*PROMPT))], rng.randint(*ANSWER))
            for _ in range(count)
        ]

    def answer(work: list[tuple[list[int], int]]) -> float:
        params = [SamplingParams(max_tokens=length, ignore_eos=True) for _, length in work]
        started = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids, _ in work], params)
        return time.perf_counter() - started

    answer(load(min(WARM_UP, requests)))
    work = load(requests)
    steps = llm.counters.steps
    seconds = answer(work)
    steps = llm.counters.steps - steps
    config = model.decoder.config
    width = getattr(torch, dtype).itemsize
    weights = sum(p.numel() for p in model.decoder.parameters()) * width
    read = sum(config.kv_bytes_per_token(width) * n * (len(ids) + (n + 1) / 2) for ids, n in work)
    tokens = sum(n for _, n in work)
    return {
        "shape": shape,
        "requests": requests,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "steps": steps,
        "bytes": steps * weights + read,
        "of_bandwidth": (steps * weights + read) / copy_bandwidth(device) / seconds,
    }


def decode(
    shape: str, batches: Sequence[int], *, kv_cache_gib: float, device: torch.device, tokens: int = 256
) -> dict[str, Any]:
    """Decoding in batches, with and without CUDA graphs: tokens/s of each, the better of two turns after a warm-up.

    ``tokens``: of each prompt and of each answer. A CPU has no graphs, and both are the same there.
    """
    model = random_model(SHAPES[shape], dtype=dtype_on(device), device=device)
    vocabulary = model.decoder.config.vocab_size
    rates: dict[str, dict[str, float]] = {}
    for graphs in (False, True):
        llm = LLM(model, kv_cache_gib=kv_cache_gib, max_num_seqs=max(batches), cuda_graphs=graphs, prefix_caching=False)
        for batch in batches:
            rng = random.Random(batch)
            prompts = [[rng.randrange(1, vocabulary) for _ in range(tokens)] for _ in range(batch)]

            _seconds(llm, prompts, tokens)
            # Without the prompts' step, whose answer to a length of 1 is the time.
            whole, first = (min(_seconds(llm, prompts, length) for _ in range(2)) for length in (tokens, 1))
            spent = whole - first
            rates.setdefault(str(batch), {})["graphs" if graphs else "eager"] = batch * (tokens - 1) / spent
    return {"shape": shape, "tokens": tokens, "tokens_per_s": rates}


def _seconds(llm: LLM, prompts: list[list[int]], length: int) -> float:
    """To answer all prompts with as many tokens."""
    started = time.perf_counter()
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return time.perf_counter() - started


def decode_table(found: dict[str, Any]) -> str:
    lines = [f"{found['shape']}: decoding {found['tokens']} tokens after as many, tokens/s"]
    lines.append(f"  {'batch':<8}{'eager':>10}{'graphs':>10}{'gain':>8}")
    for batch, rate in found["tokens_per_s"].items():
        lines.append(
            f"  {batch:<8}{rate['eager']:>10.0f}{rate['graphs']:>10.0f}{rate['graphs'] / rate['eager']:>7.2f} x"
        )
    return "\n".join(lines)


def table(found: dict[str, Any]) -> str:
    return (
        f"{found['shape']}: {found['requests']} requests, {found['tokens']} tokens in {found['seconds']:.1f} s and "
        f"{found['steps']} steps: {found['tokens_per_s']:.0f} tokens/s, "
        f"{found['of_bandwidth']:.0%} of the bandwidth limit"
    )
