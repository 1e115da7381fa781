"""Builds and loads the C++ ops, once a process; without a compiler there are none, and the reference computes.

torch's own extension loader guards a build with a lock that a killed process leaves behind, and keeps one build
per name. This is one compiler call into a file named for all that went into it, put in place whole.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

COMPILE_LIMIT_S = 600  # it takes ten seconds on an idle core
# By torch's name for the CPU; at::vec is written for these. Without fused multiply-add it would be slow.
CAPABILITY_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "AVX512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ],
}


@functools.cache
def extension() -> Any:
    """``torch.ops.onpolicy``, compiled on first use and cached; None, with a warning, where that isn't possible.

    One answer for the life of the process, so that trainer and engine always run the same code.
    """
    try:
        torch.ops.load_library(build())
    except (BuildError, OSError) as error:  # no compiler, no place to write, or a library that doesn't load
        log.warning("CPU ops run in plain torch, several times slower: %s", error)
        return None
    return torch.ops.onpolicy


class BuildError(RuntimeError):
    """The extension can't be had on this machine."""


def build() -> Path:
    """The compiled library, which is made if it isn't there.

    Raises BuildError without a compiler, on a CPU it isn't written for, and when compiling fails.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITY_FLAGS:
        raise BuildError(f"the C++ ops are written for {sorted(CAPABILITY_FLAGS)}, not for {capability}")
    compiler = shutil.which("c++") or shutil.which("g++")
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp", *CAPABILITY_FLAGS[capability]]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    sources = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".h", ".cpp"))
    content = repr((torch.__version__, flags)).encode() + b"".join(p.read_bytes() for p in sources)
    library = _folder() / f"onpolicy_cpu_{hashlib.sha256(content).hexdigest()[:16]}.so"
    if library.exists():
        return library
    if compiler is None:
        raise BuildError("no C++ compiler; install g++")
    log.info("compiling the CPU ops, once")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        paths = [f"-I{p}" for p in include_paths()] + [f"-L{p}" for p in library_paths()]
        command = [compiler, *flags, *paths, str(Path(__file__).parent / "ops.cpp"), "-o", str(made)]
        try:
            subprocess.run(
                [*command, "-ltorch_cpu", "-lc10"], check=True, capture_output=True, text=True, timeout=COMPILE_LIMIT_S
            )
        except subprocess.CalledProcessError as error:
            raise BuildError(f"compiling them failed:\n{error.stderr[-2000:]}") from error
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"compiling them took more than {COMPILE_LIMIT_S} s") from error
        made.replace(library)
    return library


def _folder() -> Path:
    """Where torch keeps extensions."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
