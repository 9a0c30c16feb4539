"""Drives a pool from an event loop: no thread, only the pool's socket and the ends of its workers.

While there are tasks, the loop watches duplicates of these fds (the pool closes its own whenever a
worker ends) and calls the pool's dispatcher as any thread that waits would, but never waits in it. A
timer looks after what no fd tells: a worker that was stopped, an audit after a death, tasks that were
cancelled while they lay in the kernel's queue.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from forkshm import _system
from forkshm.backend import kernel
from forkshm.pool._results import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forkshm.pool import Pool
    from forkshm.pool._crew import Worker
    from forkshm.pool._dispatch import Task
    from forkshm.pool._results import Outcome

__all__ = ("Pump", "PumpJob")

_LOOK_SECONDS = 0.1
_LOOK_AFTER_CANCELLED_SECONDS = 0.005
_AUDIT_SECONDS = 0.001
#: A process is stopped within microseconds, unless it is in a system call that cannot be interrupted.
_STOPPED_WITHIN_SECONDS = 0.05


class PumpJob(Job):
    """Tasks whose answers an event loop takes.

    Args:
        pump: What drives the pool.
        take: Called in the loop with the position and the outcome of each task.
        chunksize: Items in each task, but for the last.
    """

    def __init__(self, pump: Pump, take: Callable[[int, Outcome], None], chunksize: int = 1) -> None:
        super().__init__()
        self.take = take
        self.tasks: dict[int, Task] = {}
        self.chunksize = chunksize
        self._pump = pump

    def deliver(self, position: int, outcome: Outcome) -> None:
        self._pump.deliver(self, position, outcome)


class Pump:
    """One pool, driven by one event loop, the one that runs when this is made."""

    def __init__(self, pool: Pool) -> None:
        self.loop = asyncio.get_running_loop()
        self.pool = pool
        self._thread = threading.get_ident()
        self._dispatcher = pool._dispatcher
        self._crew = pool._crew
        # By what they are of, the crew or a worker.
        self._watched: dict[object, int] = {}
        self._open: set[Task] = set()
        self._cancelled: set[Task] = set()
        self._answers: collections.deque[tuple[PumpJob, int, Outcome]] = collections.deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_looking = False

    def is_idle(self) -> bool:
        """Whether all that was submitted is answered."""
        return not self._open

    def submit(self, job: PumpJob, tasks: Sequence[Task]) -> None:
        """Send tasks, whose answers *job* takes.

        Raises:
            Exception: As `Dispatcher.submit`.
        """
        for task in tasks:
            task.job = job
            job.tasks[task.position] = task
        job.keeps = self.pool
        self._open.update(tasks)
        try:
            self._dispatcher.submit(tasks, waited_for=True)
        except BaseException:
            self._open.difference_update(tasks)
            raise
        self._watch()

    async def run(self, tasks: Sequence[Task], each: Callable[[int], object] = id) -> list[tuple[bool, Any]]:
        """Send tasks, and return for each (True, value) or (False, exception).

        Args:
            tasks: Their positions are 0, 1, 2 and so on.
            each: Called with the position of each that is answered.
        """
        done = self.loop.create_future()
        answers: dict[int, tuple[bool, Any]] = {}

        def take(position: int, outcome: Outcome) -> None:
            answers[position] = self._dispatcher.open(outcome)
            each(position)
            if len(answers) == len(tasks) and not done.done():
                done.set_result(None)

        if tasks:
            job = PumpJob(self, take, len(tasks[0].arguments))
            self.submit(job, tasks)
            try:
                await done
            except asyncio.CancelledError:
                self.cancel(job)
                raise
        return [answers[position] for position in range(len(tasks))]

    # -- answers ------------------------------------------------------------------------------

    def deliver(self, job: PumpJob, position: int, outcome: Outcome) -> None:
        """Take an answer, in whichever thread; under the lock of the dispatcher, perhaps."""
        self._answers.append((job, position, outcome))
        if threading.get_ident() != self._thread:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self.loop.call_soon_threadsafe(self._hand_out)
        elif not self._is_looking and not self.loop.is_closed():
            self.loop.call_soon(self._hand_out)

    def _hand_out(self) -> None:
        while self._answers:
            job, position, outcome = self._answers.popleft()
            task = job.tasks.pop(position)
            self._open.discard(task)
            self._cancelled.discard(task)
            if not job.tasks:
                job.keeps = None
            job.take(position, outcome)
        self._watch()

    def _look(self) -> None:
        self._is_looking = True
        try:
            self._dispatcher.drive(lambda: bool(self._answers), timeout=0)
            self._dispatcher._feed()  # what was answered has made room
        finally:
            self._is_looking = False
        self._end_cancelled()
        self._hand_out()

    # -- what is watched ------------------------------------------------------------------------

    def _watch(self) -> None:
        """Watch what there is to watch while there are tasks."""
        wanted: dict[object, int] = {}
        if self._open:
            wanted[self._crew] = self._crew.results.fileno()
            wanted.update((worker, worker.sentinel) for worker in self._crew.workers)
        for source in [source for source in self._watched if source not in wanted]:
            self._unwatch(source)
        for source, fd in wanted.items():
            if source not in self._watched:
                self._watched[source] = kernel.duplicate(fd)
                self.loop.add_reader(self._watched[source], self._look)
        if not self._open:
            self._stop_timer()
        elif self._timer is None:
            pause = _LOOK_AFTER_CANCELLED_SECONDS if self._cancelled else _LOOK_SECONDS
            self._timer = self.loop.call_later(_AUDIT_SECONDS if self._dispatcher._audit else pause, self._on_time)

    def _unwatch(self, source: object) -> None:
        fd = self._watched.pop(source)
        if not self.loop.is_closed():
            self.loop.remove_reader(fd)
        kernel.close(fd)

    def _on_time(self) -> None:
        self._timer = None
        self._look()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        """Watch nothing any more. Closing twice is allowed."""
        self._stop_timer()
        for source in list(self._watched):
            self._unwatch(source)

    # -- cancelling -----------------------------------------------------------------------------

    def cancel(self, job: PumpJob) -> None:
        """Do no more of a job: what is not sent is forgotten, what runs is ended with its worker."""
        unanswered = set(job.tasks.values())
        with self._dispatcher._lock:
            unsent = unanswered.intersection(self._dispatcher._backlog)
            left = [task for task in self._dispatcher._backlog if task not in unsent]
            self._dispatcher._backlog.clear()
            self._dispatcher._backlog.extend(left)
        for task in unsent:
            task.close()
            del job.tasks[task.position]
        self._open -= unsent
        self._cancelled |= unanswered - unsent
        for task in unanswered:
            cast("Any", task).retries = 0
        self._end_cancelled()
        self._stop_timer()  # and look sooner
        self._watch()

    def _end_cancelled(self) -> None:
        """End the workers that are at tasks which nobody wants."""
        if not self._cancelled:
            return
        numbers = {number for number, task in list(self._dispatcher._sent.items()) if task in self._cancelled}
        for worker in list(self._crew.workers):
            number = self._crew.status.state(worker.slot)
            if number in numbers:
                self._end(worker, number)

    def _end(self, worker: Worker, number: int) -> None:
        # Stopped first: it may have answered and begun the next task, which somebody wants.
        with contextlib.suppress(ProcessLookupError):
            kernel.signal_process(worker.sentinel, worker.pid, _system.SIGSTOP)
            if _is_stopped(worker.pid) and self._crew.status.state(worker.slot) == number:
                kernel.signal_process(worker.sentinel, worker.pid, _system.SIGKILL)
                # It did not die of what it did.
                cast("Any", self._dispatcher)._deaths_for_nothing = 0
            else:  # the timer looks again
                kernel.signal_process(worker.sentinel, worker.pid, _system.SIGCONT)


def _is_stopped(pid: int) -> bool:
    deadline = time.monotonic() + _STOPPED_WITHIN_SECONDS
    while time.monotonic() < deadline:
        if kernel.is_stopped(pid) is not False:  # or it has ended
            return True
    return False
