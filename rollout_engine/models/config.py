"""What a decoder is made of, independent of the family it came from."""

from __future__ import annotations

from dataclasses import dataclass

from kernels import AttentionKind


@dataclass(frozen=True)
class LinearScaling:
    """All RoPE wavelengths stretched by ``factor``."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama-3 RoPE scaling; field names as in the Llama 3.1 config.json, shortened."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class LongScaling:
    """LongRoPE within the original context (Ding et al. 2024): each wavelength stretched by a factor of its own,
    and cos and sin multiplied by ``attention_factor``."""

    factors: tuple[float, ...]
    attention_factor: float


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first ``dim`` elements of each head; the rest pass unturned."""

    theta: float
    dim: int
    scaling: LinearScaling | Llama3Scaling | LongScaling | None = None

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ValueError(
                f"{self.dim} elements of each head (head_dim times partial_rotary_factor) are to turn, but rotary "
                "embedding turns pairs, and that is odd; choose a checkpoint where it is even"
            )


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer."""

    rope: Rope
    window: int | None = None  # newest keys that a query sees, its own included; None: all

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"sliding_window={self.window} shows a token nothing, not even itself; give at least 1")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes in units of elements; ``vocab_size`` counts embedding rows."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerConfig, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int  # longest sequence, prompt and answer together
    norm_eps: float
    tie_embeddings: bool = False
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    activation: str = "silu"  # of the MLP's gate: "silu" or "gelu_tanh"
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE
    norm_offset: bool = False  # norms multiply by 1 + weight
    post_norms: bool = False  # RMSNorm of a sublayer's output before it joins the residual
    embedding_scale: float | None = None  # embeddings are multiplied by it, rounded to their dtype
    attention_scale: float | None = None  # of q . k; None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # score -> softcap * tanh(score / softcap)
    logit_softcap: float | None = None  # the same for the head's logits

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}; "
                "each KV head serves an equal number of query heads"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def attention_kind(self, layer: int) -> AttentionKind:
        return AttentionKind(self.attention_scale, self.attention_softcap, self.layers[layer].window)

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

    def biased_shapes(self) -> set[tuple[int, int]]:
        """Those of :meth:`linear_shapes` that have a bias."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        shapes = {(qkv, self.hidden_size)} if self.attention_bias else set()
        if self.output_bias:
            shapes.add((self.hidden_size, self.num_heads * self.head_dim))
        if self.mlp_bias:
            shapes |= {(2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)}
        return shapes

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


# One parameter of ours <- these tensors of the Hugging Face checkpoint, concatenated along dim 0.
NameMap = dict[str, tuple[str, ...]]
