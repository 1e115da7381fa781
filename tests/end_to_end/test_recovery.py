"""kill -9 of a role's process, in any phase: the run goes on by itself, and nothing in its metrics shows it."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIG, ROOT, SMALL, command, environment, metrics_of

from rlhf.config import load_config
from rlhf.launch import launch
from rlhf.tracking import Tracker

MOVING = ("time/", "throughput/", "memory/", "swap/gib_per_s")
PPO = ["algorithm.name=ppo", "algorithm.kl_target=0.001", "algorithm.epochs=1", "train.lr=1e-3"]
FIVES = """
from recipes.arithmetic import initial_model, prompts

def reward(completion):
    return completion.text.count("5") / 5
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Runs three steps with a checkpoint after each, in this process but for the roles; the run folder."""
    os.environ["PYTHONPATH"], before = str(ROOT), os.environ.get("PYTHONPATH")
    recipe = tmp_path_factory.mktemp("recipe") / "fives.py"
    recipe.write_text(FIVES)

    def run(*overrides: str) -> Path:
        settings = [f"recipe.path={recipe}", f"run.dir={tmp_path_factory.mktemp('runs')}", "tracking.wandb=disabled"]
        return launch(load_config(CONFIG, [*SMALL, *settings, "checkpoint.every=1", *overrides])).folder

    yield run
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@contextmanager
def kill(role: str, at: tuple[int, str], delay_s: float, by: signal.Signals = signal.SIGKILL) -> Iterator[list[int]]:
    """The newest process of ``role`` dies, once, ``delay_s`` after the beginning of a phase of a step; which step."""
    phase, killed = Tracker.phase, []

    def strike(run_folder: Path) -> None:
        pids = re.findall(rf"role {role}: pid (\d+)", (run_folder / "roles" / f"{role}-0.log").read_text())
        os.kill(int(pids[-1]), by)

    def struck(self: Tracker, step: int, times: dict[str, float], name: str) -> Any:
        if (step, name) == at and not killed:
            killed.append(step)
            threading.Timer(delay_s, strike, [self.run.path]).start()
        return phase(self, step, times, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "phase", struck)
        yield killed


def fixed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(MOVING)} for row in metrics_of(folder)]


def check(folder: Path, uninterrupted: Path, role: str) -> None:
    assert fixed(folder) == fixed(uninterrupted)
    weights = "checkpoints/latest/hf/model.safetensors"
    assert (folder / weights).read_bytes() == (uninterrupted / weights).read_bytes()
    log = (folder / "train.log").read_text()
    assert re.search(rf"role {role} \(pid \d+\) died during", log) and "restart 1 of at most 3" in log
    assert "restart 2" not in log


def test_a_killed_policy_is_no_end(run: Callable[..., Path]) -> None:
    whole = run("cluster.kind=local")
    with kill("policy", (2, "train"), 0.0) as killed:
        folder = run("cluster.kind=ray")
    assert killed
    check(folder, whole, "policy")


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path]) -> Path:
    return run(*PPO, "cluster.kind=local")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "phase"),
    [
        *itertools.product(("policy", "critic", "reference", "reward"), ("generate", "score", "train")),
        *itertools.product(("policy", "critic"), ("swap", "evaluate", "checkpoint")),
    ],
)
def test_killed_roles_in_all_phases(run: Callable[..., Path], whole: Path, role: str, phase: str) -> None:
    """Some are idle then, and missed in the next phase that needs them."""
    with kill(role, (2, phase), 0.02) as killed:
        folder = run(*PPO, "cluster.kind=ray")
    assert killed
    check(folder, whole, role)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_recover_too(run: Callable[..., Path], stage: int) -> None:
    """Each rank has a share of the optimizer; the other one is in the middle of a collective when its peer dies."""
    overrides = ["cluster.kind=ray", "cluster.ranks=2", f"train.zero_stage={stage}", "train.lr=1e-3"]
    whole = run(*overrides)
    with kill("policy", (2, "train"), 0.02) as killed:
        folder = run(*overrides)
    assert killed
    assert fixed(folder) == fixed(whole)
    assert "restart 1 of at most 3" in (folder / "train.log").read_text()


@pytest.mark.slow
def test_a_role_that_hangs_is_started_anew(run: Callable[..., Path], whole: Path) -> None:
    with kill("critic", (2, "train"), 0.0, by=signal.SIGSTOP) as killed:
        folder = run(*PPO, "cluster.kind=ray", "cluster.timeout_s=40")
    assert killed and fixed(folder) == fixed(whole)
    log = (folder / "train.log").read_text()
    assert re.search(r"role critic \(pid \d+\) did not finish", log) and "restart 1 of at most 3" in log


@pytest.mark.slow
def test_a_killed_driver_is_resumed_from_the_command_line(run_training: Callable[..., Path], tmp_path: Path) -> None:
    """kill -9 of the process that a person started: its roles go with it, and the folder is free."""
    overrides = [*SMALL, "tracking.wandb=disabled", "checkpoint.every=1", "run.steps=4"]
    whole = run_training(*overrides)
    driver = subprocess.Popen(command(tmp_path, *overrides), stdout=subprocess.PIPE, text=True, env=environment())
    watchdog = threading.Timer(300, driver.kill)
    watchdog.start()
    try:
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith("step 3/"):
                break
    finally:
        watchdog.cancel()
        driver.kill()
        driver.wait(60)
    folder = max((tmp_path / "arithmetic-grpo").glob("0*"))
    assert folder != whole and int((folder / "checkpoints" / "latest").readlink().name) in (2, 3)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "train", "--resume", str(folder)],
        capture_output=True, text=True, timeout=600, env=environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert fixed(folder) == fixed(whole)
