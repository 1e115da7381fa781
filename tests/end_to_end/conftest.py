"""Runs of the command line in processes of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import command, environment


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
        return (tmp_path / "arithmetic-grpo" / "latest").resolve()

    return run
