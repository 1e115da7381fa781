"""The driver's side of a role under Ray: its calls are divided over ranks, bounded, and explained when they fail."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError, RayTaskError

from rlhf.cluster import RoleDied
from rlhf.cluster.watchdog import STATES, account, has_dumped, process_state
from rlhf.division import Join

LOG_TAIL = 2000
DUMP_S = 2.0  # for the stacks of a late rank to arrive
PEER_S = 5.0  # for Ray to notice the death of a rank whose peer has lost the connection to it
DEATHS = (RayActorError, OutOfMemoryError, ActorUnschedulableError)


@dataclass
class Ranks:
    """The processes of a role, by rank. ``pids`` and ``nodes`` are filled once they have started."""

    name: str
    workers: list[Any]
    logs: list[Path]
    phases: list[Path]  # where each keeps what it is doing
    pids: list[int] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    sent: int = 0  # bytes of arguments, since it was last asked
    received: int = 0  # and of results

    def label(self, rank: int) -> str:
        which = f" rank {rank}" if len(self.workers) > 1 else ""
        return f"role {self.name}{which} (pid {self.pids[rank] if self.pids else 'unknown'})"

    def unpack(self, blob: bytes) -> Any:
        self.received += len(blob)
        return cloudpickle.loads(blob)

    def state(self, rank: int) -> str:
        """Of the process, where it is on this node."""
        if not self.pids or self.nodes[rank] != ray.util.get_node_ip_address():
            return ""
        return STATES.get(process_state(self.pids[rank]), "")

    def accounts(self) -> str:
        """What every rank was doing, with its stacks."""
        return "\n".join(
            f"{self.label(rank)}: {', '.join(filter(None, [self.state(rank), account(phase)]))}"
            for rank, phase in enumerate(self.phases)
        )


@dataclass
class Call:
    """Something under way on every rank of a role. ``bound``: a key of the config, and its seconds."""

    ranks: Ranks
    doing: str
    references: list[Any]  # by rank
    bound: tuple[str, float]
    join: Join = list
    deadline: float = 0.0

    def __post_init__(self) -> None:
        self.start_clock()

    def start_clock(self) -> None:
        self.deadline = time.monotonic() + self.bound[1]

    @contextmanager
    def explained(self, rank: int) -> Iterator[None]:
        """Around what asks Ray for a result of ``rank``: errors say what they mean."""
        try:
            yield
        except DEATHS as error:
            raise self._death(rank) from error
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):  # bad input: the message is for the user, the traceback isn't
                raise error.cause from None
            for peer in self._dead_peers(rank):  # the connection to it is what failed
                raise self._death(peer) from error
            raise

    def _death(self, rank: int) -> RoleDied:
        file = self.ranks.logs[rank]
        tail = file.read_text(errors="replace")[-LOG_TAIL:] if file.exists() else ""
        return RoleDied(f"{self.ranks.label(rank)} died during {self.doing}; last lines of {file}:\n{tail}")

    def _dead_peers(self, rank: int) -> Iterator[int]:
        pings = {w.where.remote(): peer for peer, w in enumerate(self.ranks.workers) if peer != rank}
        answered = ray.wait(list(pings), num_returns=len(pings), timeout=PEER_S)[0] if pings else []
        for ping in answered:
            try:
                ray.get(ping)
            except DEATHS:
                yield pings[ping]

    def overdue(self, late: Sequence[int]) -> str:
        """Why there is no result, once every late rank had the time to say what it does."""
        key, seconds = self.bound
        end = time.monotonic() + DUMP_S
        while not all(has_dumped(self.ranks.phases[rank]) for rank in late) and time.monotonic() < end:
            time.sleep(0.1)
        names = ", ".join(self.ranks.label(rank) for rank in late)
        return (
            f"{names} did not finish {self.doing} within {seconds:.0f} s ({key}); log: {self.ranks.logs[late[0]]}\n"
            f"{self.ranks.accounts()}"
        )


Place = dict[Any, tuple[Call, int]]  # by reference or stream: whose it is, and of which rank


def finish(calls: Sequence[Call]) -> list[Any]:
    """What the calls return, in their order. The first failure ends the wait: others may wait for what failed.

    Raises RoleDied, TimeoutError, or what the role raised.
    """
    place: Place = {reference: (call, rank) for call in calls for rank, reference in enumerate(call.references)}
    results, left = {}, list(place)
    while left:
        ready = _first_ready(left, place)
        left.remove(ready)
        call, rank = place[ready]
        with call.explained(rank):
            results[ready] = ray.get(ready)
    return [call.join([results[reference] for reference in call.references]) for call in calls]


def _first_ready(left: list[Any], place: Place) -> Any:
    deadline = min(place[reference][0].deadline for reference in left)
    ready, _ = ray.wait(left, timeout=max(0.0, deadline - time.monotonic()))
    if ready:
        return ready[0]
    late: dict[int, tuple[Call, list[int]]] = {}
    for call, rank in (place[reference] for reference in left):
        late.setdefault(id(call), (call, []))[1].append(rank)
    raise TimeoutError("\n".join(call.overdue(ranks) for call, ranks in late.values()))


class Method:
    """A method of a role: its call is divided over the ranks as the role says (``rlhf.division``), and waits."""

    def __init__(self, name: str, function: Callable[..., Any], ranks: Ranks, timeout_s: float) -> None:
        self.name = name
        self.function = function
        self.ranks = ranks
        self.bound = ("cluster.timeout_s", timeout_s)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if inspect.isgeneratorfunction(self.function):
            return self._stream(args, kwargs)
        return finish([self.begin(*args, **kwargs)])[0]

    def begin(self, *args: Any, **kwargs: Any) -> Call:
        """The call under way; :func:`finish` waits for it."""
        shares, join = self._pack(args, kwargs)
        references = [w.call.remote(self.name, share) for w, share in zip(self.ranks.workers, shares, strict=True)]

        def unpack_and_join(blobs: list[bytes]) -> Any:
            return join([self.ranks.unpack(blob) for blob in blobs])

        return Call(self.ranks, f"{self.name}()", references, self.bound, unpack_and_join)

    def _stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
        """What the ranks yield, as it comes; the bound is on the wait for the next item."""
        shares, _ = self._pack(args, kwargs)
        streams = [
            w.stream.options(num_returns="streaming").remote(self.name, share)
            for w, share in zip(self.ranks.workers, shares, strict=True)
        ]
        call = Call(self.ranks, f"{self.name}()", streams, self.bound)
        place: Place = {stream: (call, rank) for rank, stream in enumerate(streams)}
        left = list(streams)
        while left:
            call.start_clock()
            stream = _first_ready(left, place)
            with call.explained(place[stream][1]):
                item = next(stream, None)
                blob = None if item is None else ray.get(item)
            if blob is None:
                left.remove(stream)
            else:
                yield self.ranks.unpack(blob)

    def _pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[bytes], Join]:
        """What each rank is sent, pickled here and not by Ray, so that it can be counted; and how to join results."""
        count = len(self.ranks.workers)
        if count > 1 and hasattr(self.function, "divide"):
            shares, join = self.function.divide(count, *args, **kwargs)
            blobs = [cloudpickle.dumps(((), share)) for share in shares]
        else:
            blobs, join = [cloudpickle.dumps((args, kwargs))] * count, lambda results: results[0]
        self.ranks.sent += sum(map(len, blobs))
        return blobs, join


class Proxy:
    """Stands for a role in other processes, and has its methods."""

    def __init__(self, role: Callable[..., Any], ranks: Ranks, timeout_s: float) -> None:
        self._role = role
        self._ranks = ranks
        self._timeout_s = timeout_s

    def __getattr__(self, name: str) -> Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(name, getattr(self._role, name), self._ranks, self._timeout_s)
