"""What each program of the paged attention does: work lists, made on the host from a plan's numbers alone.

An item is a span of keys for neighbouring query tokens, of one KV head each time (the grid's second axis):

* a piece of a prompt: as many tokens as fit a tall tile, over all the keys they see;
* a decode row (or a few new tokens): its keys, a program per ``SPLIT`` of them. The size of a split is fixed, and not
  their number, so that a row's bits don't depend on what else is in the batch;
* a cascade: decode rows next to each other whose tables begin alike, the samples of a prompt, go over those blocks as
  one tile, and each over the rest by itself. The bits of such a row do depend on its neighbours; not in an exact plan,
  which has no cascades and no splits, and one height of tile.

Where a token has several items, each leaves its part in memory, and a second kernel merges them in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kernels.reference import AttentionPlan

SPLIT = 512  # keys: a program's share of a decode row; a part's traffic is then 1 % of what it read
CASCADE_KEYS = 256  # shared keys below which reading them once costs more, in a second kernel, than it saves
ITEM = 8  # int32 each: the columns below
TOKEN, COUNT, POSITION, SEQUENCE, START, STOP, MERGED, PART = range(ITEM)
MERGE = 4  # int32 each: token, its first part, how many; one to spare, so that rows are 16 bytes


@dataclass(frozen=True)
class WorkLists:
    """The items of a plan by tile height, on the host; all int32.

    Columns of an item: the first of its tokens, how many there are, that token's position (later ones follow), the
    row of the tables, the first key, the key after the last, the place of its first token among those to be merged
    (-1: the item is all that its tokens have), and which of the token's parts it is.
    """

    items: tuple[tuple[int, np.ndarray], ...]  # (rows of a tile, [n, 8])
    merges: np.ndarray  # [tokens with several parts, 4]: token, its first part, how many, unused
    tables: np.ndarray  # [S, blocks]
    num_parts: int
    num_tokens: int

    def arrays(self) -> list[np.ndarray]:
        return [self.tables, self.merges, *(items for _, items in self.items)]

    def flat(self, device: torch.device) -> Tensor:
        """All of them in one array, each from a multiple of 16 bytes on; to be copied to the device unwaited for."""
        arrays = self.arrays()
        places = _places(arrays)
        flat = torch.empty(places[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
        for x, at in zip(arrays, places, strict=False):
            flat.numpy()[at : at + x.size] = x.ravel()
        return flat

    def on(self, device: torch.device) -> Work:
        flat, arrays = self.flat(device).to(device, non_blocking=True), self.arrays()
        views = [flat[at : at + x.size].view(x.shape) for x, at in zip(arrays, _places(arrays), strict=False)]
        heights = (height for height, _ in self.items)
        return Work(
            tuple(zip(heights, views[2:], strict=True)), views[1], views[0], self.num_parts, self.num_tokens, flat
        )


@dataclass(frozen=True)
class Work:
    """:class:`WorkLists` on the device."""

    items: tuple[tuple[int, Tensor], ...]
    merges: Tensor
    tables: Tensor
    num_parts: int
    num_tokens: int
    flat: Tensor  # what holds them all


@dataclass(frozen=True)
class _Batch:
    """A plan in numpy, and how it is to be divided; arguments as of :func:`divide`."""

    queries: np.ndarray  # [S]
    contexts: np.ndarray  # [S]
    tables: np.ndarray  # [S, blocks]
    group: int
    window: int | None
    step: int

    @cached_property
    def tokens(self) -> np.ndarray:
        """[S] first token of each sequence among all that are packed."""
        return np.cumsum(self.queries) - self.queries

    @cached_property
    def offsets(self) -> np.ndarray:
        """[S] position of that token."""
        return self.contexts - self.queries

    def seen_from(self, position: np.ndarray) -> np.ndarray:
        """The first key to read for tokens at these positions."""
        if self.window is None:
            return np.zeros_like(position)
        return np.maximum(position + 1 - self.window, 0) // self.step * self.step


def divide(
    plan: AttentionPlan,
    group: int,
    window: int | None,
    block: int,
    heights: Sequence[int],
    step: int,
) -> WorkLists:
    """Divide a plan among programs.

    ``group``: query heads a KV head; a tile of M rows holds M // group tokens. ``block``: keys of a table's entry.
    ``heights``: rows of the tiles that there are, lowest first. ``step``: keys that a program takes at a time; spans
    begin at multiples of it, or after a shared prefix: with a block's first key.
    Raises ValueError where a table has too few entries.
    """
    batch = _Batch(plan.queries.numpy(), plan.contexts.numpy(), plan.tables.numpy(), group, window, step)
    _check_tables(batch.queries, batch.contexts, batch.tables, block)
    lowest, highest = heights[0], heights[-1]
    if plan.exact:
        found = [(lowest, _pieces(batch, batch.queries > 0, lowest))]
        merges = np.zeros((0, MERGE), np.int64)
    else:
        few = (batch.queries > 0) & (batch.queries <= lowest // group)
        groups, prefix = np.zeros((0, 3), np.int64), np.zeros_like(batch.contexts)
        if window is None:
            groups, prefix = shared_prefixes(batch.queries, batch.contexts, batch.tables, block)
        merges, place, splits = _splits(batch, few, prefix)
        found = [(highest, _pieces(batch, (batch.queries > 0) & ~few, highest)), (lowest, splits)]
        if len(groups):
            height = next((h for h in heights if h >= groups[:, 1].max() * group), highest)
            found.append((height, _shared(batch, groups, place, height)))
    items = {
        height: _longest_first(np.concatenate([some for h, some in found if h == height]))
        for height in sorted({h for h, some in found if len(some)})
    }
    return WorkLists(
        items=tuple((height, some.astype(np.int32)) for height, some in items.items()),
        merges=merges.astype(np.int32),
        tables=batch.tables.astype(np.int32),
        num_parts=int(merges[:, 2].sum()),
        num_tokens=int(batch.queries.sum()),
    )


def _pieces(batch: _Batch, chosen: np.ndarray, height: int) -> np.ndarray:
    """Items of sequences that are divided by tokens: each piece sees all its keys, and is done with them."""
    (sequences,) = np.nonzero(chosen)
    width = height // batch.group
    owner, piece = _spread(-(-batch.queries[sequences] // width))
    sequence, first = sequences[owner], piece * width
    count = np.minimum(batch.queries[sequence] - first, width)
    position = batch.offsets[sequence] + first
    span = batch.seen_from(position), position + count
    return np.stack([batch.tokens[sequence] + first, count, position, sequence, *span, 0 * first - 1, 0 * first], 1)


def _splits(batch: _Batch, few: np.ndarray, prefix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of sequences that are divided by keys, from the end of their shared ``prefix``.

    Also the tokens to be merged [tokens, 4], and [S] the place of each sequence's first token among those, or -1.
    """
    begin = np.maximum(prefix, batch.seen_from(batch.offsets))
    shared, own = -(-prefix // SPLIT), -(-(batch.contexts - begin) // SPLIT)
    parts = np.where(few, shared + own, 0)
    merged = np.where(parts > 1, batch.queries, 0)
    place = np.where(parts > 1, np.cumsum(merged) - merged, -1)
    owner, i = _spread(merged)
    last = np.cumsum(parts[owner])
    merges = np.stack([batch.tokens[owner] + i, last - parts[owner], parts[owner], 0 * i], 1)

    (rows,) = np.nonzero(few)
    owner, split = _spread(own[rows])
    sequence = rows[owner]
    start = begin[sequence] + split * SPLIT
    span = start, np.minimum(start + SPLIT, batch.contexts[sequence])
    which = place[sequence], shared[sequence] + split
    about = batch.tokens[sequence], batch.queries[sequence], batch.offsets[sequence], sequence
    return merges, place, np.stack([*about, *span, *which], 1)


def _shared(batch: _Batch, groups: np.ndarray, place: np.ndarray, height: int) -> np.ndarray:
    """Items of the prefixes that decode rows share: the rows are one tile, or as few as hold them."""
    lead, size, keys = groups.T
    width, splits = height // batch.group, -(-keys // SPLIT)
    owner, i = _spread(-(-size // width) * splits)
    tile, split = np.divmod(i, splits[owner])
    first = lead[owner] + tile * width
    count = np.minimum(size[owner] - tile * width, width)
    span = split * SPLIT, np.minimum((split + 1) * SPLIT, keys[owner])
    # Every shared key precedes every row: seen from the last of them, all are visible.
    return np.stack([batch.tokens[first], count, keys[owner] - 1, first, *span, place[first], split], 1)


def shared_prefixes(
    queries: np.ndarray, contexts: np.ndarray, tables: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Groups of decode rows that begin with the same blocks.

    [groups, 3] first sequence, how many, keys shared (whole blocks, at least ``CASCADE_KEYS``, all of them before
    each row's own token); and [S] the keys that a sequence shares with its group, 0 for one that has none.
    """
    if len(queries) < 2:
        return np.zeros((0, 3), np.int64), np.zeros_like(contexts)
    equal = tables[1:] == tables[:-1]
    lead = np.where(equal.all(1), tables.shape[1], equal.argmin(1))  # entries that neighbours have in common
    lead = np.minimum(lead, (np.minimum(contexts[1:], contexts[:-1]) - 1) // block) * block
    lead[(queries[1:] != 1) | (queries[:-1] != 1)] = 0
    # A pair that shares much less than the pair beside it lies between two prompts, which may have a system prompt in
    # common; to join them would give up the longer prefix.
    beside = np.maximum(np.append(lead[1:], 0), np.append(0, lead[:-1]))
    joined = (lead >= CASCADE_KEYS) & (3 * lead >= 2 * beside)
    of = np.cumsum(np.append(True, ~joined)) - 1  # group of each sequence
    shared = np.full(of[-1] + 1, np.iinfo(np.int64).max)
    np.minimum.at(shared, of[1:][joined], lead[joined])
    size = np.bincount(of)
    shared[size == 1] = 0
    first = np.cumsum(size) - size
    return np.stack([first, size, shared], 1)[size > 1], shared[of]


def check_plan(plan: AttentionPlan, num_pages: int, page_size: int) -> None:
    """Raise ValueError where a table that a sequence uses names a block that there isn't.

    Not done on every call, for it reads the whole tables.
    """
    block = table_block(page_size)
    limit = num_pages * (page_size // block)
    queries, contexts, tables = plan.queries.numpy(), plan.contexts.numpy(), plan.tables.numpy()
    _check_tables(queries, contexts, tables, block)
    used = np.arange(tables.shape[1]) < -(-contexts // block)[:, None]
    wrong = np.argwhere(used & ((tables < 0) | (tables >= limit)))
    if len(wrong):
        sequence, entry = wrong[0]
        raise ValueError(
            f"attend_blocks: plan.tables[{sequence}, {entry}] = {tables[sequence, entry]}; {num_pages} pages of "
            f"{page_size} keys have blocks 0 to {limit - 1} of {block} keys"
        )


def table_block(page_size: int) -> int:
    """Keys that an entry of the tables stands for: 32, or a page of 16."""
    return min(page_size, 32)


def _check_tables(queries: np.ndarray, contexts: np.ndarray, tables: np.ndarray, block: int) -> None:
    short = np.nonzero((contexts > tables.shape[1] * block) | (queries > contexts))[0]
    if len(short):
        i = short[0]
        raise ValueError(
            f"attend_blocks: sequence {i} of the plan has {queries[i]} queries, {contexts[i]} keys and a table of "
            f"{tables.shape[1]} blocks of {block}; queries must be among the keys, and the table hold them all"
        )


def _spread(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each owner i, ``counts[i]`` entries: whose each is, and the how-manieth of its owner's."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def _longest_first(items: np.ndarray) -> np.ndarray:
    """Programs start in order, so that the last to start are short ones."""
    return items[np.argsort(items[:, START] - items[:, STOP], kind="stable")]


def _places(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each begins in one array of int32, and where the last ends: at 16 bytes."""
    return [0, *itertools.accumulate(-(-x.size // 4) * 4 for x in arrays)]
