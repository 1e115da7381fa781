"""How big a program's share of the work is: by formula, from what the device has, never by trying at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from kernels.triton.tables import cached, chosen

INTERPRETED_MULTIPROCESSORS = 4


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; few in the interpreter, which runs programs one after another."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_warps(block: int) -> int:
    """Warps of a program that holds ``block`` elements: 16 bytes a thread and load, at most 16 warps."""
    return min(16, max(1, block // 256))


def rows_per_program(block: int) -> int:
    """Rows of ``block`` elements that a program holds at a time.

    So many that it has 4 KB of bf16 under way: a row of 128, of a head's norm, would keep half a warp busy, and a
    multiprocessor holds no more than 32 programs. Never a matter of how many rows there are: a row's bits would be.
    """
    return max(1, 2048 // block)


def heads_per_program(heads: int, half: int) -> int:
    """Heads of a token that a program turns, ``half`` pairs each: up to 1024 pairs, 16 bytes a thread and load."""
    return min(triton.next_power_of_2(heads), max(1, 1024 // half))


def resident_programs(size: int) -> int:
    """Programs that a multiprocessor is to hold at once, if each goes over many pieces of ``size`` bytes, one by one.

    24 KB under way keep memory busy while some of the programs wait for their sums.
    """
    return triton.cdiv(24576, size)


def register_limit(programs: int, warps: int) -> int:
    """Registers a thread may have, so that a multiprocessor holds so many programs of so many warps."""
    return min(255, 65536 // (32 * warps * programs) // 8 * 8)


class AttentionTile(NamedTuple):
    """A program's tile of attention."""

    rows: int  # query rows, tokens times the heads that share a KV head
    keys: int  # of a step
    warps: int
    stages: int  # steps in flight


def head_block(head_dim: int) -> int:
    """A tile's columns for a head: a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


@cached
def attention_tiles(
    group: int, head_dim: int, dtype: torch.dtype, quantised: bool, device: torch.device
) -> tuple[AttentionTile, ...]:
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
        found = [chosen(device, tile, "paged", dtype, block, quantised, tile.rows) for tile in found]
    return tuple(tile for tile in found if tile.rows >= group)
