"""The command line as the end-to-end tests call it: its words, its environment, what it leaves."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

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


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
