"""PPO with every role on devices of its own: the same bits as with all on one, and as in one process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import SMALL, command, environment, metrics_of
from test_ray import FIVES, fixed

from rlhf.cluster.watchdog import process_state

PPO = ["algorithm.name=ppo", "tracking.wandb=disabled", "train.lr=1e-2", "train.zero_stage=2"]


@pytest.fixture
def fives(tmp_path: Path) -> list[str]:
    recipe = tmp_path / "fives.py"
    recipe.write_text(FIVES)
    return [*SMALL, *PPO, f"recipe.path={recipe}"]


def test_one_process_and_separate_roles_give_the_same_bits(run_training: Callable[..., Path], fives: list[str]) -> None:
    local = metrics_of(run_training(*fives, "run.steps=2", "cluster.kind=local"))
    folder = run_training(*fives, "run.steps=2", "cluster.placement=separate")
    separate = metrics_of(folder)
    assert fixed(separate) == fixed(local)
    assert local[-1]["policy/kl"] > 0 and local[-1]["critic/loss"] > 0 and local[-1]["policy/clip_fraction"] > 0
    assert "separate on 3 bundles: policy 0, reference 1, critic 2" in (folder / "plan.txt").read_text()
    for role in ("policy", "reference", "critic", "reward"):
        for row in separate:
            assert 0.05 < row[f"memory/{role}_rss_gib"] <= row[f"memory/{role}_peak_gib"] < 4
            assert row[f"memory/{role}_sent_mib"] > 0 and row[f"memory/{role}_received_mib"] > 0
    # Each step sends the critic what it scores, and four minibatches that train it: two halves, twice.
    sent = [separate[-1][f"memory/{role}_sent_mib"] for role in ("critic", "reference")]
    assert sent[0] > 2.9 * sent[1]


@pytest.mark.slow
def test_colocated_and_separate_give_the_same_bits_with_any_ranks(
    run_training: Callable[..., Path], fives: list[str]
) -> None:
    ranks = ["cluster.ranks=2", "critic.ranks=2", "reference.ranks=1"]
    colocated = metrics_of(run_training(*fives, *ranks))
    separate = metrics_of(run_training(*fives, *ranks, "cluster.placement=separate"))
    assert fixed(separate) == fixed(colocated)
    assert separate[-1]["memory/critic-1_rss_gib"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "sign", "said"),
    [
        ("critic", signal.SIGKILL, r"role critic \(pid {pid}\) died during"),
        ("critic", signal.SIGSTOP, r"role critic \(pid {pid}\): STOPPED by a signal"),
        ("driver", signal.SIGKILL, ""),
    ],
)
def test_nobody_outlives_a_run_that_failed(tmp_path: Path, fives: list[str], victim: str, sign: int, said: str) -> None:
    forever = ["run.steps=100000", "eval.every=0", "checkpoint.max_restarts=0", "cluster.timeout_s=20"]
    run = subprocess.Popen(
        command(tmp_path, *fives, *forever, "cluster.placement=separate"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    watchdog = threading.Timer(300, run.kill)
    watchdog.start()
    pids: dict[str, int] = {}
    try:
        assert run.stdout is not None
        pids["driver"] = run.pid
        for line in run.stdout:
            if found := re.search(r"role (\w+): pid (\d+) \(ray", line):
                pids[found[1]] = int(found[2])
            if line.startswith("step 2/"):
                os.kill(pids[victim], sign)
                break
        _, errors = run.communicate(timeout=120)
    finally:
        watchdog.cancel()
        run.kill()
    assert len(pids) == 5 and run.returncode
    assert re.search(said.format(pid=pids["critic"]), errors)
    deadline = time.monotonic() + 60
    while alive := {role: pid for role, pid in pids.items() if process_state(pid) not in (None, "Z")}:
        assert time.monotonic() < deadline, f"{alive} outlived the run"
        time.sleep(0.2)
