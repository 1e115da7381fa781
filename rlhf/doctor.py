"""``rlhf doctor``: is this machine ready, and what is missing?"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlhf.run_folder import PACKAGES

STALE_LOCK_S = 600


def extension_cache() -> Path:
    """Where torch keeps the C++ extensions that it builds on first use (DeepSpeed's, for one)."""
    default = Path.home() / ".cache" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))


def stale_locks() -> list[Path]:
    """Build locks older than ten minutes: their builder died, and the next one would wait for ever."""
    locks = extension_cache().glob("**/lock")
    return [lock for lock in locks if time.time() - lock.stat().st_mtime > STALE_LOCK_S]


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
        healthy = False
        lines.append(f"stale lock   {lock}: a build died there and the next waits for ever; delete the file")
    try:
        check_exact([(256, 128), (131, 260)], num_heads=4, num_kv_heads=2, head_dim=32, device=torch.device("cpu"))
        lines.append(f"exact        yes: CPU results don't depend on the batch ({torch.get_num_threads()} threads)")
    except RuntimeError as error:
        lines.append(f"exact        no: {error}")
    return lines, healthy
