"""The same load on ``transformers``: continuous batching, and padded ``generate``."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from rollout_engine.bench.load import Load


@torch.no_grad()
def continuous(model: Any, load: Load, page_size: int) -> float:
    """Seconds for the whole load with continuous batching and log-probs; building the manager is not counted."""
    sampling = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(
        page_size=page_size, num_blocks=131072 // page_size, max_batch_tokens=1024, return_logprobs=True
    )
    requests = load.requests()
    with model.continuous_batching_context_manager(
        generation_config=sampling, continuous_batching_config=config, timeout=60
    ) as manager:

        def serve(requests: list[tuple[tuple[int, ...], int]]) -> int:
            # Equal prompts last to first, as generate_batch orders them, for its prefix cache.
            for prompt, length in sorted(requests, reverse=True):
                manager.add_request(list(prompt), max_new_tokens=length)
            tokens = finished = 0
            while finished < len(requests):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    assert result.error is None, result.error
                    assert len(result.logprobs) == len(result.generated_tokens)
                    tokens += len(result.generated_tokens)
                    finished += 1
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' generation thread died; see its log above")
            return tokens

        serve([(prompt[:8], 2) for prompt, _ in requests[:4]])
        started = time.perf_counter()
        assert serve(requests) == load.useful_tokens
        return time.perf_counter() - started


@torch.no_grad()
def padded(model: Any, load: Load) -> float:
    """Seconds for the whole load as one left-padded batch, which runs to the longest answer, with log-probs."""
    requests = load.requests()
    width = max(len(prompt) for prompt, _ in requests)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt, _ in requests])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in requests])
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, max_new_tokens=load.longest,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    started = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, generation_config=sampling)
    tokens = out.sequences[:, width:]
    logprobs = [torch.log_softmax(z, -1).gather(1, tokens[:, i, None])[:, 0] for i, z in enumerate(out.logits)]
    assert len(logprobs) == load.longest
    return time.perf_counter() - started
