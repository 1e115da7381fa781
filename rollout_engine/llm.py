"""The engine's face: requests in, answers out, weights swapped in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch

from kernels.device import default_device
from kernels.dispatch import uses_triton
from kernels.exactness import check_exact
from rollout_engine import chat, streaming
from rollout_engine.admission import Admission, Prompt
from rollout_engine.block_manager import BlockManager
from rollout_engine.config import EngineConfig
from rollout_engine.detokenizer import Detokenizer
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
)


class StaleWeightsError(RuntimeError):
    """The weights changed and were not published: generating now would mix versions."""


class LLM:
    """Batch generation on one device.

    Args:
        model: checkpoint folder, Hub id, or a loaded :class:`Model`, whose weights are then shared, not copied.
        revision, dtype, device, tokenizer: of a checkpoint to load, as in ``load_model``; by default on a GPU if any.
        **engine: fields of :class:`EngineConfig` (``kv_cache_gib``, ``max_num_seqs``, ...).

    Raises ValueError for settings that can't work, RuntimeError where ``numerics="exact"`` isn't to be had.
    """

    def __init__(
        self,
        model: str | Path | Model,
        *,
        revision: str = "main",
        dtype: str = "float32",
        device: str | None = None,
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
            model = load_model(
                model, revision=revision, dtype=dtype, device=device or default_device(), tokenizer=tokenizer
            )
        self.model = model
        self.tokenizer = model.tokenizer
        decoder = model.decoder
        weight = decoder.norm.weight
        on_cpu_in_fp32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
        triton = uses_triton(weight.device)
        exact = self.config.numerics == "exact" or (self.config.numerics == "auto" and on_cpu_in_fp32)
        decoder.set_exact(exact)
        if exact:
            if weight.dtype != torch.float32 and not triton:
                raise ValueError(f"numerics='exact' holds for float32 weights, not {weight.dtype}; set numerics='fast'")
            sizes = decoder.config
            check_exact(
                sizes.linear_shapes(),
                num_heads=sizes.num_heads,
                num_kv_heads=sizes.num_kv_heads,
                head_dim=sizes.head_dim,
                device=weight.device,
                dtype=weight.dtype,
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
        self.graphs = None
        if triton and weight.is_cuda and self.config.cuda_graphs:
            from rollout_engine.decode_graphs import CudaRecorder, DecodeGraphs

            self.graphs = DecodeGraphs(decoder, self.kv_cache, CudaRecorder())
        self.runner = Runner(decoder, self.kv_cache, self.graphs)
        self._admission = Admission(model, self.config, self.kv_cache.num_pages)
        self._detokenizer = Detokenizer(self.tokenizer) if self.tokenizer else None
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

        A prompt is text, a list of token ids, ``{"prompt": text}``, ``{"prompt_token_ids": [...]}`` or
        ``{"messages": [...]}`` (through the tokenizer's chat template). ``params`` is one for all or one each.
        ``sample_ids`` (n per prompt) names the samples for the noise, so that a caller gets the
        same tokens whatever the batch; by default samples are numbered as they come. ``progress`` labels a
        :class:`Progress`.

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
        groups = [self._admission.group(*request) for request in zip(todo, each, names, strict=True)]
        for group in groups:
            self._enqueue(group)
        wanted = {group.request_id for group in groups}
        outputs: dict[int, RequestOutput] = {}
        with Progress(progress, total=sum(g.params.n for g in groups)) as bar:
            while len(outputs) < len(groups):
                before = self.counters.sampled
                mine = self.step_for(wanted)
                outputs.update({out.request_id: out for out in mine})
                bar.advance(sum(len(out.outputs) for out in mine), tokens=self.counters.sampled - before)
        return [outputs[group.request_id] for group in groups]

    def chat(
        self,
        conversations: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        **template_args: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation (a list of ``{"role": ..., "content": ...}``), or each of several.

        ``chat_template`` is Jinja text in place of the tokenizer's own; ``template_args`` go to the template
        (``enable_thinking``, ``tools``, ...). Raises as :meth:`generate` does, and ValueError for messages that the
        template refuses.
        """
        if self.tokenizer is None:
            raise ValueError("chat needs a tokenizer, and this engine was built without; generate takes token ids")
        single = len(conversations) > 0 and isinstance(conversations[0], dict)
        todo: list[Any] = [conversations] if single else conversations
        prompts = [chat.encode_chat(self.tokenizer, m, chat_template=chat_template, **template_args) for m in todo]
        return self.generate([{"prompt_token_ids": ids} for ids in prompts], params)

    def stream(
        self,
        rows: Iterable[Any],
        params: SamplingParams | None = None,
        *,
        prompt: Callable[[Any], Prompt] | None = None,
        sample_ids: Callable[[Any], Seq[int]] | None = None,
        ordered: bool = False,
    ) -> Iterator[RequestOutput]:
        """Answer a stream of rows, endless if need be, in bounded memory.

        Rows are pulled as answers finish, no more than keep ``max_num_seqs`` answers in flight. Outputs come as
        they finish; ``position`` says which row each belongs to. With ``ordered`` they come in the rows' order, and
        rows are pulled at most ``4 * max_num_seqs`` answers ahead of the oldest one that isn't out.

        Args:
            prompt: makes a row's prompt (see :meth:`generate`); without it the row is the prompt.
            sample_ids: names a row's n samples for the noise; without it they are numbered as :meth:`generate` does.

        A row that is refused, by ``prompt`` raising ValueError or by the engine, doesn't end the stream: its output
        has ``error`` set and no ``outputs``. Closing the generator aborts what is in flight.

        Raises ValueError for ``params`` that no prompt could be run with, StaleWeightsError as :meth:`step`.
        """
        params = params or SamplingParams()
        self._admission.check(params)
        return streaming.stream(self, iter(rows), params, prompt or (lambda row: row), sample_ids, ordered)

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, *, sample_ids: Seq[int] | None = None
    ) -> int:
        """Queue one prompt and return its request id; :meth:`step` hands its answers out."""
        group = self._admission.group(prompt, params or SamplingParams(), sample_ids)
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

    # ------------------------------------------------------------------ the loop

    def step(self) -> list[RequestOutput]:
        """Forward one batch; the requests that finished with it, or since the last call.

        Should the forward fail, all requests in flight are dropped with the cache (pages may be half written).
        """
        finished = self._advance()
        unclaimed, self._unclaimed = self._unclaimed, []
        return unclaimed + finished

    def step_for(self, request_ids: Container[int]) -> list[RequestOutput]:
        """:meth:`step` for one caller of several: answers to other requests stay until theirs asks."""
        finished = self.step()
        self._unclaimed = [out for out in finished if out.request_id not in request_ids]
        return [out for out in finished if out.request_id in request_ids]

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
        done: dict[Sequence, tuple[str, int | str | None]] = {}
        version = self.scheduler.version
        for seq, _, _, samples in schedule.chunks:
            if not samples:
                continue
            self.counters.sampled += samples
            for sample in [seq] if seq.group.forked else self.scheduler.fork(seq):
                token, *measured = next(columns)
                sample.token_ids.append(token)
                sample.columns.append(tuple(measured))
                sample.versions.append(version)
                stopped = self._stops(sample, token)
                if stopped:
                    done[sample] = stopped
        self.scheduler.remove(set(done))
        for seq, (reason, stop) in done.items():
            self._finish(seq, reason, stop)
        groups = dict.fromkeys(seq.group for seq in done)
        finished = [group for group in groups if len(group.outputs) == group.params.n]
        self.counters.finished_requests += len(finished)
        return [self._output(group) for group in finished]

    def _stops(self, seq: Sequence, token: int) -> tuple[str, int | str | None] | None:
        group = seq.group
        if group.params.stop and self._detokenizer:
            stop = self._detokenizer.stop_string(seq.token_ids, len(group.prompt_ids), group.params)
            if stop is not None:
                return "stop", stop
        if token in group.stop_ids:
            return "stop", token
        return ("length", None) if len(seq.token_ids) == group.max_len else None

    def _finish(self, seq: Sequence, reason: str, stop: int | str | None) -> None:
        group = seq.group
        token_ids = tuple(seq.token_ids[len(group.prompt_ids) :])
        columns = zip(*seq.columns, strict=True) if seq.columns else ((),) * 4
        policy, processed, kept, entropies = columns
        shown = None
        if group.params.logprobs is not None:
            shown = [{token: Logprob(logprob)} for token, logprob in zip(token_ids, policy, strict=True)]
        text = self._detokenizer.text(token_ids, group.params)[0] if self._detokenizer else ""
        group.outputs[seq.index] = CompletionOutput(
            seq.index, text, token_ids, reason, stop, seq.sample_id,
            policy, processed, kept, entropies, tuple(seq.versions), shown,
        )  # fmt: skip

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
        if self.graphs:
            self.graphs.check()
        self._stale = None

    def _check_fresh(self) -> None:
        if self._stale is not None:
            raise StaleWeightsError(f"{self._stale}; publish the new weights before generating")

    # ------------------------------------------------------------------ looking inside

    @property
    def exact(self) -> bool:
        """Whether a token's bits are the same in any batch."""
        return self.model.decoder.exact

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
