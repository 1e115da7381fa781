"""Family ``qwen3``: Llama's layout plus an RMSNorm on every query and key head."""

from __future__ import annotations

from typing import Any

from rollout_engine.models.config import DecoderConfig
from rollout_engine.models.llama import grouped_query_config
from rollout_engine.models.llama import name_map as name_map


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``Qwen3Config``. Raises ValueError for sliding-window layers, which aren't built."""
    if hf.use_sliding_window:
        raise ValueError("use_sliding_window: true is not supported; choose a full-attention checkpoint")
    return grouped_query_config(hf, mlp_bias=False, qk_norm=True)
