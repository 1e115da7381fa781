"""Top-k, top-p and min-p without a sort: which entries of a row they keep, and the mass of those in each tile.

With a row's entries in falling order, the lower id first among equals, every filter keeps a prefix: the entries above a
``border``, and those equal to it with an id of at most ``last``. Min-p's border is a formula. Top-k and top-p ask for
the shortest prefix whose measure reaches a target: the number of entries reaches k, or their mass a share of what has
been kept so far. So they are found alike:

1. The border is the lowest logit above which the measure doesn't reach the target. It is found by bisection of the
   logits, as integers that sort as they do: at most 32 steps. A step measures the entries above the middle. What is
   known of a tile, its largest entry and its sum, bounds the measure from both sides; where that decides no logit is
   read. Else those tiles are, from L2, that have an entry above the middle, and the entries next to it, on the side
   where the border is, are the new limits: few passes lead to the border even if many logits are equal.
2. Of the entries equal to the border, those are kept that have less than the target before them, in id order: a pass.
3. Another sums up what is kept of each tile.

Filters compare the logits themselves: ties are equal logits, not log-probs that round alike. A program a row, so a row
doesn't depend on others; all sums are in a fixed order. Axes: R rows, V vocabulary, T tiles of TILE entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.sampling import CDF_TILE
from kernels.triton.elementary import LOG2E

TILES = 16  # read at a time by a program of 8 warps: 16 entries a thread, in four loads of 16 bytes
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature, 1 for a greedy row. Finite even for the smallest, as the largest entry's 0 times it must be."""
    return tl.minimum(tl.div_rn(1.0, tl.where(temperature > 0, temperature, 1.0)), 1e38)


@triton.jit
def weight(x, top, inverse):
    """exp((x - top) / temperature), what an entry's probability is in proportion to. At most 1; 0 for -inf."""
    return tl.exp2((x - top) * (inverse * LOG2E))


@triton.jit
def tile_weights(x, top, inverse):
    """Weights of entries x [tiles, TILE] relative to their tile's largest, top [tiles]; all 0 where that is -inf."""
    return weight(x, tl.where(top == float("-inf"), 0.0, top)[:, None], inverse)


@triton.jit
def is_kept(x, i, border, last):
    """Whether the prefix has entries x with ids i."""
    return (x > border) | ((x == border) & (i <= last))


@triton.jit
def _order(x):
    """The integer, in int64, that sorts as the float does: its bits, inverted below zero."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _float(order):
    bits = order.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _list_tiles(live, chosen, tile):
    """Writes the numbers of the chosen tiles to ``live``, in order; returns how many."""
    chosen = chosen.to(tl.int32)
    tl.debug_barrier()  # no thread reads the last list any more
    tl.store(live + tl.cumsum(chosen, 0) - 1, tile, mask=chosen > 0)
    tl.debug_barrier()  # all see this one
    return tl.sum(chosen, 0)


@triton.jit
def _entries(z, banned, live, start, number, vocab, TILES: tl.constexpr, TILE: tl.constexpr):
    """Numbers of the next TILES listed tiles, their entries, -inf where there are none, and the entries' ids."""
    slot = start + tl.arange(0, TILES)
    tile = tl.load(live + slot, mask=slot < number, other=0)
    i = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    seen = (slot < number)[:, None] & (i < vocab)
    x = tl.load(z + i, mask=seen, other=float("-inf"))
    if banned is not None:
        x = tl.where(tl.load(banned + i, mask=seen, other=0) != 0, float("-inf"), x)
    return tile, x, i


@triton.jit
def _measure(
    z, banned, live, number, border, top, inverse, vocab, MASS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr
):
    """Of the listed tiles' entries above ``border``: mass or number, and the lowest. Of the others: the highest."""
    measure = tl.zeros([TILES, TILE], tl.float32)
    over = tl.full([TILES, TILE], float("inf"), tl.float32)
    under = tl.full([TILES, TILE], float("-inf"), tl.float32)
    for start in range(0, number, TILES):
        _, x, _ = _entries(z, banned, live, start, number, vocab, TILES, TILE)
        above = x > border
        if MASS:
            measure += tl.where(above, weight(x, top, inverse), 0.0)
        else:
            measure += above.to(tl.float32)
        over = tl.where(above, tl.minimum(over, x), over)
        under = tl.where(above, under, tl.maximum(under, x))
    return tl.sum(measure), tl.min(over), tl.max(under)


@triton.jit
def _shortest_prefix(
    z, banned, live, maxima, masses, border, last, target, top, inverse, vocab,
    MASS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``border`` and ``last`` of the shortest prefix whose measure reaches the target. It has one entry at least.

    It lies within the prefix given, which reaches it.
    """
    tile = tl.arange(0, BLOCK)
    low, high = _order(border), _order(top)
    while low < high:
        middle = (low + high) >> 1
        limit = _float(middle)
        alive = maxima > limit
        if MASS:
            most = tl.sum(tl.where(alive, masses, 0.0), 0)
            below = (TILE - 1) * weight(limit, top, inverse)  # at most, of a tile's mass
            least = tl.sum(tl.where(alive, tl.maximum(masses - below, 0.0), 0.0), 0)
        else:
            least = tl.sum(alive.to(tl.int32), 0).to(tl.float32)
            most = least * TILE
        if least >= target:
            low = middle + 1
        elif most < target:
            high = middle
        else:
            number = _list_tiles(live, alive, tile)
            measure, over, under = _measure(z, banned, live, number, limit, top, inverse, vocab, MASS, TILES, TILE)
            if measure >= target:
                low = tl.minimum(_order(over), high)
            else:
                under = tl.maximum(under, tl.max(tl.where(alive, float("-inf"), maxima), 0))
                high = tl.maximum(tl.minimum(_order(under), middle), low)  # at most the middle, even if NaN got in

    found = _float(low)
    number = _list_tiles(live, maxima >= found, tile)
    before, _over, _under = _measure(z, banned, live, number, found, top, inverse, vocab, MASS, TILES, TILE)
    if MASS:
        each = weight(found, top, inverse)
    else:
        each = 1.0
    ties = 0
    last_tie = -1
    for start in range(0, number, TILES):
        _, x, i = _entries(z, banned, live, start, number, vocab, TILES, TILE)
        tie = ((x == found) & is_kept(x, i, border, last)).to(tl.int32)
        in_tile = tl.sum(tie, axis=1)
        rank = ties + (tl.cumsum(in_tile, 0) - in_tile)[:, None] + tl.cumsum(tie, axis=1) - tie
        # The first one stays even if rounding says that those above reach the target after all; and a tie that an
        # earlier filter dropped stays dropped.
        wanted = (tie > 0) & ((rank == 0) | (before + rank * each < target))
        last_tie = tl.maximum(last_tie, tl.max(tl.where(wanted, i, -1)))
        ties += tl.sum(in_tile, 0)
    return found, last_tie


@triton.jit
def _keep(
    z, banned, live, kept, maxima, border, last, top, inverse, vocab, tiles,
    BLOCK: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes the sum of each tile's entries that the prefix has. How many they are, and their masses by tile."""
    tile = tl.arange(0, BLOCK)
    tl.store(kept + tile, 0.0, mask=tile < tiles)
    number = _list_tiles(live, maxima >= border, tile)
    count = 0
    for start in range(0, number, TILES):
        t, x, i = _entries(z, banned, live, start, number, vocab, TILES, TILE)
        mine = is_kept(x, i, border, last)
        sums = tl.sum(tl.where(mine, tile_weights(x, tl.max(x, axis=1), inverse), 0.0), axis=1)
        tl.store(kept + t, sums, mask=start + tl.arange(0, TILES) < number)
        count += tl.sum(mine.to(tl.int32))
    tl.debug_barrier()
    return count, tl.load(kept + tile, mask=tile < tiles, other=0.0) * weight(maxima, top, inverse)


@triton.jit(do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p"])
def _filter_kernel(
    z,  # [R, V], rows z_stride apart
    banned,  # [R, V] bool, rows banned_stride apart; or None, as the three filters
    temperature,  # [R]
    top_k,  # [R] int64
    top_p,  # [R]
    min_p,  # [R]
    maxima,  # [R, T] largest entry of each tile that isn't banned
    sums,  # [R, T] sum of its weights, relative to that
    live,  # [R, T] int32, scratch: numbers of the tiles that count at the moment
    kept,  # [R, T] the sum of those kept
    borders,  # [R]
    lasts,  # [R] int32
    z_stride,
    banned_stride,
    vocab,
    tiles,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BLOCK)
    z += row * z_stride
    if banned is not None:
        banned += row * banned_stride
    live += row * tiles
    kept += row * tiles
    heat = tl.load(temperature + row)
    inverse = inverse_temperature(heat)
    largest = tl.load(maxima + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    top = tl.max(largest, 0)
    whole = tl.load(sums + row * tiles + tile, mask=tile < tiles, other=0.0)
    tl.store(kept + tile, whole, mask=tile < tiles)
    masses = whole * weight(largest, top, inverse)
    border = tl.full((), LOWEST, tl.float32)  # which keeps all that have mass
    last = tl.cast(vocab, tl.int32)
    count = last
    if min_p is not None:
        ratio = tl.load(min_p + row)
        if (ratio > 0) & (heat > 0):
            border = tl.maximum(top + heat * tl.log(ratio), LOWEST)  # not -inf, which tiles beyond the last have
            count, masses = _keep(
                z, banned, live, kept, largest, border, last, top, inverse, vocab, tiles, BLOCK, TILES, TILE
            )
    if top_k is not None:
        k = tl.load(top_k + row)
        if (k > 0) & (k < count) & (heat > 0):
            border, last = _shortest_prefix(
                z, banned, live, largest, masses, border, last, k.to(tl.float32), top, inverse, vocab,
                False, BLOCK, TILES, TILE,
            )  # fmt: skip
            count, masses = _keep(
                z, banned, live, kept, largest, border, last, top, inverse, vocab, tiles, BLOCK, TILES, TILE
            )
    if top_p is not None:
        share = tl.load(top_p + row)
        if (share < 1) & (heat > 0):
            border, last = _shortest_prefix(
                z, banned, live, largest, masses, border, last, share * tl.sum(masses, 0), top, inverse, vocab,
                True, BLOCK, TILES, TILE,
            )  # fmt: skip
            _keep(z, banned, live, kept, largest, border, last, top, inverse, vocab, tiles, BLOCK, TILES, TILE)
    tl.store(borders + row, border)
    tl.store(lasts + row, last)


def kept_prefixes(
    z: Tensor,
    temperature: Tensor,
    maxima: Tensor,
    sums: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    banned: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept part of ``sums`` [R, T], and ``border`` (fp32) and ``last`` (int32) [R] of each row's prefix.

    maxima and sums [R, T] are of the tiles' entries that aren't banned. A row without filters, or greedy, keeps all.
    """
    rows, vocab = z.shape
    tiles = maxima.shape[1]
    kept, live = torch.empty_like(sums), torch.empty_like(sums, dtype=torch.int32)
    border, last = torch.empty_like(temperature), torch.empty_like(temperature, dtype=torch.int32)
    block = triton.next_power_of_2(tiles)
    _filter_kernel[(rows,)](
        z, banned, temperature, top_k, top_p, min_p, maxima, sums, live, kept, border, last,
        z.stride(0), 0 if banned is None else banned.stride(0), vocab, tiles,
        BLOCK=block, TILES=TILES, TILE=CDF_TILE, num_warps=8 if block <= 1024 else 16, enable_fp_fusion=False,
    )  # fmt: skip
    return kept, border, last
