"""Token log-probabilities and entropies from hidden states, by row chunks.

Axes: R scored rows, H hidden, V vocabulary rows of the head (may exceed the tokenizer's).
The engine's sampler and the trainer's loss both go through :func:`logits` and :func:`distribution`,
so a sampled token's log-prob and the trainer's are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.reference.dense import ROW_MULTIPLE, linear

CHUNK_ELEMENTS = 1 << 24  # of one [rows, V] fp32 block: 64 MiB

Product = Callable[[Tensor, Tensor], Tensor]  # x [R, H] and weight [V, H] -> [R, V]: ``linear`` or its twin


def logits(
    hidden: Tensor, weight: Tensor, num_tokens: int, softcap: float | None = None, product: Product = linear
) -> Tensor:
    """fp32 logits [R, V] of hidden [R, H] under weight [V, H]; columns from ``num_tokens`` on are -inf.

    Rows of the head beyond the tokenizer (padding for alignment) can so be neither sampled nor scored.
    With a ``softcap`` they are ``softcap * tanh(logit / softcap)`` (Gemma 2, 2024).
    The product itself is fp32 whatever the dtype: a logit of 20 in bf16 is off by up to 0.06.
    """
    z = product(hidden.float(), weight.float())
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if num_tokens < z.shape[1]:
        z[:, num_tokens:] = -torch.inf
    return z


def distribution(z: Tensor, temperature: Tensor) -> Tensor:
    """log-softmax of ``z / temperature``. z [R, V] fp32, temperature [R]; 0 (greedy) is scored at 1."""
    temperature = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    return torch.log_softmax(z / temperature[:, None], -1)


def _chunks(rows: int, width: int) -> list[slice]:
    step = max(ROW_MULTIPLE, CHUNK_ELEMENTS // width // ROW_MULTIPLE * ROW_MULTIPLE)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _pad(x: Tensor) -> Tensor:
    """At least eight rows, so that a reduction over a wide row is never split between threads."""
    pad = -x.shape[0] % ROW_MULTIPLE
    return torch.cat((x, x.new_zeros(pad, *x.shape[1:]))) if pad else x


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: Tensor,
        num_tokens: int,
        softcap: float | None,
        product: Product,
    ) -> tuple[Tensor, Tensor]:
        wide = weight.float()  # once, not chunk by chunk
        logprob = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        entropy = torch.empty_like(logprob)
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            z = logits(_pad(hidden[rows]), wide, num_tokens, softcap, product)
            logp = distribution(z, _pad(temperature[rows]))
            n = rows.stop - rows.start
            logprob[rows] = logp[:n].gather(1, targets[rows, None])[:, 0]
            entropy[rows] = entropy_of(logp)[:n]
        ctx.save_for_backward(hidden, weight, targets, temperature)
        ctx.num_tokens, ctx.softcap, ctx.product = num_tokens, softcap, product
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dlogprob, dentropy = grads
        hidden, weight, targets, temperature = ctx.saved_tensors
        wide = weight.float()
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(wide)
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            heat = temperature[rows]
            z = logits(hidden[rows], wide, ctx.num_tokens, ctx.softcap, ctx.product)
            logp = distribution(z, heat)
            p = torch.exp(logp)
            # d logprob / dz = onehot - p;  d entropy / dz = -p (log p + entropy)
            dz = p * -dlogprob[rows, None]
            dz.scatter_add_(1, targets[rows, None], dlogprob[rows, None])
            if dentropy.any():
                surprise = torch.where(p > 0, logp, torch.zeros_like(logp)) + entropy_of(logp)[:, None]
                dz -= p * surprise * dentropy[rows, None]
            dz /= torch.where(heat > 0, heat, torch.ones_like(heat))[:, None]
            if ctx.softcap is not None:
                tanh = z.div_(ctx.softcap).clamp_(min=-1)  # -inf, a column that doesn't count, gets slope 0
                dz *= 1 - tanh * tanh
            dhidden[rows] = (dz @ wide).to(hidden.dtype)
            dweight += dz.T @ hidden[rows].float()
        return dhidden, dweight.to(weight.dtype), None, None, None, None, None


def entropy_of(logp: Tensor) -> Tensor:
    """In nats, of each row of log-probs [R, V]: [R]."""
    p = torch.exp(logp)
    return -torch.where(p > 0, p * logp, torch.zeros_like(p)).sum(-1)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    num_tokens: int,
    softcap: float | None = None,
    product: Product = linear,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of each row, without ever holding [R, V] of more than one chunk.

    hidden [R, H], weight [V, H], targets [R] int64, temperature [R] fp32 (0 is scored at 1) ->
    two fp32 [R], natural log. Differentiable in hidden and weight; the backward recomputes the chunk.
    """
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, num_tokens, softcap, product)
