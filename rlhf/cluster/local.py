"""All roles in this process: for debugging, and for machines where one process is enough."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from rlhf import config
from rlhf.cluster import Role
from rlhf.cluster.worker import Rendezvous, set_rendezvous, set_threads

log = logging.getLogger(__name__)


class LocalCluster:
    def __init__(self, section: config.Cluster) -> None:
        set_threads(section.threads)
        set_rendezvous(Rendezvous.here())

    def spawn(self, name: str, role: Callable[..., Role], *, ranks: int = 1, **kwargs: Any) -> Role:
        if ranks != 1:
            raise ValueError(f"cluster.kind=local runs one rank, not {ranks}; set cluster.kind=ray")
        log.info("role %s: pid %d (local)", name, os.getpid())
        return role(**kwargs)

    def stop(self, role: Any) -> None:
        """The role's memory goes with its last reference."""

    def shutdown(self) -> None:
        """Nothing was started."""
