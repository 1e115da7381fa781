"""kill -9 of a role's process, in any phase: the run goes on by itself, and nothing in its results shows it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIG, ROOT, SMALL, command, environment, metrics_of

from rlhf.cluster.ray import RayCluster
from rlhf.cluster.watchdog import process_state
from rlhf.config import load_config
from rlhf.launch import launch
from rlhf.tracking import Tracker

MOVING = ("time/", "throughput/", "memory/", "swap/gib_per_s")
PPO = ["algorithm.name=ppo", "algorithm.epochs=1", "algorithm.kl_coef=0.02", "train.lr=1e-3"]
PPO += ["algorithm.kl_target=1000"]  # no KL reaches it: the coefficient falls after every step

# Pays for every 5, and takes its time, so that it can be found at work.
FIVES = """
import time
from recipes.arithmetic import initial_model, prompts

def reward(completion):
    time.sleep(0.05)
    return completion.text.count("5") / 5
"""

# The call that a role is at work on (*) in each phase of step 2, or else its next one, in which it is missed.
PHASES = ("generate", "reward", "score", "train", "swap", "evaluate", "checkpoint")
CALLS = {
    "policy": "generate()* score() score()* update()* publish() generate()* save_state()*",
    "critic": "score() score() score()* update()* usage usage save_state()*",
    "reference": "score() score() score()* usage usage usage score()",
    "reward": "submit() collect()* submit() submit() submit() collect()* submit()",
    "reward_model": "judge() judge()* judge() judge() judge() judge()* judge()",
}
KILLS = [(role, *kill) for role, calls in CALLS.items() for kill in zip(PHASES, calls.split(), strict=True)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, random_judge: Path) -> Iterator[Callable[..., Path]]:
    """Runs three steps with a checkpoint after each, in this process but for the roles; the run folder."""
    recipe = tmp_path_factory.mktemp("recipe") / "fives.py"
    recipe.write_text(FIVES)

    def run(*overrides: str) -> Path:
        settings = [f"recipe.path={recipe}", f"run.dir={tmp_path_factory.mktemp('runs')}", "tracking.wandb=disabled"]
        settings += [f"reward.models={{taste: {random_judge}}}", "checkpoint.every=1"]
        return launch(load_config(CONFIG, [*SMALL, *settings, *overrides])).folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield run


class Killer:
    """Sends ``by`` to the newest process of a role, once: amid ``call``, where that ends in a *, or else at once.

    What the process is at work on is read from its phase file while it is stopped.
    """

    def __init__(self, role: str, call: str, rank: int, by: signal.Signals) -> None:
        self.name = f"{role}-{rank}"
        self.amid = call.removesuffix("*") if call.endswith("*") else ""
        self.by = by
        self.struck = self.too_late = False

    @contextmanager
    def strikes(self, roles: Path) -> Iterator[None]:
        """While this goes on. ``roles``: where their logs are."""
        hunt = threading.Thread(target=self._hunt, args=[roles])
        hunt.start()
        if not self.amid:
            hunt.join()
        try:
            yield
        finally:
            self.too_late = True
            hunt.join()

    def _hunt(self, roles: Path) -> None:
        while not (self.struck or self.too_late):
            if self._is_at_it(roles):
                pid = int(re.findall(r"role \S+: pid (\d+)", (roles / f"{self.name}.log").read_text())[-1])
                os.kill(pid, signal.SIGSTOP)
                while process_state(pid) != "T":
                    time.sleep(1e-4)
                self.struck = self._is_at_it(roles)
                os.kill(pid, self.by if self.struck else signal.SIGCONT)
            time.sleep(2e-4)

    def _is_at_it(self, roles: Path) -> bool:
        phase = roles / f"{self.name}.phase"
        return phase.exists() and phase.read_text().startswith(self.amid)


@contextmanager
def kill(role: str, phase: str, call: str, *, rank: int = 0, by: signal.Signals = signal.SIGKILL) -> Iterator[None]:
    """The role's process dies in a phase of step 2, or (``build``) while it is built; that it did is asserted."""
    killer, enter, spawn = Killer(role, call, rank, by), Tracker.phase, RayCluster.spawn

    def strikes(now: bool, roles: Path) -> Any:
        return killer.strikes(roles) if now and not killer.struck else nullcontext()

    @contextmanager
    def entering(self: Tracker, step: int, times: dict[str, float], name: str) -> Iterator[None]:
        with enter(self, step, times, name), strikes((step, name) == (2, phase), self.run.path / "roles"):
            yield

    def spawning(self: RayCluster, name: str, *args: Any, **kwargs: Any) -> Any:
        with strikes((name, phase) == (role, "build"), self.log_folder):
            return spawn(self, name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "phase", entering)
        patch.setattr(RayCluster, "spawn", spawning)
        yield
    assert killer.struck, f"{role} was not to be found amid {call} in {phase}"


def fixed(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(MOVING)} for row in metrics_of(folder)]


def weights_of(folder: Path) -> dict[str, bytes]:
    """Everything that the last checkpoint has learnt, by file."""
    latest = (folder / "checkpoints" / "latest").resolve()
    return {str(file.relative_to(latest)): file.read_bytes() for file in latest.rglob("*.safetensors")}


def check(folder: Path, uninterrupted: Path, *deaths: tuple[str, str]) -> None:
    """These roles died during these calls, in this order, and nothing is otherwise for it."""
    log = (folder / "train.log").read_text()
    assert re.findall(r"^role (.+) \(pid \d+\) died during (.+);", log, re.M) == list(deaths)
    assert log.count("restart ") == len(deaths) and f"restart {len(deaths)} of at most 3" in log
    assert fixed(folder) == fixed(uninterrupted)
    assert weights_of(folder) == weights_of(uninterrupted)


def test_a_killed_reward_model_and_a_killed_policy_are_no_end(run: Callable[..., Path]) -> None:
    whole = run("cluster.kind=local")
    with kill("reward_model", "reward", "judge()*"), kill("policy", "train", "update()*"):
        folder = run("cluster.kind=ray")
    check(folder, whole, ("reward_model", "judge()"), ("policy", "update()"))
    assert set(weights_of(folder)) == {"hf/model.safetensors"}


@pytest.fixture(scope="module")
def whole(run: Callable[..., Path]) -> Path:
    folder = run(*PPO, "cluster.kind=local")
    assert [row["rollout/kl_coef"] for row in metrics_of(folder)] == [0.02, 0.02 / 1.1, 0.02 / 1.1 / 1.1]
    assert set(weights_of(folder)) == {"hf/model.safetensors", "critic/hf/model.safetensors"}
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("role", "phase", "call"), KILLS)
def test_killed_roles_in_all_phases(run: Callable[..., Path], whole: Path, role: str, phase: str, call: str) -> None:
    with kill(role, phase, call):
        folder = run(*PPO, "cluster.kind=ray")
    check(folder, whole, (role, call.removesuffix("*")))


@pytest.mark.slow
@pytest.mark.parametrize("role", list(CALLS))
def test_roles_killed_while_they_are_built(run: Callable[..., Path], whole: Path, role: str) -> None:
    with kill(role, "build", "build*"):
        folder = run(*PPO, "cluster.kind=ray")
    check(folder, whole, (role, "its build"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "rank", "overrides"),
    [
        ("policy", 0, ["train.zero_stage=1"]),
        ("policy", 0, ["train.zero_stage=2"]),
        ("policy", 0, ["train.zero_stage=3"]),
        ("critic", 1, [*PPO, "train.zero_stage=2", "reference.ranks=1"]),
    ],
)
def test_two_ranks_recover_too(run: Callable[..., Path], role: str, rank: int, overrides: list[str]) -> None:
    """Each rank has a share of the optimizer; the other one is in the middle of a collective when its peer dies."""
    overrides = ["cluster.kind=ray", "cluster.ranks=2", "reward_model.ranks=1", "train.lr=1e-3", *overrides]
    whole = run(*overrides)
    with kill(role, "train", "update()*", rank=rank):
        folder = run(*overrides)
    check(folder, whole, (f"{role} rank {rank}", "update()"))


@pytest.mark.slow
def test_a_role_that_hangs_is_started_anew(run: Callable[..., Path], whole: Path) -> None:
    with kill("critic", "train", "update()*", by=signal.SIGSTOP):
        folder = run(*PPO, "cluster.kind=ray", "cluster.timeout_s=40")
    assert fixed(folder) == fixed(whole) and weights_of(folder) == weights_of(whole)
    log = (folder / "train.log").read_text()
    assert re.search(r"role critic \(pid \d+\) did not finish update\(\)", log)
    assert log.count("restart ") == 1 and "restart 1 of at most 3" in log


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
