"""Sampler and trainer agree bitwise through training, and the swap keeps its order and its storage."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from kernels import philox_uniform, sample_tokens
from rlhf.packing import forward_logprobs, pack, score_tokens
from rlhf.roles.policy import Policy
from rlhf.types import Batch, Completion, Prompt, Score, Trajectory
from rollout_engine import SamplingParams
from rollout_engine.llm import StaleWeightsError
from rollout_engine.models.context import PackedAttention

PARAMS = SamplingParams(n=4, max_tokens=24, temperature=0.9)


def prompts(count: int = 8) -> list[Prompt]:
    """Prompts of 2 to 60 tokens that share prefixes, one of them twice."""
    rng = random.Random(0)
    stem = [rng.randrange(1, 131) for _ in range(70)]
    cut = [[*stem[: rng.randrange(1, 59)], rng.randrange(1, 131)] for _ in range(count - 3)]
    cut += [[*stem[:40], 5], [*stem[:40], 6], cut[0]]
    return [Prompt(i, "", tuple(ids)) for i, ids in enumerate(cut)]


def answer(policy: Policy, first_sample_id: int = 0) -> list[list[Completion]]:
    """Answers to the prompts, in the prompts' order."""
    generated = policy.generate(prompts(), PARAMS, first_sample_id=first_sample_id)
    return [answers for _, answers in sorted(itertools.chain.from_iterable(generated), key=lambda pair: pair[0])]


def sampled(policy: Policy, first_sample_id: int = 0) -> Batch:
    """Sample, reward at random, and pack."""
    rng = random.Random(first_sample_id)
    asked = prompts()
    answers = answer(policy, first_sample_id)
    return pack(
        [
            Trajectory.from_completion(p, c, g, Score(rng.random()))
            for g, (p, group) in enumerate(zip(asked, answers, strict=True))
            for c in group
        ]
    )


def rollout(policy: Policy, first_sample_id: int = 0) -> Batch:
    """Of the first update."""
    batch = policy.algorithm.advantages(sampled(policy, first_sample_id))
    return next(policy.algorithm.minibatches(batch, 24))


def gap(policy: Policy, batch: Batch) -> float:
    """Largest difference between the sampler's log-probs and the trainer's packed forward."""
    scored = score_tokens(forward_logprobs, policy.backend.engine, batch.microbatches(200))
    assert int(batch.loss_mask.sum()) > 100
    return (scored - batch.rollout_logprobs)[batch.loss_mask].abs().max().item()


def test_the_first_answers_are_out_while_others_are_being_sampled(make_policy: Callable[..., Policy]) -> None:
    """So that a reward can be at work meanwhile. Two prompts at a time fit the engine."""
    policy = make_policy(max_num_seqs=2 * PARAMS.n)
    stream = policy.generate(prompts(), PARAMS, first_sample_id=0)
    first = next(stream)
    assert 1 <= len(first) <= 2 and policy.llm.scheduler.has_work
    assert len([*first, *itertools.chain.from_iterable(stream)]) == 8 and not policy.llm.scheduler.has_work


ENGINES = {
    "roomy": {},
    "chunked": {"max_batch_tokens": 13},
    "preempting": {"kv_cache_gib": 0.0006, "max_num_seqs": 32},
    "wide pages": {"page_size": 64, "max_num_seqs": 9},
}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_logprobs_are_bitwise_equal_before_and_after_five_updates(
    make_policy: Callable[..., Policy], threads: Callable[[int], None], stage: int, num_threads: int
) -> None:
    threads(num_threads)
    policy = make_policy(zero_stage=stage, max_batch_tokens=29, kv_cache_gib=0.0006, max_num_seqs=32)
    for step in range(6):
        batch = rollout(policy, first_sample_id=1000 * step)
        assert gap(policy, batch) == 0.0
        metrics = policy.update(batch)
        assert metrics["rollout/logprob_gap_max"] == 0.0  # seen through DeepSpeed's own forward
        assert gap(policy, batch) > 0.0  # the update moved the weights
        assert policy.publish().version == step + 1
        policy.llm.check_integrity()
    stats = policy.llm.stats()
    assert stats.preemptions > 0 and stats.cached > 0


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_every_engine_setting_samples_the_same_tokens(make_policy: Callable[..., Policy], engine: str) -> None:
    truth = rollout(make_policy())
    policy = make_policy(**ENGINES[engine])
    batch = rollout(policy)
    assert torch.equal(batch.tokens, truth.tokens)
    assert torch.equal(batch.rollout_logprobs, truth.rollout_logprobs)
    assert gap(policy, batch) == 0.0
    if engine == "preempting":
        assert policy.llm.stats().preemptions > 0


def test_trainer_logits_and_counter_noise_reproduce_every_sampled_token(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    asked = prompts()
    decoder = policy.model.decoder
    seen = 0
    for prompt, answers in zip(asked, answer(policy, 50), strict=True):
        for drawn in answers:
            ids = torch.tensor([*prompt.token_ids, *drawn.token_ids])
            with torch.no_grad():
                hidden = decoder.hidden(ids, PackedAttention.from_lengths([len(ids)]))
                z = decoder.head.logits(hidden)
            positions = torch.arange(len(prompt.token_ids), len(ids))
            seed, sample = torch.full_like(positions, 7), torch.full_like(positions, drawn.sample_id)
            again = sample_tokens(
                z[positions - 1], torch.full((len(positions),), 0.9), philox_uniform(seed, sample, positions)
            )
            assert again.tokens.tolist() == list(drawn.token_ids)
            seen += len(positions)
    assert seen > 300


def test_a_tiny_change_of_one_engine_weight_is_seen(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    engine_weight = policy.llm.model.decoder.layers[1].mlp.down_proj.weight
    engine_weight.data = engine_weight.data.clone()
    engine_weight.data[3, 5] += 1e-6
    assert gap(policy, rollout(policy)) > 0.0
    policy.swap.begin()
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj\.weight left the trainer's storage"):
        policy.publish()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_storage_is_shared_and_stays_put(make_policy: Callable[..., Policy], stage: int) -> None:
    policy = make_policy(zero_stage=stage)
    engine, trainer = policy.llm.model.decoder, policy.model.decoder
    assert engine is not trainer
    before = {name: p.data_ptr() for name, p in trainer.named_parameters()}
    kv = [t.data_ptr() for t in policy.llm.kv_cache.storage()]
    for step in range(3):
        policy.update(rollout(policy, 100 * step))
        policy.publish()
        assert {name: p.data_ptr() for name, p in trainer.named_parameters()} == before
        assert {name: engine.get_parameter(name).data_ptr() for name in before} == before
        assert [t.data_ptr() for t in policy.llm.kv_cache.storage()] == kv
    assert not any(p.requires_grad for p in engine.parameters())


def test_generating_between_step_and_publish_raises(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    policy.update(rollout(policy))
    with pytest.raises(StaleWeightsError, match="publish"):
        answer(policy)
    update = policy.publish()
    assert (update.version, update.changed, update.bytes_moved) == (1, True, 0)
    answers = answer(policy)
    assert {v for group in answers for c in group for v in c.weight_versions} == {1}
    again = policy.publish()
    assert (again.version, again.changed) == (1, False)


def test_skipping_the_version_bump_is_caught(
    make_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, pages of the old weights are hit again, and the gap shows it."""
    policy = make_policy(kv_cache_gib=0.1)
    for mutated in (False, True):
        batch = rollout(policy)
        policy.update(batch)
        if mutated:
            monkeypatch.setattr(policy.llm, "_stale", None)
        else:
            policy.publish()
        assert (gap(policy, rollout(policy)) > 0.0) == mutated
