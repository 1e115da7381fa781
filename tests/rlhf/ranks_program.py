"""One rank of the tests over ranks: `python ranks_program.py FOLDER RANK WORLD_SIZE PORT`.

Reads ``jobs.pt`` (a list of dicts) from the folder, does each job with the other ranks, and leaves ``rank-R.pt``
with what it saw. All jobs share a process, since importing DeepSpeed takes longer than the jobs.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch

from rlhf.cluster.worker import Rendezvous, set_rendezvous, set_threads
from rlhf.config import ModelSection, Rollout, Train
from rlhf.division import divide_batch, divide_minibatch, divide_sequences
from rlhf.packing import forward_logprobs, pack
from rlhf.roles import policy as policy_module
from rlhf.roles import reference as reference_module
from rlhf.roles.critic import Critic
from rlhf.roles.policy import Policy
from rlhf.roles.reference import Reference
from rlhf.roles.reward_model import RewardModel
from rlhf.types import Batch, Completion, Prompt, Score, Trajectory
from rollout_engine import SamplingParams
from rollout_engine.models import checkpoint as checkpoint_module
from rollout_engine.models.checkpoint import load_model


def gradients(policy: Policy, share: Batch, max_tokens: int) -> dict[str, torch.Tensor]:
    """What DeepSpeed holds before its step; the step itself has rate 0."""
    held: dict[str, torch.Tensor] = {}

    def loss_fn(engine: torch.nn.Module, micro: Batch) -> torch.Tensor:
        scored, logprobs, entropy = forward_logprobs(engine, micro)
        return policy.algorithm.policy_loss(logprobs, entropy, micro, scored)[0]

    policy.backend.step(share, max_tokens, loss_fn, 0.0, lambda: held.update(policy.backend.gradients()))
    return held


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    names = [name for name, _ in policy.model.decoder.named_parameters()]
    with policy.backend.gathered(names) as whole:
        return {name: p.clone() for name, p in whole.items()}


Answers = list[tuple[int, list[Completion]]]  # (prompt's number, its answers)


def answers(policy: Policy, prompts: list[Prompt], rank: int, ranks: int) -> Answers:
    """To this rank's share of the prompts."""
    mine = range(rank, len(prompts), ranks)
    share = [prompts[i] for i in mine]
    stream = policy.generate(share, SamplingParams(n=2, max_tokens=16), first_sample_id=0, groups=mine)
    return [pair for finished in stream for pair in finished]


def gap(policy: Policy, prompts: list[Prompt], answered: Answers) -> float:
    """Largest difference between the sampler's log-probs and the trainer's."""
    batch = pack(
        [Trajectory.from_completion(prompts[i], c, i, Score(0.0)) for i, completions in answered for c in completions]
    )
    scored = policy.score(batch)
    return (scored.column("old_logprobs") - batch.rollout_logprobs)[batch.loss_mask].abs().max().item()


def run_critic(job: dict[str, Any], folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """Scores of this rank's share of a batch, then one update on it."""
    critic = Critic(
        checkpoint=job["checkpoint"],
        run_folder=folder,
        model=ModelSection(),
        train=Train(lr=job["lr"], max_grad_norm=1e9, zero_stage=job["stage"], tokens_per_microbatch=job["max_tokens"]),
        algorithm=job["algorithm"],
        total_updates=10,
        timeout_s=120,
    )
    share = divide_minibatch(ranks, job["critic"])[0][rank]["minibatch"]
    scored = critic.score(share)
    metrics = critic.update(share)
    names = [name for name, _ in critic.model.decoder.named_parameters()]
    with critic.learner.backend.gathered(names) as whole:
        return {"share": scored, "metrics": metrics, "weights": {name: p.clone() for name, p in whole.items()}}


def run_frozen(job: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Scores of this rank's shares, and how much of each weight of the reference is here: gathered, and its share."""
    train = Train(lr=0.0, zero_stage=job["stage"], tokens_per_microbatch=job["max_tokens"])
    common: dict[str, Any] = {"model": ModelSection(dtype=job["dtype"]), "train": train, "timeout_s": 120}
    reference = Reference(checkpoint=job["checkpoint"], **common)
    judge = RewardModel(checkpoint=job["scored"], **common)
    shares = [divide_batch(ranks, batch)[0][rank]["batch"] for batch in job["frozen"]]
    mine = [divide_sequences(ranks, some)[0][rank]["token_ids"] for some in job["sequences"]]
    found = {"shares": [reference.score(share) for share in shares], "scores": [judge.judge(some) for some in mine]}
    parameters = reference.frozen.model.named_parameters()
    held = {name.removeprefix("module."): (p.numel(), getattr(p, "ds_tensor", p).numel()) for name, p in parameters}
    return {**found, "held": held}


def run(job: dict[str, Any], folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    if "critic" in job:
        return run_critic(job, folder, rank, ranks)
    if "frozen" in job:
        return run_frozen(job, rank, ranks)
    policy = Policy(
        checkpoint=job["checkpoint"],
        run_folder=folder,
        model=ModelSection(),
        rollout=Rollout(prompts_per_step=4, samples_per_prompt=4, max_tokens=24, kv_cache_gib=0.02),
        train=Train(lr=job["lr"], max_grad_norm=1e9, zero_stage=job["stage"], tokens_per_microbatch=job["max_tokens"]),
        algorithm=job["algorithm"],
        total_updates=10,
        seed=7,
        timeout_s=120,
    )
    group = torch.distributed.distributed_c10d._get_default_group()
    found: dict[str, Any] = {"timeout": group._get_backend(torch.device("cpu")).options._timeout}

    def share(name: str) -> Batch:
        return divide_minibatch(ranks, job[name])[0][rank]["minibatch"]

    if "gradients" in job:
        found["gradients"] = gradients(policy, share("gradients"), job["max_tokens"])
        found["share"] = policy.score(share("score"))
    if "prompts" in job:
        found["before"] = answers(policy, job["prompts"], rank, ranks)
    found["metrics"] = policy.update(share("update"))
    swap = policy.publish()
    found |= {"version": swap.version, "changed": swap.changed, "weights": weights(policy)}
    if "prompts" in job:
        found["after"] = answers(policy, job["prompts"], rank, ranks)
        found["gap"] = gap(policy, job["prompts"], found["after"])
    return found


def main() -> None:
    for module in (policy_module, reference_module):
        module.load_model = functools.partial(load_model, tokenizer=False)  # the checkpoint has none
    checkpoint_module.load_tokenizer = lambda folder: None
    folder, rank, ranks, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    set_threads(1)
    set_rendezvous(Rendezvous("127.0.0.1", port, rank, ranks))
    jobs = torch.load(folder / "jobs.pt", weights_only=False)
    torch.save([run(job, folder, rank, ranks) for job in jobs], folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
