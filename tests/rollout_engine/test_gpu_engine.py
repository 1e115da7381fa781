"""The engine on a GPU in bf16: its log-probs and the trainer's, exact and fast, with and without CUDA graphs."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from rollout_engine import LLM, RequestOutput, SamplingParams
from rollout_engine.bench.load import random_model
from rollout_engine.models.checkpoint import Model
from rollout_engine.models.context import PackedAttention

pytestmark = pytest.mark.gpu
SAMPLES, LENGTH = 4, 96


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("25M", dtype="bfloat16", device="cuda")


def answers(model: Model, numerics: str, cuda_graphs: bool) -> list[RequestOutput]:
    """To prompts of 3 to 700 tokens, four samples each, in steps of at most 512 tokens."""
    llm = LLM(model, kv_cache_gib=1, numerics=numerics, max_batch_tokens=512, cuda_graphs=cuda_graphs)
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 4096) for _ in range(n)] for n in (3, 31, 32, 33, 350, 700)]
    params = SamplingParams(n=SAMPLES, max_tokens=LENGTH, ignore_eos=True, seed=1)
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)


@torch.no_grad()
def gaps(model: Model, outs: list[RequestOutput], exact: bool) -> Tensor:
    """Absolute differences between the reported log-probs and those of the trainer's packed forward."""
    found = []
    for out in outs:
        sequences = [[*out.prompt_token_ids, *answer.token_ids] for answer in out.outputs]
        tokens = torch.tensor(list(itertools.chain(*sequences)), device="cuda")
        ctx = PackedAttention.from_lengths([len(s) for s in sequences], "cuda", exact=exact)
        starts = itertools.accumulate((len(s) for s in sequences[:-1]), initial=0)
        rows = [at + i - 1 for at, s in zip(starts, sequences, strict=True) for i in range(len(s) - LENGTH, len(s))]
        index = torch.tensor(rows, device="cuda")
        logprobs, _ = model.decoder(tokens, ctx, index, tokens[index + 1], torch.ones(len(rows), device="cuda"))
        reported = [value for answer in out.outputs for value in answer.policy_logprobs]
        found.append((logprobs - torch.tensor(reported, device="cuda")).abs())
    return torch.cat(found)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_exact_has_no_gap(model: Model, cuda_graphs: bool) -> None:
    assert gaps(model, answers(model, "exact", cuda_graphs), exact=True).max() == 0


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_fast_has_a_small_gap(model: Model, cuda_graphs: bool) -> None:
    found = gaps(model, answers(model, "fast", cuda_graphs), exact=False)
    print(f"\nmean {found.mean():.1e}, largest {found.max():.1e}")
    assert found.mean() < 0.02


def test_graphs_change_nothing_in_exact(model: Model) -> None:
    tokens = [
        [answer.token_ids for out in answers(model, "exact", graphs) for answer in out.outputs]
        for graphs in (False, True)
    ]
    assert tokens[0] == tokens[1]
