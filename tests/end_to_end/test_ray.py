"""Ray is real: roles are processes, the driver has no weights, a dead role is named, and results don't change."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import ROOT, SMALL, command, environment, metrics_of

from rlhf.cluster import RoleDied
from rlhf.config import Cluster
from rlhf.roles.reward import RewardFunction

MOVING = ("time/", "throughput/", "memory/")
ALL_PATHS = ["algorithm.kl_coef=0.01", "algorithm.updates_per_rollout=2", "run.steps=3", "train.lr=1e-2"]

# An untrained model earns no reward on sums; this one pays for every 5, so that there is something to learn from.
FIVES = """
from recipes.arithmetic import initial_model, prompts

def reward(completion):
    return completion.text.count("5") / 5
"""


def fixed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Metrics without those that measure the machine."""
    return [{name: value for name, value in row.items() if not name.startswith(MOVING)} for row in rows]


def test_local_and_ray_give_the_same_bits_and_the_ray_driver_no_weights(
    run_training: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "fives.py"
    recipe.write_text(FIVES)
    overrides = [*SMALL, *ALL_PATHS, f"recipe.path={recipe}", "tracking.wandb=disabled"]
    local = run_training(*overrides, "cluster.kind=local")
    counting = textwrap.dedent("""
        import gc, sys, torch
        from rlhf import __main__ as cli
        from rlhf.tracking import Tracker
        log = Tracker.log
        def spy(self, step, metrics):
            alive = sum(isinstance(o, torch.nn.Parameter) for o in gc.get_objects())
            print("parameters in the driver:", alive, flush=True)
            log(self, step, metrics)
        Tracker.log = spy
        sys.exit(cli.main(sys.argv[1:]))
    """)
    arguments = command(tmp_path, *overrides, "cluster.kind=ray")[3:]
    done = subprocess.run(
        [sys.executable, "-c", counting, *arguments],
        capture_output=True, text=True, timeout=600, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    on_ray = max((tmp_path / "arithmetic-grpo").iterdir())
    assert on_ray != local
    assert fixed(metrics_of(on_ray)) == fixed(metrics_of(local))
    assert metrics_of(local)[-1]["policy/kl"] > 0 and metrics_of(local)[-1]["policy/clip_fraction"] > 0
    assert re.findall(r"parameters in the driver: (\d+)", done.stdout) == ["0", "0", "0"]
    pids = dict(re.findall(r"role (\w+): pid (\d+) \(ray", done.stdout))
    assert set(pids) == {"policy", "reward", "reference"} and len(set(pids.values())) == 3
    for role, pid in pids.items():
        assert f"role {role}: pid {pid}" in (on_ray / "roles" / f"{role}-0.log").read_text()


def test_killing_a_role_fails_the_run_and_names_it(tmp_path: Path) -> None:
    overrides = [*SMALL, "run.steps=100000", "tracking.wandb=disabled", "eval.every=0"]
    run = subprocess.Popen(
        command(tmp_path, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    watchdog = threading.Timer(300, run.kill)
    watchdog.start()
    try:
        assert run.stdout is not None and run.stderr is not None
        pid = 0
        for line in run.stdout:
            if found := re.search(r"role policy: pid (\d+) \(ray", line):
                pid = int(found[1])
            if line.startswith("step 2/"):
                os.kill(pid, signal.SIGKILL)
                break
        _, errors = run.communicate(timeout=120)
    finally:
        watchdog.cancel()
        run.kill()
    assert run.returncode == 1
    assert f"role policy (pid {pid}) died during" in errors


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from rlhf.cluster.ray import RayCluster

    os.environ["PYTHONPATH"] = str(ROOT)
    cluster = RayCluster(Cluster(kind="ray", threads=1, timeout_s=2), tmp_path_factory.mktemp("roles"))
    yield cluster
    cluster.shutdown()
    del os.environ["PYTHONPATH"]


def test_a_call_that_hangs_ends_with_the_roles_name(cluster) -> None:  # type: ignore[no-untyped-def]
    event = cluster.spawn("sleeper", threading.Event)
    assert event.is_set() is False
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"role sleeper \(pid \d+\) did not finish wait\(\) within 2 s"):
        event.wait(60)
    assert time.monotonic() - begin < 30
    cluster.stop(event)


def test_a_dead_role_is_named_and_its_place_is_free_again(cluster) -> None:  # type: ignore[no-untyped-def]
    free = len(cluster.free)
    reward = cluster.spawn("judge", RewardFunction, recipe="recipes.arithmetic", shuffle=False, seed=0)
    assert reward.score([], []) == []
    os.kill(reward._pid, signal.SIGKILL)
    with pytest.raises(RoleDied, match=rf"role judge \(pid {reward._pid}\) died during score\(\)"):
        reward.score([], [])
    cluster.stop(reward)
    assert len(cluster.free) == free


def test_an_error_in_a_role_keeps_its_type_and_message(cluster) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"recipe\.path='no_such_module'"):
        cluster.spawn("judge", RewardFunction, recipe="no_such_module", shuffle=False, seed=0)


def test_shuffled_metrics_differ(run_training: Callable[..., Path]) -> None:
    """The comparison above can fail: another seed gives other bits."""
    first = run_training(*SMALL, "cluster.kind=local", "tracking.wandb=disabled", "run.steps=1")
    second = run_training(*SMALL, "cluster.kind=local", "tracking.wandb=disabled", "run.steps=1", "run.seed=1")
    assert json.dumps(fixed(metrics_of(first))) != json.dumps(fixed(metrics_of(second)))
