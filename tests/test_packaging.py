"""The wheel holds what users need, and the name `kernels` does not confuse transformers."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_configs_types_and_commands(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves its own folders beside the sources
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(tmp_path),
            str(source),
        ],
        check=True,
        timeout=300,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("onpolicy_rlhf-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "configs/arithmetic_grpo_cpu.yaml" in names
    assert {f"{package}/py.typed" for package in ("kernels", "rollout_engine", "rlhf", "recipes")} <= names
    assert not [name for name in names if name.startswith("tests")]
    metadata = zipfile.ZipFile(wheel)
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    commands = metadata.read(entry_points).decode()
    assert "rlhf = rlhf.__main__:main" in commands and "rollout = rollout_engine.__main__:main" in commands


def test_transformers_models_import_beside_our_kernels() -> None:
    """transformers asks which distribution `kernels` is and accepts 0.18.2 to 0.19: ours must stay outside."""
    version = importlib.metadata.version("onpolicy-rlhf")
    assert not version.startswith(("0.18", "0.19"))
    code = (
        "import kernels; assert not hasattr(kernels, '__version__');"
        "from transformers import Qwen3ForCausalLM;"
        "from transformers.utils.import_utils import is_kernels_available; assert not is_kernels_available()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


def test_commands_that_are_not_built_say_so_and_fail() -> None:
    command = [sys.executable, "-m", "rlhf", "export"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2 and "not built yet" in done.stderr
