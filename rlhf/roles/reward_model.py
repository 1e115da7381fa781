"""The reward model: one scores answers, and one learns to from preference pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.device import default_device
from rlhf.config import ModelSection, Train
from rlhf.division import divide_pairs, divide_sequences, divide_update, over_ranks, runs
from rlhf.functional import pairwise_loss
from rlhf.packing import forward_scores
from rlhf.reward_model.config import PairsSection
from rlhf.reward_model.pairs import Pairs
from rlhf.roles.frozen import Frozen
from rlhf.roles.learner import Learner
from rollout_engine.models.checkpoint import has_scalar_head, load_scalar_model, save_model


@dataclass(frozen=True)
class Sequences:
    """Token ids of some sequences."""

    token_ids: Sequence[tuple[int, ...]]

    def microbatches(self, max_tokens: int) -> Iterator[Sequences]:
        """Runs of at most ``max_tokens`` tokens (or one sequence, if that alone is longer)."""
        for part in runs([len(ids) for ids in self.token_ids], max_tokens):
            yield Sequences([self.token_ids[i] for i in part])

    def filler(self) -> Sequences:
        """A token whose score nobody reads."""
        return Sequences([(0,)])


class RewardModel:
    """One rank of a trained one. train, timeout_s: as :class:`rlhf.roles.frozen.Frozen`'s.

    Raises ValueError for a checkpoint without a scalar head.
    """

    def __init__(self, *, checkpoint: Path, model: ModelSection, train: Train, timeout_s: float) -> None:
        if not has_scalar_head(checkpoint):
            raise ValueError(
                f"{checkpoint} has no scalar head (score.weight), so it is no reward model; "
                "`rlhf reward-model CONFIG` makes one, and any sequence classifier with one label will do"
            )
        self.frozen = Frozen(
            lambda device: load_scalar_model(checkpoint, dtype=model.dtype, device=device).decoder, train, timeout_s
        )

    @over_ranks(divide_sequences)
    @torch.no_grad()
    def judge(self, token_ids: Sequence[tuple[int, ...]]) -> list[float]:
        """Scores of sequences (prompt and answer, with its end where it has one), each at its last token.

        Raises ValueError for an empty sequence.
        """
        if not all(token_ids):
            empty = [bool(ids) for ids in token_ids].index(False)
            raise ValueError(f"sequence {empty} of {len(token_ids)} is empty; give at least a token to score")
        scores: list[float] = []
        for part in self.frozen.microbatches(Sequences(token_ids)):
            apart = range(len(part.token_ids))  # nobody shares a prefix
            scores += forward_scores(self.frozen.model, part.token_ids, apart).tolist()
        return scores[: len(token_ids)]


class RewardLearner:
    """One rank of a reward model in training.

    Args:
        checkpoint: of a language model, whose head gives way to a scalar one of zeros, or of a reward model.
        section: what the loss is made of.
        run_folder, total_updates, timeout_s: as :class:`rlhf.roles.learner.Learner`'s.
    """

    def __init__(
        self,
        *,
        checkpoint: Path,
        run_folder: Path,
        model: ModelSection,
        train: Train,
        section: PairsSection,
        total_updates: int,
        timeout_s: float,
    ) -> None:
        self.section = section
        self.model = load_scalar_model(checkpoint, dtype=model.dtype, device=default_device())
        self.model.decoder.gradient_checkpointing = model.gradient_checkpointing
        self.learner = Learner(
            "reward_model",
            self.model.decoder,
            train,
            run_folder=run_folder,
            total_updates=total_updates,
            timeout_s=timeout_s,
        )

    @over_ranks(divide_pairs)
    @torch.no_grad()
    def score(self, pairs: Pairs) -> Tensor:
        """Scores of the pairs' answers, chosen and rejected: [P, 2] fp32, on the CPU. Collective."""
        micro = self.learner.microbatches(pairs)
        found = [forward_scores(self.learner.backend.engine, part.sequences, part.groups).cpu() for part in micro]
        return torch.cat(found).view(-1, 2)[: len(pairs.pairs)]

    @over_ranks(divide_update)
    def update(self, pairs: Pairs) -> dict[str, float]:
        """One optimizer step; metrics as :meth:`Learner.step`. Collective."""
        forward = partial(pair_loss, section=self.section)
        metrics, _ = self.learner.step(pairs, forward, before_step=lambda: None)
        return metrics

    def save_state(self, folder: Path) -> None:
        """Write everything that the next step depends on. Collective."""
        self.learner.save_state(folder)

    def load_state(self, folder: Path) -> None:
        """Be where the learner was that wrote ``folder``; before the first step. Collective."""
        self.learner.load_state(folder)

    def save(self, folder: Path) -> None:
        """Write the weights as a Hugging Face sequence classifier (new folder, atomic); rank 0 does. Collective."""
        names = [name for name, _ in self.model.decoder.named_parameters()]
        with self.learner.backend.gathered(names):
            if self.learner.backend.rank == 0:
                save_model(self.model, folder)


def pair_loss(engine: nn.Module, pairs: Pairs, section: PairsSection) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighed loss of some pairs, and diagnostics by name, one value per pair that counts."""
    compared = [pair.compared(section.compare) for pair in pairs.pairs]  # C in all
    counts = [len(positions) for positions in compared]
    starts = _starts(pairs)
    index = [[starts[i][side] + at[side] for i, some in enumerate(compared) for at in some] for side in (0, 1)]
    scores = forward_scores(engine, pairs.sequences, pairs.groups, torch.tensor(index).flatten())
    chosen, rejected = scores.view(2, -1)  # [C] each

    def column(values: Iterable[float]) -> Tensor:
        """[P] -> [C]"""
        repeated = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
        return torch.tensor(repeated, device=scores.device)

    weights = column(weight / count for weight, count in zip(pairs.weights, counts, strict=True))
    margins = column(pair.margin for pair in pairs.pairs)
    loss = (weights * pairwise_loss(chosen, rejected, margins, section.center_coef)).sum()
    last = torch.tensor(counts).cumsum(0) - 1
    last = last[torch.tensor(pairs.weights) > 0].to(scores.device)
    chosen, rejected = chosen.detach()[last], rejected.detach()[last]
    won = chosen - rejected
    diagnostics = {
        "accuracy": (won > 0).float() + 0.5 * (won == 0).float(),
        "margin": won,
        "chosen": chosen,
        "rejected": rejected,
    }
    return loss, diagnostics


def _starts(pairs: Pairs) -> list[tuple[int, int]]:
    """Where the sequences of each pair begin, laid end to end."""
    ends = [0, *accumulate(len(ids) for ids in pairs.sequences)]
    return list(zip(ends[0:-1:2], ends[1::2], strict=True))
