"""Counter-based sampling: one uniform number per token, inverse CDF over the filtered distribution.

A token depends on (seed, sample id, position) and its own logits only; batch, order and restarts cannot
change it. Axes: R rows (one per sample), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.logprobs import distribution, entropy_of

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
CDF_TILE = 256  # the CDF is summed in tiles of this width, so a kernel can keep the order of additions


def philox_uniform(seed: Tensor, sample_id: Tensor, position: Tensor) -> Tensor:
    """Uniforms in [0, 1): first word of Philox4x32-10 (Salmon et al. 2011), top 24 bits.

    Key = seed (64 bit); counter = (sample_id low, high, position, 0). Three int64 [R] -> fp32 [R].
    """
    c0, c1 = sample_id & _MASK, (sample_id >> 32) & _MASK
    c2, c3 = position & _MASK, torch.zeros_like(position)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return (c0 >> 8).float() * 2.0**-24


@dataclass(frozen=True)
class SampledTokens:
    """What one sampling step returns, one entry per row; log-probs are natural and fp32."""

    tokens: Tensor  # [R] int64
    logprobs: Tensor  # [R] of the token under the full vocabulary at the sampling temperature
    processed_logprobs: Tensor  # [R] under the distribution that was sampled from (after bans and filters)
    log_kept_mass: Tensor  # [R] log of the probability that bans and filters left; 0 without any
    entropy: Tensor  # [R] of the full vocabulary at the sampling temperature, in nats; a greedy row's at temperature 1


def filter_mask(
    logp: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None
) -> Tensor:
    """True where the filters keep a token. logp [R, V]; top_k [R] (0 = off), top_p [R] (1 = off), min_p [R] (0 = off).

    Ties go to the lower token id. First min-p, which keeps tokens with p >= min_p * max p (Nguyen et al. 2024), and
    top-k; then top-p, which keeps the smallest set whose mass, among what those kept, reaches ``top_p``
    (Holtzman et al. 2020). At least one token stays.
    """
    ordered, index = torch.sort(logp, dim=-1, descending=True, stable=True)
    p = torch.exp(ordered)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if min_p is not None:
        kept &= p >= min_p[:, None] * p[:, :1]
    if top_k is not None:
        k = torch.where(top_k > 0, top_k, torch.full_like(top_k, logp.shape[1]))
        kept &= torch.arange(logp.shape[1], device=logp.device)[None] < k[:, None]
    if top_p is not None:
        p = torch.where(kept, p, torch.zeros_like(p))
        before = p.cumsum(-1) - p
        kept &= (before < top_p[:, None] * p.sum(-1, keepdim=True)) | (top_p >= 1)[:, None]
    return torch.zeros_like(kept).scatter_(1, index, kept)


def sample_tokens(
    z: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    banned: Tensor | None = None,
) -> SampledTokens:
    """Sample one token per row by inverse CDF in token-id order.

    z [R, V] fp32 logits with R a multiple of eight; temperature [R] (0 = greedy: arg max, lowest id on a
    tie); uniform [R] in [0, 1); top_k int64 [R], top_p and min_p fp32 [R], each None when no row uses it.
    banned bool [R, V]: tokens that can't be drawn, left out before the filters; None when no row bans any.
    """
    logp = distribution(z, temperature)
    allowed = logp
    if banned is not None:
        # Normalised anew rather than by the mass left, which underflows where a banned token has nearly all of it.
        z = z.masked_fill(banned, -torch.inf)
        allowed = distribution(z, temperature)
    kept_logp = allowed
    log_kept_mass = torch.zeros_like(temperature)
    if top_k is not None or top_p is not None or min_p is not None:
        keep = filter_mask(allowed, top_k, top_p, min_p)
        kept_logp = torch.where(keep, allowed, torch.full_like(allowed, -torch.inf))
        mass = torch.where(keep, torch.exp(allowed), torch.zeros_like(allowed)).sum(-1)
        log_kept_mass = torch.where(keep.all(-1), log_kept_mass, torch.log(mass))
    tokens = torch.where(temperature > 0, _inverse_cdf(torch.exp(kept_logp), uniform), z.argmax(-1))
    logprobs = logp.gather(1, tokens[:, None])[:, 0]
    log_kept_mass = log_kept_mass + (logprobs - allowed.gather(1, tokens[:, None])[:, 0])
    processed = torch.where(temperature > 0, logprobs - log_kept_mass, torch.zeros_like(logprobs))
    log_kept_mass = torch.where(temperature > 0, log_kept_mass, logprobs)
    return SampledTokens(tokens, logprobs, processed, log_kept_mass, entropy_of(logp))


def _inverse_cdf(p: Tensor, uniform: Tensor) -> Tensor:
    """Index of the first entry whose running sum exceeds ``uniform * total``; never one of mass zero."""
    rows, vocab = p.shape
    tiles = F.pad(p, (0, -vocab % CDF_TILE)).view(rows, -1, CDF_TILE)
    mass = tiles.sum(-1)
    tile_cdf = mass.cumsum(-1)
    threshold = uniform * tile_cdf[:, -1]
    # Rounding may lift the threshold to the total, or to a tile's own sum: stop at the last entry with mass.
    tile = torch.minimum((tile_cdf <= threshold[:, None]).sum(-1), _last_positive(mass))
    start = torch.where(tile > 0, tile_cdf.gather(1, (tile - 1).clamp(min=0)[:, None])[:, 0], torch.zeros_like(uniform))
    inside = tiles[torch.arange(rows, device=p.device), tile]
    cdf = inside.cumsum(-1)
    offset = (cdf <= (threshold - start)[:, None]).sum(-1)
    return tile * CDF_TILE + torch.minimum(offset, _last_positive(inside))


def _last_positive(x: Tensor) -> Tensor:
    return x.shape[1] - 1 - (x > 0).flip(-1).int().argmax(-1)
