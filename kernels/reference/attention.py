"""Causal attention over 32-key blocks: one core, fed from pages (engine) or packed sequences (trainer).

Bitwise agreement between the two comes from the shape of the computation, not from luck:

* keys are grouped in blocks of ``KV_BLOCK`` counted from the start of the sequence, so a key sits in the
  same block whether it was prefilled, decoded, cached or packed;
* a score and a partial output are rows of a batched matmul with a fixed 32-key side; a row's bits do not
  depend on how many rows stand beside it (asserted by ``kernels.exactness``);
* the maximum is taken over all visible blocks first, and block sums are added in block order; a block that
  is wholly masked for a row adds exactly 0, so it doesn't matter which blocks a tile skips.

Axes: T tokens, Hq query heads, Hkv KV heads, G = Hq / Hkv, D head dim, N tiles, Q tokens a tile,
R = rows a tile (Q * G, padded to a multiple of four), P (tile, block) pairs, B = ``KV_BLOCK``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.reference.kv_store import Scales, dequantise, store_kv
from kernels.reference.spans import Spans

KV_BLOCK = 32
PREFILL_TILE = 16  # query tokens a tile when a sequence brings more than one
MAX_PAIRS = 4096  # (tile, block) pairs held at a time: bounds the scratch memory of a call


@dataclass(frozen=True)
class AttentionKind:
    """How a layer turns scores into weights, beyond causality.

    ``scale``: of ``q . k``; None is 1 / sqrt(D). ``softcap``: scores become ``softcap * tanh(score / softcap)``
    (Gemma 2, 2024). ``window``: newest keys that a query sees, its own included (Mistral 7B, Jiang et al. 2023).
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None


CAUSAL = AttentionKind()


@dataclass(frozen=True)
class TileBatch:
    """Tiles of query tokens and the KV blocks that each of them sees, level by level.

    Tiles are sorted by block count, most first; pairs are ordered by level (block number counted from the first
    that the tile sees), so the pairs of level j are those of tiles ``0 .. level_sizes[j]`` and adding level after
    level is adding blocks in order.
    """

    tokens: Tensor  # [N, Q] int64 row in the packed query; padding repeats the tile's last token
    positions: Tensor  # [N, Q] int64 position of that token in its sequence
    valid: Tensor  # [N, Q] bool, False on padding
    pair_tile: Tensor  # [P] int64
    pair_block: Tensor  # [P] int64 block id in the KV tensors
    pair_start: Tensor  # [P] int64 position of the block's first key
    level_sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Which queries see which KV blocks. Iterating gives the tiles, which are made when first asked for."""

    queries: Tensor  # [S] int64 new tokens of each sequence
    contexts: Tensor  # [S] int64 all its tokens, the new ones included
    tables: Tensor  # [S, blocks] int64 ids of its KV blocks
    device: torch.device | str
    window: int | None
    exact: bool = False  # a token's output has the same bits in any chunk and batch; on a CPU it always has

    @cached_property
    def prepared(self) -> dict[Any, Any]:
        """What an implementation makes of the plan once and uses in every layer, under keys of its own."""
        return {}

    @cached_property
    def tiles(self) -> tuple[TileBatch, ...]:
        return _divide(self.queries.numpy(), self.contexts.numpy(), self.tables.numpy(), self.device, self.window)

    @cached_property
    def query_spans(self) -> Spans:
        """The packed queries, sequence by sequence."""
        return Spans(self.queries.numpy(), self.device)

    @cached_property
    def context_spans(self) -> Spans:
        """The contexts, were all their tokens packed."""
        return Spans(self.contexts.numpy(), self.device)

    def __iter__(self) -> Iterator[TileBatch]:
        return iter(self.tiles)


def plan_tiles(
    num_queries: Sequence[int] | np.ndarray,
    context_lens: Sequence[int] | np.ndarray,
    block_tables: Sequence[Sequence[int]] | np.ndarray,
    device: torch.device | str = "cpu",
    window: int | None = None,
    exact: bool = False,
) -> AttentionPlan:
    """Plan the attention of a batch. Sequence i brings its last ``num_queries[i]`` tokens.

    ``context_lens[i]`` counts all its tokens, those included; ``block_tables[i]`` lists its KV blocks (of
    32 keys) in order, at least ceil(context_len / 32) of them. Queries lie packed, sequence by sequence.
    With a ``window``, blocks that lie wholly before it are left out; what a row sees inside a block is masked by
    :class:`AttentionKind`, so such a plan serves windows up to this one. With ``exact``, which costs speed on a GPU,
    a token's output has the same bits whether it is prefilled, decoded or packed, in any chunks and any batch.
    Raises ValueError where a sequence has fewer tokens than it brings.
    """
    brought, held = np.asarray(num_queries, dtype=np.int64), np.asarray(context_lens, dtype=np.int64)
    if (brought > held).any():
        i = int(np.argmax(brought > held))
        raise ValueError(f"plan_tiles: sequence {i} brings {brought[i]} queries, but has {held[i]} tokens")
    if isinstance(block_tables, np.ndarray):
        tables = block_tables
    else:
        tables = np.zeros((len(block_tables), max(map(len, block_tables), default=1)), dtype=np.int64)
        for row, table in enumerate(block_tables):
            tables[row, : len(table)] = table

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64))

    return AttentionPlan(tensor(brought), tensor(held), tensor(tables), device, window, exact)


def _divide(
    queries: np.ndarray, context: np.ndarray, tables: np.ndarray, device: torch.device | str, window: int | None
) -> tuple[TileBatch, ...]:
    """Decode rows (one query) and longer pieces go to separate batches, since they want different tiles."""
    starts = np.cumsum(queries) - queries
    batches: list[TileBatch] = []
    for chosen, width in ((queries == 1, 1), (queries > 1, PREFILL_TILE)):
        (seqs,) = np.nonzero(chosen)
        if not len(seqs):
            continue
        per_seq = -(-queries[seqs] // width)
        seq = np.repeat(seqs, per_seq)
        first = (np.arange(len(seq)) - np.repeat(np.cumsum(per_seq) - per_seq, per_seq)) * width
        last = np.minimum(first + width, queries[seq])  # exclusive, in queries of the sequence
        offset = context[seq] - queries[seq]
        skipped = np.zeros_like(seq) if window is None else np.maximum(offset + first + 1 - window, 0) // KV_BLOCK
        blocks = -(-(offset + last) // KV_BLOCK) - skipped
        order = np.argsort(-blocks, kind="stable")
        seq, first, last, blocks, skipped = (x[order] for x in (seq, first, last, blocks, skipped))
        begin = 0
        while begin < len(seq):
            end = begin + max(1, MAX_PAIRS // int(blocks[begin]))
            part = slice(begin, end)
            tile = (seq[part], first[part], last[part], blocks[part], skipped[part])
            batches.append(_tile_batch(*tile, width, starts, context - queries, tables, device))
            begin = end
    return tuple(batches)


def _tile_batch(
    seq: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    blocks: np.ndarray,
    skipped: np.ndarray,
    width: int,
    starts: np.ndarray,
    offsets: np.ndarray,
    tables: np.ndarray,
    device: torch.device | str,
) -> TileBatch:
    index = first[:, None] + np.arange(width)
    valid = index < last[:, None]
    index = np.minimum(index, last[:, None] - 1)
    level_sizes = [int((blocks > j).sum()) for j in range(int(blocks[0]))]
    pair_tile = np.concatenate([np.arange(n) for n in level_sizes])
    block = skipped[pair_tile] + np.repeat(np.arange(len(level_sizes)), level_sizes)

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return TileBatch(
        tokens=tensor(starts[seq][:, None] + index),
        positions=tensor(offsets[seq][:, None] + index),
        valid=tensor(valid),
        pair_tile=tensor(pair_tile),
        pair_block=tensor(tables[seq[pair_tile], block]),
        pair_start=tensor(block * KV_BLOCK),
        level_sizes=tuple(level_sizes),
    )


def _blocks_of(cache: Tensor) -> Tensor:
    """Pages [pages, Hkv, page, D] seen as [pages, Hkv, page / B, B, D]."""
    pages, heads, size, dim = cache.shape
    return cache.view(pages, heads, size // KV_BLOCK, KV_BLOCK, dim)


def _gather_blocks(cache: Tensor, block: Tensor) -> Tensor:
    """[P * Hkv, B, D] of the blocks with the given ids; id = page * (page size / B) + block within the page."""
    blocks = _blocks_of(cache)
    per_page = blocks.shape[2]
    found = blocks[:, :, 0][block] if per_page == 1 else blocks[block // per_page, :, block % per_page]
    return found.flatten(0, 1)


def _gather_tiles(x: Tensor, tiles: TileBatch, kv_heads: int) -> Tensor:
    """[N, Hkv, R, D] from [T, Hq, D]: the query heads of a KV head become rows, zero rows up to a multiple of four."""
    n, q = tiles.tokens.shape
    rows = x[tiles.tokens].view(n, q, kv_heads, -1, x.shape[2]).transpose(1, 2).flatten(2, 3)
    pad = -rows.shape[2] % 4
    return torch.nn.functional.pad(rows, (0, 0, 0, pad)) if pad else rows.contiguous()


def _scatter_tiles(rows: Tensor, tiles: TileBatch, out: Tensor) -> None:
    """Inverse of :func:`_gather_tiles`: rows [N, Hkv, R, D] into out [T, Hq, D]."""
    n, q = tiles.tokens.shape
    kv_heads, group = rows.shape[1], out.shape[1] // rows.shape[1]
    rows = rows[:, :, : q * group].view(n, kv_heads, q, group, -1).transpose(1, 2)
    out[tiles.tokens[tiles.valid]] = rows.flatten(2, 3)[tiles.valid]


def _scores(rows: Tensor, keys: Tensor, tiles: TileBatch, kind: AttentionKind) -> Tensor:
    """Masked fp32 scores [P, Hkv, R, B] of pre-scaled query rows [N, Hkv, R, D] against keys [P * Hkv, B, D]."""
    _, heads, r, _ = rows.shape
    s = torch.bmm(rows[tiles.pair_tile].flatten(0, 1), keys.transpose(1, 2)).view(-1, heads, r, KV_BLOCK).float()
    if kind.softcap is not None:
        s.div_(kind.softcap).tanh_().mul_(kind.softcap)
    q = tiles.positions.shape[1]
    row_position = tiles.positions.repeat_interleave(r // q, 1)[tiles.pair_tile][:, :, None]
    key_position = (tiles.pair_start[:, None] + torch.arange(KV_BLOCK, device=s.device))[:, None, :]
    hidden = key_position > row_position
    if kind.window is not None:
        hidden |= key_position <= row_position - kind.window
    return s.masked_fill_(hidden[:, None], -torch.inf)


def _add_levels(parts: Tensor, tiles: TileBatch) -> Tensor:
    """Sum pairs [P, ...] into tiles [N, ...], blocks in order."""
    total = parts[: tiles.level_sizes[0]].clone()
    begin = tiles.level_sizes[0]
    for size in tiles.level_sizes[1:]:
        total[:size] += parts[begin : begin + size]
        begin += size
    return total


def _max_levels(parts: Tensor, tiles: TileBatch) -> Tensor:
    best = parts[: tiles.level_sizes[0]].clone()
    begin = tiles.level_sizes[0]
    for size in tiles.level_sizes[1:]:
        torch.maximum(best[:size], parts[begin : begin + size], out=best[:size])
        begin += size
    return best


def score_scale(kind: AttentionKind, head_dim: int) -> float:
    return 1 / math.sqrt(head_dim) if kind.scale is None else kind.scale


def attend_blocks(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: AttentionPlan,
    kind: AttentionKind = CAUSAL,
    lse: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """Causal softmax attention of q [T, Hq, D] over KV pages [pages, Hkv, page, D], page a multiple of 32.

    Returns [T, Hq, D]. ``lse`` [T, Hq, 1] fp32, if given, receives the log-sum-exp of the scores as ``kind``
    makes them. ``plan`` must cover ``kind.window``.
    Pages must hold finite values everywhere (0 * NaN is NaN): allocate them zeroed. With ``scales`` they are
    quantised, as :func:`store_kv` leaves them, and stand for the products of values and scales.
    """
    if scales is not None:
        k_cache, v_cache = dequantise(k_cache, scales[0], q.dtype), dequantise(v_cache, scales[1], q.dtype)
    kv_heads = k_cache.shape[1]
    out, scaled = torch.empty_like(q), q * score_scale(kind, q.shape[2])
    for tiles in plan:
        rows = _gather_tiles(scaled, tiles, kv_heads)
        s = _scores(rows, _gather_blocks(k_cache, tiles.pair_block), tiles, kind)
        peak = _max_levels(s.amax(-1), tiles)
        p = torch.exp(s - peak[tiles.pair_tile][..., None])
        mass = _add_levels(p.sum(-1), tiles)[..., None]
        parts = torch.bmm(p.to(q.dtype).flatten(0, 1), _gather_blocks(v_cache, tiles.pair_block))
        total = _add_levels(parts.view(*p.shape[:3], -1), tiles)
        _scatter_tiles((total.float() / mass).to(q.dtype), tiles, out)
        if lse is not None:
            _scatter_tiles(peak[..., None] + torch.log(mass), tiles, lse)
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
    """Store this step's k, v [T, Hkv, D] in the pages, then attend. The engine's attention; no autograd."""
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
        lse = q.new_empty(*q.shape[:2], 1, dtype=torch.float32)
        out = attend_blocks(q, k_blocks, v_blocks, plan, kind, lse)
        ctx.save_for_backward(q, k_blocks, v_blocks, slots, out, lse)
        ctx.plan, ctx.kind = plan, kind
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k_blocks, v_blocks, slots, out, lse = ctx.saved_tensors
        dout = grads[0].contiguous()
        kv_heads, scale = k_blocks.shape[1], score_scale(ctx.kind, q.shape[2])
        delta = (dout.float() * out.float()).sum(-1, keepdim=True)
        dq, scaled = torch.empty_like(q), q * scale
        dk = torch.zeros_like(k_blocks, dtype=torch.float32)
        dv = torch.zeros_like(dk)
        for tiles in ctx.plan:
            pair = tiles.pair_tile
            keys = _gather_blocks(k_blocks, tiles.pair_block)
            values = _gather_blocks(v_blocks, tiles.pair_block)
            rows = _gather_tiles(scaled, tiles, kv_heads)
            # Rows that only fill a tile repeat its last token; without an upstream gradient they add nothing.
            valid = _row_valid(tiles, rows.shape[2])
            drows = _gather_tiles(dout, tiles, kv_heads) * valid.to(q.dtype)
            s = _scores(rows, keys, tiles, ctx.kind)
            p = torch.exp(s - _gather_tiles(lse, tiles, kv_heads)[pair]).flatten(0, 1)
            dpair, rpair = drows[pair].flatten(0, 1), rows[pair].flatten(0, 1)
            dp = torch.bmm(dpair, values.transpose(1, 2)).float()
            ds = p * (dp - (_gather_tiles(delta, tiles, kv_heads) * valid)[pair].flatten(0, 1))
            if ctx.kind.softcap is not None:
                # d softcap * tanh(x) / dx = 1 - tanh^2; a masked score of -inf becomes -1, so its slope is 0, not NaN
                tanh = s.div_(ctx.kind.softcap).clamp_(min=-1).flatten(0, 1)
                ds.mul_(1 - tanh * tanh)
            ds = ds.to(q.dtype)
            shape = (len(pair), kv_heads)
            _scatter_tiles(_add_levels(torch.bmm(ds, keys).unflatten(0, shape), tiles) * scale, tiles, dq)
            block = (len(pair), kv_heads, KV_BLOCK, -1)
            dk.index_add_(0, tiles.pair_block, torch.bmm(ds.transpose(1, 2), rpair).float().view(block))
            dv.index_add_(0, tiles.pair_block, torch.bmm(p.to(q.dtype).transpose(1, 2), dpair).float().view(block))
        block_id, offset = slots // KV_BLOCK, slots % KV_BLOCK
        return dq, dk[block_id, :, offset].to(q.dtype), dv[block_id, :, offset].to(q.dtype), None, None, None, None


def _row_valid(tiles: TileBatch, num_rows: int) -> Tensor:
    """[N, 1, R, 1] 1.0 on rows of real tokens, 0.0 on padding."""
    group = num_rows // tiles.valid.shape[1]
    valid = tiles.valid.repeat_interleave(group, 1).float()
    return torch.nn.functional.pad(valid, (0, num_rows - valid.shape[1]))[:, None, :, None]


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    num_blocks: int,
    plan: AttentionPlan,
    kind: AttentionKind = CAUSAL,
) -> Tensor:
    """Causal attention within packed sequences; differentiable, never holds [T, T].

    q [T, Hq, D], k and v [K, Hkv, D] -> [T, Hq, D]: the queries that the sequences bring, and all tokens of their
    contexts, end to end. ``slots`` [K] puts each of those in one of ``num_blocks`` blocks of 32 counted from its
    sequence's start; ``plan`` is :func:`plan_tiles` over the same blocks.
    Same bits as :func:`attend_paged` over any pages and chunks. The backward recomputes the scores
    (FlashAttention-2, Dao 2023) and is deterministic on CPU.
    """
    return _PackedAttention.apply(q, k, v, slots, num_blocks, plan, kind)
