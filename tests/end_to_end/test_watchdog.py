"""A role that hangs, stops or dies is explained: which one, on which rank, doing what, and where in the code."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from command_line import ROOT

from rlhf.cluster import RoleDied
from rlhf.cluster.local import LocalCluster
from rlhf.cluster.watchdog import start_time
from rlhf.config import Cluster

TIMEOUT_S = 3.0
HANG_S = 60.0


class Fragile:
    """Does on demand what a role should not. ``dies``: while it is built."""

    def __init__(self, group: bool = False, dies: bool = False) -> None:
        if dies:
            print("last words of the build", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if group:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=HANG_S))

    def sleep(self) -> None:
        time.sleep(HANG_S)

    def hold_the_lock(self) -> None:
        """Hang in C without giving Python's lock back, as a bad extension does."""
        ctypes.PyDLL(None).sleep(int(HANG_S))

    def meet(self, absent: int) -> None:
        """A collective that one rank doesn't come to."""
        if int(os.environ["RANK"]) == absent:
            time.sleep(HANG_S)
        torch.distributed.all_reduce(torch.ones(1))

    def meet_and_die(self) -> None:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(1))

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def some(self, count: int, then: str) -> Iterator[int]:
        """``count`` numbers, then the end, or a hang, or death."""
        yield from range(count)
        if then == "hang":
            time.sleep(HANG_S)
        if then == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    def be_two(self, folder: Path, wait_s: float) -> int:
        """Wait until another role is in the same call; how many came."""
        (folder / str(os.getpid())).touch()
        deadline = time.monotonic() + wait_s
        while (count := len(list(folder.iterdir()))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        return count

    def pid(self) -> int:
        return os.getpid()

    def echo(self, column: torch.Tensor) -> torch.Tensor:
        return column + 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from rlhf.cluster.ray import RayCluster

    os.environ["PYTHONPATH"] = f"{ROOT}:{Path(__file__).parent}"
    section = Cluster(kind="ray", threads=1, timeout_s=TIMEOUT_S, placement="separate")
    cluster = RayCluster(section, tmp_path_factory.mktemp("roles"), {})
    yield cluster
    started = dict(cluster.started)
    cluster.shutdown()
    del os.environ["PYTHONPATH"]
    deadline = time.monotonic() + 20
    while alive := [pid for pid, began in started.items() if start_time(pid) == began]:
        assert time.monotonic() < deadline, f"processes {alive} outlived their cluster"
        time.sleep(0.1)
    assert len(started) > 5


@pytest.fixture
def spawn(cluster: Any) -> Iterator[Callable[..., Any]]:
    """Starts a role for a test."""
    roles: list[Any] = []

    def start(name: str, **kwargs: Any) -> Any:
        roles.append(cluster.spawn(name, Fragile, **kwargs))
        return roles[-1]

    yield start
    for role in roles:
        cluster.stop(role)


def test_a_hanging_call_leaves_its_stack_even_when_it_holds_pythons_lock(spawn: Callable[..., Any]) -> None:
    role = spawn("sleeper")
    pid = role.pid()
    begin = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        role.hold_the_lock()
    assert TIMEOUT_S <= time.monotonic() - begin < HANG_S / 2
    first, second, *stacks = str(caught.value).splitlines()
    late = rf"role sleeper \(pid {pid}\) did not finish hold_the_lock\(\) within 3 s \(cluster.timeout_s\); log: "
    assert re.match(late, first)
    now = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"role sleeper \(pid {pid}\): sleeping, hold_the_lock\(\) since {now}", second)
    assert any(re.search(r'File ".*test_watchdog.py", line \d+ in hold_the_lock$', line) for line in stacks)


def test_a_collective_that_one_rank_misses_shows_both_stacks(spawn: Callable[..., Any]) -> None:
    role = spawn("pair", ranks=2, group=True)
    with pytest.raises(
        TimeoutError, match=r"role pair rank 0 .*, role pair rank 1 .* did not finish meet\(\)"
    ) as caught:
        role.meet(absent=1)
    first, second = str(caught.value).split("role pair rank 1")[-2:]
    frames = [re.findall(r'File ".*test_watchdog.py", line (\d+) in meet', part) for part in (first, second)]
    assert len(frames[0]) == len(frames[1]) == 1
    assert int(frames[0][0]) == int(frames[1][0]) + 1  # one line further: in the collective
    assert "all_reduce" in first and "all_reduce" not in second


def test_a_generator_is_bounded_item_by_item(spawn: Callable[..., Any]) -> None:
    role = spawn("stream")
    assert list(role.some(3, then="end")) == [0, 1, 2]
    items = role.some(2, then="hang")
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(TimeoutError, match=r"role stream .* did not finish some\(\)(.|\n)*line \d+ in some"):
        next(items)


def test_a_stopped_process_is_named_as_such(spawn: Callable[..., Any]) -> None:
    """The fixture sees to it that it doesn't outlive its cluster."""
    role = spawn("stopped")
    pid = role.pid()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(
        TimeoutError, match=rf"role stopped \(pid {pid}\): STOPPED by a signal .*, idle after pid\(\) since"
    ):
        role.pid()


@pytest.mark.slow
def test_death_is_noticed_in_a_build_and_in_a_call(spawn: Callable[..., Any]) -> None:
    said = r"role mortal \(pid \d+\) died during its build; last lines of .*\n(.|\n)*last words of the build"
    with pytest.raises(RoleDied, match=said):
        spawn("mortal", dies=True)
    with pytest.raises(RoleDied, match=r"role mortal \(pid \d+\) died during die\(\)"):
        spawn("mortal").die()


def test_death_is_noticed_between_the_items_of_a_generator(spawn: Callable[..., Any]) -> None:
    items = spawn("mortal").some(2, then="die")
    with pytest.raises(RoleDied, match=r"role mortal \(pid \d+\) died during some\(\)"):
        list(items)


def test_the_rank_that_died_is_named_not_the_one_that_lost_it(spawn: Callable[..., Any]) -> None:
    role = spawn("pair", ranks=2, group=True)
    with pytest.raises(RoleDied, match=r"role pair rank 1 \(pid \d+\) died during meet_and_die\(\)"):
        role.meet_and_die()


def test_separate_roles_work_at_the_same_time_and_colocated_ones_take_turns(
    cluster: Any, spawn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [spawn("left"), spawn("right")]
    (tmp_path / "separate").mkdir()
    assert cluster.together([role.be_two for role in pair], tmp_path / "separate", TIMEOUT_S / 2) == [2, 2]
    (tmp_path / "colocated").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(cluster, "section", cluster.section.model_copy(update={"placement": "colocated"}))
        assert cluster.together([role.be_two for role in pair], tmp_path / "colocated", 0.1) == [1, 2]
    pids = [role.pid() for role in pair]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(RoleDied, match=rf"role right \(pid {pids[1]}\) died during be_two\(\)"):
        cluster.together([role.be_two for role in pair], tmp_path / "separate", 0.1)
    said = rf"role left \(pid {pids[0]}\) did not finish sleep\(\) within 3 s"
    with pytest.raises(TimeoutError, match=said):
        cluster.together([pair[0].sleep])


def test_what_travels_is_counted_and_nothing_stays_in_the_store(cluster: Any, spawn: Callable[..., Any]) -> None:
    role = spawn("echo")
    column = torch.zeros(2 << 20)  # 8 MiB
    cluster.usage()
    for calls in (1, 20):
        for _ in range(calls):
            assert float(role.echo(column)[0]) == 1.0
        usage = cluster.usage()
        for way in ("sent", "received"):
            assert 8 * calls <= usage[f"memory/echo_{way}_mib"] < 8 * calls + 0.01 * calls
        assert 0.05 < usage["memory/echo_rss_gib"] <= usage["memory/echo_peak_gib"] < 4
    assert stored(cluster, lambda mib: mib < 8) < 8
    kept = ray.put(column.numpy())  # the reading can see what stays
    assert stored(cluster, lambda mib: mib >= 8) >= 8
    del kept
    assert stored(cluster, lambda mib: mib < 8) < 8
    assert cluster.usage()["memory/echo_sent_mib"] == 0


def stored(cluster: Any, until: Callable[[float], bool]) -> float:
    """MiB in the store, which Ray reports with a delay."""
    deadline = time.monotonic() + 10
    while not until(mib := cluster.usage()["memory/object_store_mib"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return mib


def test_a_local_call_that_takes_too_long_leaves_its_stack_and_goes_on(tmp_path: Path) -> None:
    class Slow:
        def nap(self) -> str:
            time.sleep(0.6)
            return (tmp_path / "local.phase").read_text()

        def naps(self) -> Iterator[str]:
            yield "at once"
            yield self.nap()

    cluster = LocalCluster(Cluster(timeout_s=0.3, threads=1), tmp_path)
    role = cluster.spawn("slow", Slow)
    assert re.match(r"slow\.nap\(\) since .*\nTimeout (.|\n)*line \d+ in nap\n", role.nap())
    first, second = role.naps()
    assert first == "at once" and re.match(r"slow\.naps\(\) since .*\nTimeout ", second)
    assert (tmp_path / "local.phase").read_text().startswith("idle after slow.naps()")
    assert len((tmp_path / "local.phase").read_text().splitlines()) == 1
