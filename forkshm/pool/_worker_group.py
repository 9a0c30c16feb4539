"""The worker processes of a pool: starting, watching, reaping."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import math
import os
import signal
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess, _system
from forkshm._tools import is_followed
from forkshm.backend import kernel
from forkshm.channel import Kind, PrivateFd, close_in_children, pair, write_message
from forkshm.errors import ChannelBrokenError, ChannelClosedError, ForkshmWarning, WorkerStartError
from forkshm.pickler import importable_in_children
from forkshm.pool import _inner_threads, _unforkable
from forkshm.pool._status import STARTING, Status
from forkshm.pool._worker import Assignment, run_worker
from forkshm.pool.observe import WorkerReport, worker_reports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Literal

    from forkshm._multiprocess import process
    from forkshm.channel import Receiver, Sender

    InnerThreads = int | Literal["share"] | None
    """Threads of BLAS and the like in a worker: a number, the worker's share of the cores, or no limit."""

__all__ = ("WorkerGroup", "WorkerHandle", "descriptors_open")

# Seconds that a worker may take to end after SIGTERM, before SIGKILL.
_GRACE_SECONDS = 1.0
# Seconds that a worker may take to end after SIGKILL. A process in a system call that cannot be interrupted (a file
# server that does not answer, a broken disk) ends when the call does.
_LAST_SECONDS = 5.0
# How often one that may leave in order is looked at.
_LOOK_SECONDS = 0.01
# How long workers may take to leave once a closed pool has answered all: for the rest of
# their finalizers and threads.
_FAREWELL_SECONDS = 10.0


@dataclasses.dataclass(eq=False)
class WorkerHandle:
    """One worker process, as its parent sees it."""

    slot: int
    process: process.BaseProcess
    sentinel: int
    """Readable when the process has ended."""
    pid: int
    """These two outlive the process object."""
    name: str
    exitcode: int | None = None
    """Once it was collected."""
    is_collected: bool = False


def _signal(worker: WorkerHandle, number: int) -> None:
    # It may have ended, or be another user by now. What cannot be signalled ends when its lifeline is closed.
    with contextlib.suppress(OSError):
        kernel.signal_process(worker.sentinel, worker.pid, number)


def _runs_its_target(process: process.BaseProcess) -> bool:
    """Return whether a process runs its target, and not the `run` of a subclass of the caller's."""
    return type(process).run is _multiprocess.process.BaseProcess.run


def _still_there(workers: list[WorkerHandle], seconds: float) -> list[WorkerHandle]:
    """Wait until they have ended, at the most so long; return those that have not."""
    deadline = time.monotonic() + seconds
    alive = {worker.sentinel: worker for worker in workers}
    poll = kernel.poller()
    for sentinel in alive:
        poll.register(sentinel, kernel.READABLE)
    while alive and (left := deadline - time.monotonic()) > 0:
        try:
            ended = poll.poll(math.ceil(left * 1000))
        except OSError:  # ENOMEM: there may be room in a moment
            time.sleep(min(left, _LOOK_SECONDS))
            continue
        for sentinel, _ in ended:
            poll.unregister(sentinel)
            del alive[sentinel]
    return list(alive.values())


class WorkerGroup:
    """The processes of one pool, and the channels to and from them.

    Guarantees: no worker outlives this process, however it ends. Once the tasks channel
    has ended, workers finish what is queued and leave.
    """

    def __init__(
        self,
        size: int,
        make_process: Callable[..., process.BaseProcess],
        initializer: Callable[..., object] | None,
        initargs: tuple[Any, ...],
        max_tasks: int | None,
        born_shared: bool,
        worker_init: Callable[[], object] | None = None,
        worker_exit: Callable[[Any], object] | None = None,
        cpu_ids: Sequence[frozenset[int]] = (),
        inner_threads: InnerThreads = None,
    ) -> None:
        self.size = size
        self.owner = os.getpid()
        self.made_at = time.perf_counter()
        self._make_process = make_process
        self.max_tasks = max_tasks
        self.has_initializer = initializer is not None or worker_init is not None
        self._birth = (initializer, initargs, max_tasks, born_shared, worker_init, worker_exit)
        # What a tool has seen in a worker is saved when that ends in order.
        self._has_exit = worker_exit is not None or is_followed()
        self._cpu_ids = cpu_ids
        self._inner_threads = inner_threads
        # Asked once: it reads files.
        self._share = _inner_threads.share(kernel.usable_cores(), size) if inner_threads == "share" else None
        # Tasks by their numbers, from when they are sent until they are answered; and those given up since.
        self.sent: dict[int, Any] = {}
        self.given_up: set[int] = set()
        self._reports: tuple[WorkerReport, ...] = ()
        functions = {"worker_init": worker_init, "worker_exit": worker_exit}
        self._names_of_parts = {"initializer": initializer, "initargs": initargs, **functions}
        self.workers: list[WorkerHandle] = []
        self._by_sentinel: dict[int, WorkerHandle] = {}
        # The last one in each slot.
        self.by_slot: dict[int, WorkerHandle] = {}
        self.started = 0
        self._open: list[Any] = []
        # The workers are gone, and what is open is being closed.
        self._has_ended = False
        # Processes that are being started.
        self._begun: list[process.BaseProcess] = []
        # Fds of workers that are being started; empty lists mostly.
        self._of_starts: list[list[int]] = []
        # What somebody's test gives a pool in place of processes: cannot be watched, and is ended like them.
        self._imitations: list[Any] = []
        # Workers that are started later have more, and that does no harm.
        self._start_method: str | None = getattr(make_process, "_start_method", None)
        self.importable = importable_in_children(self._start_method)
        # Libraries that this process had used when it forked the workers, and that these may wait for.
        self.suspects: list[str] = []
        _worker_groups.add(self)
        try:
            self._open_channels()
        except BaseException:
            self.stop()
            raise

    def start_all(self) -> None:
        """Start the workers; once.

        Raises:
            WorkerStartError: fork(2) was refused; the worker group is stopped.
        """
        try:
            self._start_all()
        except BaseException:
            self.stop()
            raise

    def _start_all(self) -> None:
        if self._inner_threads is not None:
            _inner_threads.prepare()
        if (self._start_method or _multiprocess.default_context.get_start_method()) == "fork":
            self.suspects = _unforkable.suspects()
            _unforkable.warn(self.suspects)
        with _interrupts.held_back(), self._ends_of_workers() as ends:
            # What can be done before the first fork is, and after the last: a page that is written to is copied after
            # each.
            processes = [self._make(slot, ends) for slot in range(self.size)]
            if gc.isenabled():
                # What is young is collected now: later it would be in each of the processes.
                gc.collect(0)
            begun = 0
            try:
                for slot, process in enumerate(processes):
                    self._begin(slot, process)
                    begun += 1
            finally:
                self._enter(processes[:begun])
        self._begun.clear()
        if self._imitations:
            kind = type(self._imitations[0]).__name__
            raise WorkerStartError(
                errno.ECHILD,
                f"the context's Process makes objects that have no pid once they are started ({kind}): a pool "
                "watches real processes; give it a context whose Process is one",
            )

    def _open_channels(self) -> None:
        self.status = Status(self.size)
        self._open.append(self.status)
        # Workers and tasks share these: the kernel gives each message to one worker.
        self.tasks, self._tasks_end = pair()
        self._open += [self.tasks, self._tasks_end]
        self._results_end, self.results = pair()
        self._open += [self._results_end, self.results]
        # No child keeps any of them, not even by accident: an end that somebody holds
        # keeps messages, and what they lease, alive. Workers are given their own fds.
        close_in_children(self.tasks, self._tasks_end, self._results_end, self.results)
        self._lifeline, self._lifeline_end = PrivateFd(-1), PrivateFd(-1)
        self._wakeup, self._wakeup_end = PrivateFd(-1), PrivateFd(-1)
        self._open += [self._lifeline, self._lifeline_end, self._wakeup, self._wakeup_end]
        # Nothing is called between the fds' being there and their having an owner.
        self._lifeline_end.fd, self._lifeline.fd = kernel.create_lifeline()
        self._wakeup_end.fd, self._wakeup.fd = kernel.create_wakeup()
        self.events = kernel.poller()
        self._is_waiting = False
        self.events.register(self.results.fileno(), kernel.READABLE)

    def start(self, slot: int) -> None:
        """Start a worker in *slot*.

        Raises:
            WorkerStartError: fork(2) was refused.
        """
        self._end_unknown()
        # There is no moment at which it lives and nobody knows it.
        with _interrupts.held_back(), self._ends_of_workers() as ends:
            process = self._make(slot, ends)
            self._begin(slot, process)
            self._enter([process], slot)
        self._begun.clear()

    @contextlib.contextmanager
    def _ends_of_workers(self) -> Iterator[tuple[Receiver, Sender, int, int]]:
        """Give workers started in the block the ends of the channels, and close those ends here afterwards."""
        # No exit stack: after a fork whatever is touched is copied, and it touches much.
        channels: list[Receiver | Sender] = []
        pipes: list[int] = []
        self._of_starts.append(pipes)
        try:
            try:
                channels += [tasks := self._tasks_end.duplicate()]
                channels += [results := self._results_end.duplicate()]
                pipes += [lifeline := kernel.duplicate(self._lifeline_end.fd)]
                pipes += [wakeup := kernel.duplicate(self._wakeup_end.fd)]
            except OSError as error:
                raise self._cannot_start(error) from error
            yield tasks, results, lifeline, wakeup
        finally:
            self._close_pipes()
            for channel in channels:
                channel.close()

    def _close_pipes(self) -> None:
        """Close what workers were started with; the rest of it, if that is interrupted, with the next call."""
        while self._of_starts:
            kernel.close_all(self._of_starts[-1])
            self._of_starts.pop()

    def _cannot_start(self, error: OSError, slot: int = 0) -> WorkerStartError:
        return WorkerStartError(
            error.errno or 0,
            f"cannot start worker {slot + 1} of {self.size} {_system.why_refused(error)}",
        )

    def _make(self, slot: int, ends: tuple[Receiver, Sender, int, int]) -> process.BaseProcess:
        self.status.reset(slot)
        cpus = self._cpu_ids[slot % len(self._cpu_ids)] if self._cpu_ids else None
        tasks, results, lifeline, wakeup = ends
        inner = self._threads_in(cpus)
        assignment = Assignment(
            slot, tasks, results, self.status, lifeline, wakeup, *self._birth, cpus, inner, self.importable
        )
        made = self._make_process(target=run_worker, args=(assignment,))
        made.name = made.name.replace("Process", "PoolWorker")
        made.daemon = True
        made._names_of_parts = self._names_of_parts  # type: ignore[attr-defined]  # for those of ours
        made.ignores_interrupts = True  # type: ignore[attr-defined]  # ours
        if inner is not None:
            count, is_explicit = inner
            made._environment = _inner_threads.variables(count, is_explicit=is_explicit)  # type: ignore[attr-defined]
        return made

    def _threads_in(self, cpus: frozenset[int] | None) -> tuple[int, bool] | None:
        """Return how many threads BLAS and the like may use in a worker, and whether the caller said so."""
        if isinstance(self._inner_threads, int):
            return self._inner_threads, True
        if self._inner_threads is None:
            return None
        count = len(cpus) if cpus is not None else self._share
        return None if count is None else (count, False)

    def _begin(self, slot: int, process: process.BaseProcess) -> None:
        self._begun.append(process)
        try:
            process.start()
        except OSError as error:
            raise self._cannot_start(error, slot) from error

    def _enter(self, processes: Sequence[process.BaseProcess], first_slot: int = 0) -> None:
        """Watch processes that were started, which are in slots one after the other."""
        for slot, begun in enumerate(processes, first_slot):
            if getattr(begun, "pid", None) is None:
                self._imitations.append(begun)
                continue
            worker = WorkerHandle(slot, begun, -1, begun.pid or -1, begun.name)
            try:
                sentinel = kernel.open_process(begun.pid or -1, begun.sentinel)
            except OSError as error:
                for left in processes[slot - first_slot :]:  # nobody would ever end them
                    left.kill()
                    left.join()
                    left.close()
                raise self._cannot_start(error, slot) from error
            # No call between these.
            worker.sentinel = sentinel
            self._by_sentinel[sentinel] = self.by_slot[slot] = worker
            self.workers += [worker]
            self.started += 1
            self.look_at(worker)

    def look_at(self, worker: WorkerHandle) -> None:
        """Make `wait` report when a worker has ended. Can be repeated."""
        self.events.register(worker.sentinel, kernel.READABLE)

    def _end_unknown(self) -> None:
        """End the processes that were begun, and are no workers because that was interrupted."""
        while self._begun:
            begun = self._begun[-1]
            with contextlib.suppress(ValueError):  # it was closed
                is_importable = any(worker.process is begun for worker in self.workers)
                if getattr(begun, "pid", None) is not None and not is_importable:
                    begun.kill()
                    begun.join()
                    begun.close()
            self._begun.pop()

    def wake_workers(self, how_many: int) -> None:
        """Wake so many sleeping workers; one rung for that finds nothing sleeps on."""
        if self._wakeup.fd < 0:
            return  # stopped: nobody sleeps there any more
        kernel.wake(self._wakeup.fd, how_many)

    def has_unread_tasks(self) -> bool:
        """Return whether there are sent tasks that no worker has taken."""
        return self._tasks_end.has_message()

    def close_queue(self) -> None:
        """End the tasks channel: workers leave once the queue is empty."""
        self.tasks.end()
        self.wake_workers(len(self.workers))

    def wait(self, timeout: float) -> list[WorkerHandle]:
        """Wait until a result is there or a worker has ended; return those that have."""
        events = self.events
        if self._is_waiting:
            # A signal handler, in the midst of this very call: a poller does not wait twice at a time.
            events = kernel.poller()
            events.register(self.results.fileno(), kernel.READABLE)
            for sentinel in list(self._by_sentinel):
                events.register(sentinel, kernel.READABLE)
            ready = events.poll(math.ceil(timeout * 1000))
        else:
            self._is_waiting = True
            try:
                ready = events.poll(math.ceil(timeout * 1000))
            finally:
                self._is_waiting = False
        return [self._by_sentinel[fd] for fd, _ in ready if fd in self._by_sentinel]

    def wake(self) -> None:
        """Make `wait` return, in whichever thread it is called."""
        # When there is no room, it has something to return for anyway; and when the worker group
        # was stopped meanwhile, nobody waits.
        with contextlib.suppress(ChannelClosedError, ChannelBrokenError):
            self._results_end.send(*write_message(Kind.WAKE, 0), wait=False)

    def is_watched(self, worker: WorkerHandle) -> bool:
        """Return whether the worker's sentinel is open, because the worker was not reaped."""
        return self._by_sentinel.get(worker.sentinel) is worker

    def exit_code(self, worker: WorkerHandle) -> int | None:
        """Return the exit code of a worker that has ended."""
        if not worker.is_collected:
            worker.exitcode = _multiprocess.exit_code(worker.process, kernel.COLLECT_SECONDS)
            worker.is_collected = True
        return worker.exitcode

    def reap(self, worker: WorkerHandle) -> None:
        """Forget a worker that has ended. Can be repeated."""
        self.exit_code(worker)
        with contextlib.suppress(KeyError):
            self.events.unregister(worker.sentinel)
        if self._by_sentinel.get(worker.sentinel) is worker:
            # No call between these: the number may be that of another worker as soon as it is closed.
            sentinel = worker.sentinel
            closing = map(kernel.close, (sentinel,))
            del self._by_sentinel[sentinel]
            next(closing, None)
        if worker in self.workers:
            # Nobody is in that slot, so nobody counts on who was.
            self.status.reset(worker.slot)
            self.workers.remove(worker)

    def end(self, worker: WorkerHandle) -> None:
        """Kill a worker. It is reaped like any dead worker."""
        _signal(worker, _system.SIGKILL)

    def join_idle(self) -> None:
        """Wait a bounded time for the workers of a closed pool to leave. Workers that are still starting are killed."""
        if not self._open:
            return
        self.close_queue()  # again, where the thread that was about to do so was interrupted
        if not self.has_initializer and not self._has_exit:
            # No code of the caller has run in such a worker, and none would.
            for worker in self.workers:
                if self.status.state(worker.slot) == STARTING and _runs_its_target(worker.process):
                    self.end(worker)
        _still_there(self.workers, _FAREWELL_SECONDS)

    def _let_go(self) -> None:
        """End idle workers in order, within a second. Tasks in the queue are not begun."""
        self._end_tasks()
        deadline = time.monotonic() + _GRACE_SECONDS
        leaving = self.workers
        while leaving and (left := deadline - time.monotonic()) > 0:
            # One that is claiming may have taken the last task from the queue, and says so then.
            leaving = [worker for worker in leaving if not self._is_busy(worker)]
            leaving = _still_there(leaving, min(left, _LOOK_SECONDS))

    def _end_tasks(self) -> None:
        """End the tasks channel, and empty it: a worker that looks for a task leaves."""
        # Whatever the kernel refuses here, the workers are ended all the same.
        with contextlib.suppress(OSError):
            self.close_queue()
            while (received := self._tasks_end.receive_nowait()) is not None:
                received.close()

    def _is_busy(self, worker: WorkerHandle) -> bool:
        # What it says it is at it may have answered.
        state = self.status.state(worker.slot)
        return state == STARTING or state in self.sent or state in self.given_up

    def kill(self) -> list[WorkerHandle]:
        """End all workers: SIGTERM, a second's grace, SIGKILL; return those that live on all the same.

        Where there is a *worker_exit*, those that are at no task may call it before.
        """
        if self._has_exit and self.started:
            self._let_go()
        for worker in self.workers:
            _signal(worker, signal.SIGTERM)
        if self.workers:
            # A task may have a handler for SIGTERM that raises SystemExit. The worker survives that, and leaves now.
            self._end_tasks()
        left = _still_there(self.workers, _GRACE_SECONDS)
        for worker in left:
            _signal(worker, _system.SIGKILL)
        return _still_there(left, _LAST_SECONDS)

    def descriptors(self) -> int:
        """Return how many fds are open here beside the channels'."""
        pipes = [end for end in self._open if isinstance(end, PrivateFd) and end.fd >= 0]
        # Each worker has a pidfd, and two pipes with which multiprocess itself watches.
        return len(pipes) + 3 * len(self.workers)

    def reports(self) -> tuple[WorkerReport, ...]:
        """Return what each worker did with its time; of a stopped worker group what was last known."""
        if self._open and not self._has_ended:
            self._reports = worker_reports(self)
        return self._reports

    def stop(self) -> None:
        """End all workers and close everything. Can be repeated, also when it was interrupted."""
        if os.getpid() != self.owner or not self._open:
            return  # a forked child inherited this object; the workers are not its own
        if not self._has_ended:
            self._reports = self.reports()
            try:
                self._end_unknown()
                left = self.kill()
                for worker in list(self.workers):
                    self.reap(worker)
                self._end_imitations()
                self._warn_of(left)
            except OSError:
                self._close()
                raise
        self._has_ended = True
        self._close()

    def _end_imitations(self) -> None:
        for imitation in self._imitations:
            imitation.terminate()
            imitation.join()

    def _warn_of(self, left: list[WorkerHandle]) -> None:
        if left:
            who = ", ".join(f"{worker.name} (pid {worker.pid})" for worker in left)
            warnings.warn(
                f"{who} did not end within {_LAST_SECONDS:g} seconds of SIGKILL: it is in a system call that cannot "
                "be interrupted, and ends with that; nothing waits for it any more",
                ForkshmWarning,
                stacklevel=3,
            )

    def _close(self) -> None:
        if hasattr(self, "tasks") and not self.tasks.closed:
            self.tasks.forget_sent()
        self._close_pipes()
        # Each is kept until it is closed.
        for thing in reversed(list(self._open)):
            thing.close()
            if thing in self._open:
                self._open.remove(thing)


# Every worker group of this process.
_worker_groups: weakref.WeakSet[WorkerGroup] = weakref.WeakSet()


def descriptors_open() -> int:
    """Return the number of fds that worker groups hold beside their channels: pipes, and three for each worker."""
    return sum(worker_group.descriptors() for worker_group in list(_worker_groups))
