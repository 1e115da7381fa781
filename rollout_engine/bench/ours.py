"""The same load on our engine: as requests of their own, and in static batches; what a step's time goes to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from rollout_engine.bench.load import Load
from rollout_engine.llm import LLM
from rollout_engine.models.checkpoint import Model
from rollout_engine.types import SamplingParams


@dataclass
class Steps:
    """One entry per engine step."""

    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # tokens forwarded
    sampled: list[int] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)  # seconds inside the decoder's layers

    @property
    def total(self) -> float:
        return sum(self.seconds)


def make_engine(model: Model) -> LLM:
    return LLM(model, kv_cache_gib=0.75, max_num_seqs=1024)


def continuous(llm: LLM, load: Load) -> Steps:
    """Serve every sample as a request of its own (``n=1``), so that each has its own length, as the peers do.

    The group's prompt is still prefilled about once: equal prompts share their full pages.
    """
    return _serve(llm, load, [length for _, length in load.requests()])


def static(llm: LLM, load: Load) -> Steps:
    """As :func:`continuous`, but no answer leaves the batch before the longest is done."""
    return _serve(llm, load, [load.longest] * len(load.requests()))


def _serve(llm: LLM, load: Load, lengths: list[int]) -> Steps:
    llm.reset_prefix_cache()
    steps = Steps()
    clock = _LayerClock(llm)
    started = time.perf_counter()
    wanted = 0
    for (prompt, _), length in zip(load.requests(), lengths, strict=True):
        llm.add_request(list(prompt), SamplingParams(max_tokens=length, ignore_eos=True, logprobs=0))
        wanted += length
    steps.seconds.append(time.perf_counter() - started)
    for column in (steps.rows, steps.sampled, steps.layers):
        column.append(0)
    done = finished = 0
    while finished < len(lengths):
        before = llm.counters.forwarded, llm.counters.sampled
        started = time.perf_counter()
        outputs = llm.step()
        steps.seconds.append(time.perf_counter() - started)
        steps.rows.append(llm.counters.forwarded - before[0])
        steps.sampled.append(llm.counters.sampled - before[1])
        steps.layers.append(clock.take())
        finished += len(outputs)
        done += sum(len(answer.policy_logprobs) for out in outputs for answer in out.outputs)
    clock.remove()
    assert done == wanted
    return steps


class _LayerClock:
    """Seconds between the first layer's start and the last one's end."""

    def __init__(self, llm: LLM) -> None:
        layers = llm.model.decoder.layers
        self.handles = [
            layers[0].register_forward_pre_hook(self._start),
            layers[-1].register_forward_hook(self._stop),
        ]
        self.started = self.seconds = 0.0

    def _start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def matmul_seconds(model: Model, steps: Steps) -> float:
    """What the matrix products of these steps take by themselves, back to back: the limit of any engine here."""
    config = model.decoder.config
    layer = [p for name, p in model.decoder.layers.named_parameters() if p.dim() > 1]
    inputs = {w.shape[1]: torch.randn(max(steps.rows), w.shape[1]) for w in [*layer, model.decoder.head.weight]}
    cost: dict[tuple[int, int], float] = {}
    for key in set(zip(steps.rows, steps.sampled, strict=True)):
        rows, sampled = key
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            for weight in layer if rows else ():
                F.linear(inputs[weight.shape[1]][:rows], weight)
            if sampled:
                F.linear(inputs[config.hidden_size][:sampled], model.decoder.head.weight)
            best = min(best, time.perf_counter() - started)
        cost[key] = best
    return sum(cost[key] for key in zip(steps.rows, steps.sampled, strict=True))


def by_rows(steps: Steps) -> list[dict[str, float]]:
    """Tokens/s of the pure decode steps, by how many rows were live."""
    found = []
    low = 1
    for high in (1, 4, 8, 16, 32, 64, 128, 1024):
        chosen = [i for i, rows in enumerate(steps.rows) if low <= rows <= high and rows == steps.sampled[i]]
        if chosen:
            seconds = sum(steps.seconds[i] for i in chosen)
            found.append(
                {
                    "from_rows": low,
                    "to_rows": high,
                    "steps": len(chosen),
                    "ms_per_step": 1e3 * seconds / len(chosen),
                    "tokens_per_s": sum(steps.rows[i] for i in chosen) / seconds,
                }
            )
        low = high + 1
    return found
