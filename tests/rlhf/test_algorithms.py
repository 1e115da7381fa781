"""GRPO's losses and gradients against naive float64 code, and proof that this comparison sees a wrong weight."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf import algorithms
from rlhf.algorithms.grpo import GRPO
from rlhf.functional import token_weights
from rlhf.packing import pack
from rlhf.types import Batch, Completion, Prompt, Score, Trajectory

AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
LN2 = math.log(2)


@dataclass(frozen=True)
class Sequence:
    """One answer: per token its ratio to the old policy and log(reference / policy)."""

    given: int  # prompt tokens
    group: int
    reward: float
    ratios: list[float]
    ref_log_ratio: float = 0.0


@dataclass(frozen=True)
class Case:
    sequences: list[Sequence]
    max_tokens: int
    settings: dict[str, object]
    losses: dict[str, list[float]] = field(default_factory=dict)  # by aggregation, one per optimizer step, by hand

    def algorithm(self, aggregation: str) -> GRPO:
        return GRPO(aggregation=aggregation, **self.settings)  # type: ignore[arg-type]

    def batch(self, algorithm: GRPO) -> Batch:
        """Every token has its own id. ``rollout_logprobs`` carries the current log-probs through the splits."""
        rows = [(s, t) for s in self.sequences for t in range(-s.given, len(s.ratios))]
        total = len(rows)
        logprobs = torch.tensor([-0.2 - 0.13 * i for i in range(total)])
        ratios = torch.tensor([s.ratios[t] if t >= 0 else 1.0 for s, t in rows])
        return Batch(
            tokens=torch.arange(total),
            lengths=tuple(s.given + len(s.ratios) for s in self.sequences),
            loss_mask=torch.tensor([t >= 0 for _, t in rows]),
            temperature=torch.ones(total),
            rollout_logprobs=logprobs,
            groups=torch.tensor([s.group for s in self.sequences]),
            rewards=torch.tensor([s.reward for s in self.sequences]),
            old_logprobs=logprobs - ratios.log() if algorithm.updates_per_rollout > 1 else None,
            ref_logprobs=logprobs + torch.tensor([s.ref_log_ratio for s, _ in rows]),
        )


CASES = {
    # advantages 1/2, -1/2; every token's k3 is 1 - ln 2
    "two answers": Case(
        [Sequence(2, 0, 1.0, [1, 1], LN2), Sequence(1, 0, 0.0, [1], LN2)],
        max_tokens=4,
        settings={"kl_coef": 0.1, "std": "none"},
        losses={
            "token_mean": [-0.5 / 3 + 0.1 * (1 - LN2)],
            "sequence_mean": [0.1 * (1 - LN2)],
            "constant_length": [-0.5 / 8 + 0.1 * (1 - LN2) * 3 / 8],
        },
    ),
    # group 0: mean 3, deviation sqrt(7), advantages -2, -1, 3 over it; group 5 has one answer; k3 is ln 2 - 1/2
    "lengths and a lone answer": Case(
        [
            Sequence(2, 0, 1.0, [1], -LN2),
            Sequence(1, 0, 2.0, [1, 1], -LN2),
            Sequence(3, 0, 6.0, [1, 1, 1], -LN2),
            Sequence(1, 5, 9.0, [1, 1], -LN2),
        ],
        max_tokens=3,
        settings={"kl_coef": 0.5, "std": "group"},
        losses={
            "token_mean": [-5 / 7**0.5 / 8 + 0.5 * (LN2 - 0.5)],  # 2 * 1 + 1 * 2 - 3 * 3 = -5
            "sequence_mean": [0.5 * (LN2 - 0.5)],  # 2 + 1 - 3 = 0
            "constant_length": [-5 / 7**0.5 / 12 + 0.5 * (LN2 - 0.5) * 8 / 12],
        },
    ),
    # advantages 1/2, -1/2, -1/2, 1/2. Step 1 has answers 0 (2 clipped to 1.3) and 2, step 2 has 1 (0.5 clipped
    # to 0.8) and 3 (0.5, good, so not clipped); the first two pay 0.2 * (1 - ln 2)
    "two updates": Case(
        [
            Sequence(1, 0, 1.0, [2.0], LN2),
            Sequence(2, 0, 0.0, [0.5], LN2),
            Sequence(1, 0, 0.0, [1.1, 0.9]),
            Sequence(3, 0, 1.0, [0.5]),
        ],
        max_tokens=2,
        settings={"kl_coef": 0.2, "std": "none", "clip_low": 0.2, "clip_high": 0.3, "updates_per_rollout": 2},
        losses={
            "token_mean": [(0.35 + 0.2 * (1 - LN2)) / 3, (0.15 + 0.2 * (1 - LN2)) / 2],
            "sequence_mean": [(-0.15 + 0.2 * (1 - LN2)) / 2, (0.15 + 0.2 * (1 - LN2)) / 2],
            "constant_length": [(0.35 + 0.2 * (1 - LN2)) / 4, (0.15 + 0.2 * (1 - LN2)) / 4],
        },
    ),
}


def truth(case: Case, aggregation: str) -> list[tuple[float, dict[int, float]]]:
    """Loss and gradient by token id of every optimizer step: GRPO's formulas, one token at a time, float64."""
    algorithm = case.algorithm(aggregation)
    steps = []
    for step in range(algorithm.updates_per_rollout):
        chosen = [(i, s) for i, s in enumerate(case.sequences) if i % algorithm.updates_per_rollout == step]
        num_tokens = sum(len(s.ratios) for _, s in chosen)
        logprobs: dict[int, Tensor] = {}
        loss = torch.zeros((), dtype=torch.float64)
        for i, s in chosen:
            first = sum(b.given + len(b.ratios) for b in case.sequences[:i]) + s.given
            rewards = [mate.reward for mate in case.sequences if mate.group == s.group]
            advantage = s.reward - statistics.fmean(rewards)
            if algorithm.std == "group" and len(rewards) > 1:
                advantage /= statistics.stdev(rewards)
            for t, start_ratio in enumerate(s.ratios):
                token = first + t
                x = logprobs[token] = torch.tensor(-0.2 - 0.13 * token, dtype=torch.float64).requires_grad_()
                ratio = torch.exp(x - (x.item() - math.log(start_ratio)))
                capped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
                objective = min(ratio * advantage, capped * advantage)
                to_ref = torch.exp(x.detach() + s.ref_log_ratio - x)
                kl = to_ref - 1 - torch.log(to_ref)
                weight = {
                    "token_mean": 1 / num_tokens,
                    "sequence_mean": 1 / (len(chosen) * len(s.ratios)),
                    "constant_length": 1 / (len(chosen) * case.max_tokens),
                }[aggregation]
                loss = loss + weight * (algorithm.kl_coef * kl - objective)
        loss.backward()
        steps.append((loss.item(), {t: x.grad.item() for t, x in logprobs.items() if x.grad is not None}))
    return steps


Mutation = Callable[[Batch, int], Batch]


def accumulate(
    step: Batch, algorithm: GRPO, max_micro: int, mutate: Mutation | None = None
) -> tuple[float, dict[int, float]]:
    """Loss and gradient by token id of a minibatch, summed over its micro-batches."""
    micros = list(step.microbatches(max_micro))
    total, gradient = 0.0, {}
    for micro in micros:
        micro = mutate(micro, len(micros)) if mutate else micro
        (scored,) = torch.nonzero(micro.loss_mask, as_tuple=True)
        leaf = micro.rollout_logprobs[scored].clone().requires_grad_()
        loss, diagnostics = algorithm.policy_loss(leaf, torch.full_like(leaf, 0.7), micro, scored)
        loss.backward()
        assert leaf.grad is not None
        total += loss.item()
        gradient.update(zip(micro.tokens[scored].tolist(), leaf.grad.tolist(), strict=True))
        assert all(column.shape == leaf.shape and not column.requires_grad for column in diagnostics.values())
    return total, gradient


def steps_of(case: Case, algorithm: GRPO) -> list[Batch]:
    return list(algorithm.minibatches(algorithm.advantages(case.batch(algorithm)), case.max_tokens))


def agrees(got: dict[int, float], expected: dict[int, float]) -> bool:
    """Gradients of the same tokens, each within 1e-6 (they are of the order of 0.1)."""
    return got.keys() == expected.keys() and all(abs(got[t] - expected[t]) <= 1e-6 for t in expected)


@pytest.mark.parametrize("max_micro", [1, 6, 1000])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_match_naive_code_and_hand_computed_losses(
    name: str, aggregation: str, max_micro: int
) -> None:
    case = CASES[name]
    algorithm = case.algorithm(aggregation)
    expected = truth(case, aggregation)
    got = [accumulate(step, algorithm, max_micro) for step in steps_of(case, algorithm)]
    assert [loss for loss, _ in expected] == pytest.approx(case.losses[aggregation], abs=1e-6)
    assert [loss for loss, _ in got] == pytest.approx(case.losses[aggregation], abs=1e-6)
    assert len(got) == len(expected)
    for (_, gradient), (_, exact) in zip(got, expected, strict=True):
        assert max(map(abs, exact.values())) > 0.05
        assert agrees(gradient, exact)


def with_weights(change: Callable[[Batch, int], Tensor]) -> Mutation:
    return lambda micro, count: micro.replace(loss_weights=change(micro, count))


def weighed_alone(micro: Batch, aggregation: str, max_tokens: int) -> Tensor:
    return token_weights(micro.loss_mask, micro.lengths, aggregation, max_tokens)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_wrong_loss_weight_is_caught(aggregation: str) -> None:
    case = CASES["lengths and a lone answer"]
    algorithm = case.algorithm(aggregation)
    (step,) = steps_of(case, algorithm)
    ((_, exact),) = truth(case, aggregation)
    assert [micro.lengths for micro in step.microbatches(6)] == [(3, 3), (6,), (3,)]
    mutations = {
        "per micro-batch, summed": with_weights(lambda m, n: weighed_alone(m, aggregation, case.max_tokens)),
        "per micro-batch, averaged": with_weights(lambda m, n: weighed_alone(m, aggregation, case.max_tokens) / n),
        "right, then averaged": with_weights(lambda m, n: m.column("loss_weights") / n),
        "of the token before": with_weights(lambda m, n: m.column("loss_weights").roll(1)),
    }
    assert agrees(accumulate(step, algorithm, 6)[1], exact)
    missed = [name for name, mutate in mutations.items() if agrees(accumulate(step, algorithm, 6, mutate)[1], exact)]
    assert missed == []


def test_one_update_has_ratio_one_and_gradient_minus_advantage_times_weight() -> None:
    case = CASES["two answers"]
    algorithm = GRPO(kl_coef=0.0, std="none", clip_low=0.0, clip_high=0.0)
    (step,) = steps_of(case, algorithm)
    assert step.old_logprobs is None
    _, gradient = accumulate(step, algorithm, 1000)
    assert gradient == pytest.approx({2: -0.5 / 3, 3: -0.5 / 3, 5: 0.5 / 3}, rel=1e-6)


def test_diagnostics_are_per_token() -> None:
    case = CASES["two updates"]
    algorithm = case.algorithm("token_mean")
    first, second = steps_of(case, algorithm)
    for step, clipped, kl in ((first, [1, 0, 0], [1 - LN2, 0, 0]), (second, [1, 0], [1 - LN2, 0])):
        (scored,) = torch.nonzero(step.loss_mask, as_tuple=True)
        entropy = torch.arange(len(scored)).float()
        _, diagnostics = algorithm.policy_loss(step.rollout_logprobs[scored], entropy, step, scored)
        assert diagnostics["clip_fraction"].tolist() == clipped
        assert diagnostics["kl"].tolist() == pytest.approx(kl, abs=1e-6)
        assert torch.equal(diagnostics["entropy"], entropy)


@pytest.mark.parametrize(
    ("column", "who"),
    [
        ("old_logprobs", r"Policy\.score"),
        ("ref_logprobs", r"Reference\.score"),
        ("advantages", r"advantages\(\)"),
        ("loss_weights", r"minibatches\(\)"),
    ],
)
def test_a_missing_column_names_who_fills_it(column: str, who: str) -> None:
    case = CASES["two updates"]
    algorithm = case.algorithm("token_mean")
    step = steps_of(case, algorithm)[0].replace(**{column: None})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"no '{column}'.*{who}"):
        accumulate(step, algorithm, 1000)


# ---------------------------------------------------------------- minibatches


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 6), min_size=5, max_size=12), updates=st.integers(1, 5))
def test_minibatches_partition_the_batch(lengths: list[int], updates: int) -> None:
    case = Case([Sequence(1, i % 2, float(i), [1.0] * (n - 1)) for i, n in enumerate(lengths)], 6, {})
    algorithm = GRPO(updates_per_rollout=updates)
    batch = case.batch(algorithm)
    steps = steps_of(case, algorithm)
    assert len(steps) == updates
    assert sorted(itertools.chain(*(step.tokens.tolist() for step in steps))) == batch.tokens.tolist()
    sizes = [step.num_sequences for step in steps]
    assert max(sizes) - min(sizes) <= 1
    for step in steps:
        assert step.column("loss_weights").sum().item() == pytest.approx(1.0, rel=1e-5)
        assert all(a + 1 == b for part in step.tokens.split(step.lengths) for a, b in itertools.pairwise(part.tolist()))


def test_every_update_sees_every_group() -> None:
    case = Case([Sequence(1, i // 4, float(i % 3), [1.0]) for i in range(12)], 6, {})
    for step in steps_of(case, GRPO(updates_per_rollout=4)):
        assert sorted(step.groups.tolist()) == [0, 1, 2]


def test_fewer_judged_answers_than_updates_still_train() -> None:
    """Plan checks the sampled answers; the reward may judge fewer (None)."""
    case = Case([Sequence(1, 0, float(i), [1.0]) for i in range(2)], 6, {})
    steps = steps_of(case, GRPO(updates_per_rollout=4))
    assert sorted(token for step in steps for token in step.tokens.tolist()) == [0, 1, 2, 3]


# ---------------------------------------------------------------- truncated answers, the registry


def test_masked_truncated_answers_stay_in_the_baseline_and_leave_the_loss() -> None:
    answers = [Completion("p", "", (7,) * n, reason, (-0.5,) * n) for n, reason in ((2, "stop"), (3, "length"))]
    trajectories = [
        Trajectory.from_completion(Prompt(0, "p", (1, 2)), answer, 0, Score(reward))
        for answer, reward in zip(answers, (1.0, 0.0), strict=True)
    ]
    masked = GRPO(truncated="mask", std="none", aggregation="sequence_mean")
    scored = GRPO(truncated="score", std="none", aggregation="sequence_mean")
    assert masked.mask_truncated and not scored.mask_truncated
    for algorithm, second in ((masked, 0.0), (scored, 1 / 6)):
        batch = algorithm.advantages(pack(trajectories, mask_truncated=algorithm.mask_truncated))
        assert batch.column("advantages").tolist() == [0.5] * 4 + [-0.5] * 5
        (step,) = algorithm.minibatches(batch, 8)
        first = 1 / 2 if second == 0 else 1 / 4  # a masked answer doesn't count as a sequence that trains
        expected = [0, 0, first, first, 0, 0, second, second, second]
        assert step.column("loss_weights").tolist() == pytest.approx(expected, rel=1e-6)
        assert (step.loss_mask == (step.column("loss_weights") > 0)).all()


def test_roles_follow_the_kl_coefficient() -> None:
    assert GRPO().roles == ()
    assert GRPO(kl_coef=0.01).roles == ("reference",)


def test_every_name_loads_and_an_unknown_one_lists_them() -> None:
    assert "grpo" in algorithms.names()
    for name in algorithms.names():
        assert vars(algorithms.load({"name": name}))["name"] == name
    assert vars(algorithms.load({"name": "grpo", "clip_high": 0.28}))["clip_high"] == 0.28
    for wrong in ("gpro", "sft", None):
        with pytest.raises(ValueError, match=rf"algorithm\.name={wrong!r}.*'grpo'"):
            algorithms.load({"name": wrong})
