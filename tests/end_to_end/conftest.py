"""Runs of the command line in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "arithmetic_grpo_cpu.yaml"

# A run of seconds: no warm start, a handful of answers, every path of the loop.
SMALL = [
    "run.steps=3",
    "warm_start.steps=0",
    "rollout.prompts_per_step=8",
    "rollout.kv_cache_gib=0.02",
    "eval.every=2",
    "eval.prompts=16",
    "cluster.threads=1",
]


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "rlhf", "train", str(CONFIG), f"run.dir={folder}", *overrides]


def environment() -> dict[str, str]:
    """The tests' own, without a W&B key, with this environment's ninja on PATH."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return {**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


@pytest.fixture
def run_training(tmp_path: Path) -> Callable[..., Path]:
    """Runs ``rlhf train`` to its end; the run folder."""

    def run(*overrides: str, timeout: float = 600) -> Path:
        done = subprocess.run(
            command(tmp_path, *overrides),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environment(),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return max((tmp_path / "arithmetic-grpo").iterdir())

    return run


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
