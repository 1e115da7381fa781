"""Family ``qwen2``: Llama with a bias on q, k and v, and a sliding window on some layers where switched on."""

from __future__ import annotations

from typing import Any

from rollout_engine.models.config import DecoderConfig
from rollout_engine.models.llama import grouped_query_config, layer_windows
from rollout_engine.models.llama import name_map as name_map


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``Qwen2Config``."""
    return grouped_query_config(hf, windows=layer_windows(hf), attention_bias=True)
