"""The one decoder. Trainer and engine both run this code; they differ in the attention context they pass.

Axes: T tokens of the call (no batch axis, no padding), H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import add_rms_norm, geglu, invariant_linear, linear, logits, rms_norm, swiglu, token_logprobs
from rollout_engine.models.config import DecoderConfig
from rollout_engine.models.context import AttentionContext, take_rows
from rollout_engine.models.rope import cos_sin

GATED = {"silu": swiglu, "gelu_tanh": geglu}


class Linear(nn.Module):
    """``kernels.linear`` with its parameters. Weight [out, in]. With ``exact`` a row's bits don't depend on the others'
    on a GPU either."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.exact = False
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return (invariant_linear if self.exact else linear)(x, self.weight, self.bias)


class Embedding(nn.Module):
    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """The weight is stored as the checkpoint has it: with ``offset``, 1 is added inside the op."""

    def __init__(self, size: int, eps: float, offset: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.offset = offset
        self.reset()

    def reset(self) -> None:
        """To a factor of 1."""
        nn.init.constant_(self.weight, 0 if self.offset else 1)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of ``x + residual``, and the sum."""
        return add_rms_norm(x, residual, self.weight, self.eps, self.offset)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.kind = config.attention_kind(layer)
        self.head_dim = config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.qkv_proj = Linear(config.hidden_size, sum(self.heads) * config.head_dim, config.attention_bias)
        self.o_proj = Linear(config.num_heads * config.head_dim, config.hidden_size, config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, config.norm_offset) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, config.norm_offset) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, ctx: AttentionContext) -> Tensor:
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        q, k, v = heads.split(self.heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = ctx.attend(self.layer, q, k, v, cos, sin, self.kind)
        return self.o_proj(out.reshape(len(x), -1))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.gated = GATED[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = MLP(config)
        norm = (config.hidden_size, config.norm_eps, config.norm_offset)
        self.attention_norm = RMSNorm(*norm)
        self.mlp_norm = RMSNorm(*norm)
        self.post_attention_norm = RMSNorm(*norm) if config.post_norms else nn.Identity()
        self.post_mlp_norm = RMSNorm(*norm) if config.post_norms else nn.Identity()

    def forward(
        self, x: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, ctx: AttentionContext
    ) -> tuple[Tensor, Tensor]:
        """``x`` is the previous sublayer's output, not yet added to ``residual``."""
        normed, residual = self.attention_norm.add(x, residual)
        x = self.post_attention_norm(self.attention(normed, cos, sin, ctx))
        normed, residual = self.mlp_norm.add(x, residual)
        return self.post_mlp_norm(self.mlp(normed)), residual


class LogProbHead(nn.Module):
    """Vocabulary head of both callers. ``num_tokens`` is the tokenizer's size; rows beyond it never count."""

    def __init__(self, config: DecoderConfig, num_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.num_tokens = num_tokens
        self.softcap = config.logit_softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, H] -> fp32 [R, V]."""
        return logits(hidden, self.weight, self.num_tokens, self.softcap)

    def forward(self, hidden: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [R, H], targets [R], temperature [R] -> log-prob of the target and entropy, fp32 [R]."""
        return token_logprobs(hidden, self.weight, targets, temperature, self.num_tokens, self.softcap)


class Backbone(nn.Module):
    """Pre-norm rotary transformer with grouped-query attention and a gated MLP, up to the final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)
        self.gradient_checkpointing = False  # recompute each layer in the backward instead of keeping its activations
        self.exact = False

    def set_exact(self, exact: bool) -> None:
        """Whether a token's bits depend neither on the batch nor on who computes them, on a GPU too, where that costs
        speed. The attention context must say the same."""
        self.exact = exact
        for module in self.modules():
            if isinstance(module, Linear):
                module.exact = exact

    def hidden(self, token_ids: Tensor, ctx: AttentionContext) -> Tensor:
        """token_ids [T] -> final-normed hidden states [T, H]; row t predicts the token after t."""
        kinds = dict.fromkeys(layer.rope for layer in self.config.layers)
        tables = {kind: cos_sin(ctx.positions, kind) for kind in kinds}
        residual = self.embed_tokens(token_ids)
        if self.config.embedding_scale is not None:
            # Rounded to its dtype, as transformers does, and on the host: a CUDA graph can't record a copy from there.
            residual = residual * torch.tensor(self.config.embedding_scale, dtype=residual.dtype).item()
        x = torch.zeros_like(residual)
        for layer, config in zip(self.layers, self.config.layers, strict=True):
            inputs = (x, residual, *tables[config.rope], ctx)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, residual = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x, residual = layer(*inputs)
        normed, _ = self.norm.add(x, residual)
        return normed

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Normal(0, std) matrices, zero biases, unit norms: the usual start of a model from scratch."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.reset()
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                parameter.normal_(0, std, generator=generator)


class Decoder(Backbone):
    """The language model: a backbone and a vocabulary head.

    Args:
        config: sizes and switches.
        num_tokens: ids that may be sampled, at most ``config.vocab_size``.
    """

    def __init__(self, config: DecoderConfig, num_tokens: int) -> None:
        super().__init__(config)
        if not 0 < num_tokens <= config.vocab_size:
            raise ValueError(
                f"the tokenizer has {num_tokens} tokens but the model embeds {config.vocab_size}; "
                "use the tokenizer that belongs to the checkpoint"
            )
        self.head = LogProbHead(config, num_tokens)
        if config.tie_embeddings:
            self.head.weight = self.embed_tokens.weight

    def forward(
        self, token_ids: Tensor, ctx: AttentionContext, rows: Tensor, targets: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Score ``targets`` [R] predicted at ``rows`` [R] of token_ids [T]: log-prob and entropy, fp32 [R]."""
        return self.head(take_rows(self.hidden(token_ids, ctx), rows), targets, temperature)


class ScalarDecoder(Backbone):
    """A backbone and a head of one number per token: critics and reward models. The head starts at 0."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.score = Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, token_ids: Tensor, ctx: AttentionContext, rows: Tensor) -> Tensor:
        """The number at ``rows`` [R] of token_ids [T], fp32 [R]."""
        return linear(take_rows(self.hidden(token_ids, ctx), rows).float(), self.score.weight.float(), None)[:, 0]
