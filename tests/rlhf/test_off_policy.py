"""Importance weights, rejection, truncated sampling: by hand, by enumeration and with a real engine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import sample_tokens
from rlhf.algorithms.dapo import DAPO
from rlhf.algorithms.grpo import GRPO
from rlhf.functional import importance_ratio, overlong_penalty, rejection_mask, truncated_importance
from rlhf.packing import pack
from rlhf.roles.policy import Policy
from rlhf.types import Batch, Prompt, Score, Trajectory
from rollout_engine import SamplingParams

LN2 = math.log(2)

# ---------------------------------------------------------------- ratios, weights and masks


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("token", [2.0, 0.5, 4.0, 8.0, 1.0]),
        ("sequence", [4.0, 4.0, 4.0, 8.0, 8.0]),
        ("geometric", [2 ** (2 / 3)] * 3 + [8**0.5] * 2),
    ],
)
def test_ratios_weights_and_masks_by_hand(unit: str, expected: list[float]) -> None:
    """Two answers: powers of two 1, -1, 2 and 3, 0."""
    target = torch.tensor([1.0, -1.0, 2.0, 3.0, 0.0]) * LN2 - 1
    behaviour, counts = torch.full((5,), -1.0), (3, 2)
    ratio = importance_ratio(target.requires_grad_(), behaviour, counts, unit)
    assert ratio.tolist() == pytest.approx(expected, rel=1e-6) and not ratio.requires_grad
    weight, truncated = truncated_importance(target, behaviour, counts, unit, 3.0)
    assert weight.tolist() == pytest.approx([min(x, 3.0) for x in expected], rel=1e-6)
    assert truncated.tolist() == [x > 3.0 for x in expected] and not weight.requires_grad
    kept = rejection_mask(target, behaviour, counts, unit, 0.75, 5.0)
    assert kept.tolist() == [0.75 <= x <= 5.0 for x in expected]


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 999), unit=st.integers(0, 2))
def test_ratios_match_naive_code(counts: list[int], seed: int, unit: int) -> None:
    rng, name = random.Random(seed), ("token", "sequence", "geometric")[unit]
    answers = [[rng.uniform(-12, 12) for _ in range(n)] for n in counts]
    expected = []
    for answer in answers:
        for x in answer:
            size = {"token": x, "sequence": sum(answer), "geometric": sum(answer) / len(answer)}[name]
            expected.append(math.exp(max(-20.0, min(20.0, size))))
    target = torch.tensor([x for answer in answers for x in answer], dtype=torch.float64)
    got = importance_ratio(target, torch.zeros_like(target), tuple(counts), name)
    assert got.tolist() == pytest.approx(expected, rel=1e-10)


def test_bounds_of_a_mask_belong_to_what_is_kept() -> None:
    target = torch.tensor([0.5, 1.0, 2.0, 2.001, 0.4999], dtype=torch.float64).log()
    kept = rejection_mask(target, torch.zeros(5).double(), (5,), "token", 0.5, 2.0)
    assert kept.tolist() == [True, True, True, False, False]


def single(advantage: float = 1.0, **columns: list[float]) -> Batch:
    """One answer of three tokens, a prompt token before; log-probs of the answer's tokens by column."""
    count = 4

    def column(name: str) -> Tensor:
        return torch.tensor([-5.0, *columns.get(name, [-1.0] * 3)])

    return Batch(
        tokens=torch.arange(count),
        lengths=(count,),
        loss_mask=torch.arange(count) > 0,
        temperature=torch.ones(count),
        rollout_logprobs=column("rollout"),
        log_kept_mass=torch.tensor([0.0, *columns["kept"]]) if "kept" in columns else None,
        groups=torch.tensor([0]),
        rewards=torch.tensor([1.0]),
        old_logprobs=column("old"),
        advantages=torch.full((count,), advantage),
        loss_weights=torch.full((count,), 1 / 3),
    )


def gradient(algorithm: GRPO, batch: Batch, now: list[float]) -> tuple[list[float], dict[str, Tensor]]:
    leaf = torch.tensor(now, requires_grad=True)
    (scored,) = torch.nonzero(batch.loss_mask, as_tuple=True)
    loss, diagnostics = algorithm.policy_loss(leaf, torch.zeros(3), batch, scored)
    loss.backward()
    assert leaf.grad is not None
    return leaf.grad.tolist(), diagnostics


def test_rejected_tokens_leave_the_policy_loss_alone_and_are_counted() -> None:
    """Importance 1, 2 and 4 of the trainer's old policy over the sampler; 1/3 each token."""
    batch = single(rollout=[-1.0, -1.0 - LN2, -1.0 - 2 * LN2])
    algorithm = GRPO(updates_per_rollout=2, reject="token", reject_high=3.0, entropy_coef=0.5)
    got, diagnostics = gradient(algorithm, batch, [-1.0] * 3)
    assert got == pytest.approx([-1 / 3, -1 / 3, 0.0])
    assert diagnostics["rejected"].tolist() == [0.0, 0.0, 1.0]
    whole, _ = gradient(replace(algorithm, reject="sequence"), batch, [-1.0] * 3)  # 8 in all
    assert whole == [0.0] * 3
    root, _ = gradient(replace(algorithm, reject="geometric"), batch, [-1.0] * 3)  # 2 each
    assert root == pytest.approx([-1 / 3] * 3)


def test_the_decoupled_objective_clips_to_the_proximal_policy_and_weighs_by_the_sampler() -> None:
    """Sampler, proximal and current policy all differ: tokens of weight 2 whose ratios are 1, 1.5 (clipped), 0.9."""
    old, now = [-1.0] * 3, [-1.0, -1.0 + math.log(1.5), -1.0 + math.log(0.9)]
    batch = single(rollout=[-1.0 - LN2] * 3, old=old)
    decoupled, found = gradient(GRPO(updates_per_rollout=2, tis_clip=5.0), batch, now)
    assert decoupled == pytest.approx([-2 / 3, 0.0, -2 * 0.9 / 3], rel=1e-5)
    assert found["approx_kl"].tolist() == pytest.approx([0.0, 0.5 - math.log(1.5), -0.1 - math.log(0.9)], abs=1e-6)
    # to the sampler itself the ratios are 2, 3 and 1.8, all above 1.2
    coupled, found = gradient(GRPO(updates_per_rollout=2, proximal="sampler"), batch, now)
    assert coupled == [0.0] * 3 and found["ratio"].tolist() == pytest.approx([2.0, 3.0, 1.8], rel=1e-5)


def test_the_sampler_as_proximal_policy_needs_no_old_logprobs() -> None:
    batch = single(rollout=[-1.0 - LN2, -1.0, -1.0]).replace(old_logprobs=None)  # type: ignore[arg-type]
    algorithm = GRPO(updates_per_rollout=3, proximal="sampler", clip_high=2.0)
    assert not algorithm.needs_old_logprobs and GRPO(updates_per_rollout=3).needs_old_logprobs
    got, _ = gradient(algorithm, batch, [-1.0] * 3)
    assert got == pytest.approx([-2 / 3, -1 / 3, -1 / 3], rel=1e-6)


def test_an_older_samplers_tokens_are_weighed_in_a_single_step_too() -> None:
    """No old pass: the weight is the current policy over the one that sampled."""
    algorithm = DAPO()
    assert algorithm.is_on_policy and not algorithm.needs_old_logprobs
    got, found = gradient(algorithm, single(rollout=[-1.0, -1.0 - 0.5 * LN2, -1.0 - 3 * LN2]), [-1.0] * 3)
    assert got == pytest.approx([-1 / 3, -(2**0.5) / 3, -2 / 3], rel=1e-6)  # at most 2
    assert found["tis_truncated"].tolist() == [0.0, 0.0, 1.0]


# ---------------------------------------------------------------- truncated sampling


FILTERS = [{"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 4, "top_p": 0.8}]
TABLES = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))  # logits: a first token, and a second after each
PAYOFF = torch.randn(5, 5, generator=torch.Generator().manual_seed(4))


@dataclass(frozen=True)
class Drawn:
    token: int
    logprob: float
    kept: float  # log mass
    probability: float


def draws(row: int, filters: dict[str, Any]) -> list[Drawn]:
    """What the engine's sampler can draw from a row of the table: a fine grid of uniforms meets every token."""
    n = 4096
    settings = {name: torch.full((n,), value) for name, value in filters.items()}
    out = sample_tokens(TABLES[row].expand(n, 5).contiguous(), torch.ones(n), (torch.arange(n) + 0.5) / n, **settings)
    columns = (out.tokens, out.logprobs, out.log_kept_mass, out.processed_logprobs.exp())
    found = sorted(
        {Drawn(*values) for values in zip(*(column.tolist() for column in columns), strict=True)}, key=astuple
    )
    assert sum(d.probability for d in found) == pytest.approx(1.0, abs=1e-6)
    return found


def answers_of(length: int, filters: dict[str, Any]) -> list[list[Drawn]]:
    firsts = draws(0, filters)
    return [[a] for a in firsts] if length == 1 else [[a, b] for a in firsts for b in draws(1 + a.token, filters)]


def payoff(answer: list[Drawn]) -> float:
    return PAYOFF[answer[0].token, answer[-1].token].item()


def expected_gradient(algorithm: GRPO, answers: list[list[Drawn]]) -> Tensor:
    """Mean over the answers, as often as they are drawn, of the gradient by the table of the algorithm's loss."""
    total = torch.zeros(6, 5, dtype=torch.float64)
    for answer in answers:
        table = TABLES.clone().requires_grad_()
        rows, tokens = [0, 1 + answer[0].token][: len(answer)], [d.token for d in answer]
        logprobs = table.log_softmax(1)[rows, tokens]
        batch = Batch(
            tokens=torch.tensor(tokens),
            lengths=(len(answer),),
            loss_mask=torch.ones(len(answer), dtype=torch.bool),
            temperature=torch.ones(len(answer)),
            rollout_logprobs=torch.tensor([d.logprob for d in answer]),
            log_kept_mass=torch.tensor([d.kept for d in answer]),
            groups=torch.tensor([0]),
            rewards=torch.tensor([payoff(answer)]),
            advantages=torch.full((len(answer),), payoff(answer)),
            loss_weights=torch.ones(len(answer)),
        )
        loss, _ = algorithm.policy_loss(logprobs, torch.zeros(len(answer)), batch, torch.arange(len(answer)))
        loss.backward()
        assert table.grad is not None
        total += math.prod(d.probability for d in answer) * table.grad.double()
    return total


def true_gradient(answers: list[list[Drawn]]) -> Tensor:
    """Of minus the sum of probability x payoff over these answers, under the full distribution; float64."""
    table = TABLES.double().requires_grad_()
    p = table.softmax(1)
    total = sum(p[0, a[0].token] * (p[1 + a[0].token, a[1].token] if len(a) == 2 else 1.0) * payoff(a) for a in answers)
    assert isinstance(total, Tensor)
    (-total).backward()
    assert table.grad is not None
    return table.grad


PLAIN = {"baseline": "none", "std": "none", "clip": "none"}


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("length", "axes"),
    [(1, {"tis_clip": 50.0}), (1, {"proximal": "sampler"}), (2, {"tis_clip": 50.0, "importance": "sequence"})],
)
def test_the_kept_mass_makes_truncated_sampling_unbiased_on_what_it_kept(
    filters: dict[str, Any], length: int, axes: dict[str, Any]
) -> None:
    """All answers that can be drawn, enumerated: the mean of weight x f under the sampler is the sum of f under the
    policy over them, f being the gradient of the log-prob times a payoff."""
    answers = answers_of(length, filters)
    assert 1 < len(answers) < 5**length
    truth = true_gradient(answers)
    assert (expected_gradient(GRPO(**PLAIN, **axes), answers) - truth).abs().max().item() < 1e-6
    assert (expected_gradient(GRPO(**PLAIN), answers) - truth).abs().max().item() > 1e-2, "seen when left out"


def test_without_truncation_the_mass_is_all_and_the_weight_one() -> None:
    answers = answers_of(2, {})
    assert len(answers) == 25 and all(d.kept == 0.0 for answer in answers for d in answer)
    plain, weighed = (expected_gradient(GRPO(**PLAIN, tis_clip=clip), answers) for clip in (None, 50.0))
    assert torch.equal(plain, weighed)
    assert (plain - true_gradient(answers)).abs().max().item() < 1e-6


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_engines_kept_mass_arrives_in_the_batch(
    make_policy: Callable[..., Policy], filters: dict[str, Any]
) -> None:
    """Behaviour log-probs are those that the engine drew by, and a fresh token's weight is the mass that was kept."""
    algorithm = GRPO(tis_clip=2.0)
    policy = make_policy(algorithm=algorithm)
    asked = [Prompt(i, "", tuple(range(3, 6 + i))) for i in range(4)]
    params = SamplingParams(n=3, max_tokens=9, temperature=0.8, **filters)
    rng, trajectories = random.Random(0), []
    for finished in policy.generate(asked, params, first_sample_id=0):
        for group, answers in finished:
            for c in answers:
                trajectories.append(Trajectory.from_completion(asked[group], c, group, Score(rng.random())))
    batch = algorithm.advantages(pack(trajectories))
    kept = torch.tensor([x for t in trajectories for x in t.log_kept_mass])
    assert batch.log_kept_mass is not None and torch.equal(batch.log_kept_mass, kept)
    assert (kept[batch.loss_mask] < 0).any() and (kept[~batch.loss_mask] == 0).all() and (kept <= 1e-6).all()
    (step,) = algorithm.minibatches(batch, 9)
    metrics = policy.update(step)
    assert metrics["rollout/logprob_gap_max"] == 0.0  # of the full vocabulary, whatever was cut off
    expected = kept[batch.loss_mask].double().exp().mean().item()
    assert metrics["policy/tis_weight"] == pytest.approx(expected, rel=1e-6)
    assert metrics["policy/tis_truncated"] == 0.0


def test_untruncated_answers_carry_no_mass_and_their_weights_are_exactly_one(
    make_policy: Callable[..., Policy],
) -> None:
    algorithm = GRPO(tis_clip=2.0, importance="sequence", reject="sequence", reject_low=1.0, reject_high=1.0)
    policy = make_policy(algorithm=algorithm)
    asked = [Prompt(0, "", (5, 6, 7))]
    (((_, answers),),) = policy.generate(asked, SamplingParams(n=4, max_tokens=9), first_sample_id=0)
    batch = pack([Trajectory.from_completion(asked[0], c, 0, Score(float(i))) for i, c in enumerate(answers)])
    assert batch.log_kept_mass is None
    (step,) = algorithm.minibatches(algorithm.advantages(batch), 9)
    metrics = policy.update(step)
    assert (metrics["policy/tis_weight"], metrics["policy/rejected"]) == (1.0, 0.0)


# ---------------------------------------------------------------- overlong answers


@pytest.mark.parametrize(("length", "penalty"), [(1, 0.0), (80, 0.0), (85, 0.25), (90, 0.5), (100, 1.0), (105, 1.0)])
def test_the_overlong_penalty_by_hand(length: int, penalty: float) -> None:
    """Of at most 100 tokens the last 20 cost."""
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)
