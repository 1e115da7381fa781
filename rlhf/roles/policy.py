"""The policy: the trained model and the engine that samples from it, in one process on one storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from kernels.device import default_device
from rlhf.algorithms import Objective
from rlhf.config import ModelSection, Rollout, Train
from rlhf.division import divide_batch, divide_minibatch, divide_prompts, over_ranks
from rlhf.packing import forward_logprobs, score_tokens
from rlhf.roles.learner import Learner
from rlhf.types import Batch, Completion, Prompt, WeightUpdate
from rlhf.weight_sync import CopySwap, SharedSwap, WeightSwap, share_storage
from rollout_engine import RequestOutput, SamplingParams
from rollout_engine.llm import LLM
from rollout_engine.models.checkpoint import load_model, save_model


class Policy:
    """One rank of it: the trainer's share of a data-parallel group, and an engine of its own.

    Args:
        checkpoint: folder of the starting weights. seed: of the sampling noise.
        run_folder, total_updates, timeout_s: as :class:`rlhf.roles.learner.Learner`'s.
    """

    def __init__(
        self,
        *,
        checkpoint: Path,
        run_folder: Path,
        model: ModelSection,
        rollout: Rollout,
        train: Train,
        algorithm: Objective,
        total_updates: int,
        seed: int,
        timeout_s: float,
    ) -> None:
        self.algorithm = algorithm
        copy = train.zero_stage == 3
        self.model = load_model(checkpoint, dtype=model.dtype, device=default_device())
        own = load_model(checkpoint, dtype=model.dtype, device=default_device()).decoder if copy else None
        self.model.decoder.gradient_checkpointing = model.gradient_checkpointing
        self.learner = Learner(
            "policy",
            self.model.decoder,
            train,
            run_folder=run_folder,
            total_updates=total_updates,
            timeout_s=timeout_s,
        )
        self.backend = self.learner.backend
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
        self.model.decoder.set_exact(self.llm.exact)
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
        micro = self.learner.microbatches(batch)
        logprobs = score_tokens(forward_logprobs, self.backend.engine, micro)
        return batch.replace(old_logprobs=logprobs[: batch.num_tokens])

    @over_ranks(divide_minibatch)
    def update(self, minibatch: Batch) -> dict[str, float]:
        """One optimizer step; metrics as :meth:`Learner.step`, and the gap between sampler and trainer. Collective."""

        def forward(engine: nn.Module, micro: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            scored, logprobs, entropy = forward_logprobs(engine, micro)
            loss, diagnostics = self.algorithm.policy_loss(logprobs, entropy, micro, scored)
            gap = (logprobs.detach() - micro.rollout_logprobs.to(logprobs.device)[scored]).abs()
            if micro.weight_versions is not None:  # of older weights other log-probs are to be expected
                gap = gap * (micro.weight_versions.to(gap.device)[scored] == self.llm.weight_version)
            return loss, {**diagnostics, "logprob_gap": gap}

        metrics, peaks = self.learner.step(minibatch, forward, before_step=self.swap.begin)
        gap = {"mean": metrics.pop("policy/logprob_gap"), "max": peaks["logprob_gap"]}
        return {**metrics, **{f"rollout/logprob_gap_{kind}": value for kind, value in gap.items()}}

    def publish(self) -> WeightUpdate:
        """Let the engine generate with the weights as they are now. Collective."""
        return self.swap.publish()

    def save_state(self, folder: Path) -> None:
        """Write everything that the next step depends on; the weights must be published. Collective."""
        self.learner.save_state(folder, weight_version=self.llm.weight_version)

    def load_state(self, folder: Path) -> None:
        """Be where the policy was that wrote ``folder``, and generate with its weights; before the first step.
        Collective."""
        version = self.learner.load_state(folder)["weight_version"]
        if version != self.llm.weight_version:  # otherwise the weights are still those of the start
            self.swap.begin()
            self.swap.publish(version)

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
            log_kept_mass=answer.log_kept_mass if any(answer.log_kept_mass) else (),
        )
        for answer in output.outputs
    ]
