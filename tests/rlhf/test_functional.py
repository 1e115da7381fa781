"""The mathematics of policy optimisation against hand-computed numbers and naive float64 loops."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.functional import clipped_surrogate, group_advantages, kl_k3, token_weights
from rlhf.types import Batch

AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")


def advantages(rewards: Sequence[float], groups: Sequence[int], std: bool) -> Tensor:
    return group_advantages(torch.tensor(rewards), torch.tensor(groups), normalize_std=std)


# ---------------------------------------------------------------- group_advantages

HAND = {
    # mean 1/2, sample variance 4 * 1/4 / 3 = 1/3; then a group of one
    "halves": ([1.0, 0.0, 0.0, 1.0, 2.0], [0, 0, 0, 0, 7], [0.5, -0.5, -0.5, 0.5, 0.0], [3**-0.5] * 4 + [1.0]),
    # group 5 has mean 2 and deviation sqrt(2), group 2 mean 20 and 10 sqrt(2); ids interleaved, not from 0
    "unsorted": ([1.0, 10.0, 3.0, 30.0], [5, 2, 5, 2], [-1, -10, 1, 10], [2**0.5, 200**0.5, 2**0.5, 200**0.5]),
    # mean 3, squares 4 + 1 + 9 over n - 1 = 2; then two equal rewards
    "sevens": ([1.0, 2.0, 6.0, 4.0, 4.0], [0, 0, 0, 1, 1], [-2, -1, 3, 0, 0], [7**0.5] * 3 + [1.0] * 2),
}


@pytest.mark.parametrize("name", HAND)
def test_advantages_by_hand(name: str) -> None:
    rewards, groups, centred, deviation = HAND[name]
    assert advantages(rewards, groups, std=False).tolist() == pytest.approx(centred, abs=1e-6)
    expected = [c / d for c, d in zip(centred, deviation, strict=True)]
    assert advantages(rewards, groups, std=True).tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("std", [True, False])
def test_advantages_match_a_naive_loop(std: bool) -> None:
    rng = random.Random(3)
    rewards = torch.tensor([rng.uniform(-2, 2) for _ in range(90)]).tolist()  # rounded to fp32
    groups = [rng.choice([-4, 3, 17, 1000, 2**40]) for _ in rewards]
    expected = []
    for reward, group in zip(rewards, groups, strict=True):
        mates = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        expected.append((reward - statistics.fmean(mates)) / (statistics.stdev(mates) if std else 1.0))
    got = advantages(rewards, groups, std)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, -3.0, 0.1, 0.7, 1 / 3, 12.3, 1000.1])
def test_equal_rewards_and_groups_of_one_get_exactly_zero(reward: float, std: bool) -> None:
    for size in range(1, 10):
        assert advantages([reward] * size, [0] * size, std).tolist() == [0.0] * size, size


# ---------------------------------------------------------------- clipped_surrogate

LOW, HIGH = 0.2, 0.3
RATIOS = [0.5, 0.79, 0.81, 1.0, 1.21, 1.29, 1.31, 2.0]
ADVANTAGES = [-2.0, -0.5, 0.0, 1.0, 3.0]


def naive_surrogate(logprob: Tensor, old: float, advantage: float) -> Tensor:
    """Eq. 7 of PPO for one token, branch by branch; float64."""
    ratio = torch.exp(logprob - old)
    if advantage >= 0:
        objective = (ratio if ratio <= 1 + HIGH else torch.tensor(1 + HIGH, dtype=torch.float64)) * advantage
    else:
        objective = (ratio if ratio >= 1 - LOW else torch.tensor(1 - LOW, dtype=torch.float64)) * advantage
    return -objective


def grid() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (a leaf), old log-probs and advantages of every ratio with every advantage, fp32."""
    pairs = [(ratio, advantage) for ratio in RATIOS for advantage in ADVANTAGES]
    old = torch.linspace(-3.0, -0.1, len(pairs))
    logprobs = old + torch.tensor([ratio for ratio, _ in pairs]).log()
    return logprobs.requires_grad_(), old, torch.tensor([advantage for _, advantage in pairs])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 1.5, -1.5, -1.5, False),
        (2.0, 1.0, -1.3, 0.0, True),  # too likely already
        (2.0, -1.0, 2.0, 2.0, False),  # too likely and bad: still pushed down
        (0.5, -1.0, 0.8, 0.0, True),  # unlikely enough
        (0.5, 1.0, -0.5, -0.5, False),  # too unlikely and good: still pulled up
        (1.2, 1.0, -1.2, -1.2, False),
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    logprobs = torch.tensor([math.log(ratio) - 1.0]).requires_grad_()
    losses, flags = clipped_surrogate(logprobs, torch.tensor([-1.0]), torch.tensor([advantage]), LOW, HIGH)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, rel=1e-6)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(gradient, rel=1e-6)
    assert flags.tolist() == [clipped]


def test_surrogate_and_gradient_match_the_naive_form() -> None:
    logprobs, old, advantage = grid()
    losses, _ = clipped_surrogate(logprobs, old, advantage, LOW, HIGH)
    losses.sum().backward()
    leaf = logprobs.detach().double().requires_grad_()
    naive = torch.stack(
        [naive_surrogate(leaf[i], old[i].double().item(), advantage[i].item()) for i in range(len(leaf))]
    )
    naive.sum().backward()
    assert leaf.grad is not None and logprobs.grad is not None
    torch.testing.assert_close(losses.double(), naive, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logprobs.grad.double(), leaf.grad, rtol=1e-6, atol=1e-6)


def test_clipped_says_where_the_clip_took_the_gradient() -> None:
    logprobs, old, advantage = grid()
    losses, clipped = clipped_surrogate(logprobs, old, advantage, LOW, HIGH)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert torch.equal(clipped, (logprobs.grad == 0) & (advantage != 0))
    assert int(clipped.sum()) == 2 * 2 + 2 * 2  # ratios beyond each bound times advantages of that sign


# ---------------------------------------------------------------- kl_k3


@pytest.mark.parametrize(
    ("ratio", "value"),
    [(1.0, 0.0), (2.0, 0.3068528194400547), (0.5, 0.1931471805599453), (math.e, 0.718281828459045), (8.0, 4.920558458)],
)
def test_kl_and_its_gradient_by_hand(ratio: float, value: float) -> None:
    logprobs = torch.tensor([-1.3], dtype=torch.float64).requires_grad_()
    kl = kl_k3(logprobs, logprobs.detach() + math.log(ratio))
    kl.sum().backward()
    assert kl.item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(1 - ratio, rel=1e-9, abs=1e-12)


def test_kl_is_unbiased() -> None:
    policy, reference = [0.5, 0.3, 0.15, 0.05], [0.2, 0.2, 0.1, 0.5]
    p, q = torch.tensor(policy, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    exact = sum(a * math.log(a / b) for a, b in zip(policy, reference, strict=True))
    assert (p * kl_k3(p.log(), q.log())).sum().item() == pytest.approx(exact, rel=1e-12)
    assert exact > 0.1


def test_kl_is_never_negative() -> None:
    magnitudes = torch.logspace(-9, 1, 20_000)
    difference = torch.cat([magnitudes, -magnitudes, torch.zeros(1)])
    kl = kl_k3(torch.zeros_like(difference), difference)
    assert kl.min().item() >= 0.0, f"{int((kl < 0).sum())} of {len(kl)} are negative, down to {kl.min():.2e}"


def test_kl_of_nearly_equal_policies_is_not_rounding_noise() -> None:
    difference = torch.linspace(1e-3, 2e-3, 1000)
    exact = torch.tensor([math.expm1(x) - x for x in difference.double().tolist()], dtype=torch.float64)
    relative = (kl_k3(torch.zeros_like(difference), difference).double() / exact - 1).abs()
    assert relative.max().item() < 0.01


# ---------------------------------------------------------------- token_weights

WEIGHTS = [
    # (lengths, mask, max_tokens, aggregation, weights by hand)
    ((3, 2, 4), "011 01 0111", 5, "token_mean", [0, 1 / 6, 1 / 6, 0, 1 / 6, 0, 1 / 6, 1 / 6, 1 / 6]),
    ((3, 2, 4), "011 01 0111", 5, "sequence_mean", [0, 1 / 6, 1 / 6, 0, 1 / 3, 0, 1 / 9, 1 / 9, 1 / 9]),
    ((3, 2, 4), "011 01 0111", 5, "constant_length", [0, 1 / 15, 1 / 15, 0, 1 / 15, 0, 1 / 15, 1 / 15, 1 / 15]),
    # the middle sequence trains nothing, so two sequences count
    ((2, 3, 2), "01 000 11", 4, "token_mean", [0, 1 / 3, 0, 0, 0, 1 / 3, 1 / 3]),
    ((2, 3, 2), "01 000 11", 4, "sequence_mean", [0, 1 / 2, 0, 0, 0, 1 / 4, 1 / 4]),
    ((2, 3, 2), "01 000 11", 4, "constant_length", [0, 1 / 8, 0, 0, 0, 1 / 8, 1 / 8]),
]


@pytest.mark.parametrize(("lengths", "mask", "max_tokens", "aggregation", "expected"), WEIGHTS)
def test_weights_by_hand(
    lengths: tuple[int, ...], mask: str, max_tokens: int, aggregation: str, expected: list[float]
) -> None:
    trained = torch.tensor([bit == "1" for bit in mask.replace(" ", "")])
    weights = token_weights(trained, lengths, aggregation, max_tokens)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    share = int(trained.sum()) / (sum("1" in part for part in mask.split()) * max_tokens)
    assert weights.sum().item() == pytest.approx(share if aggregation == "constant_length" else 1.0, rel=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_that_trains_nothing_weighs_nothing(aggregation: str) -> None:
    assert token_weights(torch.zeros(5, dtype=torch.bool), (2, 3), aggregation, 3).tolist() == [0.0] * 5


def naive_aggregate(sequences: list[list[float]], aggregation: str, max_tokens: int) -> float:
    """Loss of sequences that are lists of the losses of their trained tokens."""
    trained = [losses for losses in sequences if losses]
    if not trained:
        return 0.0
    if aggregation == "token_mean":
        return statistics.fmean(loss for losses in trained for loss in losses)
    if aggregation == "sequence_mean":
        return statistics.fmean(statistics.fmean(losses) for losses in trained)
    return sum(sum(losses) / max_tokens for losses in trained) / len(trained)


@settings(max_examples=60, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=7),
    max_micro=st.integers(1, 45),
    aggregation=st.sampled_from(AGGREGATIONS),
    seed=st.integers(0, 999),
)
def test_any_split_sums_to_the_loss_of_the_whole(
    masks: list[list[bool]], max_micro: int, aggregation: str, seed: int
) -> None:
    rng = random.Random(seed)
    losses = [[rng.choice([-3.0, -0.25, 0.5, 2.0]) for _ in mask] for mask in masks]
    lengths = tuple(len(mask) for mask in masks)
    flat = torch.tensor([loss for row in losses for loss in row])
    mask = torch.tensor([bit for row in masks for bit in row])
    batch = Batch(
        tokens=torch.arange(len(flat)),
        lengths=lengths,
        loss_mask=mask,
        temperature=torch.ones(len(flat)),
        rollout_logprobs=flat,  # carries each token's loss through the split
        groups=torch.arange(len(lengths)),
        rewards=torch.zeros(len(lengths)),
        loss_weights=token_weights(mask, lengths, aggregation, 6),
    )
    order = rng.sample(range(len(lengths)), len(lengths))
    total = 0.0
    for micro in batch.select(order).microbatches(max_micro):
        total += (micro.column("loss_weights").double() * micro.rollout_logprobs.double()).sum().item()
    kept = [[loss for loss, bit in zip(row, bits, strict=True) if bit] for row, bits in zip(losses, masks, strict=True)]
    assert total == pytest.approx(naive_aggregate(kept, aggregation, 6), rel=1e-6, abs=1e-6)
