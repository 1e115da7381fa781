"""The optimizer step goes through DeepSpeed, whole, clipped and guarded, under ZeRO 0 to 3."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import deepspeed
import pytest
import torch
from test_training_exactness import rollout, sampled
from transformers import AutoModelForCausalLM

from rlhf import algorithms
from rlhf.algorithms.grpo import GRPO
from rlhf.packing import forward_logprobs
from rlhf.roles.policy import Policy
from rlhf.types import Batch
from rollout_engine.models import qwen3

STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


def true_gradients(folder: Path, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of the on-policy GRPO loss in float64, by transformers on the same weights, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    advantages, weights = batch.column("advantages").double(), batch.column("loss_weights").double()
    begin = 0
    for length in batch.lengths:
        span = slice(begin, begin + length)
        ids = batch.tokens[span]
        heat = batch.temperature[span].double()[1:, None]
        logp = (model(ids[None]).logits[0, :-1] / heat).log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        ratio = torch.exp(logp - logp.detach())
        (-(weights[span] * advantages[span])[1:] * ratio).sum().backward()
        begin += length
    config = qwen3.decoder_config(model.config)
    found = {name: p.grad for name, p in model.named_parameters()}
    return {ours: torch.cat([found[part] for part in parts]) for ours, parts in qwen3.name_map(config).items()}


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    """Whole weights of the trainer, copied."""
    names = [name for name, _ in policy.model.decoder.named_parameters()]
    with policy.backend.gathered(names) as whole:
        return {name: p.clone() for name, p in whole.items()}


def deepspeed_gradients(policy: Policy, batch: Batch, tokens_per_microbatch: int) -> dict[str, torch.Tensor]:
    """What DeepSpeed holds right before its step."""
    held: dict[str, torch.Tensor] = {}

    def loss_fn(engine: torch.nn.Module, micro: Batch) -> torch.Tensor:
        scored, logprobs, entropy = forward_logprobs(engine, micro)
        return policy.algorithm.policy_loss(logprobs, entropy, micro, scored)[0]

    policy.backend.step(
        batch,
        tokens_per_microbatch,
        loss_fn,
        lr=0.0,
        before_step=lambda: held.update(policy.backend.gradients()),
    )
    return held


def distance(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Relative distance of two gradients, all parameters together."""
    assert set(found) == set(truth)
    error = sum((found[name].double() - truth[name]).square().sum() for name in truth)
    return math.sqrt(error / sum(t.square().sum() for t in truth.values()))


@STAGES
def test_gradient_is_the_same_for_any_split(
    make_policy: Callable[..., Policy], odd_checkpoint: Path, stage: int
) -> None:
    policy = make_policy(zero_stage=stage, max_grad_norm=1e9)
    batch = rollout(policy)
    truth = true_gradients(odd_checkpoint, batch)
    for tokens in (100_000, 500, 60):
        assert distance(deepspeed_gradients(policy, batch, tokens), truth) < 1e-6


@pytest.mark.parametrize("stage", [1, 2])
def test_without_boundaries_microbatches_are_lost_and_the_comparison_sees_it(
    make_policy: Callable[..., Policy], odd_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    policy = make_policy(zero_stage=stage, max_grad_norm=1e9)
    batch = rollout(policy)
    monkeypatch.setattr(policy.backend.engine, "set_gradient_accumulation_boundary", lambda is_boundary: None)
    assert distance(deepspeed_gradients(policy, batch, 500), true_gradients(odd_checkpoint, batch)) > 0.1


def test_a_wrong_loss_weight_is_seen(make_policy: Callable[..., Policy], odd_checkpoint: Path) -> None:
    policy = make_policy(max_grad_norm=1e9)
    batch = rollout(policy)
    wrong = batch.replace(loss_weights=batch.column("loss_weights") * 1.001)
    assert distance(deepspeed_gradients(policy, wrong, 500), true_gradients(odd_checkpoint, batch)) > 5e-4


@STAGES
def test_the_step_is_deepspeeds(make_policy: Callable[..., Policy], stage: int) -> None:
    policy = make_policy(zero_stage=stage)
    engine = policy.backend.engine
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert engine.zero_optimization_stage() == stage
    before = weights(policy)
    policy.update(rollout(policy))
    assert engine.global_steps == 1
    still = [name for name, p in weights(policy).items() if torch.equal(p, before[name])]
    assert not still, f"these never moved: {still}"


@STAGES
def test_clipping_bounds_the_first_adam_free_step(make_policy: Callable[..., Policy], stage: int) -> None:
    """The norm is reported before clipping; what the optimizer sees is clipped to the limit."""
    seen: list[float] = []
    limit = 1e-3
    policy = make_policy(zero_stage=stage, max_grad_norm=limit)
    base = policy.backend.optimizer if stage == 0 else policy.backend.optimizer.optimizer
    take_step = base.step

    def spy(*args: object, **kwargs: object) -> object:
        grads = [p.grad for group in base.param_groups for p in group["params"] if p.grad is not None]
        seen.append(float(sum(g.double().square().sum() for g in grads)))
        return take_step(*args, **kwargs)

    base.step = spy
    metrics = policy.update(rollout(policy))
    assert metrics["policy/grad_norm"] > 10 * limit
    assert math.sqrt(sum(seen)) == pytest.approx(limit, rel=1e-3)  # ZeRO steps group by group


@STAGES
def test_a_non_finite_gradient_is_skipped_and_its_batch_kept(
    make_policy: Callable[..., Policy], tmp_path: Path, stage: int
) -> None:
    policy = make_policy(zero_stage=stage)
    batch = rollout(policy)
    advantages = batch.column("advantages").clone()
    advantages[batch.loss_mask.nonzero()[3]] = float("nan")
    before = weights(policy)
    metrics = policy.update(batch.replace(advantages=advantages))
    assert metrics["policy/skipped_updates"] == 1
    assert not math.isfinite(metrics["policy/grad_norm"])
    assert all(torch.equal(p, before[name]) for name, p in weights(policy).items())
    kept = torch.load(tmp_path / "skipped-policy-update-1-rank-0.pt", weights_only=False)
    assert torch.equal(kept.tokens, batch.tokens)
    assert not policy.publish().changed  # nothing moved, so the version stays and generating goes on
    again = rollout(policy)
    assert torch.equal(again.tokens, batch.tokens)
    healthy = policy.update(again)  # and no trace of the bad gradient is left
    fresh = make_policy(zero_stage=stage)
    assert healthy["policy/grad_norm"] == pytest.approx(fresh.update(rollout(fresh))["policy/grad_norm"], rel=1e-5)


def test_several_updates_per_rollout_use_old_logprobs(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(algorithm=GRPO(updates_per_rollout=2, clip_low=0.01, clip_high=0.01), lr=0.01)
    batch = policy.score(policy.algorithm.advantages(rollout(policy)))
    assert torch.equal(batch.column("old_logprobs"), batch.rollout_logprobs)  # exact numerics: the same bits
    first, second = [policy.update(m) for m in policy.algorithm.minibatches(batch, 24)]
    assert first["policy/clip_fraction"] == 0.0 and second["policy/clip_fraction"] > 0.0


@pytest.mark.parametrize("name", algorithms.names())
def test_every_preset_starts_on_the_policy_that_sampled_and_moves_away(
    name: str, make_policy: Callable[..., Policy]
) -> None:
    axes = {"updates_per_rollout": 2, "epochs": 1, "kl_coef": 0.1, "tis_clip": 2.0}
    policy = make_policy(algorithm=algorithms.load({"name": name, **axes}), lr=0.01)
    batch = policy.score(sampled(policy))
    others = {"values": torch.zeros(batch.num_tokens), "baselines": torch.zeros(batch.num_sequences)}
    batch = policy.algorithm.advantages(batch.replace(ref_logprobs=batch.column("old_logprobs"), **others))
    first, second = [policy.update(m) for m in policy.algorithm.minibatches(batch, 24)]
    assert first["policy/ratio"] == first["policy/tis_weight"] == 1.0  # exact numerics: no rounding to allow for
    assert first["policy/kl"] == first["policy/clip_fraction"] == first["policy/tis_truncated"] == 0.0
    assert second["policy/ratio"] != 1.0 and abs(second["policy/kl"]) > 1e-6
    assert second["policy/tis_weight"] == 1.0  # of the old log-probs, not of the current ones
    assert first["policy/grad_norm"] > 0.0 and second["policy/grad_norm"] > 0.0


@STAGES
def test_zero_learning_rate_moves_nothing(make_policy: Callable[..., Policy], stage: int) -> None:
    policy = make_policy(zero_stage=stage, lr=0.0)
    before = weights(policy)
    policy.update(rollout(policy, random.Random(0).randrange(100)))
    assert all(torch.equal(p, before[name]) for name, p in weights(policy).items())
