"""A run whose role dies or hangs goes on by itself, a bounded number of times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from rlhf.checkpoint import Checkpoints
from rlhf.cluster import Cluster, RoleDied, make_cluster
from rlhf.config import Config
from rlhf.reward_model.config import RewardModelConfig
from rlhf.run_folder import RunFolder
from rlhf.tracking.console import Console
from rlhf.weights import check_same_weights, fingerprint

Found = TypeVar("Found")


def with_restarts(
    config: Config | RewardModelConfig,
    folders: Mapping[str, Path],
    run: RunFolder,
    console: Console,
    train: Callable[[Cluster], Found],
) -> Found:
    """``train`` on a cluster of its own, and on another one whenever a role has died or hung; each goes on from the
    last checkpoint.

    folders: of the weights that roles start from, by key. Raises ValueError where those have changed meanwhile, and
    what ``train`` raises.
    """
    checkpoints = Checkpoints(run.path, config.checkpoint)
    for restart in itertools.count(1):
        if restart > 1:
            check_same_weights(run.path, fingerprint(folders))
        if checkpoints.last_step:
            console.line(f"goes on after step {checkpoints.last_step}")
        cluster = make_cluster(config.cluster, run.path / "roles", config.ranks)
        try:
            return train(cluster)
        except (RoleDied, TimeoutError) as error:
            if restart > config.checkpoint.max_restarts:
                raise
            console.line(f"{error}\nrestart {restart} of at most {config.checkpoint.max_restarts}")
        finally:
            cluster.shutdown()
    raise AssertionError("unreachable")
