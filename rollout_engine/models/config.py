"""What a decoder is made of, independent of the family it came from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama-3 RoPE scaling; field names as in the Llama 3.1 config.json, shortened."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes in units of elements; ``vocab_size`` counts embedding rows."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # longest sequence, prompt and answer together
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}; "
                "each KV head serves an equal number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embedding rotates pairs, so it must be even")

    def linear_shapes(self) -> set[tuple[int, int]]:
        """(out, in) of every matrix product of the model, the head included."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return {
            (qkv, self.hidden_size),
            (self.hidden_size, self.num_heads * self.head_dim),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
            (self.vocab_size, self.hidden_size),
        }

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


# One parameter of ours <- these tensors of the Hugging Face checkpoint, concatenated along dim 0.
NameMap = dict[str, tuple[str, ...]]
