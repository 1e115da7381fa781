"""Causal attention by torch's own fused kernels: what CUDA runs until it has kernels of ours.

Neither batch-invariant nor differentiable twice; ``kernels.reference`` says what it means. Axes: T query tokens, K key
tokens, Hq query heads, Hkv KV heads, D head dim, N sequences.
"""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.attention import AttentionKind
from kernels.reference.spans import Spans

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = True
    # Fewer KV heads than query heads: torch 2.11 takes them unasked, later ones want to be told.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        varlen_attn = functools.partial(varlen_attn, enable_gqa=True)
except ImportError:  # an older torch; padding is slower, not wrong
    HAS_VARLEN = False


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, kind: AttentionKind) -> Tensor:
    """Each sequence's last queries over all its keys, causal: q [T, Hq, D], k and v [K, Hkv, D] -> [T, Hq, D].

    Differentiable. Raises ValueError for a soft cap, which torch's kernels don't have.
    """
    if kind.softcap is not None:
        raise ValueError(f"softcap={kind.softcap}: torch's attention has none; use packed_attention or attend_paged")
    if HAS_VARLEN and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        left = -1 if kind.window is None else kind.window - 1
        bounds = (queries.bounds, keys.bounds, queries.longest, keys.longest)
        found = varlen_attn(q, k, v, *bounds, scale=kind.scale, window_size=(left, 0))
        assert isinstance(found, Tensor)
        return found
    return padded_attention(q, k, v, queries, keys, kind)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, kind: AttentionKind) -> Tensor:
    """The same through ``scaled_dot_product_attention`` on a padded batch, for what varlen doesn't take."""
    device = q.device
    query, key = torch.arange(queries.longest, device=device), torch.arange(keys.longest, device=device)
    real_query, real_key = query < queries.lengths[:, None], key < keys.lengths[:, None]
    position = query + (keys.lengths - queries.lengths)[:, None]  # [N, longest query]
    seen = real_key[:, None, :] & (key <= position[:, :, None])
    if kind.window is not None:
        seen &= key > position[:, :, None] - kind.window
    # A padded row sees its first key: with none at all its softmax, and then every gradient, would be NaN.
    seen |= ~real_query[:, :, None] & (key == 0)

    def pad(x: Tensor, real: Tensor) -> Tensor:
        padded = x.new_zeros(*real.shape, *x.shape[1:])
        padded[real] = x
        return padded.transpose(1, 2)

    rows = (pad(q, real_query), pad(k, real_key), pad(v, real_key))
    out = F.scaled_dot_product_attention(*rows, attn_mask=seen[:, None], scale=kind.scale, enable_gqa=True)
    return out.transpose(1, 2)[real_query]
