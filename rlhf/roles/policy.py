"""The policy: the trained model and the engine that samples from it, in one process on one storage."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels.device import default_device
from rlhf.algorithms import Algorithm
from rlhf.backends.deepspeed import DeepSpeedBackend
from rlhf.config import ModelSection, Rollout, Train
from rlhf.packing import forward_logprobs, score_tokens
from rlhf.schedule import learning_rate
from rlhf.types import Batch, Completion, Prompt, WeightUpdate
from rlhf.weight_sync import SharedSwap, share_storage
from rollout_engine import SamplingParams
from rollout_engine.llm import LLM
from rollout_engine.models.checkpoint import Model, load_model, save_model

log = logging.getLogger(__name__)


class Policy:
    """Args:
    checkpoint: folder of the starting weights. run_folder: where a skipped update leaves its batch.
    total_updates: optimizer steps of the run, for the schedule. seed: of the sampling noise.
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
    ) -> None:
        self.run_folder = run_folder
        self.train_config = train
        self.algorithm = algorithm
        self.total_updates = total_updates
        self.num_updates = 0
        self.num_skipped = 0
        self.model = load_model(checkpoint, dtype=model.dtype, device=default_device())
        self.model.decoder.gradient_checkpointing = model.gradient_checkpointing
        self.backend = DeepSpeedBackend(self.model.decoder, train, self.model.decoder.norm.weight.dtype)
        view = Model(share_storage(self.model.decoder), self.model.hf_config, self.model.tokenizer, self.model.eos_ids)
        self.llm = LLM(
            view,
            kv_cache_gib=rollout.kv_cache_gib,
            page_size=rollout.page_size,
            max_num_seqs=rollout.max_num_seqs,
            max_batch_tokens=rollout.max_batch_tokens,
            numerics=rollout.numerics,
            seed=seed,
        )
        self.swap = SharedSwap(self.model.decoder, self.llm)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, first_sample_id: int, progress: str | None = None
    ) -> list[list[Completion]]:
        """``params.n`` answers to each prompt, sampled as numbers ``first_sample_id ...`` of the run."""
        n = params.n
        ids = [range(first_sample_id + i * n, first_sample_id + (i + 1) * n) for i in range(len(prompts))]
        token_ids = [{"prompt_token_ids": list(p.token_ids)} for p in prompts]
        outputs = self.llm.generate(token_ids, params, sample_ids=ids, progress=progress)
        return [
            [
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
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def score(self, batch: Batch) -> Batch:
        """Fill ``old_logprobs`` under the current weights."""
        limit = self.train_config.tokens_per_microbatch
        return batch.replace(old_logprobs=score_tokens(self.model.decoder, batch, limit))

    def update(self, minibatch: Batch) -> dict[str, float]:
        """One optimizer step on a weighed minibatch; its metrics. A non-finite gradient skips the step."""
        sums = _Diagnostics()

        def loss_fn(engine: nn.Module, micro: Batch) -> Tensor:
            scored, logprobs, entropy = forward_logprobs(engine, micro)
            loss, diagnostics = self.algorithm.policy_loss(logprobs, entropy, micro, scored)
            gap = (logprobs.detach() - micro.rollout_logprobs.to(logprobs.device)[scored]).abs()
            sums.add({**diagnostics, "logprob_gap": gap})
            return loss

        train = self.train_config
        lr = learning_rate(self.num_updates, self.total_updates, train.lr, train.warmup_steps, train.schedule)
        result = self.backend.step(
            minibatch.microbatches(train.tokens_per_microbatch), loss_fn, lr, before_step=self.swap.begin
        )
        self.num_updates += 1
        if result.skipped:
            self.num_skipped += 1
            dump = self.run_folder / f"skipped-update-{self.num_updates}.pt"
            torch.save(minibatch, dump)
            log.warning("update %d skipped, gradient norm %s; its batch: %s", self.num_updates, result.grad_norm, dump)
        metrics = {f"policy/{name}": value for name, value in sums.means().items() if name != "logprob_gap"}
        return {
            "policy/loss": result.loss,
            "policy/grad_norm": result.grad_norm,
            "policy/lr": lr,
            "policy/skipped_updates": float(self.num_skipped),
            "rollout/logprob_gap_mean": sums.means()["logprob_gap"],
            "rollout/logprob_gap_max": sums.peak["logprob_gap"],
            **metrics,
        }

    def publish(self) -> WeightUpdate:
        """Let the engine generate with the weights as they are now."""
        return self.swap.publish()

    def save(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint (new folder, atomic)."""
        save_model(self.model, folder)


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

    def means(self) -> dict[str, float]:
        return {name: total / max(1, self.count) for name, total in self.total.items()}
