"""Every shipped kernel in every shipped configuration compiles for sm_90, without a GPU, and as intended.

``shipped/<op>.py`` has, for ``kernels/triton/<op>.py``: ``launch()``, which calls the op's wrappers once per
configuration; ``PRODUCTS``, the one tensor-core instruction that a kernel must use, by its name, or a function that
says so from a configuration's types and constants (a kernel that isn't listed must use none, and so must one of fp32
numbers); and ``SPILLS``, the reasons why a kernel may spill.
``launch_batch(tokens)`` calls the wrappers for a batch of that size, and ``VARIANTS`` says, by name, how many compiled
kernels serve batches of all sizes, if not one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from compile_only import SHARED_MEMORY

from kernels.triton.tables import FOLDER

HERE = Path(__file__).parent
OPS = sorted(p.stem for p in (HERE / "shipped").glob("*.py"))
TABLES = [*OPS, *(f"{op} {table.stem}" for table in FOLDER.glob("*.json") for op in OPS)]  # with measured tiles, too
Printed = Callable[[str, str], Any]
NOT_IN_3_6 = {"aggregate_replace", "atomic_load", "atomic_poll", "atomic_store", "expect_zero", "squeeze", "to_tensor"}
NOT_IN_3_6 |= {"unsqueeze"}  # names of triton.language that the oldest Triton meant to work lacks
NO_KERNELS = {"__init__", "attention_work", "elementary", "fixed_work", "inputs", "ragged", "tables", "tiles"}


def run_without_interpreter(program: str, op: str) -> Any:
    """What a program beside this file prints of the op; a process of its own, since this one interprets kernels."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    unsaid = "error:TRITON_DEFAULT_FP_FUSION"  # a launch must say whether to fuse: the default changes with 3.10
    words = [sys.executable, "-W", unsaid, str(HERE / program), *op.split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def printed(request: pytest.FixtureRequest) -> Iterator[Printed]:
    """What a program prints of an op. All that the tests of this file ask for run ahead, one for each core."""
    tests = [item.callspec.params for item in request.session.items if item.path == request.path and "[" in item.name]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {of: pool.submit(run_without_interpreter, *of) for of in [(p["program"], p["op"]) for p in tests]}
        yield lambda program, op: running[program, op].result()
        pool.shutdown(cancel_futures=True)


def test_every_file_of_kernels_is_in_the_gate() -> None:
    files = {p.stem for p in (HERE.parents[1] / "kernels" / "triton").glob("*.py")}
    assert files - NO_KERNELS == set(OPS)


def test_kernels_use_no_name_that_triton_3_6_lacks() -> None:
    names = re.compile(r"\btl\.(\w+)")
    for file in (HERE.parents[1] / "kernels" / "triton").glob("*.py"):
        assert not NOT_IN_3_6 & set(names.findall(file.read_text())), file.name


@pytest.mark.parametrize(("program", "op"), [("compile_only.py", op) for op in TABLES])
def test_kernels_compile_for_sm_90_as_intended(program: str, op: str, printed: Printed) -> None:
    shipped = importlib.import_module(f"shipped.{op.split()[0]}")
    found = printed(program, op)
    assert found and all(found.values()), f"never launched: {[name for name, made in found.items() if not made]}"
    for kernel, configurations in found.items():
        print(f"{kernel}: {len(configurations)} configurations")
        for made in configurations:
            wanted = shipped.PRODUCTS.get(kernel)
            if callable(wanted):
                wanted = wanted(made["constants"])
            elif made["dtype"] == "fp32":
                wanted = None
            assert made["products"] == ([wanted] if wanted else []), made
            assert made["shared"] <= SHARED_MEMORY, made
            if kernel not in shipped.SPILLS:
                assert made["spills"] == 0 and made["stack"] == 0, made


@pytest.mark.parametrize(("program", "op"), [("count_compilations.py", op) for op in OPS])
def test_no_kernel_is_compiled_anew_because_a_batch_is_longer(program: str, op: str, printed: Printed) -> None:
    shipped = importlib.import_module(f"shipped.{op}")
    if not hasattr(shipped, "launch_batch"):
        pytest.skip("it says nothing of batches")
    allowed = getattr(shipped, "VARIANTS", {})
    for kernel, count in printed(program, op).items():
        assert 1 <= count <= allowed.get(kernel, 1), f"{kernel}: compiled {count} times for 50 batches"
