"""PPO's mathematics against definitions, naive loops and numbers by hand, and proof that wrong code would be seen."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_policy_gradient import Answer, batch_of, naive_kl, naive_reward, random_answers
from torch import Tensor

from rlhf import functional
from rlhf.algorithms.ppo import PPO
from rlhf.functional import adapted_kl_coef, clipped_value_loss, gae, whitened
from rlhf.types import Batch

# ---------------------------------------------------------------- generalised advantage estimates


@pytest.mark.parametrize(
    ("lengths", "rewards", "values", "gamma", "lam", "advantages"),
    [
        # Monte Carlo: all returns are 1
        ((3,), [0, 0, 1], [0.5, 0.25, 0.75], 1.0, 1.0, [0.5, 0.75, 0.25]),
        # deltas 1 + 2/2 - 4 = -2 and 4 - 2 = 2; the first looks ahead with 1/4
        ((2,), [1, 4], [4, 2], 0.5, 0.5, [-1.5, 2.0]),
        # one step ahead: 1 + 0.25 - 0.5, -1 - 0.25; a sequence of nothing; 3 - 1
        ((2, 0, 1), [1, -1, 3], [0.5, 0.25, 1.0], 1.0, 0.0, [0.75, -1.25, 2.0]),
    ],
)
def test_gae_by_hand(
    lengths: tuple[int, ...],
    rewards: list[float],
    values: list[float],
    gamma: float,
    lam: float,
    advantages: list[float],
) -> None:
    got, returns = gae(torch.tensor(rewards).double(), torch.tensor(values).double(), lengths, gamma, lam)
    assert got.tolist() == advantages
    assert returns.tolist() == [a + v for a, v in zip(advantages, values, strict=True)]


def gae_by_definition(
    rewards: Sequence[float], values: Sequence[float], lengths: Sequence[int], gamma: float, lam: float
) -> list[float]:
    """Eq. 16: every sum of discounted temporal differences written out, O(T^2)."""
    result, first = [], 0
    for n in lengths:
        r, v = rewards[first : first + n], [*values[first : first + n], 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        result += [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        first += n
    return result


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=6),
    gamma=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)),
    lam=st.one_of(st.sampled_from([0.0, 0.95, 1.0]), st.floats(0, 1)),
    seed=st.integers(0, 999),
)
def test_gae_is_its_definition(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    rng = random.Random(seed)
    rewards, values = ([rng.uniform(-2, 2) for _ in range(sum(lengths))] for _ in range(2))
    columns = torch.tensor([rewards, values], dtype=torch.float64).unbind()
    got, returns = gae(*columns, tuple(lengths), gamma, lam)
    expected = gae_by_definition(rewards, values, lengths, gamma, lam)
    assert got.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=True)], abs=1e-11)


# ---------------------------------------------------------------- whitening


@pytest.mark.parametrize(
    ("values", "of", "expected"),
    [
        ([1.0, 2.0, 3.0], None, [-1.0, 0.0, 1.0]),
        ([5.0, 5.0, 1.0, 1.0], None, [0.75**0.5, 0.75**0.5, -(0.75**0.5), -(0.75**0.5)]),  # squares 4 x 4 over 3
        ([3.0, 0.0], [1.0, 3.0], [2**-0.5, -2 * 2**-0.5]),  # mean 2, deviation sqrt(2)
        ([7.0], None, [0.0]),
        ([], None, []),
    ],
)
def test_whitening_by_hand(values: list[float], of: list[float] | None, expected: list[float]) -> None:
    got = whitened(torch.tensor(values), None if of is None else torch.tensor(of))
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(-1000, 1000).map(lambda x: x / 64), min_size=2, max_size=50))
def test_whitening_matches_naive_code(values: list[float]) -> None:
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    expected = [(x - mean) / (deviation + 1e-8) for x in values]
    assert whitened(torch.tensor(values).double()).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------- the preset's advantages

AXES = {
    "proximal": "trainer", "updates_per_rollout": 2, "epochs": 2, "kl_in": "reward",
    "reward_norm": "none", "reward_clip": None,
}  # fmt: skip


def case(seed: int) -> tuple[list[Answer], list[list[float]], Batch]:
    """Answers, the critic's values of their tokens, and the batch; on the prompts stand values that must not matter."""
    rng = random.Random(seed)
    answers = random_answers(rng, [2, 1, 3])
    values = [[rng.randint(-16, 16) / 8 for _ in a.now] for a in answers]
    rows = [x for a, own in zip(answers, values, strict=True) for x in (*[9.0] * a.given, *own)]
    batch = batch_of(answers, {**AXES, "kl_coef": 0.1})
    return answers, values, batch.replace(values=torch.tensor(rows))


def naive_ppo(answers: list[Answer], values: list[list[float]], ppo: PPO) -> tuple[list[float], list[float]]:
    """Advantages and returns of all tokens, one after another."""
    advantages, returns = [], []
    for a, v in zip(answers, values, strict=True):
        costs = [ppo.kl_coef * naive_kl(p, q, ppo.kl_estimator) for p, q in zip(a.old, a.ref, strict=True)]
        rewards = [-cost for cost in costs]
        rewards[-1] += naive_reward(a.reward, answers, vars(ppo))
        found = gae_by_definition(rewards, v, [len(v)], ppo.gamma, ppo.lam)
        advantages += found
        returns += [x + y for x, y in zip(found, v, strict=True)]
    if ppo.whiten:
        mean, deviation = statistics.fmean(advantages), statistics.stdev(advantages)
        advantages = [(x - mean) / (deviation + 1e-8) for x in advantages]
    return advantages, returns


SETTINGS: list[dict[str, Any]] = [
    {},
    {"gamma": 0.9, "lam": 0.5, "whiten": False, "kl_coef": 0.3, "kl_estimator": "k3"},
    {"lam": 0.0, "kl_coef": 0.0},
    {"lam": 1.0, "kl_estimator": "k2", "reward_clip": 0.5},
    {"gamma": 0.5, "reward_norm": "batch", "reward_clip": 1.0},
]


def same(got: Batch, expected: tuple[list[float], list[float]]) -> bool:
    columns = [got.column(name)[got.loss_mask].tolist() for name in ("advantages", "returns")]
    return all(a == pytest.approx(b, rel=1e-5, abs=1e-5) for a, b in zip(columns, expected, strict=True))


@pytest.mark.parametrize("changed", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_advantages_and_returns_match_naive_code(changed: dict[str, Any], seed: int) -> None:
    answers, values, batch = case(seed)
    ppo = PPO(**changed)
    got = ppo.advantages(batch)
    assert same(got, naive_ppo(answers, values, ppo))
    for name in ("advantages", "returns"):
        assert got.column(name).dtype == torch.float32 and not got.column(name)[~got.loss_mask].any()


def test_a_masked_answer_has_no_part_in_the_others_advantages() -> None:
    answers, values, batch = case(0)
    ppo = PPO(truncated="mask")
    lengths = torch.tensor(batch.lengths)
    mask = batch.loss_mask & (torch.arange(len(answers)) != 2).repeat_interleave(lengths)
    got = ppo.advantages(batch.replace(loss_mask=mask))
    kept = [i for i in range(len(answers)) if i != 2]
    assert same(got, naive_ppo([answers[i] for i in kept], [values[i] for i in kept], ppo))


def unlike(**axes: Any) -> Callable[[pytest.MonkeyPatch, Batch], Batch]:
    return lambda monkeypatch, batch: PPO(**axes).advantages(batch)


def with_gae(change: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[pytest.MonkeyPatch, Batch], Batch]:
    def run(monkeypatch: pytest.MonkeyPatch, batch: Batch) -> Batch:
        monkeypatch.setattr(functional, "gae", change)
        return PPO().advantages(batch)

    return run


def without_mask(monkeypatch: pytest.MonkeyPatch, batch: Batch) -> Batch:
    everything = torch.ones_like(batch.loss_mask)
    return PPO().advantages(batch.replace(loss_mask=everything)).replace(loss_mask=batch.loss_mask)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Batch], Batch]] = {
    "lambda ignored": with_gae(lambda r, v, lengths, gamma, lam: gae(r, v, lengths, gamma, 1.0)),
    "gamma ignored": with_gae(lambda r, v, lengths, gamma, lam: gae(r, v, lengths, 0.9, lam)),
    "sequences run together": with_gae(lambda r, v, lengths, gamma, lam: gae(r, v, (len(r),), gamma, lam)),
    "value of the token before": with_gae(lambda r, v, lengths, gamma, lam: gae(r, v.roll(1), lengths, gamma, lam)),
    "mask forgotten": without_mask,
    "KL paid out": lambda m, b: PPO().advantages(b.replace(ref_logprobs=2 * b.old_logprobs - b.ref_logprobs)),
    "KL of the current sampler": lambda m, b: PPO().advantages(b.replace(old_logprobs=b.rollout_logprobs)),
    "not whitened": unlike(whiten=False),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, values, batch = case(1)
    assert not same(FAULTS[fault](monkeypatch, batch), naive_ppo(answers, values, PPO()))


# ---------------------------------------------------------------- value loss


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient"),
    [
        (2.0, 1.5, 1.0, None, 0.5, 1.0),  # (2 - 1)^2 / 2
        (2.0, 1.5, 3.0, 0.2, 0.845, 0.0),  # held at 1.7, which is farther: 1.3^2 / 2
        (2.0, 1.5, 1.0, 0.2, 0.5, 1.0),  # held at 1.7, which is nearer, so it doesn't count
        (1.6, 1.5, 3.0, 0.2, 0.98, -1.4),  # within the clip
    ],
)
def test_value_loss_by_hand(
    value: float, old: float, target: float, clip: float | None, loss: float, gradient: float
) -> None:
    leaf = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    got, clipped = clipped_value_loss(leaf, torch.tensor([old]).double(), torch.tensor([target]).double(), clip)
    got.sum().backward()
    assert leaf.grad is not None
    assert (got.item(), leaf.grad.item()) == (pytest.approx(loss), pytest.approx(gradient))
    assert clipped.tolist() == [gradient == 0.0]


@pytest.mark.parametrize("max_micro", [1, 9, 1000])
@pytest.mark.parametrize("clip", [None, 0.2, 0.5])
def test_value_loss_and_gradient_match_naive_code_for_any_split(clip: float | None, max_micro: int) -> None:
    _, _, batch = case(2)
    ppo = PPO(value_clip=clip)
    rng = random.Random(0)
    now = [x + rng.uniform(-1, 1) for x in batch.column("values").tolist()]
    for minibatch in ppo.minibatches(ppo.advantages(batch), 7):
        loss, gradient = 0.0, {}
        for micro in minibatch.microbatches(max_micro):
            (scored,) = torch.nonzero(micro.loss_mask, as_tuple=True)
            tokens = micro.tokens[scored].tolist()
            leaf = torch.tensor([now[t] for t in tokens], requires_grad=True)
            part, diagnostics = ppo.value_loss(leaf, micro, scored)
            part.backward()
            assert leaf.grad is not None
            loss += part.item()
            gradient.update(zip(tokens, leaf.grad.tolist(), strict=True))
            errors = (leaf.detach() - micro.column("returns")[scored]) ** 2
            assert torch.equal(diagnostics["error"], errors) and torch.equal(diagnostics["value"], leaf.detach())
        naive_loss, naive_gradient = 0.0, {}
        trained = minibatch.tokens[minibatch.loss_mask].tolist()
        columns = [minibatch.column(name)[minibatch.loss_mask].tolist() for name in ("values", "returns")]
        for token, old, target in zip(trained, *columns, strict=True):
            x = torch.tensor(now[token], dtype=torch.float64, requires_grad=True)
            error = (x - target) ** 2
            if clip is not None:
                held = min(max(x, x.new_tensor(old - clip)), x.new_tensor(old + clip))
                error = max(error, (held - target) ** 2 + 0 * x)
            (error / 2 / len(trained)).backward()
            naive_loss += error.item() / 2 / len(trained)
            naive_gradient[token] = 0.0 if x.grad is None else x.grad.item()
        assert loss == pytest.approx(naive_loss, rel=1e-5)
        assert gradient == pytest.approx(naive_gradient, rel=1e-5, abs=1e-7)


# ---------------------------------------------------------------- epochs, minibatches, who learns


def test_every_epoch_sees_every_answer_once_in_an_order_of_its_own() -> None:
    _, _, batch = case(3)
    ppo = PPO(updates_per_rollout=3, epochs=3)
    steps = list(ppo.minibatches(ppo.advantages(batch), 7))
    assert len(steps) == 9
    epochs = [steps[i : i + 3] for i in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(t for step in epoch for t in step.tokens.tolist()) == batch.tokens.tolist()
        assert all(step.column("loss_weights").sum().item() == pytest.approx(1.0, rel=1e-5) for step in epoch)
    divided = [{tuple(step.tokens.tolist()) for step in epoch} for epoch in epochs]
    assert divided[0] != divided[1] != divided[2]
    again = [step.tokens.tolist() for step in ppo.minibatches(ppo.advantages(batch), 7)]
    assert again == [step.tokens.tolist() for step in steps]


def test_the_critic_warms_up_alone_and_is_always_asked() -> None:
    ppo = PPO(critic_warmup_steps=2)
    assert [ppo.learners(step) for step in (1, 2, 3)] == [("critic",), ("critic",), ("policy", "critic")]
    assert PPO().learners(1) == ("policy", "critic")
    assert PPO().roles == ("reference", "critic") and PPO(kl_coef=0.0).roles == ("critic",)


# ---------------------------------------------------------------- the adaptive KL coefficient


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.31, 0.11), (0.29, 0.1), (0.2, 0.1), (0.14, 0.1), (0.13, 0.1 / 1.1), (-1.0, 0.1 / 1.1)],
)
def test_the_controller_by_hand(kl: float, expected: float) -> None:
    """Target 0.2: up above 0.3, down below 0.1333."""
    assert adapted_kl_coef(0.1, kl, 0.2) == pytest.approx(expected, rel=1e-12)


def test_the_coefficient_stays_within_its_bounds_whatever_happens() -> None:
    low = high = 0.02
    for _ in range(2000):
        low, high = adapted_kl_coef(low, 0.0, 0.1), adapted_kl_coef(high, 50.0, 0.1)
    assert (low, high) == (1e-4, 10.0)


def batch_with_kl(kl: float) -> Batch:
    """The sampler's log-probs are above the reference's by ``kl`` in the mean; the trainer's old ones are elsewhere."""
    ref = [-60.0 - kl + spread for spread in (-1.0, 0.0, 1.0)]
    answer = Answer(2, 0, 1.0, now=[-9.0] * 3, old=[-9.0] * 3, ref=ref, rollout=[-60.0] * 3)
    return batch_of([answer], {**AXES, "kl_coef": 0.1})


Controller = Callable[[float, float, float], float]


def simulated(
    ppo: PPO, controller: Controller = adapted_kl_coef, follows: float = 0.5, pull: float = 50.0, steps: int = 200
) -> list[tuple[float, float]]:
    """(KL, coefficient) after each step, of a policy whose reward pulls it to ``pull`` nats, or to where the
    coefficient lets it, of which way it goes the part ``follows`` in a step."""
    kl, history = 0.0, []
    for step in range(1, steps):
        kl += follows * (min(pull, 0.02 / ppo.kl_coef) - kl)
        adapted = ppo.adapted(batch_with_kl(kl), step)
        if controller is not adapted_kl_coef:
            assert ppo.kl_target is not None
            adapted = replace(ppo, kl_coef=controller(ppo.kl_coef, kl, ppo.kl_target))
        ppo = adapted
        history.append((kl, ppo.kl_coef))
    return history


@pytest.mark.parametrize("coef", [1e-4, 0.02, 10.0])
@pytest.mark.parametrize("target", [0.01, 0.1, 1.0])
def test_the_adaptive_coefficient_brings_the_kl_to_its_target(coef: float, target: float) -> None:
    history = simulated(PPO(kl_coef=coef, kl_target=target))
    assert all(target / 1.5 <= kl <= 1.5 * target for kl, _ in history[-50:])


def test_a_controller_of_the_wrong_direction_would_be_seen() -> None:
    def wrong(coef: float, kl: float, target: float) -> float:
        return min(10.0, max(1e-4, coef * coef / adapted_kl_coef(coef, kl, target)))

    history = simulated(PPO(kl_target=0.1), wrong)
    assert not any(0.1 / 1.5 <= kl <= 1.5 * 0.1 for kl, _ in history[-50:])


def test_where_the_kl_is_slow_the_coefficient_does_not_run_away() -> None:
    """A KL that follows over 50 steps, and a reward that pulls it above the target: the quickstart's. 0.02 / 0.5 would
    hold it there; a coefficient that is doubled and halved comes to 20 times that, and takes the policy back."""

    def doubled(coef: float, kl: float, target: float) -> float:
        return min(2 * coef, 10.0) if kl > 1.5 * target else max(coef / 2, 1e-4) if kl < target / 1.5 else coef

    def highest(controller: Controller) -> float:
        ppo = PPO(kl_coef=0.01, kl_target=0.5)
        return max(coef for _, coef in simulated(ppo, controller, follows=0.02, pull=1.2, steps=400))

    assert highest(adapted_kl_coef) < 5 * 0.02 / 0.5 < 15 * 0.02 / 0.5 < highest(doubled)


def test_the_coefficient_waits_while_the_policy_does() -> None:
    ppo = PPO(kl_coef=0.1, kl_target=0.2, critic_warmup_steps=2)
    assert [ppo.adapted(batch_with_kl(0.0), step).kl_coef for step in (1, 2, 3)] == [0.1, 0.1, 0.1 / 1.1]
    assert ppo.adapted(batch_with_kl(5.0), 3) == replace(ppo, kl_coef=1.1 * 0.1)
    assert PPO(kl_coef=0.1).adapted(batch_with_kl(5.0), 3) == PPO(kl_coef=0.1)
    nothing = batch_with_kl(5.0)
    nothing = nothing.replace(loss_mask=torch.zeros_like(nothing.loss_mask))
    assert ppo.adapted(nothing, 3) == ppo and ppo.mean_kl(nothing) == 0.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_that_steers_is_the_mean_log_ratio_of_the_policy_that_sampled(estimator: Any) -> None:
    """Log-ratios of the sampler over the reference of 1 and -2, whatever the penalty's estimator and the old policy."""
    answer = Answer(1, 0, 1.0, now=[-9.0] * 2, old=[-8.0] * 2, ref=[-3.0, -1.0], rollout=[-2.0, -3.0])
    batch = batch_of([answer], {**AXES, "kl_coef": 0.1})
    assert PPO(kl_estimator=estimator).mean_kl(batch) == -0.5


@pytest.mark.parametrize("coef", [5e-5, 20.0])
def test_a_coefficient_that_the_controller_would_not_hold_is_refused(coef: float) -> None:
    with pytest.raises(ValueError, match=r"kl_coef=.*\[0.0001, 10.0\]"):
        PPO(kl_coef=coef, kl_target=0.1)
