"""DAPO: clip-higher, dynamic sampling, token-level loss, overlong shaping (Yu et al. 2025, arXiv 2503.14476)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf.algorithms.policy_gradient import STRICT, ClipHigh, CriticFree, TISClip


@dataclass(frozen=True, config=STRICT)
class DAPO(CriticFree):
    """The paper's numbers: its buffer is 4,096 of 20,480 tokens. The importance weights are ours: for the groups that
    waited for a step; of fresh ones they are 1."""

    name: Literal["dapo"] = "dapo"
    dynamic_sampling: bool = True
    overlong_buffer: Annotated[float, Field(ge=0, le=1)] = 0.2
    clip_high: ClipHigh = 0.28
    tis_clip: TISClip = 2.0


ALGORITHM = DAPO
