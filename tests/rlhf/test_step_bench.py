"""The step bench runs both sides and accounts for the whole step. In a process of its own: it starts DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.bench import Clock


def test_a_phase_inside_a_phase_is_counted_once() -> None:
    clock = Clock()
    with clock.time("outer"):
        with clock.time("inner"):
            sum(range(100_000))
        with clock.time("inner"):
            pass
    seconds = clock.take()
    assert 0 <= seconds["outer"] < seconds["inner"]
    assert clock.take() == {}


@pytest.mark.slow  # starts DeepSpeed, and transformers beside it
def test_both_sides_do_every_phase(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    small = "rollout.prompts_per_step=4 rollout.samples_per_prompt=2 rollout.kv_cache_gib=0.01 cluster.threads=1"
    command = [sys.executable, "-m", "rlhf.bench", "step", "--steps", "2", "--json", str(out), *small.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    both = {"generate", "reward", "pack", "forward", "backward", "optimizer"}
    assert set(found["phases"]["onpolicy"]) == both | {"swap"}
    assert set(found["phases"]["transformers"]) == both
    assert found["answers_per_step"] == 8
    assert found["ratio"] > 0 and f"onpolicy is {found['ratio']:.2f} x" in done.stdout
