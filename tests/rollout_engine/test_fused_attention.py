"""The decoder through torch's fused attention, which CUDA runs, says what it says through the tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout_engine.models.checkpoint import Model
from rollout_engine.models.context import PackedAttention, PagedAttention
from rollout_engine.models.decoder import Decoder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(1, 131, (count,), generator=torch.Generator().manual_seed(count))


@pytest.fixture(params=DEVICES)
def decoder(model: Model, request: pytest.FixtureRequest) -> Decoder:
    return model.decoder.to(request.param).double()


def test_packed_sequences_and_their_gradients(decoder: Decoder) -> None:
    lengths = [1, 33, 70]
    ids = random_ids(sum(lengths)).to(decoder.norm.weight.device)
    grads = []
    for fused in (False, True):
        ctx = PackedAttention.from_lengths(lengths, ids.device, fused=fused)
        decoder.zero_grad()
        hidden = decoder.hidden(ids, ctx)
        (hidden * torch.linspace(-1, 1, hidden.numel(), device=ids.device).view_as(hidden)).sum().backward()
        grads.append([hidden.detach(), *(p.grad for p in decoder.layers.parameters())])
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(*grads, strict=True))  # the tiles' softmax is fp32


@pytest.mark.parametrize("page_size", [32, 64])
def test_chunks_over_pages(decoder: Decoder, page_size: int) -> None:
    """Two sequences on interleaved pages, prefilled in chunks, then one token each."""
    device, config = decoder.norm.weight.device, decoder.config
    ids = random_ids(90).to(device)
    tables = np.array([[0, 2, 4, 6], [1, 3, 5, 7]])
    found = []
    for fused in (False, True):
        shape = (config.num_layers, 8, config.num_kv_heads, page_size, config.head_dim)
        cache = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in "kv"]
        rows = []
        for starts, ends in (((0, 0), (40, 7)), ((40, 7), (41, 30)), ((41, 30), (42, 31))):
            lengths = np.array(ends) - np.array(starts)
            tokens = torch.cat([ids[starts[i] + 45 * i : ends[i] + 45 * i] for i in range(2)])
            with torch.no_grad():
                ctx = PagedAttention.from_pages(lengths, np.array(ends), tables, *cache, fused=fused)
                rows.append(decoder.hidden(tokens, ctx))
        found.append(torch.cat(rows))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_bf16_on_the_gpu_is_as_close_to_fp64_as_the_tiles_are(model: Model) -> None:
    lengths = [5, 200, 64, 1]
    ids = random_ids(sum(lengths)).cuda()
    truth = model.decoder.cuda().double().hidden(ids, PackedAttention.from_lengths(lengths, "cuda", fused=False))
    half = model.decoder.bfloat16()

    def error(fused: bool) -> float:
        found = half.hidden(ids, PackedAttention.from_lengths(lengths, "cuda", fused=fused))
        return (found.double() - truth).norm().item()

    assert error(True) < 1.5 * error(False)


@pytest.mark.gpu
def test_the_engine_on_the_gpu_answers_as_on_the_cpu(model: Model) -> None:
    from rollout_engine import LLM, SamplingParams

    params = SamplingParams(n=2, max_tokens=24, temperature=0.8, seed=3)
    prompts = [[5, 6, 7], list(range(1, 60))]
    on_cpu = LLM(model, kv_cache_gib=0.01).generate(prompts, params)
    moved = Model(model.decoder.cuda(), model.hf_config, model.tokenizer, model.eos_ids)
    on_gpu = LLM(moved, kv_cache_gib=0.01).generate(prompts, params)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert a.token_ids == b.token_ids  # fp32 in both: a draw within rounding of a step is unlikely
            assert a.policy_logprobs == pytest.approx(b.policy_logprobs, abs=1e-4)
