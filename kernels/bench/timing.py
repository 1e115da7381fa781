"""Honest times: inputs rotate so that no cache holds them, random data, the machine's own limits measured alongside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CACHE_BYTES = {"cuda": 60 << 20, "cpu": 32 << 20}  # last-level cache of an H200; of a server CPU, by core or shared
BEYOND_CACHE = 5  # rotating inputs take at least so many times the cache
MAX_SETS = 64
ROUND = 20  # calls that are queued on a GPU at a time: its queue holds about a thousand launches
CYCLES_PER_S = 2e9  # at least a GPU's clock

Calls = Sequence[Callable[[], Any]]


@dataclass(frozen=True)
class Limits:
    """What this machine reaches by itself: the roofline."""

    bytes_per_s: float  # of a large copy, read and written bytes counted
    flops: float  # of a large square matrix product, per second, in the bench's dtype

    def seconds(self, bytes: float, flops: float) -> float:
        """The least that so much takes."""
        return max(bytes / self.bytes_per_s, flops / self.flops)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_sets(make: Callable[[int], tuple[Tensor, ...]], device: torch.device) -> list[tuple[Tensor, ...]]:
    """As many inputs, from different seeds, as outgrow the cache."""
    first = make(0)
    wanted = BEYOND_CACHE * CACHE_BYTES[device.type] / max(1, sum(t.nbytes for t in first))
    return [first, *(make(seed) for seed in range(1, max(2, min(MAX_SETS, int(wanted) + 1))))]


def seconds(calls: Calls, device: torch.device, budget_s: float = 0.5) -> float:
    """Median time of a call, one after the other and around again, for about ``budget_s``; warmed up."""
    for call in calls[:2]:
        call()
    synchronize(device)
    started = time.perf_counter()
    calls[0]()
    launched = time.perf_counter()
    synchronize(device)
    turns = max(5, min(200, int(budget_s / max(time.perf_counter() - started, 1e-6))))
    if device.type == "cuda":
        return _gpu_seconds([calls[i % len(calls)] for i in range(turns)], launched - started)
    found = []
    for i in range(turns):
        started = time.perf_counter()
        calls[i % len(calls)]()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _gpu_seconds(calls: Calls, launch_s: float) -> float:
    """By events around each call. A GPU that works as fast as Python launches would wait for it: so it is held back
    until a round of calls, ``launch_s`` each, is in its queue."""
    found = []
    for first in range(0, len(calls), ROUND):
        some = calls[first : first + ROUND]
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in some]
        torch.cuda._sleep(int(1.5 * launch_s * len(some) * CYCLES_PER_S))
        for call, (begin, end) in zip(some, marks, strict=True):
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        found += [begin.elapsed_time(end) / 1e3 for begin, end in marks]
    return statistics.median(found)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy far larger than the cache, read and written counted."""
    source = torch.empty((1 << 30) if device.type == "cuda" else (1 << 27), dtype=torch.uint8, device=device)
    source.random_(0, 255)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds([lambda: target.copy_(source)], device)


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure them: a copy, and a product of random matrices (zeros would run faster)."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Limits(copy_bandwidth(device), 2 * size**3 / seconds([lambda: torch.mm(a, b)], device))
