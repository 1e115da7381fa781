"""Calls of a user's function: a bounded number at a time, each bounded in time, none of them in the caller's way.

A hung thread can't be killed, and a blocked event loop neither: the call is given up, and a new thread takes the place
of the old one. All threads are daemons, so that a hung one doesn't keep the process alive.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import Any

log = logging.getLogger(__name__)

THREADS = 4  # more would only share the interpreter's lock: a reward that computes would seem to hang
TASKS = 64
MAX_HUNG = 64  # threads given up before calling goes on no longer
BLOCKED_S = 5.0  # a loop that is this late with a timeout is blocked


class Overdue(TimeoutError):
    """The call did not return in time."""

    def __init__(self, timeout_s: float, hint: str = "") -> None:
        super().__init__(f"did not return within {timeout_s:g} s{hint}")


class Call:
    """One call. ``future`` is settled once: whoever comes second is told so."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.future: Future[Any] = Future()
        self.started: float | None = None

    def settle(self, result: Any = None, error: BaseException | None = None) -> bool:
        try:
            self.future.set_exception(error) if error else self.future.set_result(result)
        except InvalidStateError:
            return False
        return True

    def is_overdue(self, limit_s: float) -> bool:
        return self.started is not None and not self.future.done() and time.monotonic() - self.started > limit_s


def make_caller(function: Callable[..., Any], timeout_s: float, concurrency: int | None) -> Threads | Tasks:
    """``Tasks`` for an ``async def``, else ``Threads``. concurrency None: the default of either."""
    if inspect.iscoroutinefunction(function):
        return Tasks(timeout_s, concurrency or TASKS)
    return Threads(timeout_s, concurrency or THREADS)


class Threads:
    """Calls of plain functions, in worker threads."""

    def __init__(self, timeout_s: float, concurrency: int) -> None:
        self.timeout_s = timeout_s
        self.queue: SimpleQueue[Call | None] = SimpleQueue()
        self.workers = [_Worker(self.queue) for _ in range(concurrency)]
        self.num_hung = 0
        weakref.finalize(self, self.queue.put, None)

    def start(self, work: Callable[[], Any]) -> Future[Any]:
        """Queue a call; returns at once."""
        call = Call(work)
        self.queue.put(call)
        return call.future

    def watch(self) -> None:
        """Give up calls that are overdue. Raises ValueError when too many threads hang."""
        for i, worker in enumerate(self.workers):
            call = worker.call
            if call is None or not call.is_overdue(self.timeout_s) or not call.settle(error=Overdue(self.timeout_s)):
                continue
            self.num_hung += 1
            log.warning("a call hangs; its thread is left behind (%d so far), a new one takes over", self.num_hung)
            if self.num_hung >= MAX_HUNG:
                raise ValueError(f"{self.num_hung} calls of the function hang in threads that can't be ended; mend it")
            self.workers[i] = _Worker(self.queue)


class _Worker(threading.Thread):
    """Takes calls from the queue until one is given up under its hands, or None says that it is over."""

    def __init__(self, queue: SimpleQueue[Call | None]) -> None:
        super().__init__(daemon=True)
        self.queue = queue
        self.call: Call | None = None
        self.start()

    def run(self) -> None:
        while (call := self.queue.get()) is not None:
            call.started = time.monotonic()
            self.call = call
            try:
                kept = call.settle(call.work())
            except BaseException as error:  # also sys.exit(): whatever it is, it is the call's
                kept = call.settle(error=error)
            if not kept:
                return
        self.queue.put(None)  # for the next worker


class Tasks:
    """Calls of coroutine functions, as tasks on one event loop in a thread of its own."""

    def __init__(self, timeout_s: float, concurrency: int) -> None:
        self.timeout_s = timeout_s
        self.concurrency = concurrency
        self.num_hung = 0
        self.waiting: set[Call] = set()
        self._open_loop()

    def _open_loop(self) -> None:
        self.running: set[Call] = set()
        self.slots = asyncio.Semaphore(self.concurrency)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=_serve, args=(self.loop,), daemon=True).start()
        self.end_loop = weakref.finalize(self, self.loop.call_soon_threadsafe, self.loop.stop)

    def start(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Future[Any]:
        """Queue a call; returns at once."""
        call = Call(work)
        self.waiting.add(call)
        asyncio.run_coroutine_threadsafe(self._run(call, self.slots), self.loop)
        return call.future

    async def _run(self, call: Call, slots: asyncio.Semaphore) -> None:
        async with slots:
            if slots is not self.slots:  # this loop was given up, and the call moved to the next one
                return
            call.started = time.monotonic()
            self.waiting.discard(call)
            self.running.add(call)
            task = asyncio.ensure_future(_contained(call.work))
            # Not wait_for: that waits for the end of what it cancels, which may not come.
            await asyncio.wait([task], timeout=self.timeout_s)
            if not task.done():
                task.cancel()
                call.settle(error=Overdue(self.timeout_s))
            elif task.cancelled():
                call.settle(error=RuntimeError("the call was cancelled from within"))
            elif error := task.exception():
                call.settle(error=error)
            else:
                call.settle(task.result())
            self.running.discard(call)

    def watch(self) -> None:
        """Give up a loop that a call blocks, with the calls that run on it; the others move to a new one.

        Raises ValueError when too many loops hang.
        """
        if not any(call.is_overdue(self.timeout_s + BLOCKED_S) for call in list(self.running)):
            return
        self.num_hung += 1
        log.warning(
            "a call blocks its event loop; the loop is left behind (%d so far), a new one takes over", self.num_hung
        )
        if self.num_hung >= MAX_HUNG:
            raise ValueError(f"{self.num_hung} calls of the function block event loops that can't be ended; mend it")
        stuck = self.running
        self.end_loop()  # should it ever wake
        self._open_loop()
        hint = ": it, or a call beside it, blocks the event loop; await what takes time, or write a plain `def`"
        for call in stuck:
            call.settle(error=Overdue(self.timeout_s, hint))
        for call in list(self.waiting):
            asyncio.run_coroutine_threadsafe(self._run(call, self.slots), self.loop)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))  # they take notice
    loop.close()


async def _contained(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What ends an interpreter must not end the loop."""
    try:
        return await work()
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
