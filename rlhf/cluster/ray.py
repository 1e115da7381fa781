"""Each rank of each role in a Ray actor of its own. Only this package imports ray."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf import config
from rlhf.cluster import PlacementError, Role
from rlhf.cluster.placement import num_bundles, seats, share
from rlhf.cluster.proxy import Call, Proxy, Ranks, finish
from rlhf.cluster.watchdog import Watchdog, kill_if_alive, resident_bytes, start_time
from rlhf.cluster.worker import Rendezvous, free_port, gpu_peak_bytes, hide_gpus, set_rendezvous, set_threads

log = logging.getLogger(__name__)

BUNDLE_CPU = 0.1  # a fraction, so that many ranks fit a small machine
REPORT_EVERY_S = 10.0
GIB, MIB = 1 << 30, 1 << 20


@ray.remote(max_restarts=0)
class _Worker:
    """A process that holds one rank of a role and runs its methods."""

    def __init__(self, name: str, threads: int, log_file: str, phase_file: str, timeout_s: float) -> None:
        if not ray.get_runtime_context().get_accelerator_ids()["GPU"]:
            hide_gpus()  # Ray leaves a worker that was given none the sight of all
        with open(log_file, "ab", buffering=0) as file:  # whatever libraries print belongs in the role's log too
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", force=True)
        self.watchdog = Watchdog(Path(phase_file))
        self.timeout_s = timeout_s
        set_threads(threads)
        log.info("role %s: pid %d", name, os.getpid())

    def where(self) -> tuple[int, str, int]:
        """Process id, address of the node, and a port that is free on it."""
        return os.getpid(), ray.util.get_node_ip_address(), free_port()

    def usage(self) -> tuple[int, int, int]:
        """Bytes: resident, now and at the peak; and those of a GPU's memory that torch holds, at the peak."""
        return *resident_bytes(), gpu_peak_bytes()

    def build(self, meeting: Rendezvous, role: Callable[..., Any], kwargs: dict[str, Any], timeout_s: float) -> None:
        with self.watchdog.phase("build", timeout_s):
            set_rendezvous(meeting)
            self.role = role(**kwargs)

    def call(self, method: str, arguments: bytes) -> bytes:
        with self.watchdog.phase(f"{method}()", self.timeout_s):
            args, kwargs = cloudpickle.loads(arguments)
            return cloudpickle.dumps(getattr(self.role, method)(*args, **kwargs))

    def stream(self, method: str, arguments: bytes) -> Iterator[bytes]:
        args, kwargs = cloudpickle.loads(arguments)
        items = getattr(self.role, method)(*args, **kwargs)
        for item in self.watchdog.each(f"{method}()", items, self.timeout_s):
            yield cloudpickle.dumps(item)


class RayCluster:
    """Starts a local Ray (or joins the one at RAY_ADDRESS) and reserves the bundles that the roles sit in.

    ``ranks``: data-parallel ranks of the roles that need a device, by name; others get no share of one.
    Raises PlacementError naming what was asked for and what there is.
    """

    def __init__(self, section: config.Cluster, log_folder: Path, ranks: Mapping[str, int]) -> None:
        self.section = section
        self.log_folder = log_folder
        self.seats = seats(section.placement, ranks)
        self.roles: list[Ranks] = []
        self.started: dict[int, str | None] = {}  # processes on this node, and when they began
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
            self.group = _place([bundle] * num_bundles(self.seats), wait_s)
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

    def _start(self, name: str, role: Callable[..., Role], count: int, kwargs: dict[str, Any]) -> Role:
        logs = [(self.log_folder / f"{name}-{rank}.log").resolve() for rank in range(count)]
        phases = [file.with_suffix(".phase") for file in logs]
        for file in phases:
            file.unlink(missing_ok=True)  # an earlier role's of this name
        workers = [
            self._worker(name, bundle, str(logs[rank]), str(phases[rank]))
            for rank, bundle in enumerate(self._bundles(name, count))
        ]
        ranks = Ranks(name, workers, logs, phases)
        self.roles.append(ranks)
        proxy = Proxy(role, ranks, self.section.timeout_s)
        bound = ("cluster.start_timeout_s", self.section.start_timeout_s)
        try:
            (found,) = finish([Call(ranks, "its start", [w.where.remote() for w in workers], bound)])
            pids, nodes, ports = map(list, zip(*found, strict=True))
            ranks.pids, ranks.nodes = pids, nodes
            here = ray.util.get_node_ip_address()
            self.started |= {pid: start_time(pid) for pid, node in zip(pids, nodes, strict=True) if node == here}
            for rank, pid in enumerate(pids):
                log.info("role %s: pid %s (ray, rank %d of %d)", name, pid, rank, count)
            meet_at = nodes[0] if len(set(nodes)) > 1 else "127.0.0.1"
            meetings = [Rendezvous(meet_at, ports[0], rank, count) for rank in range(count)]
            built = [w.build.remote(at, role, kwargs, bound[1]) for w, at in zip(workers, meetings, strict=True)]
            finish([Call(ranks, "its build", built, bound)])
        except BaseException:
            self.stop(proxy)
            raise
        return cast(Role, proxy)

    def _bundles(self, name: str, count: int) -> Sequence[int]:
        if name not in self.seats:
            return [-1] * count  # any
        if len(self.seats[name]) != count:
            raise ValueError(f"role {name}: {count} ranks to start, {len(self.seats[name])} were announced; one number")
        return self.seats[name]

    def _worker(self, name: str, bundle: int, log_file: str, phase_file: str) -> Any:
        device = share(self.section.placement, self.seats) if self.section.gpus and bundle >= 0 else 0.0
        return _Worker.options(  # type: ignore[attr-defined]
            num_cpus=0,  # of its bundle: any number of processes share it
            num_gpus=device,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle),
        ).remote(name, self.section.threads, log_file, phase_file, self.section.timeout_s)

    def together(self, methods: Sequence[Callable[..., Any]], *args: Any) -> list[Any]:
        if self.section.placement == "colocated":
            return [method(*args) for method in methods]
        return finish([cast(Any, method).begin(*args) for method in methods])

    def usage(self) -> dict[str, float]:
        bound = ("cluster.timeout_s", self.section.timeout_s)
        asked = [Call(role, "usage", [w.usage.remote() for w in role.workers], bound) for role in self.roles]
        found: dict[str, float] = {}
        for role, ranks in zip(self.roles, finish(asked), strict=True):
            for rank, (resident, _, _) in enumerate(ranks):
                if len(ranks) > 1:
                    found[f"memory/{role.name}-{rank}_rss_gib"] = resident / GIB
            resident, peak, on_gpu = map(max, zip(*ranks, strict=True))
            found[f"memory/{role.name}_rss_gib"], found[f"memory/{role.name}_peak_gib"] = resident / GIB, peak / GIB
            if on_gpu:
                found[f"memory/{role.name}_gpu_peak_gib"] = on_gpu / GIB
            found[f"memory/{role.name}_sent_mib"] = role.sent / MIB
            found[f"memory/{role.name}_received_mib"] = role.received / MIB
            role.sent = role.received = 0
        total, free = ray.cluster_resources(), ray.available_resources()
        store = "object_store_memory"
        found["memory/object_store_mib"] = (total.get(store, 0.0) - free.get(store, 0.0)) / MIB
        return found

    def stop(self, role: Any) -> None:
        for worker in role._ranks.workers:
            ray.kill(worker)
        if role._ranks in self.roles:
            self.roles.remove(role._ranks)

    def shutdown(self) -> None:
        remove_placement_group(self.group)
        ray.shutdown()
        for pid, began in self.started.items():  # one that is stopped doesn't hear Ray
            kill_if_alive(pid, began)


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
        left = deadline + (REPORT_EVERY_S if enough else 0.0) - time.monotonic()
        if left <= 0:
            remove_placement_group(group)
            raise PlacementError(
                f"Ray can't place {len(bundles)} bundles of {bundles[0]}: {state}. "
                "Lower cluster.ranks, a role's ranks or cluster.gpus, or join a larger cluster through RAY_ADDRESS"
            )
        log.info("waiting for a place, %.0f s at most: %s", left, state)
    return group
