"""A Ray whose GPUs others hold: a run waits for its place, says what for, and starts or gives up in time."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from command_line import ROOT
from ray.util.placement_group import placement_group, remove_placement_group

from rlhf.cluster import PlacementError
from rlhf.cluster import ray as module
from rlhf.cluster.ray import RayCluster
from rlhf.config import Cluster


@pytest.fixture(autouse=True)
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray that believes in them and is there already; clusters join it. It reports each second."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the workers
    context = ray.init(address="local", num_cpus=2, num_gpus=3, include_dashboard=False, log_to_driver=False)
    monkeypatch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
    monkeypatch.setattr(module, "REPORT_EVERY_S", 1.0)
    yield
    ray.shutdown()


class WhenItWaits(logging.Handler):
    """Takes down what a cluster says while it waits, and gives the place back that it waits for."""

    def __init__(self, place: ray.util.placement_group.PlacementGroup) -> None:
        super().__init__()
        self.place = place
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("waiting"):
            self.said.append(record.getMessage())
            remove_placement_group(self.place)


def test_a_run_waits_for_a_place_and_takes_it_or_gives_up_in_time(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The first one gets the GPUs that somebody else had; a second one waits for them in vain."""
    caplog.set_level(logging.INFO, "rlhf.cluster.ray")
    others = placement_group([{"GPU": 2}])
    assert others.wait(60)
    handler = WhenItWaits(others)
    module.log.addHandler(handler)
    try:
        cluster = RayCluster(section(60), tmp_path, {"policy": 2})
    finally:
        module.log.removeHandler(handler)
    (left,) = seconds_left(handler.said)
    assert 30 < left <= 60
    role = cluster.spawn("policy", threading.Event, ranks=2)
    assert role.is_set() is False

    caplog.clear()
    begin = time.monotonic()
    with pytest.raises(PlacementError, match=r"place 2 bundles of .*GPU: 2 asked for, 1 free of 3.*RAY_ADDRESS"):
        RayCluster(section(3), tmp_path, {"policy": 2})
    assert 4 <= time.monotonic() - begin < 60  # three seconds and, since Ray has enough, one report more
    said = seconds_left([message for message in caplog.messages if message.startswith("waiting")])
    assert len(said) >= 2 and said[0] <= 3 and said == sorted(said, reverse=True)


def section(wait_s: float) -> Cluster:
    return Cluster(kind="ray", gpus=2, threads=1, start_timeout_s=wait_s)


def seconds_left(said: list[str]) -> list[int]:
    """How long each line gives the wait at most; all say what is asked for and what is free."""
    pattern = r"waiting for a place, (\d+) s at most: CPU: 0\.2 asked for, \S+ free of 2; GPU: 2 asked for, 1 free of 3"
    return [int(re.fullmatch(pattern, message)[1]) for message in said]  # type: ignore[index]
