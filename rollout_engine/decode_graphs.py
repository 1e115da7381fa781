"""Decode steps as CUDA graphs: the hundreds of small launches of a step, recorded once and replayed as one.

A step is recorded where every sequence brings one token. Its batch is padded to one of few sizes by rows that are
ordinary data: token 0 at position 0, on a spare page that no sequence owns. Steps whose work lists have the same padded
sizes share a recording; all recordings share one memory pool. A recording holds addresses, so it is thrown away should
a weight or the KV cache ever move (``check``, at each weight swap); in-place updates leave it valid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernels.triton.fixed_work import fill, padded_like, prepare, sizes
from rollout_engine.kv_cache import KVCache
from rollout_engine.models.context import PagedAttention
from rollout_engine.models.decoder import Decoder

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)  # rows
MAX_RECORDINGS = 128  # a recording takes megabytes of launch parameters; the oldest goes


class Recorder(Protocol):
    """Records what ``run`` launches; returns how to launch it again, and the tensor that each launch fills."""

    def forget(self) -> None:
        """All recordings are gone."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]: ...


@dataclass(frozen=True)
class _Recording:
    token_ids: Tensor  # [B]: the inputs' fixed places, those of the step that was recorded
    ctx: PagedAttention
    replay: Callable[[], None]
    hidden: Tensor  # [B, H]: the output's


class CudaRecorder:
    """Records on the GPU; all recordings take their memory from one pool, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # one for all: cuBLAS keeps a workspace for each that it has seen
        self.forget()

    def forget(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # one whose recordings are all gone takes no more

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels and loads libraries, which can't be recorded
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a judge, a watchdog) may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out


class DecodeGraphs:
    """Runs decode steps of one decoder over one KV cache by recordings."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache, recorder: Recorder) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.recorder = recorder
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._first: PagedAttention | None = None  # of a step that ran as it is; it shows what layers prepare
        self._addresses = self._fingerprint()

    def padding(self, lengths: np.ndarray) -> int | None:
        """Rows to add to a step of these many new tokens a sequence; None where it isn't one to record."""
        if len(lengths) > BATCHES[-1] or lengths.max() > 1:
            return None
        return next(size for size in BATCHES if size >= len(lengths)) - len(lengths)

    def hidden(self, token_ids: Tensor, ctx: PagedAttention) -> Tensor:
        """What ``decoder.hidden`` gives of a padded step: token_ids [B] -> [B, H], valid until the next call."""
        if self._first is None:
            self._first = ctx
            return self.decoder.hidden(token_ids, ctx)
        work = {window: padded_like(ctx.plans[window], plan) for window, plan in self._first.plans.made.items()}
        key = (len(token_ids), *((window, sizes(lists)) for window, lists in work.items()))
        found = self._recordings.get(key)
        if found is None:
            for window, lists in work.items():
                prepare(ctx.plans[window], lists)
            found = self._recordings[key] = _Recording(
                token_ids, ctx, *self.recorder(lambda: self.decoder.hidden(token_ids, ctx))
            )
            if len(self._recordings) > MAX_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
        else:
            found.token_ids.copy_(token_ids)
            found.ctx.positions.copy_(ctx.positions)
            found.ctx.slots.copy_(ctx.slots)
            for window, lists in work.items():
                fill(found.ctx.plans[window], lists)
        found.replay()
        return found.hidden

    def check(self) -> None:
        """Forget all recordings if a weight or the cache has moved since they were made."""
        addresses = self._fingerprint()
        if addresses != self._addresses:
            self._recordings.clear()
            self.recorder.forget()
            self._addresses = addresses

    def _fingerprint(self) -> tuple[int, ...]:
        return tuple(t.data_ptr() for t in (*self.decoder.parameters(), *self.kv_cache.storage()))
