"""Family ``gemma3_text``: Gemma 2 with q/k norms instead of capped scores, and RoPE by layer type.

The text half of a multimodal ``gemma3`` checkpoint is of this family too.
"""

from __future__ import annotations

from typing import Any

from rollout_engine.models.config import DecoderConfig, LayerConfig
from rollout_engine.models.gemma2 import gemma_config
from rollout_engine.models.gemma2 import name_map as name_map
from rollout_engine.models.llama import layer_windows
from rollout_engine.models.rope import rope_config


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``Gemma3TextConfig``. Raises ValueError for capped scores, which transformers ignores."""
    if hf.attn_logit_softcapping is not None:
        raise ValueError(f"attn_logit_softcapping={hf.attn_logit_softcapping}: gemma3 has none; set it to null")
    layers = tuple(
        LayerConfig(rope_config(hf.rope_parameters[kind], hf.head_dim, hf.max_position_embeddings), window)
        for kind, window in zip(hf.layer_types, layer_windows(hf), strict=False)
    )
    return gemma_config(hf, layers=layers, qk_norm=True)
