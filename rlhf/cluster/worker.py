"""What every process that holds a role does before its first work, local or remote."""

from __future__ import annotations

import ctypes
import os
import platform
import socket


def set_threads(threads: int) -> None:
    """Give this process a thread count of its own.

    Ray sets OMP_NUM_THREADS=1 by itself, and a sum over a long vector depends on the count, so the driver
    and all workers get the same one.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed memory instead of giving it back to the kernel.

    A CPU step frees and asks for the same large tensors again and again; the page faults cost a fifth of it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (malloc.h)
            libc.mallopt(option, 1 << 30)


def set_rendezvous(rank: int = 0, world_size: int = 1) -> None:
    """Say which rank this process is, where its peers meet. DeepSpeed looks for mpi4py unless it finds all of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
