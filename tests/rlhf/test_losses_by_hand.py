"""Whole losses of presets and their gradients, worked out by hand: two answers to one prompt, of rewards 1 and 0."""

from __future__ import annotations

from typing import Any

import pytest
from naive_policy_gradient import Answer, Step, steps_of

from rlhf import algorithms

# Answers as (log-probs now, at the start of the step, of the reference); a prompt token each, so that the first has
# the tokens 1 and 2, the second 4 and, where there is one, 5. Two epochs make two equal steps, since nothing moves.
Columns = tuple[list[float], list[float], list[float]]


def step_of(name: str, first: Columns, second: Columns, **axes: Any) -> Step:
    algorithm: Any = algorithms.load({"name": name, "epochs": 2, **axes})
    answers = [Answer(1, 0, r, *columns, rollout=columns[1]) for r, columns in ((1.0, first), (0.0, second))]
    one, again = steps_of(algorithm, answers, vars(algorithm), max_tokens=4, max_micro=1000)
    assert again.loss == pytest.approx(one.loss, rel=1e-6) and again.gradient == pytest.approx(one.gradient, rel=1e-6)
    return one


# Answers of one prompt divided by their deviation: mean 1/2, variance 2 (1/2)^2 / (2 - 1) = 1/2, so 1/2 : sqrt(1/2).
A = 0.7071058  # sqrt(1/2), less a millionth for the deviation's eps: the first answer's advantage, and -A the second's

# log-ratios 1/2 and -1/4 of the first answer, 1 of the second
FIRST: Columns = ([-1.5, -1.25], [-2.0, -1.0], [-3.0, -3.0])
SECOND: Columns = ([-4.0], [-5.0], [-3.0])


def test_gspo() -> None:
    """Each answer's ratio is the geometric mean of its tokens'.

    First: log-ratios 4/4096 and 8/4096, mean 6/4096, ratio 1.0014659, which is clipped to 1.0004: no gradient.
    Second: 3/4096 and -1/4096, mean 1/4096, ratio 1.0002442, within the bounds.
    Loss: 1/2 (-1.0004 A + 1.0002442 A) = -0.0001558 A / 2 = -5.509e-5. A token's gradient: A 1.0002442 / (2 * 2).
    """
    first = ([-1.0, -2.0], [-1.0 - 4 / 4096, -2.0 - 8 / 4096], [0.0, 0.0])
    second = ([-1.0, -3.0], [-1.0 - 3 / 4096, -3.0 + 1 / 4096], [0.0, 0.0])
    step = step_of("gspo", first, second)
    assert step.loss == pytest.approx(-5.5094e-5, abs=2e-7)
    assert step.gradient == pytest.approx({1: 0.0, 2: 0.0, 4: 0.1768196, 5: 0.1768196}, abs=2e-7)


def test_cispo() -> None:
    """Weights e^0.5 = 1.6487213, e^2 = 7.389 bounded to 5, and e^-1 = 0.3678794, times A, A and -A times the log-probs.

    Loss: -(1.6487213 A (-1) + 5 A (-0.5) + 0.3678794 (-A) (-2)) / 3 = A (1.6487213 + 2.5 - 0.7357589) / 3
    = 3.4129624 A / 3 = 0.8044418. Gradients: -weight times advantage / 3; the bounded token keeps its own.
    """
    step = step_of("cispo", ([-1.0, -0.5], [-1.5, -2.5], [0.0, 0.0]), ([-2.0], [-1.0], [0.0]))
    assert step.loss == pytest.approx(0.8044418, rel=1e-6)
    assert step.gradient == pytest.approx({1: -0.3886068, 2: -5 * A / 3, 4: 0.0867099}, rel=1e-6)


def test_rloo_with_the_kl_in_the_reward() -> None:
    """log(old / reference): 1 and 2 of the first answer, -2 of the second.

    Returns 1 - 0.1 (1 + 2) = 0.7 and 0 + 0.1 * 2 = 0.2; less the other's: 0.5 and -0.5.
    Ratios e^0.5 = 1.6487213, e^-0.25 = 0.7788008, e = 2.7182818, none clipped; each token counts 1 / (2 * 4).
    Loss: -(0.5 * 1.6487213 + 0.5 * 0.7788008 - 0.5 * 2.7182818) / 8 = 0.1453799 / 8 = 0.01817249.
    Gradients: the terms one by one.
    """
    step = step_of("rloo", FIRST, SECOND, kl_coef=0.1)
    assert step.loss == pytest.approx(0.01817249, rel=1e-6)
    assert step.gradient == pytest.approx({1: -0.1030451, 2: -0.04867505, 4: 0.1698926}, rel=1e-6)


def test_reinforce_pp() -> None:
    """Of each token the reward less the penalties from there on: 1 - 0.1 (1 + 2) = 0.7, 1 - 0.1 * 2 = 0.8, 0.2.

    Mean 17/30; squares (4/30)^2 + (7/30)^2 + (-11/30)^2 = 186/900 over 2: deviation 0.3214550. Advantages 0.4147794,
    0.7258639, -1.1406433. Ratio e^0.5 of a good token is clipped to 1.2: no gradient; e^-0.25 of a good one and e of a
    bad one are not.
    Loss: -(1.2 * 0.4147794 + 0.7788008 * 0.7258639 - 2.7182818 * 1.1406433) / 3
    = -(0.4977353 + 0.5653034 - 3.1005900) / 3 = 0.6791838. Gradients: the last two terms by themselves.
    """
    step = step_of("reinforce_pp", FIRST, SECOND, kl_coef=0.1)
    assert step.loss == pytest.approx(0.6791838, rel=1e-6)
    assert step.gradient == pytest.approx({1: 0.0, 2: -0.1884345, 4: 1.0335300}, rel=1e-6)
