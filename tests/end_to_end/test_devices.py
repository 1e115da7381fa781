"""Which role sees which device, on a Ray that believes in three GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray
from command_line import ROOT
from ray import cloudpickle

from rlhf.cluster import PlacementError
from rlhf.cluster.ray import RayCluster
from rlhf.config import Cluster

pytestmark = pytest.mark.slow


class Seat:
    def device(self) -> str:
        return os.environ.get("CUDA_VISIBLE_DEVICES", "unset")


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that is there already; the cluster under test joins it, and ends it."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    ray.init(address="local", num_gpus=3, include_dashboard=False, log_to_driver=False)


def devices(placement: str, ranks: dict[str, int], folder: Path) -> dict[str, list[str]]:
    """What each rank of each role sees, and a function that asks for nothing."""
    section = Cluster.model_validate({"kind": "ray", "gpus": 3, "threads": 1, "placement": placement})
    cluster: Any = RayCluster(section, folder, ranks)
    try:
        roles = {name: cluster.spawn(name, Seat, ranks=count) for name, count in {**ranks, "reward": 1}.items()}
        return {name: [device_of(worker) for worker in role._ranks.workers] for name, role in roles.items()}
    finally:
        cluster.shutdown()


def device_of(worker: Any) -> str:
    nothing = cloudpickle.dumps(((), {}))
    return str(cloudpickle.loads(ray.get(worker.call.remote("device", nothing), timeout=60)))


@pytest.mark.usefixtures("three_gpus")
def test_separate_ranks_have_a_gpu_each(tmp_path: Path) -> None:
    seen = devices("separate", {"policy": 2, "critic": 1}, tmp_path)
    assert sorted([*seen["policy"], *seen["critic"]]) == ["0", "1", "2"]
    assert seen["reward"] == [""]  # placed, though every GPU is taken, and sees none of them


@pytest.mark.usefixtures("three_gpus")
def test_colocated_ranks_share_theirs(tmp_path: Path) -> None:
    seen = devices("colocated", {"policy": 3, "critic": 3, "reference": 1}, tmp_path)
    assert sorted(seen["policy"]) == ["0", "1", "2"]
    assert seen["critic"] == seen["policy"] and seen["reference"] == seen["policy"][:1]


@pytest.mark.usefixtures("three_gpus")
def test_nine_roles_share_a_gpu(tmp_path: Path) -> None:
    seen = devices("colocated", {"policy": 3, **{f"judge-{i}": 1 for i in range(8)}}, tmp_path)
    assert sorted(seen["policy"]) == ["0", "1", "2"]
    assert all(seen[f"judge-{i}"] == seen["policy"][:1] for i in range(8))


@pytest.mark.usefixtures("three_gpus")
def test_more_ranks_than_gpus_are_refused_with_what_there_is(tmp_path: Path) -> None:
    section = Cluster(kind="ray", gpus=4, threads=1, placement="separate")
    with pytest.raises(PlacementError, match="GPU: 4 asked for, 3 free of 3"):
        RayCluster(section, tmp_path, {"policy": 3, "critic": 1})
