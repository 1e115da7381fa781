"""Both commands of `make quickstart-ppo`, cut to seconds: five roles that sit together, apart, and in one process."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray
from command_line import ROOT, metrics_of
from test_ray import fixed

from rlhf.__main__ import main
from rlhf.cluster.ray import RayCluster

SMALL = ["cluster.threads=1", "tracking.wandb=disabled"]
PAIRS = ["warm_start.steps=0", "pairs.steps=2", "pairs.batch_size=16", "eval.pairs=16", "eval.every=0"]
SUMS = [
    "warm_start.steps=1",
    "warm_start.batch_size=8",
    "run.steps=3",
    "rollout.prompts_per_step=8",
    "rollout.kv_cache_gib=0.02",
    "eval.every=2",
    "eval.prompts=16",
]
SUMS += ["algorithm.critic_warmup_steps=1"]  # as packaged, the critic learns alone for longer than this run takes
ROLES = {"policy", "reward", "reward_model", "reference", "critic"}

Places = dict[str, tuple[str | None, int]]  # by role: the placement group that it says it is in, and its size


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    """Of the roles at work when a run ends."""
    found: Places = {}
    shutdown = RayCluster.shutdown

    def asking(self: RayCluster) -> None:
        for role in self.roles:
            (worker,) = role.workers
            group = worker.__ray_call__.remote(lambda _: ray.get_runtime_context().get_placement_group_id())
            found[role.name] = ray.get(group), self.group.bundle_count
        shutdown(self)

    monkeypatch.setattr(RayCluster, "shutdown", asking)
    return found


def quickstart() -> tuple[list[str], list[str]]:
    """The words of the two commands, after `rlhf`."""
    target = re.search(r"^quickstart-ppo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert target
    first, second = ([command, str(ROOT / config)] for _, command, config in map(str.split, target[1].splitlines()))
    return first, second


def weights_of(folder: Path) -> dict[str, bytes]:
    latest = (folder / "checkpoints" / "latest").resolve()
    return {str(file.relative_to(latest)): file.read_bytes() for file in latest.rglob("*.safetensors")}


def test_five_roles_of_the_ppo_quickstart_give_the_same_bits_wherever_they_sit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: Places
) -> None:
    monkeypatch.chdir(tmp_path)  # the second config finds the first one's result from here
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    reward_model, ppo = quickstart()
    assert main([*reward_model, *SMALL, *PAIRS]) == 0

    def train(*overrides: str) -> Path:
        assert main([*ppo, *SMALL, *SUMS, *overrides]) == 0
        return Path("runs/arithmetic-ppo/latest").resolve()

    local = train("cluster.kind=local", "cluster.placement=colocated")
    rows = metrics_of(local)
    assert [row["rollout/logprob_gap_max"] for row in rows[1:]] == [0.0, 0.0]
    assert rows[-1]["policy/kl"] > 0 and rows[-1]["critic/loss"] > 0
    for row in rows:  # the model judges, the sum is only watched
        assert row["reward/mean"] == row["reward/part/preference"] != row["reward/part/function"]
        assert row["reward/std"] > 0
    assert set(weights_of(local)) == {"hf/model.safetensors", "critic/hf/model.safetensors"}

    for placement, bundles in (("colocated", 1), ("separate", 4)):
        folder = train(f"cluster.placement={placement}")
        assert fixed(metrics_of(folder)) == fixed(rows)
        assert weights_of(folder) == weights_of(local)
        assert f"{placement} on {bundles} bundle" in (folder / "plan.txt").read_text()
        started = re.findall(r"role (\S+): pid (\d+) \(ray", (folder / "train.log").read_text())
        assert {role for role, _ in started} == {"warm_start", *ROLES}
        assert len(started) == len({pid for _, pid in started}) == 6
        assert set(places) == ROLES
        ((group, size),) = set(places.values())
        assert group is not None and size == bundles
        places.clear()
