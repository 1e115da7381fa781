"""What the presets compute, written again from the formulas: python loops, one token at a time, float64."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.algorithms import Algorithm
from rlhf.types import Batch

Axes = dict[str, Any]
ENTROPY = 0.7  # of every token
GRID = 2**-13  # log-probs are multiples of it: exact in float32, and so are their differences


@dataclass(frozen=True)
class Answer:
    """Log-probs of an answer's tokens under the policy now, at the last pass, of the reference and the sampler."""

    given: int  # prompt tokens
    group: int
    reward: float
    now: list[float]
    old: list[float]
    ref: list[float]
    rollout: list[float]
    kept: list[float] | None = None  # log of the mass that the sampler left of the vocabulary; None: all of it
    greedy: float = 0.0  # reward of the greedy answer to the prompt

    def sampled(self, axes: Axes) -> list[float]:
        return self.old if needs_old(axes) else self.rollout

    def behaviour(self) -> list[float]:
        return [x - k for x, k in zip(self.rollout, self.kept or [0.0] * len(self.now), strict=True)]


def needs_old(axes: Axes) -> bool:
    return axes["proximal"] == "trainer" and axes["updates_per_rollout"] * axes["epochs"] > 1


@dataclass
class Step:
    """An optimizer step: its loss, and by token id the gradient and the diagnostics."""

    loss: float = 0.0
    gradient: dict[int, float] = field(default_factory=dict)
    entropy_gradient: dict[int, float] = field(default_factory=dict)
    diagnostics: dict[str, dict[int, float]] = field(default_factory=dict)

    def note(self, name: str, token: int, value: float) -> None:
        self.diagnostics.setdefault(name, {})[token] = value


def random_answers(rng: random.Random, sizes: Sequence[int], spread: float = 0.5) -> list[Answer]:
    """Groups of these sizes, interleaved; log-ratios within ``spread``."""

    def near(logprobs: list[float]) -> list[float]:
        return [x + GRID * round(rng.uniform(-spread, spread) / GRID) for x in logprobs]

    answers = []
    for group in rng.sample([g for g, size in enumerate(sizes) for _ in range(size)], sum(sizes)):
        now = [GRID * round(rng.uniform(-4, -1) / GRID) for _ in range(rng.randint(1, 5))]
        reward = rng.choice([-1.0, 0.0, 0.25, 1.0, 2.5])
        kept = [-GRID * rng.choice([0, 300, 2000]) for _ in now]
        greedy = 0.5 * (group % 4) - 0.25
        given = rng.randint(1, 3)
        answers.append(Answer(given, 7 * group, reward, now, near(now), near(now), near(now), kept, greedy))
    return answers


def batch_of(answers: Sequence[Answer], axes: Axes) -> Batch:
    """Token ids are positions in the batch. Columns hold something on the prompts too, which must not matter."""

    on_prompts = {"now": 1.0, "rollout": -0.25, "old": -0.5, "ref": -1.0, "kept": -0.75}

    def column(name: str) -> Tensor:
        rows = [(*[on_prompts[name]] * a.given, *(getattr(a, name) or [0.0] * len(a.now))) for a in answers]
        return torch.tensor([x for row in rows for x in row])

    lengths = tuple(a.given + len(a.now) for a in answers)
    return Batch(
        tokens=torch.arange(sum(lengths)),
        lengths=lengths,
        loss_mask=column("now") < 0,
        temperature=torch.ones(sum(lengths)),
        rollout_logprobs=column("rollout"),
        groups=torch.tensor([a.group for a in answers]),
        rewards=torch.tensor([a.reward for a in answers]),
        log_kept_mass=column("kept") if any(a.kept for a in answers) else None,
        baselines=torch.tensor([a.greedy for a in answers]) if axes.get("baseline") == "greedy" else None,
        old_logprobs=column("old") if needs_old(axes) else None,
        ref_logprobs=column("ref") if axes["kl_coef"] > 0 else None,
    )


# ---------------------------------------------------------------- the formulas


def naive_kl(policy: Any, reference: float, estimator: str) -> Any:
    """Schulman's k1, k2, k3 of one token, of a float or a tensor."""
    if estimator == "k1":
        return policy - reference
    if estimator == "k2":
        return 0.5 * (policy - reference) ** 2
    exp = torch.exp if isinstance(policy, Tensor) else math.exp
    return exp(reference - policy) - 1 - (reference - policy)


def naive_reward(reward: float, answers: Sequence[Answer], axes: Axes) -> float:
    """As the algorithm sees it, beside those of all answers."""
    if axes["reward_norm"] == "batch":
        rewards = [a.reward for a in answers]
        reward = (reward - statistics.fmean(rewards)) / (statistics.stdev(rewards) + 1e-8)
    bound = axes["reward_clip"]
    return torch.tensor(reward if bound is None else max(-bound, min(bound, reward))).item()  # rounded to float32


def naive_advantages(answers: Sequence[Answer], axes: Axes) -> list[list[float]]:
    """Per answer, per token."""
    beta = axes["kl_coef"] if axes["kl_in"] == "reward" else 0.0
    items: list[tuple[int, int, float]] = []  # answer, group, return
    for i, a in enumerate(answers):
        reward = naive_reward(a.reward, answers, axes)
        if axes["baseline"] == "greedy":
            reward -= naive_reward(a.greedy, answers, axes)
        costs = [0.0] * len(a.now)
        if beta:
            pairs = zip(a.sampled(axes), a.ref, strict=True)
            costs = [beta * naive_kl(p, q, axes["kl_estimator"]) for p, q in pairs]
        if axes["returns"] == "sequence":
            items.append((i, a.group, reward - sum(costs)))
        else:
            items += [(i, a.group, reward - sum(costs[t:])) for t in range(len(costs))]

    def mates(k: int, level: str) -> list[int]:
        return [j for j in range(len(items)) if level == "batch" or items[j][1] == items[k][1]]

    def centred(k: int) -> float:
        if axes["baseline"] in ("none", "greedy"):
            return items[k][2]
        return items[k][2] - statistics.fmean(items[j][2] for j in mates(k, axes["baseline"]))

    result: list[list[float]] = [[] for _ in answers]
    for k, (i, _, value) in enumerate(items):
        advantage = centred(k)
        if axes["leave_one_out"]:
            others = [items[j][2] for j in mates(k, "group") if j != k]
            advantage = value - statistics.fmean(others) if others else 0.0
        if axes["std"] != "none":
            around = [centred(j) for j in mates(k, axes["std"])]
            advantage /= (statistics.stdev(around) if len(around) > 1 else 0.0) + 1e-6
        result[i] += [advantage] * (len(answers[i].now) if axes["returns"] == "sequence" else 1)
    return result


def naive_objective(ratio: Tensor, logprob: Tensor, advantage: float, axes: Axes) -> tuple[Tensor, bool]:
    """What a token adds to the objective, and whether a clip acted; branch by branch."""
    low, high = 1 - axes["clip_low"], 1 + axes["clip_high"]
    r = ratio.item()
    if axes["clip"] == "none":
        return ratio * advantage, False
    if axes["clip"] == "cispo":
        return min(max(r, low), high) * advantage * logprob, not low <= r <= high
    zero = 0.0 * logprob  # a constant, differentiably
    if advantage > 0 and r > high:
        return high * advantage + zero, True
    if advantage < 0 and r < low:
        return low * advantage + zero, True
    if advantage < 0 and axes["dual_clip"] is not None and r > axes["dual_clip"]:
        return axes["dual_clip"] * advantage + zero, True
    return ratio * advantage, False


def naive_importance(log_ratios: Sequence[float], t: int, unit: str) -> float:
    """Of token t of an answer with these log-ratios of trainer over sampler."""
    return math.exp(
        {"token": log_ratios[t], "sequence": sum(log_ratios), "geometric": statistics.fmean(log_ratios)}[unit]
    )


def naive_steps(answers: Sequence[Answer], axes: Axes, max_tokens: int) -> list[Step]:
    """Every optimizer step of a rollout, in order. With several epochs there is one step in each."""
    advantages = naive_advantages(answers, axes)
    updates, epochs = axes["updates_per_rollout"], axes["epochs"]
    assert 1 in (updates, epochs)
    return [
        naive_step(answers, advantages, range(number, len(answers), updates), axes, max_tokens)
        for number in list(range(updates)) * epochs
    ]


def naive_step(
    answers: Sequence[Answer], advantages: list[list[float]], chosen: Sequence[int], axes: Axes, max_tokens: int
) -> Step:
    step = Step()
    num_tokens = sum(len(answers[i].now) for i in chosen)
    for i in chosen:
        a = answers[i]
        first = sum(b.given + len(b.now) for b in answers[:i]) + a.given
        behaviour = a.behaviour()
        old = behaviour if axes["proximal"] == "sampler" else a.old if needs_old(axes) else a.now
        mean = statistics.fmean(x - o for x, o in zip(a.now, old, strict=True))
        trust = [o - b for o, b in zip(old, behaviour, strict=True)]
        for t, value in enumerate(a.now):
            x = torch.tensor(value, dtype=torch.float64).requires_grad_()
            ratio = torch.exp(x - value) * math.exp(mean if axes["ratio"] == "sequence" else value - old[t])
            objective, clipped = naive_objective(ratio, x, advantages[i][t], axes)
            step.note("ratio", first + t, ratio.item())
            step.note("clip_fraction", first + t, float(clipped))
            if old is not a.now:
                step.note("approx_kl", first + t, naive_kl(old[t], value, "k3"))
            if axes["tis_clip"] is not None:
                weight = naive_importance(trust, t, axes["importance"])
                step.note("tis_weight", first + t, min(weight, axes["tis_clip"]))
                step.note("tis_truncated", first + t, float(weight > axes["tis_clip"]))
                objective = min(weight, axes["tis_clip"]) * objective
            if axes["reject"] != "none":
                weight = naive_importance(trust, t, axes["reject"])
                rejected = weight < axes["reject_low"] or weight > axes["reject_high"]
                step.note("rejected", first + t, float(rejected))
                objective = 0.0 * x if rejected else objective
            loss = -objective - axes["entropy_coef"] * ENTROPY
            if axes["kl_coef"] > 0:
                kl = naive_kl(x, a.ref[t], axes["kl_estimator"])
                step.note("kl", first + t, kl.item())
                loss = loss + (axes["kl_coef"] * kl if axes["kl_in"] == "loss" else 0.0)
            weight = {
                "token_mean": 1 / num_tokens,
                "sequence_mean": 1 / (len(chosen) * len(a.now)),
                "constant_length": 1 / (len(chosen) * max_tokens),
            }[axes["aggregation"]]
            (weight * loss).backward()
            assert x.grad is not None
            step.loss += weight * loss.item()
            step.gradient[first + t] = x.grad.item()
            step.entropy_gradient[first + t] = -weight * axes["entropy_coef"]
    return step


# ---------------------------------------------------------------- what rlhf computes


def steps_of(
    algorithm: Algorithm, answers: Sequence[Answer], axes: Axes, max_tokens: int, max_micro: int
) -> list[Step]:
    """The same from the algorithm, its minibatches cut into micro-batches of at most ``max_micro`` tokens."""
    logprobs = torch.tensor([x for a in answers for x in (*[0.0] * a.given, *a.now)])
    batch = algorithm.advantages(batch_of(answers, axes))
    steps = []
    for minibatch in algorithm.minibatches(batch, max_tokens):
        step = Step()
        for micro in minibatch.microbatches(max_micro):
            (scored,) = torch.nonzero(micro.loss_mask, as_tuple=True)
            tokens = micro.tokens[scored]
            leaf = logprobs[tokens].requires_grad_()
            entropy = torch.full_like(leaf, ENTROPY).requires_grad_()
            loss, diagnostics = algorithm.policy_loss(leaf, entropy, micro, scored)
            loss.backward()
            assert leaf.grad is not None and entropy.grad is not None
            step.loss += loss.item()
            step.gradient.update(zip(tokens.tolist(), leaf.grad.tolist(), strict=True))
            step.entropy_gradient.update(zip(tokens.tolist(), entropy.grad.tolist(), strict=True))
            for name, column in diagnostics.items():
                assert column.shape == leaf.shape and not column.requires_grad
                for token, value in zip(tokens.tolist(), column.tolist(), strict=True):
                    step.note(name, token, value)
        steps.append(step)
    return steps
