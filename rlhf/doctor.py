"""``rlhf doctor``: is this machine ready, and what is missing?"""

from __future__ import annotations

import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version

from rlhf.backends.extension_cache import stale_locks
from rlhf.run_folder import PACKAGES


def report() -> tuple[list[str], bool]:
    """Lines for a person, and whether everything needed is there."""
    import torch

    from kernels.exactness import check_exact

    lines = [f"python       {sys.version.split()[0]} on {platform.platform()}"]
    healthy = True
    for name in PACKAGES:
        try:
            lines.append(f"{name:<13}{version(name)}")
        except PackageNotFoundError:
            healthy = False
            lines.append(f"{name:<13}MISSING: run `make quickstart`, or pip install {name}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU: fp32, gloo)"
    lines.append(f"gpu          {gpu}")
    compiler = shutil.which("g++") or shutil.which("c++")
    ninja = shutil.which("ninja")
    lines.append(f"compiler     {compiler or 'MISSING: DeepSpeed builds one small op with it; install g++'}")
    lines.append(f"ninja        {ninja or 'MISSING on PATH: activate the environment, or pip install ninja'}")
    healthy &= compiler is not None and ninja is not None
    for lock in stale_locks():
        lines.append(f"stale lock   {lock}: a process died there; the next start removes it")
    try:
        check_exact([(256, 128), (131, 260)], num_heads=4, num_kv_heads=2, head_dim=32, device=torch.device("cpu"))
        lines.append(f"exact        yes: CPU results don't depend on the batch ({torch.get_num_threads()} threads)")
    except RuntimeError as error:
        lines.append(f"exact        no: {error}")
    return lines, healthy
