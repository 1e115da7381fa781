"""What every process that holds a role does before its first work, local or remote."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
from dataclasses import dataclass


def set_threads(threads: int) -> None:
    """Give this process a thread count of its own.

    Ray sets OMP_NUM_THREADS=1 by itself, and a sum over a long vector depends on the count, so the driver
    and all workers get the same one.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    keep_freed_memory()


def hide_gpus() -> None:
    """Leave this process the CPU alone. Before anything in it asks for a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def gpu_peak_bytes() -> int:
    """The most that torch has held of a GPU's memory; 0 without one."""
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed memory instead of giving it back to the kernel.

    A CPU step frees and asks for the same large tensors again and again; the page faults cost a fifth of it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD (malloc.h)
            libc.mallopt(option, 1 << 30)


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of a role meet, and which one this is."""

    address: str
    port: int
    rank: int = 0
    world_size: int = 1

    @classmethod
    def here(cls) -> Rendezvous:
        """For a process alone."""
        return cls("127.0.0.1", free_port())


def free_port() -> int:
    """A TCP port that nobody listens on now; someone may take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def set_rendezvous(meeting: Rendezvous) -> None:
    """Put it where torch and DeepSpeed look; DeepSpeed goes for mpi4py unless it finds all of it."""
    os.environ.update(
        RANK=str(meeting.rank),
        LOCAL_RANK="0",  # each worker sees one device, its own
        WORLD_SIZE=str(meeting.world_size),
        MASTER_ADDR=meeting.address,
        MASTER_PORT=str(meeting.port),
    )
