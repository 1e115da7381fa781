"""The policy: the trained model and the engine that samples from it, in one process on one storage."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.device import default_device
from rlhf.algorithms import Algorithm
from rlhf.backends.deepspeed import DeepSpeedBackend
from rlhf.config import ModelSection, Rollout, Train
from rlhf.division import divide_batch, divide_minibatch, divide_prompts, over_ranks
from rlhf.packing import forward_logprobs, score_tokens
from rlhf.schedule import learning_rate
from rlhf.types import Batch, Completion, Prompt, WeightUpdate
from rlhf.weight_sync import CopySwap, SharedSwap, WeightSwap, share_storage
from rollout_engine import RequestOutput, SamplingParams
from rollout_engine.llm import LLM
from rollout_engine.models.checkpoint import load_model, save_model

log = logging.getLogger(__name__)


class Policy:
    """One rank of it: the trainer's share of a data-parallel group, and an engine of its own.

    Args:
        checkpoint: folder of the starting weights. run_folder: where a skipped update leaves its batch.
        total_updates: optimizer steps of the run, for the schedule. seed: of the sampling noise.
        timeout_s: bound of every collective.
    """

    def __init__(
        self,
        *,
        checkpoint: Path,
        run_folder: Path,
        model: ModelSection,
        rollout: Rollout,
        train: Train,
        algorithm: Algorithm,
        total_updates: int,
        seed: int,
        timeout_s: float,
    ) -> None:
        self.run_folder = run_folder
        self.train_config = train
        self.algorithm = algorithm
        self.total_updates = total_updates
        self.num_updates = 0
        self.num_skipped = 0
        copy = train.zero_stage == 3
        self.model = load_model(checkpoint, dtype=model.dtype, device=default_device())
        own = load_model(checkpoint, dtype=model.dtype, device=default_device()).decoder if copy else None
        self.model.decoder.gradient_checkpointing = model.gradient_checkpointing
        self.backend = DeepSpeedBackend(self.model.decoder, train, self.model.decoder.norm.weight.dtype, timeout_s)
        decoder = share_storage(self.model.decoder) if own is None else own.requires_grad_(False)
        self.llm = LLM(
            replace(self.model, decoder=decoder),
            kv_cache_gib=rollout.kv_cache_gib,
            page_size=rollout.page_size,
            max_num_seqs=rollout.max_num_seqs,
            max_batch_tokens=rollout.max_batch_tokens,
            numerics=rollout.numerics,
            seed=seed,
        )
        self.swap: WeightSwap = CopySwap(self.backend, self.llm) if copy else SharedSwap(self.model.decoder, self.llm)

    @over_ranks(divide_prompts)
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        first_sample_id: int,
        groups: Sequence[int] | None = None,
    ) -> Iterator[list[tuple[int, list[Completion]]]]:
        """``params.n`` answers to each prompt, handed out as they finish: lists of (group, answers).

        ``groups`` numbers the prompts, 0, 1, ... by default; sample j of group g is number
        ``first_sample_id + g * n + j`` of the run, whichever rank draws it.
        """
        n = params.n
        asked: dict[int, tuple[int, Prompt]] = {}
        try:
            for group, prompt in zip(range(len(prompts)) if groups is None else groups, prompts, strict=True):
                first = first_sample_id + group * n
                token_ids = {"prompt_token_ids": list(prompt.token_ids)}
                request = self.llm.add_request(token_ids, params, sample_ids=range(first, first + n))
                asked[request] = (group, prompt)
            while asked:
                finished = [(*asked.pop(out.request_id), out) for out in self.llm.step()]
                if finished:
                    yield [(group, _completions(prompt, params, out)) for group, prompt, out in finished]
        finally:  # nobody wants the rest
            for request in asked:
                self.llm.abort(request)

    @over_ranks(divide_batch)
    def score(self, batch: Batch) -> Batch:
        """Fill ``old_logprobs`` under the current weights. Collective."""
        micro = self.backend.microbatches(batch, self.train_config.tokens_per_microbatch)
        return batch.replace(old_logprobs=score_tokens(self.backend.engine, micro)[: batch.num_tokens])

    @over_ranks(divide_minibatch)
    def update(self, minibatch: Batch) -> dict[str, float]:
        """One optimizer step on this rank's share of a weighed minibatch; the metrics of all ranks together.

        A non-finite gradient skips the step, on every rank. Collective.
        """
        sums = _Diagnostics()

        def loss_fn(engine: nn.Module, micro: Batch) -> Tensor:
            scored, logprobs, entropy = forward_logprobs(engine, micro)
            loss, diagnostics = self.algorithm.policy_loss(logprobs, entropy, micro, scored)
            gap = (logprobs.detach() - micro.rollout_logprobs.to(logprobs.device)[scored]).abs()
            sums.add({**diagnostics, "logprob_gap": gap})
            return loss

        train = self.train_config
        lr = learning_rate(self.num_updates, self.total_updates, train.lr, train.warmup_steps, train.schedule)
        result = self.backend.step(minibatch, train.tokens_per_microbatch, loss_fn, lr, before_step=self.swap.begin)
        self.num_updates += 1
        if result.skipped:
            self.num_skipped += 1
            dump = self.run_folder / f"skipped-update-{self.num_updates}-rank-{self.backend.rank}.pt"
            torch.save(minibatch, dump)
            log.warning("update %d skipped, gradient norm %s; its batch: %s", self.num_updates, result.grad_norm, dump)
        means, peaks = sums.reduce(self.backend)
        gaps = {"rollout/logprob_gap_mean": means.pop("logprob_gap"), "rollout/logprob_gap_max": peaks["logprob_gap"]}
        return {
            "policy/loss": result.loss,
            "policy/grad_norm": result.grad_norm,
            "policy/lr": lr,
            "policy/skipped_updates": float(self.num_skipped),
            **gaps,
            **{f"policy/{name}": value for name, value in means.items()},
        }

    def publish(self) -> WeightUpdate:
        """Let the engine generate with the weights as they are now. Collective."""
        return self.swap.publish()

    def save(self, folder: Path) -> None:
        """Write the published weights as a Hugging Face checkpoint (new folder, atomic); rank 0 does."""
        if self.backend.rank == 0:
            save_model(self.llm.model, folder)


def _completions(prompt: Prompt, params: SamplingParams, output: RequestOutput) -> list[Completion]:
    return [
        Completion(
            prompt.text,
            answer.text,
            answer.token_ids,
            answer.finish_reason,
            answer.policy_logprobs,
            answer.weight_versions,
            answer.sample_id,
            params.temperature,
        )
        for answer in output.outputs
    ]


class _Diagnostics:
    """Token means and maxima over the micro-batches of a step."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.peak: dict[str, float] = {}
        self.count = 0

    def add(self, columns: dict[str, Tensor]) -> None:
        self.count += len(next(iter(columns.values())))
        for name, column in columns.items():
            self.total[name] = self.total.get(name, 0.0) + column.double().sum().item()
            self.peak[name] = max(self.peak.get(name, -math.inf), column.max().item() if len(column) else -math.inf)

    def reduce(self, backend: DeepSpeedBackend) -> tuple[dict[str, float], dict[str, float]]:
        """Means and maxima by name, over all ranks. Collective."""
        *totals, count = backend.reduce([*self.total.values(), self.count], "sum")
        peaks = backend.reduce(list(self.peak.values()), "max")
        means = {name: total / max(1.0, count) for name, total in zip(self.total, totals, strict=True)}
        return means, dict(zip(self.peak, peaks, strict=True))
