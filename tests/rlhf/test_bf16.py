"""bfloat16 weights train through fp32 masters under every ZeRO stage, and the stages agree."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_deepspeed_contract import deepspeed_gradients, distance, weights
from transformers import Qwen3Config

from rlhf.algorithms.grpo import GRPO
from rlhf.config import ModelSection, Rollout, Train
from rlhf.packing import pack
from rlhf.roles import policy as policy_module
from rlhf.roles.policy import Policy
from rlhf.types import Batch, Prompt, Score, Trajectory
from rollout_engine import SamplingParams
from rollout_engine.models import qwen3
from rollout_engine.models.checkpoint import Model, load_model, save_model
from rollout_engine.models.decoder import Decoder

LR = 1e-2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf_config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        eos_token_id=0,
    )
    decoder = Decoder(qwen3.decoder_config(hf_config), 32)
    decoder.init_weights(0, std=0.2)
    folder = tmp_path_factory.mktemp("bf16") / "hf"
    save_model(Model(decoder, hf_config, None, (0,)), folder)
    return folder


@pytest.fixture
def make(
    make_policy: Callable[..., Policy], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Policy]:
    """``make_policy`` is asked for since it arranges the rendezvous."""
    monkeypatch.setattr(policy_module, "load_model", functools.partial(load_model, tokenizer=False))

    def make(stage: int) -> Policy:
        return Policy(
            checkpoint=checkpoint,
            run_folder=tmp_path,
            model=ModelSection(dtype="bfloat16"),
            rollout=Rollout(prompts_per_step=2, samples_per_prompt=4, max_tokens=8, kv_cache_gib=0.01, numerics="fast"),
            train=Train(lr=LR, zero_stage=stage),
            algorithm=GRPO(),
            total_updates=10,
            seed=1,
            timeout_s=60,
        )

    return make


def rollout(policy: Policy) -> Batch:
    prompts = [Prompt(i, "", (3, 4, 5 + i)) for i in range(2)]
    rng = random.Random(0)
    stream = policy.generate(prompts, SamplingParams(n=4, max_tokens=8), first_sample_id=0)
    answers = dict(pair for finished in stream for pair in finished)
    batch = pack(
        [Trajectory.from_completion(prompts[g], c, g, Score(rng.random())) for g in range(2) for c in answers[g]]
    )
    return next(policy.algorithm.minibatches(policy.algorithm.advantages(batch), 8))


def test_every_stage_steps_alike_and_skips_alike(make: Callable[[int], Policy]) -> None:
    norms = []
    for stage in range(4):
        policy = make(stage)
        assert all(p.dtype == torch.bfloat16 for p in policy.llm.model.decoder.parameters())
        before = weights(policy)
        batch = rollout(policy)
        first = policy.update(batch)
        moved = [(weights(policy)[name].float() - p.float()).abs().max().item() for name, p in before.items()]
        assert all(0 < step <= 2 * LR for step in moved)  # Adam's first step is the rate, rounded to bf16
        assert policy.publish().version == 1
        after = weights(policy)
        nan = batch.column("advantages").clone()
        nan[batch.loss_mask.nonzero()[0]] = math.nan
        assert policy.update(batch.replace(advantages=nan))["policy/skipped_updates"] == 1
        assert not policy.publish().changed
        assert all(torch.equal(p, after[name]) for name, p in weights(policy).items())
        norms.append((first["policy/grad_norm"], policy.update(rollout(policy))["policy/grad_norm"]))
    for norm in norms[1:]:
        assert norm == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.parametrize("stage", range(4))
def test_gradients_of_many_microbatches_are_added_up_in_fp32(make: Callable[[int], Policy], stage: int) -> None:
    """In bfloat16 the sum of these would be off by a part in 200."""
    policy = make(stage)
    batch = rollout(policy)
    parts = list(batch.microbatches(8))
    assert len(parts) > 4
    found = deepspeed_gradients(policy, batch, 8)
    alone = [deepspeed_gradients(policy, part, 8) for part in parts]
    truth = {name: sum(part[name].double() for part in alone) for name in found}
    assert distance(found, truth) < 1e-6


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_policy_has_its_masters(make: Callable[[int], Policy], tmp_path: Path, stage: int) -> None:
    """What bfloat16 rounds away is kept in the masters, across a resume too."""
    first = make(stage)
    batch = rollout(first)
    for _ in range(3):
        first.update(batch)
        first.publish()
    first.save_state(tmp_path / "state")
    second = make(stage)
    second.load_state(tmp_path / "state")
    for policy in (first, second):
        for _ in range(3):
            policy.update(batch)
    moved, again = weights(first), weights(second)
    assert all(torch.equal(moved[name], again[name]) for name in moved)
