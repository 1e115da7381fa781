"""All roles in this process: for debugging, and for machines where one process is enough."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from rlhf import config
from rlhf.cluster import Role
from rlhf.cluster.watchdog import Watchdog
from rlhf.cluster.worker import Rendezvous, set_rendezvous, set_threads

log = logging.getLogger(__name__)


class LocalCluster:
    """A call that takes longer than ``cluster.timeout_s`` leaves its stacks in ``local.phase``, and goes on: nobody is
    there to end it.

    Raises ValueError where ``cluster.gpus`` is 0 and there is a GPU, which roles would use.
    """

    def __init__(self, section: config.Cluster, log_folder: Path) -> None:
        self.section = section
        if torch.cuda.is_available() and not section.gpus:
            raise ValueError(
                "cluster.kind=local with cluster.gpus=0 would use this machine's GPU: set cluster.gpus=1, or leave it "
                "alone by CUDA_VISIBLE_DEVICES="
            )
        set_threads(section.threads)
        set_rendezvous(Rendezvous.here())
        log_folder.mkdir(parents=True, exist_ok=True)
        self.watchdog = Watchdog(log_folder / "local.phase")

    def spawn(self, name: str, role: Callable[..., Role], *, ranks: int = 1, **kwargs: Any) -> Role:
        if ranks != 1:
            raise ValueError(f"cluster.kind=local runs one rank, not {ranks}; set cluster.kind=ray")
        log.info("role %s: pid %d (local)", name, os.getpid())
        with self.watchdog.phase(f"build of {name}", self.section.start_timeout_s):
            built = role(**kwargs)
        return cast(Role, _Watched(name, built, self.watchdog, self.section.timeout_s))

    def together(self, methods: Sequence[Callable[..., Any]], *args: Any) -> list[Any]:
        return [method(*args) for method in methods]

    def usage(self) -> dict[str, float]:
        """The driver's memory is all there is."""
        return {}

    def stop(self, role: Any) -> None:
        """The role's memory goes with its last reference."""

    def shutdown(self) -> None:
        """Nothing was started."""


class _Watched:
    """A role whose every call is a phase."""

    def __init__(self, name: str, role: Any, watchdog: Watchdog, timeout_s: float) -> None:
        self._name = name
        self._role = role
        self._watchdog = watchdog
        self._timeout_s = timeout_s

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._role, name)
        if not inspect.ismethod(found):
            return found
        phase = f"{self._name}.{name}()"

        def call(*args: Any, **kwargs: Any) -> Any:
            if inspect.isgeneratorfunction(found):
                return self._watchdog.each(phase, found(*args, **kwargs), self._timeout_s)
            with self._watchdog.phase(phase, self._timeout_s):
                return found(*args, **kwargs)

        return call
