"""THE LOOP: generate -> reward -> score -> advantages -> update -> publish. One screen; nothing else drives a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf.algorithms import Algorithm
from rlhf.checkpoint import Checkpoints, LoopState
from rlhf.cluster import Cluster
from rlhf.config import Config
from rlhf.evaluate import Evaluation, evaluate
from rlhf.judging import Judges, spawn_judges
from rlhf.metrics import batch_metrics, mean_of, merged, rollout_metrics, swap_metrics, timing
from rlhf.packing import pack
from rlhf.roles.critic import Critic
from rlhf.roles.policy import Policy
from rlhf.roles.reference import Reference
from rlhf.rollouts import Rollouts
from rlhf.run_folder import RunFolder
from rlhf.tracking import Tracker
from rlhf.types import Prompt
from rlhf.weights import Weights


@dataclass(frozen=True)
class Roles:
    """``scorers`` each fill a column of the batch before the update, none reads another's; ``learners`` by name."""

    policy: Policy
    reward: Judges
    scorers: list[Any]
    learners: dict[str, Policy | Critic]


def spawn_roles(config: Config, algorithm: Algorithm, cluster: Cluster, run: RunFolder, weights: Weights) -> Roles:
    """Everybody that the algorithm asks for. ``weights``: what they start from."""
    learning = {
        "run_folder": run.path,
        "algorithm": algorithm,
        "total_updates": config.run.steps * algorithm.epochs * algorithm.updates_per_rollout,
        "timeout_s": config.cluster.timeout_s,
    }

    def spawn(name: str, role: Any, **arguments: Any) -> Any:
        model, train, ranks = config.of_role(name)
        checkpoint = weights.get(name, weights["policy"])
        return cluster.spawn(name, role, ranks=ranks, checkpoint=checkpoint, model=model, train=train, **arguments)

    policy = spawn("policy", Policy, rollout=config.rollout, seed=config.run.seed, **learning)
    reward = spawn_judges(config, cluster, weights)
    scorers, learners = [], {"policy": policy}
    if "reference" in algorithm.roles:
        exact = config.rollout.numerics == "exact"
        scorers.append(spawn("reference", Reference, exact=exact, timeout_s=config.cluster.timeout_s))
    if "critic" in algorithm.roles:
        learners["critic"] = spawn("critic", Critic, **learning)
        scorers.append(learners["critic"])
    if algorithm.needs_old_logprobs:
        scorers.append(policy)
    return Roles(policy, reward, scorers, learners)


def train(
    config: Config,
    algorithm: Algorithm,
    cluster: Cluster,
    tracker: Tracker,
    run: RunFolder,
    weights: Weights,
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
) -> tuple[Evaluation, Evaluation]:
    """Train from ``weights`` until ``run.steps`` steps are done; held-out evaluations before and after.

    Goes on from the run's newest whole checkpoint, if it has one.
    """
    roles = spawn_roles(config, algorithm, cluster, run, weights)
    policy, reward = roles.policy, roles.reward
    rollouts = Rollouts(config, algorithm, policy, reward, prompts)
    checkpoints = Checkpoints(run.path, config.checkpoint)
    state = checkpoints.load(roles.learners)
    if state is None:
        before = evaluate(config, policy, reward, eval_prompts, step=0)
        state = LoopState(algorithm, rollouts.state(), reward.state(), before, before)
        tracker.evaluated(before)
    algorithm, before, latest = state.algorithm, state.before, state.latest
    rollouts.restore(state.rollouts)
    reward.restore(state.reward)
    tracker.rewind(state.step, state.progress)
    started = time.perf_counter() - state.elapsed_s

    for step in range(state.step + 1, config.run.steps + 1):
        times: dict[str, float] = {}
        phase = partial(tracker.phase, step, times)
        trajectories = rollouts.take(phase)
        with phase("score"):
            batch = pack(trajectories, mask_truncated=algorithm.mask_truncated)
            batch = batch.with_columns_of(cluster.together([scorer.score for scorer in roles.scorers], batch))
            batch = algorithm.advantages(batch)
        with phase("train"):
            learners = [roles.learners[name] for name in algorithm.learners(step)]
            updates = [
                merged(cluster.together([learner.update for learner in learners], minibatch))
                for minibatch in algorithm.minibatches(batch, config.rollout.max_tokens)
            ]
        with phase("swap"):
            swap = policy.publish()

        last = step == config.run.steps
        if last or (config.eval.every and step % config.eval.every == 0):
            with phase("evaluate"):
                latest = evaluate(config, policy, reward, eval_prompts, step)
            tracker.evaluated(latest)
        tracker.log(
            step,
            {
                **rollout_metrics(trajectories),
                **rollouts.metrics,
                **batch_metrics(batch, algorithm),
                **mean_of(updates),
                **latest.metrics,
                **swap_metrics(swap),
                **cluster.usage(),
                **timing(times, started, step, config.run.steps, batch.num_tokens),
            },
        )
        tracker.samples(step, trajectories, batch)
        algorithm = algorithm.adapted(batch, step)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            elapsed = time.perf_counter() - started
            state = LoopState(
                algorithm, rollouts.state(), reward.state(), before, latest, step, tracker.progress, elapsed
            )
            with phase("checkpoint"):
                checkpoints.save(state, roles.learners)
    return before, latest
