"""How big a program's share of the work is: by formula, from what the device has, never by trying at run time."""

from __future__ import annotations

import functools

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
