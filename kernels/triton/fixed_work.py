"""Work lists of paged attention that keep their places in memory, for launches that are recorded and replayed.

A recorded launch has its grid and its addresses baked in. So a plan's lists are padded to one of few sizes, and the
lists of another plan of the same sizes are copied over them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.reference import AttentionPlan
from kernels.triton.attention_work import MERGED, Work
from kernels.triton.paged_attention import work_of

LEAST = 8  # entries of a padded list


def prepare_like(plan: AttentionPlan, other: AttentionPlan) -> None:
    """Make the work lists for ``plan`` that the layers made for ``other``."""
    for _, *arguments in other.prepared:
        work_of(plan, *arguments)


def sizes(plan: AttentionPlan) -> tuple[object, ...]:
    """What a prepared plan must have in common with another, for one to be copied over the other."""
    return tuple(
        (key, tuple((rows, _room(len(items))) for rows, items in work.items), _room(len(work.merges)),
         _room(work.num_parts), len(work.tables), _room(work.tables.shape[1]), work.num_tokens)
        for key, work in plan.prepared.items()
    )  # fmt: skip


def pad(plan: AttentionPlan) -> None:
    """Give a prepared plan padded lists of its own."""
    for key, work in plan.prepared.items():
        plan.prepared[key] = _padded(work)


def fill(padded: AttentionPlan, plan: AttentionPlan) -> None:
    """Copy a prepared plan over a padded one of the same :func:`sizes`, in place."""
    for key, work in plan.prepared.items():
        target, source = padded.prepared[key], _padded(work)
        target.tables.copy_(source.tables)
        target.merges.copy_(source.merges)
        for (_, into), (_, items) in zip(target.items, source.items, strict=True):
            into.copy_(items)


def _padded(work: Work) -> Work:
    width = _room(work.tables.shape[1])
    return replace(
        work,
        items=tuple((rows, _with_idle(items)) for rows, items in work.items),
        merges=_repeated(work.merges),
        num_parts=_room(work.num_parts),
        tables=torch.nn.functional.pad(work.tables, (0, width - work.tables.shape[1])),
    )


def _with_idle(items: Tensor) -> Tensor:
    """Items without a token and without a key follow: their programs write nothing."""
    idle = items.new_zeros(_room(len(items)) - len(items), items.shape[1])
    idle[:, MERGED] = -1
    return torch.cat([items, idle])


def _repeated(merges: Tensor) -> Tensor:
    """The last merge again: the same bits to the same place."""
    return torch.cat([merges, merges[-1:].expand(_room(len(merges)) - len(merges), -1)])


def _room(count: int) -> int:
    """0, or a power of two that holds as many."""
    return 0 if count == 0 else max(LEAST, 1 << (count - 1).bit_length())
