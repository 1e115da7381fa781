"""PPO with a real policy and critic: exact ratios and log-probs, and values and gradients against transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3ForSequenceClassification

import rollout_engine.models.checkpoint as checkpoint_module
from rlhf.algorithms.policy_gradient import PolicyGradient
from rlhf.algorithms.ppo import PPO
from rlhf.config import ModelSection, Train
from rlhf.packing import forward_values, pack
from rlhf.roles.critic import Critic
from rlhf.roles.policy import Policy
from rlhf.types import Batch, Prompt, Score, Trajectory
from rollout_engine import SamplingParams

PARAMS = SamplingParams(n=4, max_tokens=12, temperature=0.9)


def sampled(policy: Policy, first_sample_id: int = 0) -> Batch:
    rng = random.Random(first_sample_id)
    asked = [Prompt(i, "", tuple(rng.randrange(1, 131) for _ in range(rng.randint(1, 20)))) for i in range(6)]
    groups = dict(pair for done in policy.generate(asked, PARAMS, first_sample_id=first_sample_id) for pair in done)
    return pack(
        [
            Trajectory.from_completion(prompt, answer, group, Score(rng.random()))
            for group, prompt in enumerate(asked)
            for answer in groups[group]
        ]
    )


# ---------------------------------------------------------------- exactness


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Of every update, those of its micro-batches."""
    seen: list[list[Tensor]] = []
    update, loss = Policy.update, PolicyGradient.policy_loss

    def watched_update(self: Policy, minibatch: Batch) -> dict[str, float]:
        seen.append([])
        return update(self, minibatch)

    def watched_loss(self: PolicyGradient, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, diagnostics = loss(self, *args)
        seen[-1].append(diagnostics["ratio"])
        return total, diagnostics

    monkeypatch.setattr(Policy, "update", watched_update)
    monkeypatch.setattr(PolicyGradient, "policy_loss", watched_loss)
    return seen


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("stage", [0, 2])
def test_old_logprobs_are_the_engines_and_first_ratios_exactly_one(
    make_policy: Callable[..., Policy],
    threads: Callable[[int], None],
    ratios: list[list[Tensor]],
    stage: int,
    num_threads: int,
) -> None:
    threads(num_threads)
    algorithm = PPO(updates_per_rollout=1, epochs=2, kl_coef=0.0, gamma=1.0)
    settings = {"zero_stage": stage, "max_batch_tokens": 29, "tokens_per_microbatch": 100}
    policy = make_policy(algorithm=algorithm, **settings)
    for step in range(3):
        batch = policy.score(sampled(policy, 1000 * step))
        trained = batch.loss_mask
        assert int(trained.sum()) > 50
        assert torch.equal(batch.column("old_logprobs")[trained], batch.rollout_logprobs[trained])
        batch = algorithm.advantages(batch.replace(values=torch.zeros(batch.num_tokens)))
        found = [policy.update(minibatch) for minibatch in algorithm.minibatches(batch, 12)]
        first, second = ratios[2 * step :]
        assert len(first) > 1 and all((ratio == 1.0).all() for ratio in first)
        assert all((ratio != 1.0).any() for ratio in second)
        assert (found[0]["policy/ratio"], found[0]["policy/approx_kl"], found[0]["rollout/logprob_gap_max"]) == (
            1,
            0,
            0,
        )
        assert found[1]["policy/approx_kl"] > 0
        policy.publish()


def test_of_several_minibatches_only_the_first_has_ratios_of_one(
    make_policy: Callable[..., Policy], ratios: list[list[Tensor]]
) -> None:
    algorithm = PPO(updates_per_rollout=2, epochs=1, kl_coef=0.0)
    policy = make_policy(algorithm=algorithm)
    batch = policy.score(sampled(policy))
    batch = algorithm.advantages(batch.replace(values=torch.zeros(batch.num_tokens)))
    for minibatch in algorithm.minibatches(batch, 12):
        policy.update(minibatch)
    (first,), (second,) = ratios
    assert (first == 1.0).all() and (second != 1.0).any()


def test_stale_answers_are_weighed_by_the_policy_as_it_is_and_leave_the_gap_alone(
    make_policy: Callable[..., Policy],
) -> None:
    """A batch half of older weights: its weights are now over then, those of fresh tokens exactly 1."""
    algorithm = PPO(updates_per_rollout=1, epochs=1, kl_coef=0.0, tis_clip=100.0)
    policy = make_policy(algorithm=algorithm)

    def ready(batch: Batch) -> Batch:
        batch = algorithm.advantages(batch.replace(values=torch.zeros(batch.num_tokens)))
        (minibatch,) = algorithm.minibatches(batch, 12)
        return minibatch

    old = sampled(policy)
    policy.update(ready(old))
    policy.publish()
    fresh = sampled(policy, 1000)
    both = Batch.concatenate([old, fresh])
    now = policy.score(both).column("old_logprobs")
    weights = (now - both.rollout_logprobs).double().exp()[both.loss_mask]
    is_fresh = both.column("weight_versions")[both.loss_mask] == 1
    assert 0.2 < is_fresh.float().mean() < 0.8
    assert (weights[is_fresh] == 1.0).all() and (weights[~is_fresh] != 1.0).float().mean() > 0.9
    metrics = policy.update(ready(both))
    assert metrics["policy/tis_weight"] == pytest.approx(weights.mean().item(), rel=1e-6)
    assert metrics["rollout/logprob_gap_max"] == 0.0


# ---------------------------------------------------------------- the critic


@pytest.fixture
def make_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_policy: Any) -> Callable[..., Critic]:
    """``make_policy`` has set the rendezvous up."""
    monkeypatch.setattr(checkpoint_module, "load_tokenizer", lambda folder: None)

    def make(checkpoint: Path, algorithm: PPO, **train: Any) -> Critic:
        return Critic(
            checkpoint=checkpoint,
            run_folder=tmp_path,
            model=ModelSection(),
            train=Train(**{"lr": 1e-3, **train}),
            algorithm=algorithm,
            total_updates=100,
            timeout_s=120,
        )

    return make


def made_batch() -> Batch:
    """Groups of answers to a prompt, with ``values`` and ``returns``; one answer is masked."""
    rng = random.Random(4)
    prompts = [[rng.randrange(131) for _ in range(n)] for n in (1, 7, 34)]
    rows = [
        (g, p, [rng.randrange(131) for _ in range(rng.randint(1, 9))]) for g, p in enumerate(prompts) for _ in "abc"
    ]
    lengths = tuple(len(p) + len(a) for _, p, a in rows)
    total = sum(lengths)
    mask = [scored and i != 4 for i, (_, p, a) in enumerate(rows) for scored in (*[False] * len(p), *[True] * len(a))]
    generator = torch.Generator().manual_seed(0)
    return Batch(
        tokens=torch.tensor([token for _, p, a in rows for token in (*p, *a)]),
        lengths=lengths,
        loss_mask=torch.tensor(mask),
        temperature=torch.ones(total),
        rollout_logprobs=torch.zeros(total),
        groups=torch.tensor([g for g, _, _ in rows]),
        rewards=torch.zeros(len(rows)),
        values=torch.randn(total, generator=generator),
        returns=torch.randn(total, generator=generator),
    )


def true_values(folder: Path, batch: Batch) -> tuple[nn.Module, Tensor]:
    """transformers in float64, one sequence at a time: the head's number at the position before each trained token."""
    model = Qwen3ForSequenceClassification.from_pretrained(folder, attn_implementation="eager").double()
    found, begin = [], 0
    for length in batch.lengths:
        tokens, mask = batch.tokens[begin : begin + length], batch.loss_mask[begin : begin + length]
        hidden = model.model(input_ids=tokens[None]).last_hidden_state[0]
        found.append((hidden @ model.score.weight[0]).roll(1)[mask])
        begin += length
    return model, torch.cat(found)


def test_values_are_those_of_transformers(scored_checkpoint: Path, make_critic: Callable[..., Critic]) -> None:
    batch = made_batch()
    critic = make_critic(scored_checkpoint, PPO(), tokens_per_microbatch=60)
    got = critic.score(batch).column("values")
    _, expected = true_values(scored_checkpoint, batch)
    assert expected.std() > 0.1
    assert (got[batch.loss_mask] - expected).abs().max() < 1e-5 and not got[~batch.loss_mask].any()


@pytest.mark.parametrize("tokens_per_microbatch", [8, 60, 1000])
def test_a_value_gradient_is_that_of_float64_for_any_split(
    scored_checkpoint: Path, make_critic: Callable[..., Critic], tokens_per_microbatch: int
) -> None:
    ppo, batch = PPO(value_clip=0.5), made_batch()
    critic = make_critic(scored_checkpoint, ppo, lr=0.0, max_grad_norm=1e9)
    minibatch = ppo.weighed(batch, 9)
    held: dict[str, Tensor] = {}

    def forward(engine: nn.Module, micro: Batch) -> Tensor:
        scored, values = forward_values(engine, micro)
        return ppo.value_loss(values, micro, scored)[0]

    backend = critic.learner.backend
    result = backend.step(minibatch, tokens_per_microbatch, forward, 0.0, lambda: held.update(backend.gradients()))

    model, values = true_values(scored_checkpoint, batch)
    old, returns = (batch.column(name)[batch.loss_mask].double() for name in ("values", "returns"))
    held_values = torch.minimum(torch.maximum(values, old - 0.5), old + 0.5)
    loss = torch.maximum((values - returns) ** 2, (held_values - returns) ** 2).mean() / 2
    loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    truth = {
        "score.weight": theirs["score.weight"],
        "embed_tokens.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
    }
    for layer in range(2):
        ours, name = f"layers.{layer}.", f"model.layers.{layer}."
        parts = [theirs[f"{name}self_attn.{x}_proj.weight"] for x in "qkv"]
        truth[f"{ours}attention.qkv_proj.weight"] = torch.cat(parts)
        truth[f"{ours}mlp.down_proj.weight"] = theirs[f"{name}mlp.down_proj.weight"]
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    missing = [name for name in truth if name not in held]
    assert not missing, (missing, sorted(held))
    scale = max(g.abs().max().item() for g in truth.values())
    for name, gradient in truth.items():
        assert gradient.abs().max() > 1e-4 * scale
        assert (held[name].double() - gradient).abs().max() < 1e-6 * scale, name
