"""Family ``llama``: Llama 2/3 and everything that publishes ``model_type: llama``."""

from __future__ import annotations

from typing import Any

from rollout_engine.models.config import DecoderConfig, Llama3Scaling, NameMap


def decoder_config(hf: Any) -> DecoderConfig:
    """From a transformers ``LlamaConfig``. Raises ValueError for a RoPE type that isn't built."""
    return grouped_query_config(hf, mlp_bias=hf.mlp_bias)


def grouped_query_config(hf: Any, *, mlp_bias: bool, qk_norm: bool = False) -> DecoderConfig:
    """The fields that Llama and its descendants name alike, and the switches that tell them apart."""
    if hf.hidden_act != "silu":
        raise ValueError(f"hidden_act {hf.hidden_act!r} is not supported; the MLP is built for 'silu'")
    return DecoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        max_position=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_theta=hf.rope_parameters["rope_theta"],
        rope_scaling=rope_scaling(hf.rope_parameters),
        tie_embeddings=hf.tie_word_embeddings,
        attention_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
    )


def rope_scaling(parameters: dict[str, Any]) -> Llama3Scaling | None:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; choose a checkpoint with 'default' or 'llama3' RoPE")
    return Llama3Scaling(
        factor=parameters["factor"],
        low_freq_factor=parameters["low_freq_factor"],
        high_freq_factor=parameters["high_freq_factor"],
        original_max_position=parameters["original_max_position_embeddings"],
    )


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
