"""How big a program's share of the work is: by formula, from what the device has, never by trying at run time."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

INTERPRETED_MULTIPROCESSORS = 4


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; few in the interpreter, which runs programs one after another."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_warps(block: int) -> int:
    """Warps of a program that holds one row of ``block`` elements: 16 bytes a thread and load, at most 16 warps."""
    return min(16, max(1, block // 256))


def heads_per_program(heads: int, half: int) -> int:
    """Heads of a token that a program turns, ``half`` pairs each: up to 1024 pairs, 16 bytes a thread and load."""
    return min(triton.next_power_of_2(heads), max(1, 1024 // half))


@dataclass(frozen=True)
class AttentionTile:
    """A program's tile of attention."""

    rows: int  # query rows, tokens times the heads that share a KV head
    keys: int  # of a step
    warps: int
    stages: int  # steps in flight


def head_block(head_dim: int) -> int:
    """A tile's columns for a head: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


@functools.cache
def attention_tiles(group: int, head_dim: int, dtype: torch.dtype, quantised: bool) -> tuple[AttentionTile, ...]:
    """Tiles of paged attention for ``group`` query heads a KV head, lowest first; none where a kernel doesn't fit.

    Decode rows take the lowest, pieces of prompts the highest, shared prefixes the first that holds their rows.
    Their shape depends on nothing that changes from batch to batch.
    """
    block = head_block(head_dim)
    if block > 256 or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return ()
    keys = 64 if block * dtype.itemsize <= 256 else 32  # keys and values of a step: at most 32 KB of shared memory
    if dtype == torch.float32:
        # Without tensor cores a thread holds whole rows of both operands: a higher tile spills.
        found = [AttentionTile(16, keys, 8, 3 if block <= 128 else 2)]
    else:
        found = [
            AttentionTile(16, keys, 4, 3),
            AttentionTile(64, keys, 4 if block <= 128 else 8, 3),
            AttentionTile(128, 32 if quantised else keys, 8, 3),  # scales take registers: with 64 keys it spills
        ]
        if quantised and block > 128:
            found.pop()
    return tuple(tile for tile in found if tile.rows >= group)
