"""Two-digit addition from preferences: a reward model learns right from wrong sums, and PPO learns from it.

Task, prompts, model and held-out sums are those of ``recipes.arithmetic``, whose ``reward`` stays the truth that a run
is measured by. What is new are preference pairs: the right sum, and a wrong one of the kind that a policy writes. No
held-out sum is in a training pair.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from recipes.arithmetic import ALPHABET, _answer, _problems, _question, initial_model, prompts, reward, warm_start

__all__ = ["initial_model", "preferences", "prompts", "reward", "warm_start"]

PAIRS_PER_PROBLEM = 8
LONGEST = 5  # tokens that the policy may write: three digits, the end, and one to go wrong with
# How often a wrong answer is of a kind. A policy that has seen some sums is mostly right in form, and off by a digit.
KINDS = {"digit": 8, "carry": 4, "near": 4, "order": 1, "short": 1, "long": 1, "unfinished": 1, "noise": 1}


def preferences(split: str) -> Iterator[dict[str, Any]]:
    """Rows of prompt, right and wrong answer, and the kind of mistake. split: "train" or "eval"."""
    rng = random.Random(f"preferences/{split}")
    for _ in range(PAIRS_PER_PROBLEM):
        for a, b in _problems(split):
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            wrong = _answer(a, b)
            while wrong == _answer(a, b):  # a kind may leave some sums as they are: 33 has no wrong order
                wrong = _mistake(kind, a, b, rng)
                kind = "digit" if wrong == _answer(a, b) else kind
            finish = "length" if len(wrong) >= LONGEST else "stop"
            yield {
                "prompt": _question(a, b),
                "chosen": _answer(a, b),
                "rejected": wrong,
                "rejected_finish_reason": finish,
                "kind": kind,
            }


def _mistake(kind: str, a: int, b: int, rng: random.Random) -> str:
    right = _answer(a, b)
    if kind == "digit":
        place = rng.randrange(len(right))
        return right[:place] + rng.choice(ALPHABET[:10]) + right[place + 1 :]
    if kind == "carry":  # of the ones or of the tens, forgotten or made up
        return f"{max(0, a + b + rng.choice((-10, 10, -100, 100))) % 1000:03d}"[::-1]
    if kind == "near":
        return _answer(a, max(0, b + rng.choice((-2, -1, 1, 2))))
    if kind == "order":
        return right[::-1]
    if kind == "short":
        return right[: rng.randrange(len(right))]
    if kind == "long":
        return right + rng.choice(ALPHABET)
    if kind == "unfinished":
        return right + "".join(rng.choices(ALPHABET, k=LONGEST - len(right)))
    assert kind == "noise", kind
    return "".join(rng.choices(ALPHABET, k=rng.randint(0, LONGEST)))
