"""Family ``mistral``: Llama with a sliding window on every layer, or on none."""

from __future__ import annotations

from typing import Any

from rollout_engine.models.config import DecoderConfig
from rollout_engine.models.llama import grouped_query_config
from rollout_engine.models.llama import name_map as name_map


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``MistralConfig``."""
    return grouped_query_config(hf, windows=[hf.sliding_window] * hf.num_hidden_layers)
