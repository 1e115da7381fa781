"""Rotary embedding: from the ``rope_parameters`` of a Hugging Face config to frequencies."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from kernels import rope_tables
from kernels.reference.dense import llama3_inv_freq
from rollout_engine.models.config import LinearScaling, Llama3Scaling, LongScaling, Rope

Scaling = LinearScaling | Llama3Scaling | LongScaling | None


def rope_config(parameters: dict[str, Any], head_dim: int, max_position: int) -> Rope:
    """From ``rope_parameters`` as transformers standardises them.

    ``max_position`` is the config's ``max_position_embeddings``. Raises ValueError for a RoPE type that isn't built.
    """
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    return Rope(parameters["rope_theta"], dim, _scaling(parameters, max_position))


def _scaling(parameters: dict[str, Any], max_position: int) -> Scaling:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(parameters["factor"])
    if kind == "llama3":
        return Llama3Scaling(
            factor=parameters["factor"],
            low_freq_factor=parameters["low_freq_factor"],
            high_freq_factor=parameters["high_freq_factor"],
            original_max_position=parameters["original_max_position_embeddings"],
        )
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        factor = parameters.get("factor") or max_position / original
        attention_factor = parameters.get("attention_factor")
        if attention_factor is None:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return LongScaling(tuple(parameters["short_factor"]), attention_factor)
    raise ValueError(
        f"rope_type {kind!r} is not supported; choose a checkpoint with 'default', 'linear', 'llama3' or 'longrope'"
    )


@functools.lru_cache
def inv_freq(rope: Rope, device: torch.device) -> Tensor:
    """RoPE frequencies, fp32 [dim/2]. Not a buffer: that would follow the module to bf16, and angles need fp32."""
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    plain = 1.0 / (rope.theta**exponent)
    match rope.scaling:
        case LinearScaling(factor):
            plain = plain / factor
        case Llama3Scaling(factor, low, high, original):
            plain = llama3_inv_freq(plain, factor=factor, low=low, high=high, original=original)
        case LongScaling(factors):
            plain = 1.0 / (torch.tensor(factors) * rope.theta**exponent)
    return plain.to(device)


def cos_sin(positions: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """cos and sin tables, each fp32 [T, dim/2], for positions [T] int64."""
    cos, sin = rope_tables(positions, inv_freq(rope, positions.device))
    if isinstance(rope.scaling, LongScaling):
        return cos * rope.scaling.attention_factor, sin * rope.scaling.attention_factor
    return cos, sin
