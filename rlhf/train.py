"""THE LOOP: generate -> reward -> score -> advantages -> update -> publish. One screen; nothing else drives a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.algorithms import Algorithm
from rlhf.cluster import Cluster
from rlhf.config import Config
from rlhf.data import PromptStream
from rlhf.evaluate import Evaluation, evaluate
from rlhf.metrics import mean_of, rollout_metrics, swap_metrics, timing
from rlhf.packing import pack
from rlhf.roles.policy import Policy
from rlhf.roles.reference import Reference
from rlhf.roles.reward import RewardFunction
from rlhf.run_folder import RunFolder
from rlhf.tracking import Tracker
from rlhf.types import Prompt
from rollout_engine import SamplingParams

SCORERS = {"reference": Reference}


def spawn_roles(
    config: Config, algorithm: Algorithm, cluster: Cluster, run: RunFolder, checkpoint: Path
) -> tuple[Policy, RewardFunction, list[Reference | Policy]]:
    """The policy, the reward, and the roles that fill a column of the batch before the update."""
    policy = cluster.spawn(
        "policy",
        Policy,
        ranks=config.cluster.num_ranks,
        checkpoint=checkpoint,
        run_folder=run.path,
        model=config.model,
        rollout=config.rollout,
        train=config.train,
        algorithm=algorithm,
        total_updates=config.run.steps * algorithm.updates_per_rollout,
        seed=config.run.seed,
        timeout_s=config.cluster.timeout_s,
    )
    reward = cluster.spawn(
        "reward", RewardFunction, recipe=config.recipe.path, section=config.reward, seed=config.run.seed
    )
    scorers: list[Reference | Policy] = [
        cluster.spawn(
            name,
            SCORERS[name],
            ranks=config.cluster.num_ranks,
            checkpoint=checkpoint,
            model=config.model,
            train=config.train,
        )
        for name in algorithm.roles
    ]
    if algorithm.updates_per_rollout > 1:  # with one, the ratio's denominator is the current log-prob itself
        scorers.append(policy)
    return policy, reward, scorers


def train(
    config: Config,
    algorithm: Algorithm,
    cluster: Cluster,
    tracker: Tracker,
    run: RunFolder,
    checkpoint: Path,
    prompts: Sequence[Prompt],
    eval_prompts: Sequence[Prompt],
) -> tuple[Evaluation, Evaluation]:
    """Train from ``checkpoint`` for ``run.steps`` steps; held-out evaluations before and after."""
    rollout = config.rollout
    answers_per_step = rollout.prompts_per_step * rollout.samples_per_prompt
    policy, reward, scorers = spawn_roles(config, algorithm, cluster, run, checkpoint)
    sampling = SamplingParams(
        n=rollout.samples_per_prompt, temperature=rollout.temperature, max_tokens=rollout.max_tokens
    )
    stream = PromptStream(prompts, config.run.seed)
    started = time.perf_counter()
    before = latest = evaluate(config, policy, reward, eval_prompts, step=0)
    tracker.evaluated(before)

    for step in range(1, config.run.steps + 1):
        times: dict[str, float] = {}
        asked = stream.take(rollout.prompts_per_step)
        with tracker.phase(step, "generate", times):
            for finished in policy.generate(asked, sampling, first_sample_id=(step - 1) * answers_per_step):
                reward.submit([(group, asked[group], answers) for group, answers in finished])
        with tracker.phase(step, "reward", times):  # what is left of it: judging began with the first answers
            trajectories = reward.collect(control=True)
        with tracker.phase(step, "train", times):
            batch = pack(trajectories, mask_truncated=algorithm.mask_truncated)
            for scorer in scorers:
                batch = scorer.score(batch)
            batch = algorithm.advantages(batch)
            updates = [policy.update(minibatch) for minibatch in algorithm.minibatches(batch, rollout.max_tokens)]
        with tracker.phase(step, "swap", times):
            swap = policy.publish()

        last = step == config.run.steps
        if last or (config.eval.every and step % config.eval.every == 0):
            with tracker.phase(step, "evaluate", times):
                latest = evaluate(config, policy, reward, eval_prompts, step)
            tracker.evaluated(latest)
        tracker.log(
            step,
            {
                **rollout_metrics(trajectories),
                **mean_of(updates),
                **latest.metrics,
                **swap_metrics(swap),
                **timing(times, started, step, config.run.steps, batch.num_tokens),
            },
        )
        tracker.samples(step, trajectories, batch)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            policy.save(run.checkpoint(step) / "hf")
            run.finish_checkpoint(step, {"step": step, **latest.metrics}, config.checkpoint.keep_last)
    return before, latest
