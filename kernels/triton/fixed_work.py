"""Work lists of paged attention that keep their places in memory, for launches that are recorded and replayed.

A recorded launch has its grid and its addresses baked in. So a plan's lists are padded to one of few sizes, and the
lists of another plan of the same sizes are copied over them: one copy, which nobody waits for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.reference import AttentionPlan
from kernels.triton.attention_work import ITEM, MERGED, Work, WorkLists
from kernels.triton.paged_attention import lists_of

LEAST = 8  # entries of a padded list
Lists = dict[tuple[Any, ...], WorkLists]  # by key of ``AttentionPlan.prepared``


def padded_like(plan: AttentionPlan, other: AttentionPlan) -> Lists:
    """Padded lists for ``plan``, of each kind that the layers made for ``other``."""
    return {key: _padded(lists_of(plan, key)) for key in other.prepared}


def sizes(lists: Lists) -> tuple[object, ...]:
    """What padded lists must have in common with others, to be copied over them."""
    return tuple(
        (key, *((height, len(items)) for height, items in work.items), len(work.merges), work.num_parts,
         work.tables.shape, work.num_tokens)
        for key, work in lists.items()
    )  # fmt: skip


def prepare(plan: AttentionPlan, lists: Lists) -> None:
    """Give a plan its padded lists."""
    for key, work in lists.items():
        plan.prepared[key] = work.on(key[-1])


def fill(prepared: AttentionPlan, lists: Lists) -> None:
    """Copy lists of the same :func:`sizes` over those of a prepared plan."""
    for key, work in lists.items():
        held = prepared.prepared[key]
        assert isinstance(held, Work)
        held.flat.copy_(work.flat(held.flat.device), non_blocking=True)


def _padded(work: WorkLists) -> WorkLists:
    width = _room(work.tables.shape[1])
    return WorkLists(
        items=tuple((height, _with_idle(items)) for height, items in work.items),
        merges=_repeated(work.merges),
        tables=np.pad(work.tables, ((0, 0), (0, width - work.tables.shape[1]))),
        num_parts=_room(work.num_parts),
        num_tokens=work.num_tokens,
    )


def _with_idle(items: np.ndarray) -> np.ndarray:
    """Items without a token and without a key follow: their programs write nothing."""
    idle = np.zeros((_room(len(items)) - len(items), ITEM), items.dtype)
    idle[:, MERGED] = -1
    return np.concatenate([items, idle])


def _repeated(merges: np.ndarray) -> np.ndarray:
    """The last merge again: the same bits to the same place."""
    return np.concatenate([merges, np.repeat(merges[-1:], _room(len(merges)) - len(merges), axis=0)])


def _room(count: int) -> int:
    """0, or a power of two that holds as many."""
    return 0 if count == 0 else max(LEAST, 1 << (count - 1).bit_length())
