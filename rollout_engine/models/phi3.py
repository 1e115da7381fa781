"""Family ``phi3``: Phi-3 and Phi-4-mini. Checkpoints hold q/k/v and gate/up fused, as we do."""

from __future__ import annotations

from typing import Any

from rollout_engine.models import llama
from rollout_engine.models.config import DecoderConfig, NameMap


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``Phi3Config``.

    LongRoPE models are cut to their original context: a sequence that outgrows it changes the frequencies of all
    its tokens at once, which would contradict the keys already cached.
    """
    max_position = hf.max_position_embeddings
    if hf.rope_parameters["rope_type"] == "longrope":
        max_position = min(max_position, hf.rope_parameters["original_max_position_embeddings"])
    windows = [hf.sliding_window] * hf.num_hidden_layers
    return llama.grouped_query_config(hf, windows=windows, max_position=max_position)


def name_map(config: DecoderConfig) -> NameMap:
    names = llama.name_map(config)
    for i in range(config.num_layers):
        for ours, theirs in (("attention", "self_attn.qkv_proj"), ("mlp", "mlp.gate_up_proj")):
            name = f"layers.{i}.{ours}.{theirs.split('.')[1]}.weight"
            names[name] = (f"model.layers.{i}.{theirs}.weight",)
    return names
