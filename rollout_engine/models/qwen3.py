"""Family ``qwen3``: Llama's layout plus an RMSNorm on every query and key head."""

from __future__ import annotations

from typing import Any

from rollout_engine.models.config import DecoderConfig
from rollout_engine.models.llama import grouped_query_config, layer_windows
from rollout_engine.models.llama import name_map as name_map


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``Qwen3Config``."""
    biases = {"attention_bias": hf.attention_bias, "output_bias": hf.attention_bias}
    return grouped_query_config(hf, windows=layer_windows(hf), qk_norm=True, **biases)
