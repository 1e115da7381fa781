"""Several processes answer, each with its own engine and every N-th row; the parent takes their records in turn."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from rollout_engine.batch.job import Job
from rollout_engine.batch.output import Record

READ_AHEAD = 1024  # records held for each process while another one is slow
JOIN_SECONDS = 10

Message = Record | BaseException | None  # an answer, why the process failed, or the end of its rows


class WorkerDied(ChildProcessError):
    """A process ended before its rows did."""


@contextmanager
def answer_in_parallel(job: Job, done: int, world: int) -> Iterator[Iterator[Record]]:
    """Records of the rows from ``done`` on, in their order, as ``world`` processes answer them.

    Raises, while iterating, WorkerDied when a process is gone, and what a process raised.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    queues: list[queue.Queue[Message]] = []
    try:
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, done, rank, world, sender), daemon=True)
            process.start()
            sender.close()  # the child holds the only end now, so its death ends the pipe
            records: queue.Queue[Message] = queue.Queue(READ_AHEAD)
            threading.Thread(target=_drain, args=(receiver, records), daemon=True).start()
            processes.append(process)
            queues.append(records)
        yield _in_turn(processes, queues)
    finally:
        for process in processes:
            process.kill()
            process.join(JOIN_SECONDS)


def _in_turn(processes: list[SpawnProcess], queues: list[queue.Queue[Message]]) -> Iterator[Record]:
    """Rows were dealt in turn, so the first process that has no more ends them all."""
    while True:
        for process, records in zip(processes, queues, strict=True):
            message = records.get()
            if message is None:
                return
            if isinstance(message, EOFError):
                process.join(JOIN_SECONDS)
                raise WorkerDied(
                    f"process {process.pid}, one of {len(queues)}, died with exit code {process.exitcode}; what was "
                    "answered before is written, and the same command goes on from there"
                )
            if isinstance(message, BaseException):
                raise message
            yield message


def _drain(receiver: Connection, records: queue.Queue[Message]) -> None:
    message: Message = EOFError()
    while message is not None:
        try:
            message = receiver.recv()
        except (EOFError, OSError):
            records.put(EOFError())
            return
        records.put(message)


def _work(job: Job, done: int, rank: int, world: int, sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for record in job.answer(job.load(rank), job.rows(done, rank, world)):
            sender.send(record)
        sender.send(None)
    except Exception as error:
        sender.send(error)


def _end_with_parent() -> None:
    """A killed parent can't end its children, and a new run must not compete with them for the device."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
