"""Family ``llama``: Llama 2/3 and everything that publishes ``model_type: llama``.

Also what its descendants share with it; a family's own file says where it differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollout_engine.models.config import DecoderConfig, LayerConfig, NameMap
from rollout_engine.models.rope import rope_config

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``LlamaConfig``. Raises ValueError for an activation or RoPE type that isn't built."""
    return grouped_query_config(
        hf, attention_bias=hf.attention_bias, output_bias=hf.attention_bias, mlp_bias=hf.mlp_bias
    )


def grouped_query_config(
    hf: Any,
    *,
    activation: str | None = None,
    windows: Sequence[int | None] | None = None,
    layers: tuple[LayerConfig, ...] | None = None,
    **family: Any,
) -> DecoderConfig:
    """The fields that Llama and its descendants name alike, and those that the family sets.

    Args:
        activation: transformers' name of it; ``hf.hidden_act`` where not given.
        windows: sliding window of each layer, None for full attention; all full where not given.
        layers: for a family whose layers differ in more than that.
        **family: further fields of :class:`DecoderConfig`.
    """
    activation = activation or hf.hidden_act
    if activation not in ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is not supported; the MLP is built for {sorted(ACTIVATIONS)}")
    if layers is None:
        rope = rope_config(hf.rope_parameters, head_dim(hf), hf.max_position_embeddings)
        layers = tuple(LayerConfig(rope, window) for window in windows or [None] * hf.num_hidden_layers)
    fields = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "layers": layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim(hf),
        "max_position": hf.max_position_embeddings,
        "norm_eps": hf.rms_norm_eps,
        "tie_embeddings": hf.tie_word_embeddings,
        "activation": ACTIVATIONS[activation],
    }
    return DecoderConfig(**{**fields, **family})


def head_dim(hf: Any) -> int:
    """Qwen2 and Phi-3 configs may leave it out."""
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def layer_windows(hf: Any) -> list[int | None]:
    """Sliding window of each layer where a config lists ``layer_types``. Raises ValueError for another type."""
    kinds = {"full_attention": None, "sliding_attention": hf.sliding_window}
    types = hf.layer_types[: hf.num_hidden_layers]
    for kind in types:
        if kind not in kinds:
            raise ValueError(f"layer type {kind!r} is not supported; choose a checkpoint with {sorted(kinds)}")
        if kind == "sliding_attention" and hf.sliding_window is None:
            raise ValueError("config.json has layers of type 'sliding_attention' but no sliding_window; give one")
    return [kinds[kind] for kind in types]


def name_map(config: DecoderConfig) -> NameMap:
    names: NameMap = {"embed_tokens.weight": ("model.embed_tokens.weight",), "norm.weight": ("model.norm.weight",)}
    if not config.tie_embeddings:
        names["head.weight"] = ("lm_head.weight",)
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names[f"{ours}.attention_norm.weight"] = (f"{theirs}.input_layernorm.weight",)
        names[f"{ours}.mlp_norm.weight"] = (f"{theirs}.post_attention_layernorm.weight",)
        for name, parts, bias in (
            ("attention.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), config.attention_bias),
            ("attention.o_proj", ("self_attn.o_proj",), config.output_bias),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), config.mlp_bias),
            ("mlp.down_proj", ("mlp.down_proj",), config.mlp_bias),
        ):
            for kind in ("weight", "bias") if bias else ("weight",):
                names[f"{ours}.{name}.{kind}"] = tuple(f"{theirs}.{part}.{kind}" for part in parts)
        if config.qk_norm:
            names[f"{ours}.attention.q_norm.weight"] = (f"{theirs}.self_attn.q_norm.weight",)
            names[f"{ours}.attention.k_norm.weight"] = (f"{theirs}.self_attn.k_norm.weight",)
    return names
