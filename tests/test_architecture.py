"""The shape of the code, checked: who imports whom, how long files are, and how long the loop is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "rollout_engine", "rlhf", "recipes")
ALLOWED = {
    "kernels": {"kernels"},
    "rollout_engine": {"rollout_engine", "kernels"},
    "rlhf": {"rlhf", "rollout_engine", "kernels"},
    "recipes": {"recipes", "rlhf", "rollout_engine", "kernels"},
}
ONLY_IN = {
    "deepspeed": "rlhf/backends/deepspeed.py",
    "ray": "rlhf/cluster/",
    "wandb": "rlhf/tracking/",
    "triton": "kernels/",
}
TOP_LEVEL = {
    "pyproject.toml", "README.md", "rlhf", "rollout_engine", "kernels", "recipes", "configs", "tests",
    "Makefile", "LICENSE", "CHANGELOG.md", "constraints.txt", "docs",
}  # fmt: skip


def sources() -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_there_are_sources_to_check() -> None:
    assert len(sources()) > 40


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = (imports(path) & set(PACKAGES)) - ALLOWED[package]
    assert not wrong, f"{package} must not import {wrong}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_have_one_importer(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    for package, home in ONLY_IN.items():
        assert package not in imports(path) or place.startswith(home), f"{package} may be imported in {home} only"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_transformers_models_run_nowhere(path: Path) -> None:
    """transformers gives configs, tokenizers and names; its modelling code is for tests, and for the benches' peers."""
    text = path.read_text()
    assert "AutoModel" not in text and "modeling_" not in text.replace("models.auto.modeling_auto", "")


def test_files_stay_small() -> None:
    sizes = {p: len(p.read_text().splitlines()) for p in [*sources(), *(ROOT / "tests").rglob("*.py")]}
    assert not {str(p): n for p, n in sizes.items() if n > 400}


def test_the_loop_fits_its_budget() -> None:
    assert len((ROOT / "rlhf" / "train.py").read_text().splitlines()) <= 150


def test_scheduling_needs_no_torch() -> None:
    for name in ("scheduler.py", "block_manager.py", "types.py", "config.py"):
        assert "torch" not in imports(ROOT / "rollout_engine" / name)


def test_no_file_is_a_drawer_and_top_level_is_fixed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [f for f in listed if Path(f).name == "utils.py"]
    top = {f.split("/")[0] for f in listed}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_one_environment_variable_at_most_steers_the_code() -> None:
    """Configs steer runs. What is read from the environment belongs to others (W&B, Ray, torch)."""
    known = {
        "PATH",
        "KERNELS",
        "TRITON_INTERPRET",
        "WANDB_API_KEY",
        "WANDB_MODE",
        "RAY_ADDRESS",
        "TORCH_EXTENSIONS_DIR",
    }
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                name = ast.literal_eval(node.args[0])
                assert name in known, f"{path} reads {name}"


def test_importing_the_engine_is_light() -> None:
    code = "import sys, rollout_engine; assert 'torch' not in sys.modules; from rollout_engine import SamplingParams"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
