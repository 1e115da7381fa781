"""Linear, RMSNorm, RoPE and the gated activations, forward and backward.

Axes: T tokens, H hidden, N heads, D head dim, I MLP width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.attention import store_kv

ROW_MULTIPLE = 8  # fewer rows than this, or an odd rest, send BLAS down another summation path
COLUMN_MULTIPLE = 4  # rows that don't start on 16 bytes do so too, where the output is narrow


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with rows padded to a multiple of eight, and odd columns to one of four.

    x [T, in], weight [out, in], bias [out] -> [T, out]. Row-invariant; differentiable.
    """
    rows, columns = x.shape
    if columns % COLUMN_MULTIPLE:
        x, weight = (F.pad(t, (0, -columns % COLUMN_MULTIPLE)) for t in (x, weight))
    pad = -rows % ROW_MULTIPLE
    if pad:
        return F.linear(F.pad(x, (0, 0, 0, pad)), weight, bias)[:rows]
    return F.linear(x, weight, bias)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` where a row's bits must not depend on the others, on a GPU too, at a price in speed there.

    x [T, in], weight [out, in], bias [out], one dtype -> [T, out]. Sums in fp32, rounds once. Its gradients are
    those of any linear layer, and not row-invariant.
    """
    return linear(x, weight, bias)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: bool) -> Tensor:
        wide = x.float()
        inv = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inv)
        ctx.offset = offset
        if offset:
            return (wide * inv * (weight.float() + 1)).to(x.dtype)
        return (wide * inv).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        x, weight, inv = ctx.saved_tensors
        normed = x.float() * inv
        dy = dy.float()
        g = dy * (weight.float() + 1 if ctx.offset else weight.float())
        dx = inv * (g - normed * (g * normed).mean(-1, keepdim=True))
        dw = (dy * normed).flatten(0, -2).sum(0)
        return dx.to(x.dtype), dw.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: bool = False) -> Tensor:
    """Root-mean-square norm over the last axis, in fp32 (Zhang & Sennrich 2019).

    x [..., D], weight [D] -> [..., D] in x's dtype. With ``offset`` the factor is ``1 + weight``, in fp32
    (Gemma): bf16 resolves a weight near 0 far better than one near 1.
    """
    return _RMSNorm.apply(x, weight, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: bool = False
) -> tuple[Tensor, Tensor]:
    """``h = x + residual``; returns ``(rms_norm(h), h)``, both [T, H]."""
    h = x + residual
    return rms_norm(h, weight, eps, offset), h


def rope_tables(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position * inv_freq``, each fp32 [T, D/2]. positions [T] int, inv_freq [D/2] fp32."""
    angle = positions.float()[:, None] * inv_freq
    return torch.cos(angle), torch.sin(angle)


def llama3_inv_freq(inv_freq: Tensor, *, factor: float, low: float, high: float, original: int) -> Tensor:
    """Llama-3's RoPE scaling (Llama 3.1 release, ``rope_type: llama3``).

    Wavelengths above ``original/low`` are stretched by ``factor``, those below ``original/high`` kept, and
    those between interpolated linearly in ``original/wavelength``.
    """
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, scaled)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turning = 2 * cos.shape[-1]
    a, b = x[..., :turning].float().chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
    return torch.cat((turned, x[..., turning:]), -1) if turning < x.shape[-1] else turned


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split layout (Su et al. 2021; the layout of Hugging Face checkpoints).

    x [T, N, D], cos and sin [T, R/2] fp32 -> [T, N, D] in x's dtype. Elements from R on pass unturned.
    """
    return _Rope.apply(x, cos, sin)


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
    """Turn q and k, write k and v into their pages, and return q turned: :func:`rope` and :func:`store_kv` in one.

    q [T, Hq, D], k and v [T, Hkv, D]; cos and sin as for :func:`rope`; pages [pages, Hkv, page, D] of q's dtype and
    slots [T] as for :func:`store_kv`; one that several tokens share gets the k and v of any of them. The engine's; no
    autograd.
    """
    store_kv(rope(k, cos, sin), v, k_cache, v_cache, slots)
    return rope(q, cos, sin)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.float().chunk(2, -1)
        return (gate / torch.exp(-gate).add_(1)).mul_(up).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        dy = grads[0].float()
        gate, up = gate_up.float().chunk(2, -1)
        # Through 1/(1+e) rather than autograd: e overflows to inf for gate < -88 and 0 * inf is NaN.
        # In place, since on CPU fresh memory of this size costs more than the arithmetic.
        sig = torch.exp(-gate).add_(1).reciprocal_()
        act = gate * sig
        dgate_up = torch.empty_like(gate_up, dtype=torch.float32)
        dgate, dup = dgate_up.chunk(2, -1)
        torch.mul(dy, act, out=dup)
        # silu' = sig + silu * (1 - sig)
        torch.mul(act.mul_(1 - sig).add_(sig).mul_(up), dy, out=dgate)
        return dgate_up.to(gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020). gate_up [T, 2I], gate first -> [T, I]."""
    return _SwiGLU.apply(gate_up)


GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.float().chunk(2, -1)
        tanh = torch.tanh(GELU_SCALE * (gate + GELU_CUBIC * (gate * gate * gate)))
        return (tanh.add_(1).mul_(gate).mul_(0.5).mul_(up)).to(gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gate_up,) = ctx.saved_tensors
        dy = grads[0].float()
        gate, up = gate_up.float().chunk(2, -1)
        square = gate * gate
        tanh = torch.tanh(GELU_SCALE * (gate + GELU_CUBIC * (square * gate)))
        dgate_up = torch.empty_like(gate_up, dtype=torch.float32)
        dgate, dup = dgate_up.chunk(2, -1)
        half = 0.5 * (1 + tanh)
        torch.mul(dy, gate * half, out=dup)
        # d gate * (1 + tanh(u)) / 2 = (1 + tanh) / 2 + gate * (1 - tanh^2) / 2 * du
        inner = GELU_SCALE * (1 + 3 * GELU_CUBIC * square)
        torch.mul(half + 0.5 * gate * (1 - tanh * tanh) * inner, up * dy, out=dgate)
        return dgate_up.to(gate_up.dtype)


def geglu(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up`` (Shazeer 2020), GELU by its tanh form (Hendrycks & Gimpel 2016).

    gate_up [T, 2I], gate first -> [T, I].
    """
    return _GeGLU.apply(gate_up)
