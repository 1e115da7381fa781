"""The claims about speed: ratios to transformers on the same load, both measured in turns in one run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, environment

pytestmark = pytest.mark.slow


def measured(folder: Path, *words: str) -> dict[str, Any]:
    """What a bench writes."""
    found = folder / "bench.json"
    command = [sys.executable, "-m", *words, "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"\n{done.stdout}")
    numbers: dict[str, Any] = json.loads(found.read_text())
    return numbers


def test_the_engine_is_three_times_as_fast_as_the_best_of_transformers(tmp_path: Path) -> None:
    """Its continuous batching, at the best of its page sizes and thread counts."""
    found = measured(tmp_path, "rollout_engine.bench", "--models", "3M", "--repeats", "3")["models"]["3M"]
    assert {trial["page_size"] for trial in found["tried"]} == {64, 128, 256}
    assert found["ratio"]["transformers, continuous"] >= 3


def test_a_step_is_twice_as_fast_as_with_padded_generate_and_plain_torch(tmp_path: Path) -> None:
    assert measured(tmp_path, "rlhf.bench", "step")["ratio"] >= 2
