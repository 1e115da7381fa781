"""Family ``gemma2``: norms before and after each sublayer, soft caps on scores and logits, alternating windows."""

from __future__ import annotations

import math
from typing import Any

from rollout_engine.models import llama
from rollout_engine.models.config import DecoderConfig, NameMap


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``Gemma2Config``. Raises ValueError for bidirectional attention."""
    return gemma_config(hf, windows=llama.layer_windows(hf), attention_softcap=hf.attn_logit_softcapping)


def gemma_config(hf: Any, **family: Any) -> DecoderConfig:
    """What the Gemmas share."""
    if hf.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention: true is not supported; a decoder that generates is causal")
    return llama.grouped_query_config(
        hf,
        activation=hf.hidden_activation,
        attention_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        norm_offset=True,
        post_norms=True,
        embedding_scale=math.sqrt(hf.hidden_size),
        attention_scale=1 / math.sqrt(hf.query_pre_attn_scalar),
        logit_softcap=hf.final_logit_softcapping,
        **family,
    )


def name_map(config: DecoderConfig) -> NameMap:
    names = llama.name_map(config)
    for i in range(config.num_layers):
        for ours, theirs in (
            ("post_attention_norm", "post_attention_layernorm"),  # in Llama the name of the norm before the MLP
            ("mlp_norm", "pre_feedforward_layernorm"),
            ("post_mlp_norm", "post_feedforward_layernorm"),
        ):
            names[f"layers.{i}.{ours}.weight"] = (f"model.layers.{i}.{theirs}.weight",)
    return names
