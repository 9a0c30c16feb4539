"""Drives a pool from an event loop, without a thread.

While there are tasks, the loop watches duplicates of the pool's fds: the results channel and the sentinels of the
workers. (The pool closes its own whenever a worker ends.) The loop calls the pool's dispatcher as a waiting thread
would, but never waits in it. A timer handles events without an fd: a worker that was stopped, an audit after a death,
and tasks that were cancelled in the kernel's queue. If a loop cannot watch these fds, `SelectorThread` watches them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.backend import kernel
from forkshm.channel import PrivateFd
from forkshm.pool._results import delivering
from forkshm.pool._selector_thread import SelectorThread
from forkshm.pool._tasks import ResultSink
from forkshm.region import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forkshm.pool import Pool
    from forkshm.pool._tasks import Answer, Task

__all__ = ("LoopDriver", "LoopResultSink")

_LOOK_SECONDS = 0.1
_LOOK_AFTER_CANCELLED_SECONDS = 0.005
_AUDIT_SECONDS = 0.001


class LoopResultSink(ResultSink):
    """Tasks whose answers an event loop takes.

    Args:
        driver: The driver of the pool.
        came: Called in the loop when there may be new `answers`. It is called again if a signal handler raises in it.
        chunksize: Items in each task, except the last.
    """

    def __init__(self, driver: LoopDriver, came: Callable[[], None], chunksize: int = 1) -> None:
        super().__init__()
        self.came = came
        # Both keyed by the position of the task: those without an answer, and the answers that are not consumed.
        self.tasks: dict[int, Task] = {}
        self.answers: dict[int, Answer] = {}
        self.chunksize = chunksize
        self._driver = driver

    def deliver(self, task: Task, answer: Answer) -> None:
        """Pass the answer of *task* to the event loop."""
        self._driver.deliver(self, task, answer)


class LoopDriver:
    """One pool, driven by the event loop that runs when this object is made."""

    def __init__(self, pool: Pool) -> None:
        self.loop = asyncio.get_running_loop()
        self.pool = pool
        self._thread = threading.get_ident()
        self._dispatcher = pool._dispatcher
        self._worker_group = pool._worker_group
        # The watched duplicates, keyed by their worker or, for the results channel, the worker group.
        self._watched: dict[object, OwnedFd] = {}
        self._selector_thread: SelectorThread | None = None
        self._open: set[Task] = set()
        self._cancelled: set[Task] = set()
        # Keyed by the id of the task.
        self._answers: dict[int, tuple[LoopResultSink, Task, Answer]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_looking = False

    def is_idle(self) -> bool:
        """Return whether every submitted task was answered."""
        return not self._open

    def submit(self, sink: LoopResultSink, tasks: Sequence[Task]) -> None:
        """Send tasks, whose answers *sink* takes.

        Raises:
            Exception: As for `Dispatcher.submit`.
        """
        for task in tasks:
            task.sink = sink
            sink.tasks[task.position] = task
        sink.keeps = self.pool
        try:
            self._open.update(tasks)
            self._dispatcher.submit(tasks, waited_for=True)
        except BaseException:
            self._open.difference_update(tasks)
            for task in tasks:  # not those of earlier calls, which may be answered later
                sink.tasks.pop(task.position, None)
            raise
        self._watch()

    async def run(self, tasks: Sequence[Task], each: Callable[[int], object] = id) -> list[tuple[bool, Any]]:
        """Send tasks, and return (True, value) or (False, exception) for each.

        Args:
            tasks: The tasks, whose positions are 0, 1, 2 and so on.
            each: Called with the position of each answered task.
        """
        done = self.loop.create_future()
        opened: dict[int, tuple[bool, Any]] = {}
        expected = len(tasks)

        def came() -> None:
            for position, answer in list(sink.answers.items()):
                opened[position] = self._dispatcher.open(answer)
                del sink.answers[position]
                each(position)
            if len(opened) == expected and not done.done():
                done.set_result(None)

        if tasks:
            sink = LoopResultSink(self, came, len(tasks[0].arguments))
            self.submit(sink, tasks)
            try:
                await done
            except BaseException:  # canceled, or a signal handler has raised
                self.cancel(sink)
                raise
        # `came` and the sink refer to each other, so results left in `opened` would stay until a garbage collection.
        return [opened.pop(position) for position in range(expected)]

    # -- answers ------------------------------------------------------------------------------

    def deliver(self, sink: LoopResultSink, task: Task, answer: Answer) -> None:
        """Take an answer. May be called in any thread."""
        key, entry = id(task), (sink, task, answer)
        with delivering:
            if not task.is_delivered:
                self._answers[key] = entry
                task.is_delivered = True
        if threading.get_ident() != self._thread:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so no coroutine waits
                self.loop.call_soon_threadsafe(self._hand_out)
        elif not self._is_looking and not self.loop.is_closed():
            self.loop.call_soon(self._hand_out)

    def _hand_out(self) -> None:
        # If a signal handler raises here, the event loop only logs that. So an answer stays until all of this was done;
        # the next call repeats it.
        for key in list(self._answers):
            sink, task, answer = self._answers[key]
            position = task.position
            # No call between these stores, so that no answer is consumed twice.
            if position in sink.tasks:
                if not task.is_cancelled:
                    sink.answers[position] = answer
                del sink.tasks[position]
                if not sink.tasks:
                    sink.keeps = None
            sink.came()
            self._cancelled.discard(task)
            self._open.discard(task)
            self._answers.pop(key, None)
        self._watch()

    @_interrupts.promptly
    def _look(self) -> None:
        try:
            self._look_once()
        except BaseException:
            # A signal handler has raised. The loop only logs that, and nobody else would look.
            if self._is_needed() and not self.loop.is_closed():
                self.loop.call_later(_LOOK_SECONDS, self._look)
            raise

    def _look_once(self) -> None:
        self._is_looking = True
        try:
            if not self._worker_group.results.closed:
                self._dispatcher.drive(lambda: bool(self._answers), timeout=0)
                self._dispatcher.feed()  # the answers have made room
        finally:
            self._is_looking = False
        if self._cancelled:
            self._dispatcher.end_cancelled()
        self._hand_out()

    # -- watching -------------------------------------------------------------------------------

    def _is_needed(self) -> bool:
        return bool(self._open) and not self._worker_group.results.closed

    def _watch(self) -> None:
        """Watch the results channel and the workers while there are tasks, until the pool is terminated."""
        wanted: dict[object, int] = {}
        is_needed = self._is_needed()
        if is_needed:
            wanted[self._worker_group] = self._worker_group.results.fileno()
            wanted.update((worker, worker.sentinel) for worker in self._worker_group.workers)
        for source in [source for source in self._watched if source not in wanted]:
            self._unwatch(source)
        for source, fd in wanted.items():
            if source in self._watched:
                continue
            self._worker_group.check()
            if kernel.loops_watch_fds:
                owned = OwnedFd()
                # No call between the creation of the fd and its stores.
                owned.fd = kernel.duplicate(fd)
                self._watched[source] = owned
                try:
                    owned.own()
                    self.loop.add_reader(owned.fd, self._look)
                except BaseException:
                    self._unwatch(source)
                    raise
            else:
                if self._selector_thread is None:
                    self._selector_thread = SelectorThread(self.loop, self._look)
                    weakref.finalize(self, self._selector_thread.close)
                of_worker_group = source is self._worker_group
                self._selector_thread.watch(
                    source, self._worker_group.results.duplicate() if of_worker_group else _Sentinel(fd)
                )
                self._watched[source] = OwnedFd()
        if not is_needed:
            self._stop_timer()
        elif self._timer is None:
            pause = _LOOK_AFTER_CANCELLED_SECONDS if self._cancelled else _LOOK_SECONDS
            self._timer = self.loop.call_later(
                _AUDIT_SECONDS if self._dispatcher.needs_a_look() else pause, self._on_time
            )

    def _unwatch(self, source: object) -> None:
        owned = self._watched[source]
        if self._selector_thread is not None:
            self._selector_thread.unwatch(source)
            del self._watched[source]
            return
        if not self.loop.is_closed():
            self.loop.remove_reader(owned.fd)
        # No call between these.
        del self._watched[source]
        owned.close()

    @_interrupts.promptly
    def _on_time(self) -> None:
        self._timer = None
        self._look()

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Stop watching. Closing twice is allowed."""
        self._stop_timer()
        for source in list(self._watched):
            self._unwatch(source)
        if self._selector_thread is not None:
            self._selector_thread.close()
            self._selector_thread = None

    # -- cancelling -----------------------------------------------------------------------------

    def cancel(self, sink: LoopResultSink) -> None:
        """Cancel the tasks of *sink*: drop those that no worker has begun, and end the workers that run one."""
        tasks = list(sink.tasks.values())
        sink.tasks.clear()
        for task in tasks:
            task.retries = 0
        self._cancelled.update(tasks)
        self._dispatcher.cancel(tasks, running=True)
        self._stop_timer()  # check sooner
        self._watch()


class _Sentinel(PrivateFd):
    """A duplicate of a process's sentinel."""

    def __init__(self, fd: int) -> None:
        super().__init__(kernel.duplicate(fd))

    def fileno(self) -> int:
        """Return the fd; -1 when closed."""
        return self.fd
