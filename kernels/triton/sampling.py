"""Counter-based sampling: Philox, and one token per row by inverse CDF over the filtered distribution.

Three kernels, none of which sorts or makes the host wait:

1. ``_sample_tiles_kernel`` reads the logits, and writes for each tile of 256 entries the largest, the sum of w =
   exp(u), u = (z - largest) / temperature, and that of w u, which the entropy is made of; the first two again without
   the banned ones, as log-prob and entropy are of the full vocabulary.
2. ``_filter_kernel`` of ``filters.py``, if any row filters: the part of those sums that is kept.
3. ``_sample_draw_kernel``, a program a row, has from these the log-sum-exp and the tiles' running masses, finds the
   tile by the uniform, reads it once more and finds the entry. A greedy row's is the first tile with the largest entry.

Axes: R rows, V vocabulary, T tiles of TILE entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.dispatch import warn_once
from kernels.reference import SampledTokens
from kernels.reference.sampling import CDF_TILE
from kernels.triton.elementary import LOWEST
from kernels.triton.filters import inverse_temperature, is_kept, kept_prefixes, tile_weights, weight

TILES = 16  # that a program of 4 warps reads: 32 entries a thread, in eight loads of 16 bytes
PHILOX_BLOCK = 128


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["seed", "sample_id", "position"])
def _philox_uniform_kernel(
    seed,  # [R] int64, as the next two
    sample_id,
    position,
    out,  # [R]
    rows,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = i < rows
    key = tl.load(seed + i, mask=seen, other=0)
    sample = tl.load(sample_id + i, mask=seen, other=0)
    place = tl.load(position + i, mask=seen, other=0).to(tl.uint32)
    word, _, _, _ = tl.philox_impl(
        sample.to(tl.uint32),
        (sample >> 32).to(tl.uint32),
        place,
        place * 0,
        key.to(tl.uint32),
        (key >> 32).to(tl.uint32),
    )
    tl.store(out + i, (word >> 8).to(tl.float32) * 2.0**-24, mask=seen)


@triton.jit(do_not_specialize_on_alignment=["temperature"])  # a part of a longer column may start anywhere
def _sample_tiles_kernel(
    z,  # [R, V], rows z_stride apart
    banned,  # [R, V] bool, rows banned_stride apart; or None
    temperature,  # [R]
    maxima,  # [R, T] of the entries that aren't banned
    sums,  # [R, T]
    full_maxima,  # [R, T] of all; without banned the same two
    full_sums,  # [R, T]
    moments,  # [R, T]
    z_stride,
    banned_stride,
    vocab,
    tiles,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    i = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    seen = i < vocab
    inverse = inverse_temperature(tl.load(temperature + row))
    x = tl.load(z + row * z_stride + i, mask=seen, other=float("-inf"))
    top = tl.max(x, axis=1)
    w = tile_weights(x, top, inverse)
    u = (x - tl.where(top == float("-inf"), 0.0, top)[:, None]) * inverse
    moment = w * tl.maximum(u, LOWEST)
    tl.store(full_maxima + row * tiles + tile, top, mask=tile < tiles)
    tl.store(full_sums + row * tiles + tile, tl.sum(w, axis=1), mask=tile < tiles)
    tl.store(moments + row * tiles + tile, tl.sum(moment, axis=1), mask=tile < tiles)
    if banned is not None:
        out = tl.load(banned + row * banned_stride + i, mask=seen, other=0)
        x = tl.where(out != 0, float("-inf"), x)
        top = tl.max(x, axis=1)
        total = tl.sum(tile_weights(x, top, inverse), axis=1)
        tl.store(maxima + row * tiles + tile, top, mask=tile < tiles)
        tl.store(sums + row * tiles + tile, total, mask=tile < tiles)


@triton.jit
def _draw(mass, threshold, SIZE: tl.constexpr):
    """Index of the first of SIZE entries whose running sum exceeds the threshold, and the running sum before it.

    Never one of mass zero, though the sums are a tree's, and may rise or fall by a rounding step where nothing is
    added. The last with mass if rounding has lifted the threshold to the total.
    """
    i = tl.arange(0, SIZE)
    cdf = tl.cumsum(mass, 0)
    first = tl.min(tl.where((mass > 0) & (cdf > threshold), i, SIZE), 0)
    last = tl.max(tl.where(mass > 0, i, 0), 0)
    found = tl.minimum(first, last)
    return found, tl.sum(tl.where(i == found - 1, cdf, 0.0), 0)


@triton.jit(do_not_specialize_on_alignment=["temperature", "uniform"])
def _sample_draw_kernel(
    z,  # [R, V], rows z_stride apart
    banned,  # [R, V] bool, rows banned_stride apart; or None
    temperature,  # [R]
    uniform,  # [R]
    maxima,  # [R, T] of the entries that aren't banned
    sums,  # [R, T] of those kept
    full_maxima,  # [R, T] of all
    full_sums,  # [R, T]
    moments,  # [R, T]
    borders,  # [R] of filters.py, as the next; or None
    lasts,  # [R] int32
    tokens,  # [R] int64
    logprobs,  # [R]
    processed_logprobs,  # [R]
    log_kept_mass,  # [R]
    entropy,  # [R]
    z_stride,
    banned_stride,
    vocab,
    tiles,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    heat = tl.load(temperature + row)
    inverse = inverse_temperature(heat)
    largest = tl.load(maxima + row * tiles + t, mask=t < tiles, other=float("-inf"))
    top = tl.max(largest, 0)
    mass = tl.load(sums + row * tiles + t, mask=t < tiles, other=0.0) * weight(largest, top, inverse)
    kept = tl.sum(mass, 0)
    full = tl.load(full_maxima + row * tiles + t, mask=t < tiles, other=float("-inf"))
    full_top = tl.max(full, 0)
    share = weight(full, full_top, inverse)
    sums_of_all = tl.load(full_sums + row * tiles + t, mask=t < tiles, other=0.0)
    total = tl.sum(sums_of_all * share, 0)
    lower = tl.maximum((full - full_top) * inverse, LOWEST)
    moment = tl.load(moments + row * tiles + t, mask=t < tiles, other=0.0) + sums_of_all * lower
    moment = tl.sum(moment * share, 0)

    threshold = tl.load(uniform + row) * kept
    tile, before = _draw(mass, threshold, BLOCK)
    tile = tl.where(heat > 0, tile, tl.min(tl.where(largest == top, t, tiles - 1), 0))
    i = tile * TILE + tl.arange(0, TILE)
    x = tl.load(z + row * z_stride + i, mask=i < vocab, other=float("-inf"))
    allowed = x
    if banned is not None:
        out = tl.load(banned + row * banned_stride + i, mask=i < vocab, other=0)
        allowed = tl.where(out != 0, float("-inf"), x)
    p = weight(allowed, top, inverse)
    if borders is not None:
        p = tl.where(is_kept(allowed, i, tl.load(borders + row), tl.load(lasts + row)), p, 0.0)
    offset, _ = _draw(p, threshold - before, TILE)
    token = tl.where(heat > 0, tile * TILE + offset, tl.min(tl.where(allowed == top, i, vocab - 1), 0))

    chosen = tl.sum(tl.where(i == token, x, 0.0), 0)
    logprob = (chosen - full_top) * inverse - tl.log(total)
    left = (top - full_top) * inverse + tl.log(tl.div_rn(kept, total))
    left = tl.where(heat > 0, left, logprob)  # greedy: the one token
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, logprob)
    tl.store(processed_logprobs + row, logprob - left)
    tl.store(log_kept_mass + row, left)
    tl.store(entropy + row, tl.log(total) - tl.div_rn(moment, total))


def philox_uniform(seed: Tensor, sample_id: Tensor, position: Tensor) -> Tensor:
    counters = seed.contiguous(), sample_id.contiguous(), position.contiguous()
    for name, column in zip(("seed", "sample_id", "position"), counters, strict=True):
        _require("philox_uniform", name, column, seed.shape, torch.int64, seed.device)
    out = torch.empty(seed.shape, dtype=torch.float32, device=seed.device)
    rows = out.numel()
    if rows:
        _philox_uniform_kernel[(triton.cdiv(rows, PHILOX_BLOCK),)](
            *counters, out, rows, BLOCK=PHILOX_BLOCK, num_warps=4, enable_fp_fusion=False
        )
    return out


def sample_tokens(
    z: Tensor,
    temperature: Tensor,
    uniform: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    banned: Tensor | None = None,
) -> SampledTokens:
    """As the reference, and any number of rows. The log-probs of a row with NaN or inf, or all -inf, are NaN.

    z [R, V], R contiguous rows that may lie apart. Raises ValueError for a wrong shape, dtype or device.
    """
    if z.dtype != torch.float32:
        warn_once(f"sample_tokens of logits in {z.dtype} runs in plain torch: its kernels take float32")
        return reference.sample_tokens(z, temperature, uniform, top_k, top_p, min_p, banned)
    if z.ndim != 2 or not z.shape[1]:
        raise ValueError(
            f"sample_tokens: z is {list(z.shape)}; expected [rows, vocabulary], and a vocabulary of one up"
        )
    rows, vocab = z.shape
    for name, column, dtype in (
        ("temperature", temperature, torch.float32),
        ("uniform", uniform, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        _require("sample_tokens", name, column, (rows,), dtype, z.device)
    _require("sample_tokens", "banned", banned, z.shape, torch.bool, z.device)
    z, banned = _dense(z), None if banned is None else _dense(banned)
    temperature, uniform = temperature.contiguous(), uniform.contiguous()
    top_k, top_p, min_p = (None if given is None else given.contiguous() for given in (top_k, top_p, min_p))

    tiles = triton.cdiv(vocab, CDF_TILE)
    # Tensors of their own, not parts of one: what is aligned mustn't depend on the number of rows, or kernels are
    # compiled anew.
    maxima, sums = (z.new_empty((rows, tiles)) for _ in range(2))
    full_maxima, full_sums = (maxima, sums) if banned is None else (z.new_empty((rows, tiles)) for _ in range(2))
    moments = z.new_empty((rows, tiles))
    tokens = torch.empty(rows, dtype=torch.int64, device=z.device)
    out = SampledTokens(tokens, *(z.new_empty(rows) for _ in range(4)))
    if not rows:
        return out
    shape = z.stride(0), 0 if banned is None else banned.stride(0), vocab, tiles
    _sample_tiles_kernel[(rows, triton.cdiv(tiles, TILES))](
        z,
        banned,
        temperature,
        maxima,
        sums,
        full_maxima,
        full_sums,
        moments,
        *shape,
        TILES=TILES,
        TILE=CDF_TILE,
        num_warps=4,
        enable_fp_fusion=False,
    )
    kept, border, last = sums, None, None
    if top_k is not None or top_p is not None or min_p is not None:
        kept, border, last = kept_prefixes(z, temperature, maxima, sums, top_k, top_p, min_p, banned)
    _sample_draw_kernel[(rows,)](
        z, banned, temperature, uniform, maxima, kept, full_maxima, full_sums, moments, border, last,
        *vars(out).values(), *shape,
        BLOCK=triton.next_power_of_2(tiles), TILE=CDF_TILE, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _require(
    op: str, name: str, given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if given is not None and (given.shape != shape or given.dtype != dtype or given.device != device):
        raise ValueError(
            f"{op}: {name} is {given.dtype} {list(given.shape)} on {given.device}; "
            f"expected {dtype} {list(shape)} on {device}"
        )


def _dense(x: Tensor) -> Tensor:
    """x [R, V] with each row's entries one after the other; rows may lie apart."""
    return x if x.stride(1) == 1 else x.contiguous()
