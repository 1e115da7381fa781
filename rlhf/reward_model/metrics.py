"""How well scores agree with preferences, and how far their margins can be taken for probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_BINS = 10


def accuracy(margins: Tensor) -> float:
    """Share of pairs [P] whose chosen answer scores higher; a tie counts half."""
    return float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())


def auc(right: Tensor, wrong: Tensor) -> float:
    """Probability that a right answer to any prompt outscores a wrong one to any other; a tie counts half
    (Mann and Whitney 1947). right [A], wrong [B]."""
    ordered = wrong.sort().values
    below = torch.searchsorted(ordered, right, right=False) + torch.searchsorted(ordered, right, right=True)
    return float(below.double().mean() / (2 * len(wrong)))


@dataclass(frozen=True)
class Bin:
    """Pairs whose preferred answer has a probability in [low, high)."""

    low: float
    high: float
    count: int
    confidence: float  # mean probability
    accuracy: float  # share of those that are right


def reliability(margins: Tensor) -> list[Bin]:
    """Ten equal bins of the probability sigmoid(|margin|) that the model gives to the answer it prefers, 0.5 .. 1."""
    confidence = margins.double().abs().sigmoid()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    place = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    table = []
    for i in range(NUM_BINS):
        inside = place == i
        count = int(inside.sum())
        means = [float(column[inside].mean()) if count else 0.0 for column in (confidence, right)]
        table.append(Bin(0.5 + i / (2 * NUM_BINS), 0.5 + (i + 1) / (2 * NUM_BINS), count, *means))
    return table


def expected_calibration_error(table: list[Bin]) -> float:
    """Mean distance of confidence and accuracy over the bins, each with its share of pairs (Guo et al. 2017, eq. 3)."""
    total = sum(row.count for row in table)
    return sum(row.count * abs(row.confidence - row.accuracy) for row in table) / total


@dataclass(frozen=True)
class PairEvaluation:
    """Scores of held-out pairs."""

    step: int
    scores: Tensor  # [P, 2] fp32, chosen and rejected
    kinds: tuple[str, ...]  # P

    @property
    def table(self) -> list[Bin]:
        return reliability(self.scores[:, 0] - self.scores[:, 1])

    @property
    def metrics(self) -> dict[str, float]:
        """``midpoint`` lies between the mean scores: above it an answer is rather a chosen one."""
        chosen, rejected = self.scores.double().T.contiguous()
        return {
            "midpoint": float(chosen.mean() + rejected.mean()) / 2,
            "chosen": float(chosen.mean()),
            "rejected": float(rejected.mean()),
            "accuracy": accuracy(chosen - rejected),
            "auc": auc(chosen, rejected),
            "ece": expected_calibration_error(self.table),
        }

    @property
    def by_kind(self) -> dict[str, dict[str, float]]:
        """Of each kind its ``pairs``, their ``accuracy``, and the ``auc`` of all chosen against its rejected ones."""
        chosen, rejected = self.scores.double().T.contiguous()
        found = {}
        for kind in sorted(set(self.kinds)):
            mine = torch.tensor([other == kind for other in self.kinds])
            found[kind] = {
                "pairs": int(mine.sum()),
                "accuracy": accuracy((chosen - rejected)[mine]),
                "auc": auc(chosen, rejected[mine]),
            }
        return found

    def __str__(self) -> str:
        """The reliability table, and a line for each kind of pair."""
        lines = ["confidence    pairs  mean   right"]
        for row in self.table:
            if row.count:
                means = f"{row.count:>7}  {row.confidence:.3f}  {row.accuracy:.3f}"
                lines.append(f"{row.low:.2f} - {row.high:.2f}{means}")
        kinds = {kind or "(no kind)": found for kind, found in self.by_kind.items()}
        if len(kinds) > 1:
            width = max(map(len, kinds))
            lines += ["", f"{'kind':<{width}}    pairs  right  auc"]
            for kind, found in kinds.items():
                lines.append(f"{kind:<{width}}  {found['pairs']:>7}  {found['accuracy']:.3f}  {found['auc']:.3f}")
        return "\n".join(lines)
