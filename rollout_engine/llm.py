"""The engine's face: requests in, answers out, weights swapped in between."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from kernels.exactness import check_exact
from rollout_engine.block_manager import BlockManager
from rollout_engine.config import EngineConfig
from rollout_engine.kv_cache import KVCache
from rollout_engine.models.checkpoint import Model, load_model
from rollout_engine.progress import Progress
from rollout_engine.runner import Runner
from rollout_engine.scheduler import Scheduler
from rollout_engine.types import (
    CompletionOutput,
    EngineStats,
    Group,
    Logprob,
    RequestOutput,
    SamplingParams,
    Sequence,
    fits_int64,
)

Prompt = str | dict[str, Any] | list[int]


class StaleWeightsError(RuntimeError):
    """The weights changed and were not published: generating now would mix versions."""


class LLM:
    """Batch generation on one device.

    Args:
        model: checkpoint folder, Hub id, or a loaded :class:`Model`, whose weights are then shared, not copied.
        revision, dtype, device, tokenizer: of a checkpoint to load, as in ``load_model``.
        **engine: fields of :class:`EngineConfig` (``kv_cache_gib``, ``max_num_seqs``, ...).

    Raises ValueError for settings that can't work, RuntimeError where ``numerics="exact"`` isn't to be had.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        revision: str = "main",
        dtype: str = "float32",
        device: str = "cpu",
        tokenizer: bool = True,
        **engine: Any,
    ) -> None:
        if "gpu_memory_utilization" in engine:
            raise ValueError("gpu_memory_utilization has no meaning here; size the cache in GiB with kv_cache_gib")
        known = EngineConfig.__dataclass_fields__
        unknown = sorted(set(engine) - set(known))
        if unknown:
            raise ValueError(f"LLM() has no argument {unknown[0]!r}; it takes {sorted(known)}")
        self.config = EngineConfig(**engine)
        if not isinstance(model, Model):
            model = load_model(model, revision=revision, dtype=dtype, device=device, tokenizer=tokenizer)
        self.model = model
        self.tokenizer = model.tokenizer
        decoder = model.decoder
        weight = decoder.norm.weight
        if self.config.numerics == "exact":
            if weight.dtype != torch.float32:
                raise ValueError(f"numerics='exact' holds for float32 weights, not {weight.dtype}; set numerics='fast'")
            sizes = decoder.config
            check_exact(
                sizes.linear_shapes(),
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                device=weight.device,
                biased_shapes=sizes.biased_shapes(),
            )
        memory = (self.config.kv_cache_gib, self.config.page_size)
        self.kv_cache = KVCache(decoder.config, *memory, weight.dtype, weight.device)
        self.counters = EngineStats(total_pages=self.kv_cache.num_pages)
        self.scheduler = Scheduler(
            BlockManager(self.kv_cache.num_pages, self.config.page_size),
            max_num_seqs=self.config.max_num_seqs,
            max_batch_tokens=self.config.max_batch_tokens,
            prefix_caching=self.config.prefix_caching,
            stats=self.counters,
        )
        self.runner = Runner(decoder, self.kv_cache)
        self._request_ids = itertools.count()
        self._sample_ids = itertools.count()
        self._groups: dict[int, Group] = {}
        self._unclaimed: list[RequestOutput] = []  # finished while `generate` ran for somebody else
        self._stale: str | None = None

    # ------------------------------------------------------------------ requests

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        sample_ids: Seq[Seq[int]] | None = None,
        progress: str | None = None,
    ) -> list[RequestOutput]:
        """Answer all prompts; results in their order.

        A prompt is text, a list of token ids, or ``{"prompt_token_ids": [...]}``. ``params`` is one for all
        or one each. ``sample_ids`` (n per prompt) names the samples for the noise, so that a caller gets the
        same tokens whatever the batch; by default samples are numbered as they come. ``progress`` labels a bar.

        Every prompt is checked before the first is run. Raises ValueError for bad input, StaleWeightsError
        between a weight update's start and its publication.
        """
        single = isinstance(prompts, (str, dict)) or (len(prompts) > 0 and isinstance(prompts[0], int))
        todo: list[Any] = [prompts] if single else list(prompts)
        params = params or SamplingParams()
        each = [params] * len(todo) if isinstance(params, SamplingParams) else list(params)
        for name, given in (("params", each), ("sample_ids", sample_ids)):
            if given is not None and len(given) != len(todo):
                raise ValueError(f"{len(todo)} prompts but {len(given)} {name}; give one for each prompt")
        self._check_fresh()
        names: Seq[Seq[int] | None] = sample_ids or [None] * len(todo)
        groups = [self._group(*request) for request in zip(todo, each, names, strict=True)]
        for group in groups:
            self._enqueue(group)
        wanted = {group.request_id for group in groups}
        outputs: dict[int, RequestOutput] = {}
        with Progress(progress, total=sum(g.params.n for g in groups)) as bar:
            while len(outputs) < len(groups):
                before = self.counters.sampled
                finished = self._advance()
                mine = [out for out in finished if out.request_id in wanted]
                self._unclaimed += [out for out in finished if out.request_id not in wanted]
                outputs.update({out.request_id: out for out in mine})
                bar.advance(sum(len(out.outputs) for out in mine), tokens=self.counters.sampled - before)
        return [outputs[group.request_id] for group in groups]

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, *, sample_ids: Seq[int] | None = None
    ) -> int:
        """Queue one prompt and return its request id; :meth:`step` hands its answers out."""
        group = self._group(prompt, params or SamplingParams(), sample_ids)
        self._enqueue(group)
        return group.request_id

    def abort(self, request_id: int) -> RequestOutput:
        """End a request now. Its answers so far are returned, the unfinished ones with reason "abort".

        Raises ValueError when no such request is in flight.
        """
        group = self._groups.get(request_id)
        if group is None:
            raise ValueError(f"no request {request_id} in flight; in flight are {sorted(self._groups)[:8]}")
        live = [seq for seq in self.scheduler.sequences() if seq.group is group]
        self.scheduler.remove(set(live))
        if not group.forked:
            live = [Sequence(group, index, list(group.prompt_ids)) for index in range(group.params.n)]
        for seq in live:
            self._finish(seq, "abort", None)
        self.counters.aborted_requests += 1
        return self._output(group)

    def _enqueue(self, group: Group) -> None:
        if not group.sample_ids:  # numbered here, so that a refused call leaves later ones their numbers
            numbers = itertools.count() if group.params.seed is not None else self._sample_ids
            group.sample_ids = list(itertools.islice(numbers, group.params.n))
        self._groups[group.request_id] = group
        self.scheduler.add(Sequence(group, 0, list(group.prompt_ids)))

    def _group(self, prompt: Prompt, params: SamplingParams, sample_ids: Seq[int] | None) -> Group:
        text = prompt if isinstance(prompt, str) else None
        ids = self._token_ids(prompt)
        limit = self.model.decoder.config.max_position
        if not ids:
            raise ValueError("empty prompt: give at least one token")
        if len(ids) >= limit:
            raise ValueError(f"the prompt has {len(ids)} tokens; the context of {limit} must hold at least one more")
        vocab = self.model.decoder.head.num_tokens
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"prompt token ids span {min(ids)}..{max(ids)}; the tokenizer has ids 0..{vocab - 1}")
        max_len = min(len(ids) + params.max_tokens, limit)
        if params.n > self.config.max_num_seqs:
            limit = self.config.max_num_seqs
            raise ValueError(f"n={params.n} answers at once, but max_num_seqs={limit}; raise it or lower n")
        pages = self.scheduler.blocks.pages_for(max_len)
        if pages > self.kv_cache.num_pages:
            raise ValueError(
                f"one answer may need {max_len} tokens = {pages} KV pages, but kv_cache_gib={self.config.kv_cache_gib} "
                f"holds {self.kv_cache.num_pages}; raise kv_cache_gib or lower max_tokens"
            )
        if sample_ids is not None and len(sample_ids) != params.n:
            raise ValueError(f"{len(sample_ids)} sample ids for n={params.n} answers; give one for each answer")
        if not all(map(fits_int64, sample_ids or ())):
            raise ValueError(f"sample_ids={list(sample_ids or ())}: must be integers of 64 bits")
        seed = self.config.seed if params.seed is None else params.seed
        return Group(next(self._request_ids), text, ids, params, seed, list(sample_ids or ()), max_len)

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, dict):
            if set(prompt) != {"prompt_token_ids"}:
                raise ValueError(f"a prompt dict has the one key 'prompt_token_ids', not {sorted(prompt)}")
            prompt = list(prompt["prompt_token_ids"])
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a text prompt needs a tokenizer, and this engine was built without; give token ids")
            return list(self.tokenizer(prompt)["input_ids"])
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(f"prompt token ids must be integers, not {prompt!r:.80}") from None

    # ------------------------------------------------------------------ the loop

    def step(self) -> list[RequestOutput]:
        """Forward one batch; the requests that finished with it, or since the last call.

        Should the forward fail, all requests in flight are dropped with the cache (pages may be half written).
        """
        finished = self._advance()
        unclaimed, self._unclaimed = self._unclaimed, []
        return unclaimed + finished

    def _advance(self) -> list[RequestOutput]:
        self._check_fresh()
        if not self.scheduler.has_work:
            return []
        schedule = self.scheduler.schedule()
        try:
            sampled = self.runner.run(schedule)
        except BaseException:
            self.scheduler.remove(set(self.scheduler.sequences()))
            self.scheduler.blocks.reset_prefix_cache()
            self.kv_cache.clear()
            self._groups.clear()
            raise
        self.scheduler.commit(schedule)
        if sampled is None:
            return []
        columns = zip(*(column.tolist() for column in vars(sampled).values()), strict=True)
        done: dict[Sequence, tuple[str, int | None]] = {}
        for chunk in schedule.chunks:
            if not chunk.samples:
                continue
            for seq in [chunk.seq] if chunk.seq.group.forked else self.scheduler.fork(chunk.seq):
                token, *logprobs = next(columns)
                seq.token_ids.append(token)
                seq.logprobs.append(tuple(logprobs))
                seq.versions.append(self.scheduler.version)
                self.counters.sampled += 1
                stopped = self._stops(seq, token)
                if stopped:
                    done[seq] = stopped
        self.scheduler.remove(set(done))
        for seq, (reason, stop) in done.items():
            self._finish(seq, reason, stop)
        groups = dict.fromkeys(seq.group for seq in done)
        finished = [group for group in groups if len(group.outputs) == group.params.n]
        self.counters.finished_requests += len(finished)
        return [self._output(group) for group in finished]

    def _stops(self, seq: Sequence, token: int) -> tuple[str, int | None] | None:
        params = seq.group.params
        if token in params.stop_token_ids or (token in self.model.eos_ids and not params.ignore_eos):
            return "stop", token
        return ("length", None) if len(seq.token_ids) == seq.group.max_len else None

    def _finish(self, seq: Sequence, reason: str, stop: int | None) -> None:
        group = seq.group
        token_ids = tuple(seq.token_ids[len(group.prompt_ids) :])
        policy, processed, kept = zip(*seq.logprobs, strict=True) if seq.logprobs else ((), (), ())
        shown = None
        if group.params.logprobs is not None:
            shown = [{token: Logprob(logprob)} for token, logprob in zip(token_ids, policy, strict=True)]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True) if self.tokenizer else ""
        group.outputs[seq.index] = CompletionOutput(
            seq.index, text, token_ids, reason, stop, seq.sample_id, policy, processed, kept, tuple(seq.versions), shown
        )

    def _output(self, group: Group) -> RequestOutput:
        del self._groups[group.request_id]
        outputs = tuple(group.outputs[index] for index in range(group.params.n))
        return RequestOutput(group.request_id, group.prompt, tuple(group.prompt_ids), outputs, group.num_cached)

    # ------------------------------------------------------------------ weights

    def invalidate(self, reason: str) -> None:
        """The weights are about to change: refuse to generate until :meth:`publish`."""
        self._stale = reason

    def publish(self, version: int) -> None:
        """The weights are whole again, as ``version``. Older cache entries can no longer be reached; the KV of
        unfinished requests is recomputed under the new weights.

        Raises ValueError when the version doesn't grow.
        """
        if version <= self.scheduler.version:
            raise ValueError(f"weight version {version} does not follow {self.scheduler.version}; versions only grow")
        self.scheduler.preempt_all()
        self.scheduler.version = version
        self._stale = None

    def _check_fresh(self) -> None:
        if self._stale is not None:
            raise StaleWeightsError(f"{self._stale}; publish the new weights before generating")

    # ------------------------------------------------------------------ looking inside

    @property
    def weight_version(self) -> int:
        return self.scheduler.version

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Requests in flight keep their pages."""
        self.scheduler.blocks.reset_prefix_cache()

    def stats(self) -> EngineStats:
        """Counters since the start, and the queues as they are now."""
        running = sum(seq.num_samples for seq in self.scheduler.running)
        waiting = sum(seq.num_samples for seq in self.scheduler.waiting)
        now = {"running_sequences": running, "waiting_sequences": waiting, "free_pages": self.scheduler.blocks.num_free}
        return EngineStats(**{**self.counters.as_dict(), **now, "weight_version": self.weight_version})

    def check_integrity(self) -> None:
        """Assert the engine's invariants: pages partition into free and owned, no request is lost."""
        self.scheduler.check_integrity()
        queued = {seq.group.request_id for seq in self.scheduler.sequences()}
        assert queued == set(self._groups), f"requests {set(self._groups) ^ queued} are in one place only"

    def parameter_addresses(self) -> dict[str, int]:
        """Where each weight lives; a shared swap never moves one."""
        return {name: parameter.data_ptr() for name, parameter in self.model.decoder.named_parameters()}
