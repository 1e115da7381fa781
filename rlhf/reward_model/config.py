"""The config of a reward model: the sections of a run (``rlhf.config``), and ``pairs``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from rlhf.config import (
    Checkpoint,
    Cluster,
    Data,
    ModelSection,
    Rollout,
    RunSection,
    Section,
    Tracking,
    Train,
    WarmStart,
    read_tree,
    validated,
)

Compare = Literal["last", "tokens"]


class RecipeSection(Section):
    """Needed where ``data.path``, ``model.path`` or the warm start leave something to it."""

    path: str | None = None


class PairsSection(Section):
    """Preference pairs: ``batch_size`` of them an optimizer step, for ``steps`` steps or ``epochs`` passes.

    ``chosen``, ``rejected``, ``margin`` and ``kind`` name columns; the last two may be missing: no margin, and no
    breakdown of evaluations. Pairs whose prompt and longer answer have more than ``max_tokens`` tokens are dropped,
    and counted.

    compare: the loss compares the scores at the answers' ``last`` tokens, or takes the mean over these and all
    ``tokens`` since the answers part, as DeepSpeed-Chat does: a denser signal, and a critic that starts from such a
    model knows unfinished answers. center_coef: of ``functional.pairwise_loss``.
    """

    batch_size: PositiveInt
    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    compare: Compare = "last"
    center_coef: NonNegativeFloat = 0.0
    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str = "margin"
    kind: str = "kind"
    max_tokens: PositiveInt = 1024

    @model_validator(mode="after")
    def _one_length(self) -> PairsSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"pairs.steps={self.steps} and pairs.epochs={self.epochs}: give one of the two")
        return self

    def num_steps(self, num_pairs: int) -> int:
        """Optimizer steps of the run; an epoch's last one may reach into the next."""
        return self.steps or -(-num_pairs * (self.epochs or 1) // self.batch_size)


class Eval(Section):
    """Held-out pairs are judged every ``every`` steps, and at the end. ``pairs``: at most so many are held out."""

    every: NonNegativeInt = 20  # 0: only before and after
    pairs: PositiveInt = 512


class RewardModelConfig(Section):
    run: RunSection
    model: ModelSection = ModelSection()
    recipe: RecipeSection = RecipeSection()
    data: Data = Data()
    warm_start: WarmStart = WarmStart()
    pairs: PairsSection
    train: Train
    cluster: Cluster = Cluster()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @property
    def ranks(self) -> dict[str, int]:
        """Of the reward model, and of the warm start's policy."""
        ranks = self.cluster.ranks or max(1, self.cluster.gpus)
        return {"policy": ranks, "reward_model": ranks}

    @property
    def rollout(self) -> Rollout:
        """Of the warm start's policy, whose engine nobody asks for an answer."""
        return Rollout(prompts_per_step=1, samples_per_prompt=1, max_tokens=1, kv_cache_gib=0.01)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RewardModelConfig:
    """As :func:`rlhf.config.load_config`."""
    return validated(RewardModelConfig, read_tree(path, overrides))
