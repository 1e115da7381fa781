"""The mathematics of policy optimisation against hand-computed numbers and naive float64 loops."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.functional import (
    clipped_surrogate,
    clipped_weight_loss,
    kl_estimate,
    sequence_ratio,
    token_ratio,
    token_weights,
    truncated_importance,
)
from rlhf.types import Batch

AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")


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
    losses, flags = clipped_surrogate(token_ratio(logprobs, torch.tensor([-1.0])), torch.tensor([advantage]), LOW, HIGH)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, rel=1e-6)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(gradient, rel=1e-6)
    assert flags.tolist() == [clipped]


def test_surrogate_and_gradient_match_the_naive_form() -> None:
    logprobs, old, advantage = grid()
    losses, _ = clipped_surrogate(token_ratio(logprobs, old), advantage, LOW, HIGH)
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
    losses, clipped = clipped_surrogate(token_ratio(logprobs, old), advantage, LOW, HIGH)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert torch.equal(clipped, (logprobs.grad == 0) & (advantage != 0))
    assert int(clipped.sum()) == 2 * 2 + 2 * 2  # ratios beyond each bound times advantages of that sign


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (2.0, -1.0, 2.0, 2.0, False),  # below c = 3
        (5.0, -1.0, 3.0, 0.0, True),  # 5 is more than 3
        (5.0, -0.5, 1.5, 0.0, True),
        (5.0, 1.0, -1.3, 0.0, True),  # good tokens: PPO's own bound
        (0.5, -1.0, 0.8, 0.0, True),
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    logprobs = torch.tensor([math.log(ratio)]).requires_grad_()
    ratios = token_ratio(logprobs, torch.zeros(1))
    losses, flags = clipped_surrogate(ratios, torch.tensor([advantage]), LOW, HIGH, dual_clip=3.0)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, rel=1e-6)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(gradient, rel=1e-6)
    assert flags.tolist() == [clipped]


# ---------------------------------------------------------------- sequence_ratio


@pytest.mark.parametrize(
    ("counts", "log_ratios", "values"),
    [
        ((2,), [math.log(2), math.log(8)], [4.0, 4.0]),  # (2 * 8) ** (1/2)
        ((1, 3), [math.log(3), math.log(2), 0.0, math.log(4)], [3.0, 2.0, 2.0, 2.0]),  # 3; (2 * 1 * 4) ** (1/3)
        ((2, 0, 1), [math.log(0.5), math.log(2), -math.log(4)], [1.0, 1.0, 0.25]),  # the middle one has no tokens
    ],
)
def test_sequence_ratios_by_hand(counts: tuple[int, ...], log_ratios: list[float], values: list[float]) -> None:
    old = torch.linspace(-3, -1, len(values), dtype=torch.float64)
    logprobs = (old + torch.tensor(log_ratios, dtype=torch.float64)).requires_grad_()
    ratio = sequence_ratio(logprobs, old, counts)
    ratio.sum().backward()
    assert ratio.tolist() == pytest.approx(values, rel=1e-12)
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx(values, rel=1e-12)


def test_the_mean_of_a_sequence_ratio_has_the_gradient_of_the_true_ratio() -> None:
    counts = (3, 1, 4)
    old = torch.tensor([-0.3, -1.2, -2.0, -0.7, -1.1, -0.1, -0.9, -3.0], dtype=torch.float64)
    ours = (old + torch.sin(torch.arange(8, dtype=torch.float64))).requires_grad_()
    true = ours.detach().clone().requires_grad_()
    means = [part.mean() for part in sequence_ratio(ours, old, counts).split(counts)]
    exact = [torch.exp((x - o).sum() / len(o)) for x, o in zip(true.split(counts), old.split(counts), strict=True)]
    scale = (1.0, -2.0, 0.5)
    sum(s * m for s, m in zip(scale, means, strict=True)).backward()  # type: ignore[union-attr]
    sum(s * e for s, e in zip(scale, exact, strict=True)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(torch.stack(means), torch.stack(exact), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, true.grad, rtol=1e-12, atol=0)


def test_a_sequence_ratio_is_exactly_one_where_nothing_has_changed() -> None:
    logprobs = torch.tensor([-11.7, -0.3, -5.1, -1e-3])
    assert sequence_ratio(logprobs, logprobs.clone(), (3, 1)).tolist() == [1.0] * 4


def test_a_sequence_ratio_keeps_its_digits_where_the_tokens_are_unlikely() -> None:
    """Bounds are of the order of 1e-4; a mean added to a log-prob of -40 first would be 3 % off."""
    old = torch.tensor([-40.0, -40.0, -40.0])
    ratio = sequence_ratio(old + torch.tensor([2**-13, 0.0, 0.0]), old, (3,))
    assert (ratio.double() - 1).tolist() == pytest.approx([2**-13 / 3] * 3, rel=1e-2)


# ---------------------------------------------------------------- clipped_weight_loss, truncated_importance


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # log-prob -2, weight at most 1.3: loss is -weight * advantage * -2, its gradient -weight * advantage
        (1.0, 1.5, 3.0, -1.5, False),
        (2.0, 1.0, 2.6, -1.3, True),
        (2.0, -1.0, -2.6, 1.3, True),
        (0.01, 1.0, 0.02, -0.01, False),  # clip_low 1 is no bound
    ],
)
def test_clipped_weights_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    logprobs = torch.tensor([-2.0]).requires_grad_()
    ratios = token_ratio(logprobs, torch.tensor([-2.0 - math.log(ratio)]))
    losses, flags = clipped_weight_loss(ratios, logprobs, torch.tensor([advantage]), 1.0, HIGH)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(gradient, rel=1e-5)
    assert flags.tolist() == [clipped]


def test_a_lower_bound_on_the_weight_holds_too() -> None:
    losses, flags = clipped_weight_loss(torch.tensor([0.1]), torch.tensor([-1.0]), torch.tensor([2.0]), 0.2, HIGH)
    assert losses.item() == pytest.approx(0.8 * 2) and flags.tolist() == [True]


def test_truncated_importance_by_hand() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0]).requires_grad_()
    rollout = torch.tensor([-1.0, -1.0 - math.log(1.5), -1.0 - math.log(4), -1.0 + math.log(2)])
    weight, truncated = truncated_importance(old, rollout, (4,), "token", 2.0)
    assert weight.tolist() == pytest.approx([1.0, 1.5, 2.0, 0.5], rel=1e-6)
    assert truncated.tolist() == [False, False, True, False] and not weight.requires_grad


# ---------------------------------------------------------------- kl_estimate

E = math.e


@pytest.mark.parametrize(
    ("estimator", "ratio", "value", "gradient"),  # ratio: reference over policy
    [
        ("k1", 1.0, 0.0, 1.0),
        ("k1", 2.0, -0.6931471805599453, 1.0),
        ("k1", 1 / E, 1.0, 1.0),
        ("k2", 1.0, 0.0, 0.0),
        ("k2", E, 0.5, -1.0),
        ("k2", 1 / E**2, 2.0, 2.0),  # gradient: log(policy / reference)
        ("k3", 1.0, 0.0, 0.0),
        ("k3", 2.0, 0.3068528194400547, -1.0),  # gradient: 1 - ratio
        ("k3", 0.5, 0.1931471805599453, 0.5),
        ("k3", E, 0.718281828459045, 1 - E),
        ("k3", 8.0, 4.920558458, -7.0),
    ],
)
def test_kl_and_its_gradient_by_hand(estimator: str, ratio: float, value: float, gradient: float) -> None:
    logprobs = torch.tensor([-1.3], dtype=torch.float64).requires_grad_()
    kl = kl_estimate(logprobs, logprobs.detach() + math.log(ratio), estimator)
    kl.sum().backward()
    assert kl.item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(gradient, rel=1e-9, abs=1e-12)


LOGITS = torch.tensor([0.9, 0.2, -0.4, -1.3], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.2, 0.1, 0.5], dtype=torch.float64).log()


def expected_estimate(estimator: str) -> tuple[float, Tensor]:
    """Expectation over the policy's samples of an estimate, and of the estimate's gradient by the logits."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    estimate = kl_estimate(logprobs, REFERENCE, estimator)
    (gradient,) = torch.autograd.grad((logprobs.exp().detach() * estimate).sum(), logits)
    return (logprobs.exp() * estimate).sum().item(), gradient


def true_kl() -> tuple[float, Tensor]:
    logits = LOGITS.clone().requires_grad_()
    p = logits.softmax(0)
    kl = (p * (p.log() - REFERENCE)).sum()
    (gradient,) = torch.autograd.grad(kl, logits)
    return kl.item(), gradient


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    kl, _ = true_kl()
    assert kl > 0.1
    assert expected_estimate("k1")[0] == pytest.approx(kl, rel=1e-12)
    assert expected_estimate("k3")[0] == pytest.approx(kl, rel=1e-12)
    assert abs(expected_estimate("k2")[0] - kl) > 0.01


def test_only_k2_has_the_gradient_of_the_kl_and_that_of_k1_is_zero() -> None:
    _, gradient = true_kl()
    assert gradient.abs().max().item() > 0.1
    torch.testing.assert_close(expected_estimate("k2")[1], gradient, rtol=1e-12, atol=1e-15)
    assert expected_estimate("k1")[1].abs().max().item() < 1e-15
    assert (expected_estimate("k3")[1] - gradient).abs().max().item() > 0.05


def test_k3_is_never_negative() -> None:
    magnitudes = torch.logspace(-9, 1, 20_000)
    difference = torch.cat([magnitudes, -magnitudes, torch.zeros(1)])
    kl = kl_estimate(torch.zeros_like(difference), difference, "k3")
    assert kl.min().item() >= 0.0, f"{int((kl < 0).sum())} of {len(kl)} are negative, down to {kl.min():.2e}"


def test_k3_of_nearly_equal_policies_is_not_rounding_noise() -> None:
    difference = torch.linspace(1e-3, 2e-3, 1000)
    exact = torch.tensor([math.expm1(x) - x for x in difference.double().tolist()], dtype=torch.float64)
    relative = (kl_estimate(torch.zeros_like(difference), difference, "k3").double() / exact - 1).abs()
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
