"""The reference ops once more, in C++ for fp32 on CPU: the same meaning in one pass, without a dispatch per operator.

Each op here has the signature and contract of its namesake in ``kernels.reference``, and falls back to it for
other devices and dtypes, and where the extension can't be built. Which of the two runs is decided once a
process, so trainer and engine agree. ``python -m kernels.cpu`` builds the extension beforehand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.loader import extension
from kernels.reference import KV_BLOCK, AttentionKind, AttentionPlan, SampledTokens
from kernels.reference.attention import CAUSAL, score_scale
from kernels.reference.kv_store import Scales
from kernels.reference.logprobs import Product

__all__ = [
    "add_rms_norm",
    "attend_blocks",
    "attend_paged",
    "geglu",
    "invariant_linear",
    "linear",
    "logits",
    "packed_attention",
    "philox_uniform",
    "rms_norm",
    "rope",
    "rope_store",
    "sample_tokens",
    "store_kv",
    "swiglu",
    "token_logprobs",
]


def _ops(x: Tensor) -> Any | None:
    """The extension, if it can take this; what goes with it has its dtype and device, or the extension objects."""
    return extension() if x.dtype is torch.float32 and x.is_cpu else None


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _heads(x: Tensor) -> Tensor:
    """[T, N, D] with each token's heads one after the other; tokens may lie apart (a slice of fused qkv)."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return extension().linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dout,) = grads
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            dout @ weight if wanted[0] else None,
            dout.T @ x if wanted[1] else None,
            dout.sum(0) if wanted[2] else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    ops = _ops(x)
    if ops is None:
        return reference.linear(x, weight, bias)
    x, weight = x.contiguous(), weight.contiguous()
    return (
        _Linear.apply(x, weight, bias)
        if _needs_grad(x, weight, *(() if bias is None else (bias,)))
        else ops.linear(x, weight, bias)
    )


invariant_linear = linear


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        out, inv = extension().rms_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inv)
        ctx.offset = offset
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dx, dweight = extension().rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.offset, None)
        return dx, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    ops = _ops(x)
    if ops is None or x.ndim not in (2, 3):
        return reference.rms_norm(x, weight, eps, offset)
    heads = _heads(x[:, None] if x.ndim == 2 else x)
    args = heads, weight, eps, offset
    out = _RMSNorm.apply(*args) if _needs_grad(x, weight) else ops.rms_norm(*args)[0]
    return out.view(x.shape)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: bool
    ) -> tuple[Tensor, Tensor]:
        out, inv, total = extension().add_rms_norm(x, residual, weight, eps, offset)
        ctx.offset = offset
        ctx.save_for_backward(total, weight, inv)
        return out, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        total, weight, inv = ctx.saved_tensors
        dout, dtotal = (grad.contiguous()[:, None] for grad in grads)
        dx, dweight = extension().rms_norm_backward(dout, total[:, None], weight, inv, ctx.offset, dtotal)
        dx = dx[:, 0]
        return dx, dx, dweight, None, None


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: bool = False
) -> tuple[Tensor, Tensor]:
    ops = _ops(x)
    if ops is None:
        return reference.add_rms_norm(x, residual, weight, eps, offset)
    x, residual = x.contiguous(), residual.contiguous()
    if _needs_grad(x, residual, weight):
        return _AddRMSNorm.apply(x, residual, weight, eps, offset)
    out, _, total = ops.add_rms_norm(x, residual, weight, eps, offset)
    return out, total


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return extension().rope(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return extension().rope(_heads(grads[0]), *ctx.saved_tensors, -1.0), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    ops = _ops(x)
    if ops is None:
        return reference.rope(x, cos, sin)
    args = _heads(x), cos.contiguous(), sin.contiguous()
    return _Rope.apply(*args) if _needs_grad(x) else ops.rope(*args, 1.0)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.gelu = gelu
        return extension().gated(gate_up, gelu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return extension().gated_backward(grads[0].contiguous(), *ctx.saved_tensors, ctx.gelu), None


def _gated(gate_up: Tensor, gelu: bool) -> Tensor:
    ops = _ops(gate_up)
    if ops is None:
        return reference.geglu(gate_up) if gelu else reference.swiglu(gate_up)
    gate_up = gate_up.contiguous()
    return _Gated.apply(gate_up, gelu) if _needs_grad(gate_up) else ops.gated(gate_up, gelu)


def swiglu(gate_up: Tensor) -> Tensor:
    return _gated(gate_up, gelu=False)


def geglu(gate_up: Tensor) -> Tensor:
    return _gated(gate_up, gelu=True)


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, scales: Scales | None = None
) -> None:
    ops = _ops(k)
    if ops is None or scales is not None:
        reference.store_kv(k, v, k_cache, v_cache, slots, scales)
    else:
        ops.store_kv(_heads(k), _heads(v), k_cache, v_cache, slots)


def rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    store_kv(rope(k, cos, sin), v, k_cache, v_cache, slots)
    return rope(q, cos, sin)


def _scores(kind: AttentionKind, q: Tensor) -> tuple[float, int, float]:
    return score_scale(kind, q.shape[2]), kind.window or 0, kind.softcap or 0.0


def attend_blocks(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    kind: AttentionKind = CAUSAL,
    lse: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    ops = _ops(q)
    if ops is None or scales is not None:
        return reference.attend_blocks(q, k_cache, v_cache, plan, kind, lse, scales)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    where = plan.queries, plan.contexts, plan.tables
    ops.attend(_heads(q), k_cache, v_cache, *where, *_scores(kind, q), out, lse)
    return out


def attend_paged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    plan: AttentionPlan,
    kind: AttentionKind = CAUSAL,
    scales: Scales | None = None,
) -> Tensor:
    store_kv(k, v, k_cache, v_cache, slots, scales)
    return attend_blocks(q, k_cache, v_cache, plan, kind, scales=scales)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        num_blocks: int,
        plan: AttentionPlan,
        kind: AttentionKind,
    ) -> Tensor:
        shape = (num_blocks, k.shape[1], KV_BLOCK, k.shape[2])
        k_blocks, v_blocks = k.new_zeros(shape), v.new_zeros(shape)
        store_kv(k, v, k_blocks, v_blocks, slots)
        lse = q.new_empty(*q.shape[:2], 1)
        out = attend_blocks(q, k_blocks, v_blocks, plan, kind, lse)
        ctx.save_for_backward(q, k_blocks, v_blocks, slots, out, lse)
        ctx.plan, ctx.kind = plan, kind
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k_blocks, v_blocks, _, out, lse = ctx.saved_tensors
        where = ctx.plan.queries, ctx.plan.contexts, ctx.plan.tables
        dq, dk, dv = extension().attend_backward(
            grads[0].contiguous(), q.contiguous(), k_blocks, v_blocks, out, lse, *where, *_scores(ctx.kind, q)
        )
        return dq, dk, dv, None, None, None, None, None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    num_blocks: int,
    plan: AttentionPlan,
    kind: AttentionKind = CAUSAL,
) -> Tensor:
    if _ops(q) is None:
        return reference.packed_attention(q, k, v, slots, num_blocks, plan, kind)
    return _PackedAttention.apply(q, k, v, slots, num_blocks, plan, kind)


def logits(
    hidden: Tensor, weight: Tensor, num_tokens: int, softcap: float | None = None, product: Product = linear
) -> Tensor:
    return reference.logits(hidden, weight, num_tokens, softcap, product)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    num_tokens: int,
    softcap: float | None = None,
    product: Product = linear,
) -> tuple[Tensor, Tensor]:
    return reference.token_logprobs(hidden, weight, targets, temperature, num_tokens, softcap, product)


def philox_uniform(seed: Tensor, sample_id: Tensor, position: Tensor) -> Tensor:
    columns = seed.contiguous(), sample_id.contiguous(), position.contiguous()
    ops = extension() if seed.device.type == "cpu" else None
    return reference.philox_uniform(*columns) if ops is None else ops.philox_uniform(*columns)


def sample_tokens(
    z: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    *filters: Tensor | None,
    **named: Tensor | None,
) -> SampledTokens:
    ops = _ops(z)
    if ops is None:
        return reference.sample_tokens(z, temperature, uniform, *filters, **named)
    logp = reference.distribution(z, temperature)  # as the trainer's log-probs
    tokens, logprobs, entropy = ops.draw(z.contiguous(), logp, temperature.contiguous(), uniform.contiguous())
    if any(given is not None for given in (*filters, *named.values())):
        # The entropy's bits mustn't tell whether another row filters.
        return replace(reference.sample_tokens(z, temperature, uniform, *filters, **named), entropy=entropy)
    greedy = temperature == 0
    processed = logprobs.masked_fill(greedy, 0.0)
    return SampledTokens(tokens, logprobs, processed, logprobs - processed, entropy)
