"""Compiles kernels for sm_90 on a machine without a GPU: a Triton driver that launches nothing.

The ops' own wrappers run, on small CPU tensors, so what is compiled is what would be launched: the same constants,
warps, stages and argument specialisation. Nothing is computed. The process must not have TRITON_INTERPRET set.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from kernels.triton import tables

SHARED_MEMORY = 232448  # bytes a block may use on sm_90
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA")  # warp-group and warp products, by what SASS calls them


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None: ...


class CompileOnly(DriverBase):
    """An H100 that takes every launch and does nothing."""

    def __init__(self) -> None:
        self.utils = _Utils()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("nothing runs here")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs here")

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return lambda *args: None


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel and configuration."""

    kernel: str
    constants: str
    dtype: str  # of what the first argument points to
    registers: int
    stack: int  # bytes a thread; more than 0 means spills, or an array that lives in memory
    spills: int  # stores to local memory
    shared: int  # bytes a block
    products: tuple[str, ...]  # which of TENSOR_CORE it uses


def kernels_of(module: ModuleType) -> list[Any]:
    """The kernels that a module defines: what is launched, not the functions that those call."""
    found = [value for name, value in vars(module).items() if name.endswith("_kernel")]
    return [kernel for kernel in found if kernel.__module__ == module.__name__]


def compiled(kernel: Any) -> list[Any]:
    """What has been compiled of it so far in this process."""
    return list(kernel.device_caches[0][0].values())


def inspect(kernel: Any) -> Compiled:
    """Read a compiled kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    numbers = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", usage))
    pointers = {name: kind for name, kind in kernel.src.signature.items() if kind.startswith("*")}
    constants = pointers | {kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()}
    return Compiled(
        kernel.metadata.name,
        ", ".join(f"{name}={value}" for name, value in constants.items()) + f", warps={kernel.metadata.num_warps}",
        kernel.src.signature[kernel.src.fn.arg_names[0]].removeprefix("*"),
        int(numbers["REG"]),
        int(numbers["STACK"]),
        len(re.findall(r"\bSTL\b", code)),
        kernel.metadata.shared,
        tuple(name for name in TENSOR_CORE if re.search(rf"\b{name}\b", code)),
    )


def _run(tool: str, *words: str) -> str:
    return subprocess.run([BIN / tool, *words], capture_output=True, text=True, check=True, timeout=60).stdout


def main(name: str, table: str | None = None) -> None:
    """Launch what ``shipped/<name>.py`` launches; print, as JSON, what the compiler made of it by kernel.

    ``table``: with the tiles measured on that device.
    """
    driver.set_active(CompileOnly())
    if table:
        tables.table("cpu").update(tables.table(table))
    importlib.import_module(f"shipped.{name}").launch()
    kernels = kernels_of(importlib.import_module(f"kernels.triton.{name}"))
    report = {k.__name__: [asdict(inspect(made)) for made in compiled(k)] for k in kernels}
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
