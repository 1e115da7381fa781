"""The C++ extension that DeepSpeed builds on first use, and the lock that a killed process leaves on it.

torch guards each build with a lock file and waits for it without end. Every start of DeepSpeed takes that
lock for a moment, so a process killed just then would hang all later ones.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

log = logging.getLogger(__name__)

BUILT_LOCK_S = 180  # with the library there, the lock is held to look at it, or for a rebuild
BUILD_LOCK_S = 600  # a build takes about a minute


def folder() -> Path:
    """Where torch keeps extensions: inside the virtual environment, unless told otherwise; built by its own ninja.

    Torch's own default is one folder for all environments, which then rebuild each other's extensions in turn. So do
    two versions of ninja: the environment's comes first, whether or not the environment was activated.
    """
    if "TORCH_EXTENSIONS_DIR" not in os.environ and sys.prefix != sys.base_prefix:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
        programs = str(Path(sys.prefix) / "bin")
        if os.environ.get("PATH", "").split(os.pathsep)[0] != programs:
            os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))


def stale_locks() -> list[Path]:
    """Locks held longer than any live process would."""
    found = []
    for lock in folder().glob("**/lock"):
        limit = BUILT_LOCK_S if any(lock.parent.glob("*.so")) else BUILD_LOCK_S
        if _age(lock) > limit:
            found.append(lock)
    return found


def wait_for_locks() -> None:
    """Let others finish their builds, for a bounded time; then take stale locks away."""
    while locks := [lock for lock in folder().glob("**/lock") if lock.exists()]:
        for lock in stale_locks():
            log.warning("removing the lock %s: whoever held it has died", lock)
            lock.unlink(missing_ok=True)
        if any(lock.exists() for lock in locks):
            log.info("waiting for the build that holds %s", locks[0])
            time.sleep(1)


def _age(lock: Path) -> float:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0
