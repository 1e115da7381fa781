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
from itertools import chain
from pathlib import Path

import pytest
from command_line import ROOT, SMALL, command, environment, metrics_of

from rlhf.cluster import RoleDied
from rlhf.config import Cluster, Reward
from rlhf.division import Join, over_ranks
from rlhf.roles.reward import RewardFunction
from rlhf.types import Completion, Prompt, Score

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
    overrides = [*SMALL, "run.steps=100000", "tracking.wandb=disabled", "eval.every=0", "checkpoint.max_restarts=0"]
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

    os.environ["PYTHONPATH"] = f"{ROOT}:{Path(__file__).parent}"
    seats = {f"role-{i}": 1 for i in range(9)}
    cluster = RayCluster(Cluster(kind="ray", threads=1, timeout_s=2), tmp_path_factory.mktemp("roles"), seats)
    yield cluster
    cluster.shutdown()
    del os.environ["PYTHONPATH"]


def test_a_dead_role_is_named(cluster) -> None:  # type: ignore[no-untyped-def]
    judge = {"recipe": "recipes.arithmetic", "section": Reward()}
    reward = cluster.spawn("judge", RewardFunction, **judge)
    assert reward.collect() == []
    (pid,) = reward._ranks.pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RoleDied, match=rf"role judge \(pid {pid}\) died during collect\(\)"):
        reward.collect()
    cluster.stop(reward)


def test_nine_roles_share_a_device(cluster) -> None:  # type: ignore[no-untyped-def]
    """Policy, critic, reference, function and five reward models."""
    roles = [cluster.spawn(f"role-{i}", threading.Event) for i in range(9)]
    assert [role.is_set() for role in roles] == [False] * 9
    assert len({pid for role in roles for pid in role._ranks.pids}) == 9
    for role in roles:
        cluster.stop(role)


def test_a_reward_works_in_its_actor_after_submit_has_returned(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "waits.py").write_text(
        "import pathlib, time\nHERE = pathlib.Path(__file__).parent\n"
        "def reward(completion):\n    (HERE / 'started').touch()\n"
        "    while not (HERE / 'go').exists(): time.sleep(0.01)\n    return float(completion.text)"
    )
    recipe = str(tmp_path / "waits.py")
    judge = cluster.spawn("judge", RewardFunction, recipe=recipe, section=Reward(timeout_s=60))
    for group in (1, 0):  # a call that waits for the reward would end after 2 s, as the cluster says
        judge.submit([(group, Prompt(group, "p", (1,)), [Completion("p", str(group), (7,), "stop", (-1.0,))])])
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
    (tmp_path / "go").touch()
    assert judge.collect() == [{"function": Score(0.0)}, {"function": Score(1.0)}]
    cluster.stop(judge)


def deal(ranks: int, items: list[int]) -> tuple[list[dict[str, list[int]]], Join]:
    return [{"items": items[rank::ranks]} for rank in range(ranks)], lambda results: sorted(chain(*results))


class Ranked:
    """A role whose every answer says which rank gave it."""

    def __init__(self, fail_on: int | None = None) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.meets_at = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        self.fail_on = fail_on

    def who(self) -> tuple[int, int]:
        return self.rank, self.world_size

    @over_ranks(deal)
    def tag(self, items: list[int]) -> list[tuple[int, int]]:
        return [(item, self.rank) for item in items]

    @over_ranks(deal)
    def stream(self, items: list[int]) -> Iterator[tuple[int, int]]:
        for item in items:
            if item == self.fail_on:
                raise ValueError(f"item {item}: is not to be had")
            yield item, self.rank

    def hang_but_fail_on_rank_1(self) -> None:
        if self.rank == 1:
            raise ValueError("rank 1 has had enough")
        time.sleep(60)


def test_calls_are_divided_over_ranks_and_joined(cluster) -> None:  # type: ignore[no-untyped-def]
    role = cluster.spawn("ranked", Ranked, ranks=2)
    assert role.who() == (0, 2)  # not divided: every rank is called, rank 0's result counts
    assert role.tag(list(range(5))) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    assert sorted(role.stream(list(range(7)))) == [(i, i % 2) for i in range(7)]
    cluster.stop(role)


def test_the_first_failing_rank_ends_the_wait(cluster) -> None:  # type: ignore[no-untyped-def]
    role = cluster.spawn("ranked", Ranked, ranks=2, fail_on=3)
    with pytest.raises(ValueError, match=r"^item 3: is not to be had$"):
        list(role.stream(list(range(7))))
    begin = time.monotonic()
    with pytest.raises(ValueError, match="rank 1 has had enough"):
        role.hang_but_fail_on_rank_1()
    assert time.monotonic() - begin < 30
    cluster.stop(role)


class PortTakenOnce:
    """Its first start finds its port taken, as may happen between asking for a free one and using it."""

    def __init__(self, marker: Path) -> None:
        if not marker.exists():
            marker.touch()
            raise RuntimeError("code: -98, name: EADDRINUSE, message: address already in use")

    def ready(self) -> bool:
        return True


def test_a_port_taken_meanwhile_is_tried_once_more(cluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    role = cluster.spawn("binder", PortTakenOnce, marker=tmp_path / "tried")
    assert role.ready()
    cluster.stop(role)


def test_an_error_in_a_role_keeps_its_type_and_message(cluster) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"recipe\.path='no_such_module'"):
        cluster.spawn("judge", RewardFunction, recipe="no_such_module", section=Reward())


def test_shuffled_metrics_differ(run_training: Callable[..., Path]) -> None:
    """The comparison above can fail: another seed gives other bits."""
    first = run_training(*SMALL, "cluster.kind=local", "tracking.wandb=disabled", "run.steps=1")
    second = run_training(*SMALL, "cluster.kind=local", "tracking.wandb=disabled", "run.steps=1", "run.seed=1")
    assert json.dumps(fixed(metrics_of(first))) != json.dumps(fixed(metrics_of(second)))


def test_a_placement_that_cannot_be_met_says_what_there_is(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, *SMALL, "cluster.gpus=3", "rollout.prompts_per_step=9", "tracking.wandb=disabled"),
        capture_output=True, text=True, timeout=300, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "GPU: 3 asked for, 0 free of 0" in done.stderr and "cluster.gpus" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_ranks_under_zero_3_learn_as_one_rank_does(run_training: Callable[..., Path], tmp_path: Path) -> None:
    """Same samples in the first step, no gap in any, and the same losses up to the order of float additions."""
    recipe = tmp_path / "fives.py"
    recipe.write_text(FIVES)
    overrides = [*SMALL, f"recipe.path={recipe}", "tracking.wandb=disabled", "cluster.kind=ray", "train.lr=1e-3"]
    one = metrics_of(run_training(*overrides, "algorithm.kl_coef=0.01"))
    two = metrics_of(
        run_training(
            *overrides, "algorithm.kl_coef=0.01", "cluster.ranks=2", "train.zero_stage=3", "warm_start.steps=0"
        )
    )
    assert all(row["rollout/logprob_gap_max"] == 0.0 for row in one + two)
    for name in ("reward/mean", "length/answer_tokens", "policy/entropy", "policy/grad_norm", "eval/reward"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4), name
    assert two[-1]["policy/version"] == 3 and two[-1]["swap/gib"] > 0 and one[-1]["swap/gib"] == 0
