"""Honest times: inputs rotate so that no cache holds them, random data, the machine's own limits measured alongside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CACHE_BYTES = {"cuda": 60 << 20, "cpu": 32 << 20}  # last-level cache of an H200; of a server CPU, by core or shared
BEYOND_CACHE = 5  # rotating inputs take at least so many times the cache
MAX_SETS = 64


@dataclass(frozen=True)
class Limits:
    """What this machine reaches by itself: the roofline."""

    bytes_per_s: float  # of a large copy, read and written bytes counted
    flops: float  # of a large square matrix product, per second, in the bench's dtype


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_sets(make: Callable[[int], Any], bytes_each: float, device: torch.device) -> list[Any]:
    """As many inputs, from different seeds, as outgrow the cache."""
    wanted = BEYOND_CACHE * CACHE_BYTES[device.type] / max(bytes_each, 1.0)
    return [make(seed) for seed in range(max(2, min(MAX_SETS, int(wanted) + 1)))]


def seconds(run: Callable[..., Any], inputs: list[Any], device: torch.device, budget_s: float = 0.5) -> float:
    """Median time of ``run(*inputs[i])`` over the rotating inputs, for about ``budget_s``; warmed up.

    On a GPU the calls are recorded by events around each; launches of a few microseconds are hidden by queueing many.
    """
    for given in inputs[:2]:
        run(*given)
    synchronize(device)
    started = time.perf_counter()
    run(*inputs[0])
    synchronize(device)
    turns = max(5, min(200, int(budget_s / max(time.perf_counter() - started, 1e-6))))
    if device.type != "cuda":
        found = []
        for i in range(turns):
            started = time.perf_counter()
            run(*inputs[i % len(inputs)])
            found.append(time.perf_counter() - started)
        return statistics.median(found)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(turns)]
    for i, (begin, end) in enumerate(marks):
        begin.record()
        run(*inputs[i % len(inputs)])
        end.record()
    synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1e3


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure them: a copy far larger than the cache, and a product of random matrices (zeros would run faster)."""
    on_gpu = device.type == "cuda"
    source = torch.empty((1 << 30) if on_gpu else (1 << 27), dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source), [(), ()], device)
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = seconds(lambda: torch.mm(a, b), [(), ()], device)
    return Limits(2 * source.numel() / copy, 2 * size**3 / product)
