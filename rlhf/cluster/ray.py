"""Each rank of each role in a Ray actor of its own. The only importer of ray."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf import config
from rlhf.cluster import PlacementError, Role, RoleDied
from rlhf.cluster.worker import Rendezvous, free_port, set_rendezvous, set_threads

log = logging.getLogger(__name__)

ROLES_PER_BUNDLE = 8  # rank r of every role sits in bundle r, and colocated roles take turns there
BUNDLE_CPU = 0.1  # a fraction, so that many ranks fit a small machine
LOG_TAIL = 2000
REPORT_EVERY_S = 10.0


@ray.remote(max_restarts=0)
class _Worker:
    """A process that holds one rank of a role and runs its methods."""

    def __init__(self, name: str, threads: int, log_file: str) -> None:
        with open(log_file, "ab", buffering=0) as file:  # whatever libraries print belongs in the role's log too
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
        set_threads(threads)
        log.info("role %s: pid %d", name, os.getpid())

    def where(self) -> tuple[int, str, int]:
        """Process id, address of the node, and a port that is free on it."""
        return os.getpid(), ray.util.get_node_ip_address(), free_port()

    def build(self, meeting: Rendezvous, role: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        set_rendezvous(meeting)
        self.role = role(**kwargs)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return getattr(self.role, method)(*args, **kwargs)

    def stream(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        yield from getattr(self.role, method)(*args, **kwargs)


class _Proxy:
    """Stands for a role in other processes: a method call is divided over the ranks and waits, with a bound."""

    def __init__(self, name: str, role: Callable[..., Any], workers: list[Any], logs: list[Path], wait_s: float):
        self._name = name
        self._role = role
        self._workers = workers
        self._logs = logs
        self._wait_s = wait_s
        self._pids: list[int | str] = ["unknown"] * len(workers)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            ranks = len(self._workers)
            function = getattr(self._role, method)
            calls, join = [(args, kwargs)] * ranks, lambda results: results[0]
            if ranks > 1 and hasattr(function, "divide"):
                shares, join = function.divide(ranks, *args, **kwargs)
                calls = [((), share) for share in shares]
            if inspect.isgeneratorfunction(function):
                return self._stream(method, calls)
            pairs = zip(self._workers, calls, strict=True)
            return join(self._gather(method, [w.call.remote(method, *call) for w, call in pairs], self._wait_s))

        return call

    def _stream(self, method: str, calls: list[Any]) -> Iterator[Any]:
        """What the ranks yield, as it comes."""
        pairs = zip(self._workers, calls, strict=True)
        streams = [w.stream.options(num_returns="streaming").remote(method, *call) for w, call in pairs]
        rank_of = {stream: rank for rank, stream in enumerate(streams)}
        while streams:
            stream = self._next(method, streams, rank_of, self._wait_s)
            try:
                item = next(stream)
            except StopIteration:
                streams.remove(stream)
            else:
                yield self._get(method, item, rank_of[stream])

    def _gather(self, doing: str, references: list[Any], timeout_s: float) -> list[Any]:
        """Results in the order of ranks; the first failure ends the wait, since the others may wait for it."""
        deadline = time.monotonic() + timeout_s
        rank_of = {reference: rank for rank, reference in enumerate(references)}
        left = list(references)
        results: dict[int, Any] = {}
        while left:
            ready = self._next(doing, left, rank_of, timeout_s, deadline - time.monotonic())
            left.remove(ready)
            rank = rank_of[ready]
            results[rank] = self._get(doing, ready, rank)
        return [results[rank] for rank in range(len(references))]

    def _next(
        self, doing: str, left: list[Any], rank_of: dict[Any, int], timeout_s: float, remaining_s: float | None = None
    ) -> Any:
        ready, _ = ray.wait(left, timeout=max(0.0, timeout_s if remaining_s is None else remaining_s))
        if not ready:
            late = ", ".join(self._label(rank_of[reference]) for reference in left)
            raise TimeoutError(
                f"{late} did not finish {doing}() within {timeout_s:.0f} s (cluster.timeout_s); "
                f"log: {self._logs[rank_of[left[0]]]}"
            )
        return ready[0]

    def _get(self, doing: str, reference: Any, rank: int) -> Any:
        try:
            return ray.get(reference)
        except (RayActorError, OutOfMemoryError, ActorUnschedulableError) as error:
            file = self._logs[rank]
            tail = file.read_text(errors="replace")[-LOG_TAIL:] if file.exists() else ""
            raise RoleDied(f"{self._label(rank)} died during {doing}(); last lines of {file}:\n{tail}") from error
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):  # bad input: the message is for the user, the traceback isn't
                raise error.cause from None
            raise

    def _label(self, rank: int) -> str:
        which = f" rank {rank}" if len(self._workers) > 1 else ""
        return f"role {self._name}{which} (pid {self._pids[rank]})"


class RayCluster:
    """Starts a local Ray (or joins the one at RAY_ADDRESS) and reserves one bundle per data-parallel rank.

    Raises PlacementError naming what was asked for and what there is.
    """

    def __init__(self, section: config.Cluster, log_folder: Path) -> None:
        self.section = section
        self.log_folder = log_folder
        log_folder.mkdir(parents=True, exist_ok=True)
        set_threads(section.threads)
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            ignore_reinit_error=True,
        )
        bundle = {"CPU": BUNDLE_CPU, **({"GPU": 1.0} if section.gpus else {})}
        try:
            # A Ray of our own doesn't grow: what it lacks now it will lack in five minutes.
            wait_s = 0.0 if address == "local" else section.start_timeout_s
            self.group = _place([bundle] * section.num_ranks, wait_s)
        except PlacementError:
            ray.shutdown()
            raise

    def spawn(self, name: str, role: Callable[..., Role], *, ranks: int = 1, **kwargs: Any) -> Role:
        try:
            return self._start(name, role, ranks, kwargs)
        except RayTaskError as error:
            if "EADDRINUSE" not in str(error):
                raise
            log.warning("role %s: the port of its rendezvous was taken meanwhile; once more", name)
            return self._start(name, role, ranks, kwargs)

    def _start(self, name: str, role: Callable[..., Role], ranks: int, kwargs: dict[str, Any]) -> Role:
        logs = [(self.log_folder / f"{name}-{rank}.log").resolve() for rank in range(ranks)]
        workers = [
            _Worker.options(  # type: ignore[attr-defined]
                num_cpus=BUNDLE_CPU / ROLES_PER_BUNDLE,
                num_gpus=(1.0 if self.section.gpus else 0.0) / ROLES_PER_BUNDLE,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank),
            ).remote(name, self.section.threads, str(logs[rank]))
            for rank in range(ranks)
        ]
        proxy = _Proxy(name, role, workers, logs, self.section.timeout_s)
        try:
            timeout_s = self.section.start_timeout_s
            pids, nodes, ports = zip(
                *proxy._gather("start", [w.where.remote() for w in workers], timeout_s), strict=True
            )
            proxy._pids = list(pids)
            for rank, pid in enumerate(pids):
                log.info("role %s: pid %s (ray, rank %d of %d)", name, pid, rank, ranks)
            meet_at = nodes[0] if len(set(nodes)) > 1 else "127.0.0.1"
            meetings = [Rendezvous(meet_at, ports[0], rank, ranks) for rank in range(ranks)]
            built = [w.build.remote(at, role, kwargs) for w, at in zip(workers, meetings, strict=True)]
            proxy._gather("build", built, timeout_s)
        except BaseException:
            self.stop(proxy)
            raise
        return cast(Role, proxy)

    def stop(self, role: Any) -> None:
        for worker in role._workers:
            ray.kill(worker)

    def shutdown(self) -> None:
        remove_placement_group(self.group)
        ray.shutdown()


def _place(bundles: list[dict[str, float]], wait_s: float) -> PlacementGroup:
    """Reserve the bundles, saying now and then what is waited for."""
    asked: dict[str, float] = {}
    for bundle in bundles:
        asked = {name: asked.get(name, 0.0) + amount for name, amount in bundle.items()}
    group = placement_group(bundles, strategy="PACK")
    deadline = time.monotonic() + wait_s
    while not group.wait(min(REPORT_EVERY_S, max(1.0, deadline - time.monotonic()))):
        total, free = ray.cluster_resources(), ray.available_resources()
        state = "; ".join(
            f"{name}: {amount:g} asked for, {free.get(name, 0.0):g} free of {total.get(name, 0.0):g}"
            for name, amount in asked.items()
        )
        enough = all(total.get(name, 0.0) >= amount for name, amount in asked.items())
        if time.monotonic() >= deadline + (REPORT_EVERY_S if enough else 0.0):
            remove_placement_group(group)
            raise PlacementError(
                f"Ray can't place {len(bundles)} bundles of {bundles[0]}: {state}. "
                "Lower cluster.ranks or cluster.gpus, or join a larger cluster through RAY_ADDRESS"
            )
        log.info("waiting for a place, %.0f s at most: %s", deadline - time.monotonic(), state)
    return group
