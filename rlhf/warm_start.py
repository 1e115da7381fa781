"""Supervised training before the RL, for models too raw to earn a first reward."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.algorithms.sft import SFT
from rlhf.cluster import Cluster
from rlhf.config import Config
from rlhf.data import Renderer
from rlhf.packing import pack_supervised
from rlhf.recipe import Recipe
from rlhf.reward_model.config import RewardModelConfig
from rlhf.roles.policy import Policy
from rlhf.run_folder import RunFolder
from rlhf.tracking.console import Console

UNUSED_KV_GIB = 0.1  # nothing is generated
REPORT_EVERY = 25
AVERAGED = 8  # steps whose mean loss is reported, and compared with warm_start.until_loss


def warm_start(
    config: Config | RewardModelConfig,
    recipe: Recipe,
    tokenizer: Any,
    checkpoint: Path,
    cluster: Cluster,
    run: RunFolder,
    console: Console,
) -> Path:
    """Train ``checkpoint`` on the recipe's worked examples; the folder of the resulting checkpoint, which may be there
    from before a restart."""
    folder = run.path / "warm_start"
    if folder.exists():
        return folder
    section, sft = config.warm_start, SFT()
    policy = cluster.spawn(
        "warm_start",
        Policy,
        ranks=config.ranks["policy"],
        checkpoint=checkpoint,
        run_folder=run.path,
        model=config.model,
        rollout=config.rollout.model_copy(update={"kv_cache_gib": min(config.rollout.kv_cache_gib, UNUSED_KV_GIB)}),
        train=config.train.model_copy(update={"lr": section.lr, "warmup_steps": 0, "schedule": "constant"}),
        algorithm=sft,
        total_updates=section.steps,
        seed=config.run.seed,
        timeout_s=config.cluster.timeout_s,
    )
    rows = _token_rows(recipe, Renderer(config.data, tokenizer), config.run.seed)
    recent: deque[float] = deque(maxlen=AVERAGED)
    for step in range(1, section.steps + 1):
        console.phase(step, section.steps, "warm start")
        chosen = list(itertools.islice(rows, section.batch_size))
        if not chosen:
            raise ValueError(f"the recipe's warm_start() ended before step {step} of {section.steps}; it must not end")
        batch = pack_supervised(chosen)
        for minibatch in sft.minibatches(batch, config.rollout.max_tokens):
            metrics = policy.update(minibatch)
        recent.append(metrics["policy/loss"])
        loss = sum(recent) / len(recent)
        done = step == section.steps or (len(recent) == AVERAGED and loss <= section.until_loss)
        if done or step % REPORT_EVERY == 0:
            console.line(f"warm start {step}/{section.steps}  loss {loss:.3f}")
        if done:
            break
    policy.publish()
    policy.save(folder)
    cluster.stop(policy)
    return folder


def _token_rows(recipe: Recipe, render: Renderer, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of the prompt, as the RL will show it, and of the answer, which ends with the end-of-sequence token."""
    for prompt, answer in recipe.warm_start(seed):
        _, prompt_ids, _ = render(prompt)
        yield list(prompt_ids), render.answer(answer)
