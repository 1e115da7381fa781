"""Each role in a Ray actor of its own. The only importer of ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, OutOfMemoryError, RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf import config
from rlhf.cluster import Role, RoleDied
from rlhf.cluster.worker import set_rendezvous, set_threads

log = logging.getLogger(__name__)

MAX_ROLES = 8  # bundles reserved; each takes a fraction of a CPU, since colocated roles take turns
LOG_TAIL = 2000


@ray.remote(max_restarts=0)
class _Worker:
    """A process that holds one role and runs its methods."""

    def __init__(self, name: str, threads: int, log_file: str) -> None:
        with open(log_file, "ab", buffering=0) as file:  # whatever libraries print belongs in the role's log too
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
        set_threads(threads)
        set_rendezvous()
        log.info("role %s: pid %d", name, os.getpid())

    def pid(self) -> int:
        return os.getpid()

    def build(self, role: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self.role = role(**kwargs)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(self.role, method)(*args, **kwargs)


class _Proxy:
    """Stands for a role in another process: any method call goes there and waits, with a bound."""

    def __init__(self, name: str, worker: Any, log_file: Path, timeout_s: float) -> None:
        self._name = name
        self._worker = worker
        self._log_file = log_file
        self._timeout_s = timeout_s
        self._pid: int | str = "unknown"

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._wait(method, self._worker.call.remote(method, args, kwargs), self._timeout_s)

        return call

    def _wait(self, doing: str, reference: Any, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except GetTimeoutError:
            raise TimeoutError(
                f"role {self._name} (pid {self._pid}) did not finish {doing}() within {timeout_s:.0f} s "
                f"(cluster.timeout_s); its log: {self._log_file}"
            ) from None
        except (RayActorError, OutOfMemoryError, ActorUnschedulableError) as error:
            tail = self._log_file.read_text(errors="replace")[-LOG_TAIL:] if self._log_file.exists() else ""
            raise RoleDied(
                f"role {self._name} (pid {self._pid}) died during {doing}(); last lines of {self._log_file}:\n{tail}"
            ) from error


class RayCluster:
    """Starts a local Ray (or joins the one at RAY_ADDRESS) and reserves one placement group for all roles.

    Raises TimeoutError naming what was asked for when the group can't be placed in time.
    """

    def __init__(self, section: config.Cluster, log_folder: Path) -> None:
        self.section = section
        self.log_folder = log_folder
        log_folder.mkdir(parents=True, exist_ok=True)
        set_threads(section.threads)
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            ignore_reinit_error=True,
        )
        self.share = 1.0 / MAX_ROLES
        bundles = [{"CPU": self.share, **({"GPU": section.gpus * self.share} if section.gpus else {})}] * MAX_ROLES
        self.group = placement_group(bundles, strategy="PACK")
        if not self.group.wait(section.start_timeout_s):
            there = f"available: {ray.available_resources()}, in all: {ray.cluster_resources()}"
            self.shutdown()
            raise TimeoutError(f"Ray could not place {bundles} within {section.start_timeout_s:.0f} s; {there}")
        self.free = list(range(MAX_ROLES))
        self.bundle_of: dict[int, int] = {}

    def spawn(self, name: str, role: Callable[..., Role], **kwargs: Any) -> Role:
        log_file = (self.log_folder / f"{name}-0.log").resolve()
        bundle = self.free.pop(0)
        options = {
            "num_cpus": self.share,
            "num_gpus": self.section.gpus * self.share,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle),
        }
        worker = _Worker.options(**options).remote(name, self.section.threads, str(log_file))  # type: ignore[attr-defined]
        proxy = _Proxy(name, worker, log_file, self.section.timeout_s)
        proxy._pid = proxy._wait("start", worker.pid.remote(), self.section.start_timeout_s)
        log.info("role %s: pid %s (ray, bundle %d)", name, proxy._pid, bundle)
        proxy._wait("build", worker.build.remote(role, kwargs), self.section.start_timeout_s)
        self.bundle_of[id(proxy)] = bundle
        return cast(Role, proxy)

    def stop(self, role: Any) -> None:
        ray.kill(role._worker)
        self.free.append(self.bundle_of.pop(id(role)))

    def shutdown(self) -> None:
        remove_placement_group(self.group)
        ray.shutdown()
