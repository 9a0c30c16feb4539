"""The worker processes of a pool: starting, watching, reaping."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import math
import operator
import os
import signal
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess, _system
from forkshm.backend import UNKNOWN, kernel
from forkshm.channel import Kind, PrivateFd, close_in_children, pair, write_message
from forkshm.errors import ChannelBrokenError, ChannelClosedError, ForkshmWarning, WorkerStartError
from forkshm.pickler import importable_in_children
from forkshm.pool import _inner_threads, _unforkable
from forkshm.pool._status import SLOT_WORDS, STARTING, Status
from forkshm.pool._worker import Assignment, run_worker
from forkshm.pool.observe import WorkerReport, worker_reports
from forkshm.processes import exit_code, is_followed
from forkshm.region import OwnedFd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Literal

    from forkshm._multiprocess import process
    from forkshm.backend import Identity

    InnerThreads = int | Literal["share"] | None
    """Threads of BLAS and similar libraries in a worker: a number, the worker's share of the cores, or no limit."""

__all__ = ("WorkerGroup", "WorkerHandle", "descriptors_open")

# Seconds that a worker may take to end after SIGTERM, before SIGKILL.
_GRACE_SECONDS = 1.0
# Seconds that a worker may take to end after SIGKILL. A process in a system call that cannot be interrupted (a file
# server that does not answer, a broken disk) ends when the call does.
_LAST_SECONDS = 5.0
# Interval between checks of workers that may end in order.
_LOOK_SECONDS = 0.01
# Seconds that workers may take to end after a closed pool has answered all tasks: for their remaining finalizers and
# threads.
_FAREWELL_SECONDS = 10.0


@dataclasses.dataclass(eq=False)
class WorkerHandle:
    """One worker process, as its parent sees it."""

    slot: int
    process: process.BaseProcess
    sentinel: int
    """Readable when the process has ended."""
    watched: Identity
    """What the sentinel refers to, because its number may be closed and used again."""
    pid: int
    """These two outlive the process object."""
    name: str
    exitcode: int | None = None
    """Set once the process was collected."""
    is_collected: bool = False


def _signal(worker: WorkerHandle, number: int) -> None:
    # The worker may have ended, or belong to another user by now. It then ends when its lifeline is closed.
    with contextlib.suppress(OSError):
        if kernel.refers_to(worker.sentinel, worker.watched):
            kernel.signal_process(worker.sentinel, worker.pid, number)


def _runs_its_target(process: process.BaseProcess) -> bool:
    """Return whether a process runs its target, as opposed to the `run` of a user's subclass."""
    return type(process).run is _multiprocess.process.BaseProcess.run


def _still_there(workers: list[WorkerHandle], seconds: float) -> list[WorkerHandle]:
    """Wait until the workers have ended, for at most this long; return those that still run."""
    deadline = time.monotonic() + seconds
    alive = {worker.sentinel: worker for worker in workers}
    poll = kernel.poller()
    for sentinel in alive:
        poll.register(sentinel, kernel.READABLE)
    while alive and (left := deadline - time.monotonic()) > 0:
        try:
            ended = poll.poll(math.ceil(left * 1000))
        except OSError as error:
            if not _interrupts.is_of_kernel(error):  # raised by a signal handler
                raise
            # ENOMEM: memory may be available in a moment.
            time.sleep(min(left, _LOOK_SECONDS))
            continue
        for sentinel, _ in ended:
            poll.unregister(sentinel)
            del alive[sentinel]
    return list(alive.values())


class _Start:
    """A start of workers: the fds that they are given, and the processes."""

    __slots__ = ("begun", "ends", "is_over", "lifeline", "wakeup")

    def __init__(self) -> None:
        self.lifeline, self.wakeup = OwnedFd(), OwnedFd()
        # The ends of the channels of tasks and of results.
        self.ends: list[Any] = []
        self.begun: list[process.BaseProcess] = []
        self.is_over = False


class WorkerGroup:
    """The processes of one pool, and the channels to and from them.

    No worker outlives this process, however it ends. Once the tasks channel has ended, workers complete the queued
    tasks and end.
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
        # A worker that a tool follows must end in order, so that the tool's data is saved.
        self._has_exit = worker_exit is not None or is_followed()
        self._cpu_ids = cpu_ids
        self._inner_threads = inner_threads if isinstance(inner_threads, str | None) else operator.index(inner_threads)
        # Read once, because it reads files.
        self._share = _inner_threads.share(kernel.usable_cores(), size) if inner_threads == "share" else None
        # Tasks by their numbers, from when they are sent until they are answered, and the numbers of abandoned tasks.
        self.sent: dict[int, Any] = {}
        self.given_up: set[int] = set()
        self._reports: tuple[WorkerReport, ...] = ()
        functions = {"worker_init": worker_init, "worker_exit": worker_exit}
        self._names_of_parts = {"initializer": initializer, "initargs": initargs, **functions}
        self.workers: list[WorkerHandle] = []
        self._by_sentinel: dict[int, WorkerHandle] = {}
        # The latest worker in each slot.
        self.by_slot: dict[int, WorkerHandle] = {}
        self.started = 0
        self._open: list[Any] = []
        # Set when the workers are gone, and open resources are being closed.
        self._has_ended = False
        # Starts that are under way, or were interrupted; mostly empty.
        self.starts: list[_Start] = []
        # Substitutes for processes, from a test's context. They cannot be watched, and are ended like processes.
        self._imitations: list[Any] = []
        # Names that exist now. Workers that are started later have more, which does no harm.
        self._start_method: str | None = getattr(make_process, "_start_method", None)
        self.importable = importable_in_children(self._start_method)
        # Libraries that this process had used when it forked the workers, and that the workers may wait for.
        self.suspects: list[str] = []
        _worker_groups.add(self)
        try:
            self._open_channels()
        except BaseException:
            self.stop()
            raise

    def start_all(self) -> None:
        """Start the workers. Call it once. After an exception, the caller stops the worker group.

        Raises:
            WorkerStartError: fork(2) failed.
        """
        if self._inner_threads is not None:
            _inner_threads.prepare()
        if (self._start_method or _multiprocess.default_context.get_start_method()) == "fork":
            self.suspects = _unforkable.suspects()
            _unforkable.warn(self.suspects)
        with _interrupts.held_back(), self._starting() as start:
            # As much as possible is done before the first fork and after the last, because a page that is written to is
            # copied after each fork.
            processes = [self._make(slot, start) for slot in range(self.size)]
            if gc.isenabled():
                # Collect young garbage now; otherwise it would be in each of the processes.
                gc.collect(0)
            begun = 0
            try:
                for slot, process in enumerate(processes):
                    self._begin(slot, process, start)
                    begun += 1
            finally:
                self._enter(processes[:begun])
        if self._imitations:
            kind = type(self._imitations[0]).__name__
            raise WorkerStartError(
                errno.ECHILD,
                f"cannot use the context's Process: its objects have no pid once they are started ({kind}), and a pool "
                "watches real processes. Pass a context whose Process starts one.",
            )

    def _open_channels(self) -> None:
        self.status = Status(self.size)
        self._open.append(self.status)
        # Workers and tasks share these channels: the kernel gives each message to one worker.
        self.tasks, self._tasks_end = pair()
        self._open += [self.tasks, self._tasks_end]
        self._results_end, self.results = pair()
        self._open += [self._results_end, self.results]
        # No child keeps these ends, not even by accident: an open end keeps messages, and the memory that they lease,
        # alive. Workers are given their own fds.
        close_in_children(self.tasks, self._tasks_end, self._results_end, self.results)
        self._lifeline, self._lifeline_end = PrivateFd(), PrivateFd()
        self._wakeup, self._wakeup_end = PrivateFd(), PrivateFd()
        self._open += [self._lifeline, self._lifeline_end, self._wakeup, self._wakeup_end]
        # No call comes between the creation of the fds and the assignment to their owner.
        self._lifeline_end.fd, self._lifeline.fd = kernel.create_lifeline()
        self._wakeup_end.fd, self._wakeup.fd = kernel.create_wakeup()
        for end in (self._lifeline_end, self._lifeline, self._wakeup_end, self._wakeup):
            end.own()
        self.events = kernel.poller()
        self._is_waiting = False
        self.events.register(self.results.fileno(), kernel.READABLE)

    def start(self, slot: int) -> None:
        """Start a worker in *slot*.

        Raises:
            WorkerStartError: fork(2) failed.
        """
        self.check()
        # Interrupts are held back, so that no process runs that is not in `workers`.
        with _interrupts.held_back(), self._starting() as start:
            process = self._make(slot, start)
            self._begin(slot, process, start)
            self._enter([process], slot)

    @contextlib.contextmanager
    def _starting(self) -> Iterator[_Start]:
        """Provide the ends of the channels for workers started in the block, and close those ends here afterwards."""
        # No exit stack is used, because it touches much memory, and touched memory is copied after a fork.
        start = _Start()
        self.starts.append(start)
        try:
            try:
                start.ends += [self._tasks_end.duplicate()]
                start.ends += [self._results_end.duplicate()]
                start.lifeline.fd = kernel.duplicate(self._lifeline_end.fd)
                start.wakeup.fd = kernel.duplicate(self._wakeup_end.fd)
            except OSError as error:
                raise self._cannot_start(error) from error
            yield start
        finally:
            start.is_over = True
            self.clean_up()

    def clean_up(self) -> None:
        """Close what workers were started with, and end processes that did not become workers because of an interrupt.

        The next call continues an interrupted one.
        """
        for start in self.starts[:]:
            if not start.is_over:
                continue  # this is a signal handler that has interrupted it
            for end in (*start.ends, start.lifeline, start.wakeup):
                end.close()
            for begun in start.begun:
                with contextlib.suppress(ValueError):  # the process object was closed
                    is_known = any(worker.process is begun for worker in self.workers)
                    if getattr(begun, "pid", None) is not None and not is_known:
                        begun.kill()
                        begun.join()
                        begun.close()
            with contextlib.suppress(ValueError):  # a signal handler has done the same meanwhile
                self.starts.remove(start)

    def _cannot_start(self, error: OSError, slot: int = 0) -> WorkerStartError:
        return WorkerStartError(
            error.errno or 0,
            f"cannot start worker {slot + 1} of {self.size} {_system.why_refused(error)}",
        )

    def _make(self, slot: int, start: _Start) -> process.BaseProcess:
        self.status.reset(slot)
        cpus = self._cpu_ids[slot % len(self._cpu_ids)] if self._cpu_ids else None
        tasks, results = start.ends
        inner = self._threads_in(cpus)
        assignment = Assignment(
            slot, tasks, results, self.status, start.lifeline, start.wakeup, *self._birth, cpus, inner, self.importable
        )
        made = self._make_process(target=run_worker, args=(assignment,))
        made.name = made.name.replace("Process", "PoolWorker")
        made.daemon = True
        made._names_of_parts = self._names_of_parts  # type: ignore[attr-defined]  # for those of ours
        made.ignores_interrupts = True  # type: ignore[attr-defined]  # ours
        if inner is not None:
            count, is_explicit, by_user = inner
            chosen = _inner_threads.variables(count, is_explicit=is_explicit)
            made._environment = {**by_user, **chosen}  # type: ignore[attr-defined]
        return made

    def _threads_in(self, cpus: frozenset[int] | None) -> tuple[int, bool, dict[str, str]] | None:
        """Return the arguments of `_inner_threads.limit` for a worker."""
        by_user = _inner_threads.set_by_user()
        if isinstance(self._inner_threads, int):
            return self._inner_threads, True, by_user
        if self._inner_threads is None:
            return None
        count = len(cpus) if cpus is not None else self._share
        return None if count is None else (count, False, by_user)

    def _begin(self, slot: int, process: process.BaseProcess, start: _Start) -> None:
        start.begun.append(process)
        try:
            process.start()
        except OSError as error:
            raise self._cannot_start(error, slot) from error

    def _enter(self, processes: Sequence[process.BaseProcess], first_slot: int = 0) -> None:
        """Watch started processes, which are in consecutive slots."""
        for slot, begun in enumerate(processes, first_slot):
            if getattr(begun, "pid", None) is None:
                self._imitations.append(begun)
                continue
            worker = WorkerHandle(slot, begun, -1, UNKNOWN, begun.pid or -1, begun.name)
            try:
                sentinel = kernel.open_process(begun.pid or -1, begun.sentinel)
            except OSError as error:
                for left in processes[slot - first_slot :]:  # otherwise they would never be ended
                    left.kill()
                    left.join()
                    left.close()
                raise self._cannot_start(error, slot) from error
            # No call may come between these assignments.
            worker.sentinel = sentinel
            self._by_sentinel[sentinel] = self.by_slot[slot] = worker
            self.workers += [worker]
            self.started += 1
            worker.watched = kernel.file_of(sentinel)
            self.look_at(worker)

    def look_at(self, worker: WorkerHandle) -> None:
        """Make `wait` report when a worker has ended. Can be repeated."""
        self.events.register(worker.sentinel, kernel.READABLE)

    def wake_workers(self, how_many: int) -> None:
        """Wake so many sleeping workers. A wake-up that finds no sleeper stays for the next one."""
        if not self._wakeup.is_intact():
            return  # stopped, so no worker sleeps any more, or other code has closed it: see `check`
        kernel.wake(self._wakeup.fd, how_many)

    def has_unread_tasks(self) -> bool:
        """Return whether there are sent tasks that no worker has taken."""
        self.check()
        return self._tasks_end.has_message()

    def close_queue(self) -> None:
        """End the tasks channel: workers leave once the queue is empty."""
        if self.is_lost():
            for worker in self.workers:  # the channel that would tell them is gone
                self.end(worker)
            return
        self.tasks.end()
        self.wake_workers(len(self.workers))

    def is_lost(self) -> bool:
        """Return whether other code in this process has closed the channels, as a program does that becomes a daemon.

        The fds may belong to other files by now. The workers end, because nobody has their lifeline any more.
        """
        try:
            self.check()
        except ChannelClosedError:
            return True
        return False

    def check(self) -> None:
        """Raise ChannelClosedError if other code in this process has closed the channels."""
        for end in (self.tasks, self.results, self._tasks_end, self._results_end):
            end.check("use this pool")

    def _watch_again(self) -> None:
        """Watch the workers by new sentinels if other code in this process has closed the sentinels."""
        for worker in list(self.workers):
            if worker.is_collected or kernel.refers_to(worker.sentinel, worker.watched):
                continue
            if self._by_sentinel.get(worker.sentinel) is worker:
                del self._by_sentinel[worker.sentinel]
                with contextlib.suppress(KeyError):
                    self.events.unregister(worker.sentinel)
            with contextlib.suppress(OSError):
                # No call between the creation of the fd and these stores.
                worker.sentinel = kernel.open_process(worker.pid)
                self._by_sentinel[worker.sentinel] = worker
                worker.watched = kernel.file_of(worker.sentinel)
                self.look_at(worker)

    def wait(self, timeout: float) -> list[WorkerHandle]:
        """Wait until a result has arrived or a worker has ended; return the ended workers.

        Raises:
            ChannelClosedError: Other code in this process has closed the channels.
        """
        events, watched = self.events, self._by_sentinel.copy()
        if self._is_waiting:
            # A signal handler runs during this call. A poller cannot wait twice at a time.
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
        if not ready and timeout > 0:
            self.check()
        # As they were before: a signal handler may have reaped a worker, and another one may have its number now.
        return [watched[fd] for fd, _ in ready if fd in watched]

    def wake(self) -> None:
        """Make `wait` return, in whichever thread it is called."""
        # If there is no room for the message, `wait` returns anyway. If the worker group was stopped meanwhile, no
        # thread waits. If other code has closed the fd, a waiting thread notices that by itself.
        with contextlib.suppress(ChannelBrokenError, ChannelClosedError):
            self._results_end.check("wake a thread")
            self._results_end.send(*write_message(Kind.WAKE, 0), wait=False)

    def is_watched(self, worker: WorkerHandle) -> bool:
        """Return whether the worker's sentinel is open, because the worker was not reaped."""
        return self._by_sentinel.get(worker.sentinel) is worker

    def last_words(self, worker: WorkerHandle) -> tuple[int, int | None] | None:
        """Return the last state of a worker that has ended, and the item that it ran; None if it was reaped already."""
        words, first = self.status.words, SLOT_WORDS * worker.slot
        # No call from here on, in which a signal handler could reap the worker and give its slot to another one.
        if worker.sentinel in self._by_sentinel and self._by_sentinel[worker.sentinel] is worker:
            item = words[first + 1]
            return words[first], item - 1 if item else None
        return None

    def exit_code(self, worker: WorkerHandle) -> int | None:
        """Return the exit code of a worker that has ended."""
        if not worker.is_collected:
            try:
                worker.exitcode = exit_code(worker.process, kernel.COLLECT_SECONDS)
            except ValueError:  # closed: a signal handler has done the same meanwhile
                if not worker.is_collected:
                    raise
            worker.is_collected = True
        return worker.exitcode

    def reap(self, worker: WorkerHandle) -> None:
        """Forget a worker that has ended. Can be repeated."""
        self.exit_code(worker)
        sentinel, watched = worker.sentinel, self._by_sentinel
        forgetting = map(self.events.unregister, (sentinel,))
        closing = kernel.closing(sentinel, worker.watched)
        # No call may come between a check and what follows, because the number may belong to another worker as soon as
        # a signal handler has reaped this one.
        try:
            if sentinel in watched and watched[sentinel] is worker:
                next(forgetting, None)
        except KeyError:  # an earlier call was interrupted
            pass
        if sentinel in watched and watched[sentinel] is worker:
            del watched[sentinel]
            kernel.close_own(closing)
        removing = map(self.workers.remove, (worker,))
        if worker in self.workers:
            # The slot is empty now, so no audit may depend on its state. No call comes in between, because a signal
            # handler may start another worker in the slot.
            self.status.words[SLOT_WORDS * worker.slot] = STARTING
            next(removing, None)

    def end(self, worker: WorkerHandle) -> None:
        """Kill a worker. It is reaped like any dead worker."""
        _signal(worker, _system.SIGKILL)

    def join_idle(self) -> None:
        """Wait a limited time for the workers of a closed pool to end. Workers that are still starting are killed."""
        if not self._open:
            return
        self._watch_again()
        self.close_queue()  # again, because an earlier call may have been interrupted
        if not self.has_initializer and not self._has_exit:
            # No code of the user has run in such a worker, and none would.
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
            # A claiming worker may have taken the last task from the queue, and its slot shows this then.
            leaving = [worker for worker in leaving if not self._is_busy(worker)]
            leaving = _still_there(leaving, min(left, _LOOK_SECONDS))

    def _end_tasks(self) -> None:
        """End and empty the tasks channel, so that a worker that looks for a task ends."""
        # If the kernel refuses any of this, the workers are still ended.
        with contextlib.suppress(OSError):
            self.close_queue()
            self.check()
            while True:
                if (received := self._tasks_end.receive_nowait()) is None:
                    break
                received.close()

    def _is_busy(self, worker: WorkerHandle) -> bool:
        # The worker may have answered the task in its slot.
        state = self.status.state(worker.slot)
        return state == STARTING or state in self.sent or state in self.given_up

    def kill(self) -> list[WorkerHandle]:
        """End all workers: SIGTERM, a second's grace, SIGKILL; return those that still run.

        If there is a *worker_exit*, idle workers may call it first.
        """
        self._watch_again()
        if self._has_exit and self.started:
            self._let_go()
        for worker in self.workers:
            _signal(worker, signal.SIGTERM)
        if self.workers:
            # A task may have a handler for SIGTERM that raises SystemExit. The worker survives that, and ends now.
            self._end_tasks()
        left = _still_there(self.workers, _GRACE_SECONDS)
        for worker in left:
            _signal(worker, _system.SIGKILL)
        return _still_there(left, _LAST_SECONDS)

    def descriptors(self) -> int:
        """Return how many fds are open here apart from the channels'."""
        pipes = [end for end in self._open if isinstance(end, PrivateFd) and end.fd >= 0]
        # Each worker has a pidfd, and two pipes with which multiprocess itself watches.
        return len(pipes) + 3 * len(self.workers)

    def reports(self) -> tuple[WorkerReport, ...]:
        """Return how each worker spent its time. For a stopped worker group, return the last known numbers."""
        if self._open and not self._has_ended:
            self._reports = worker_reports(self)
        return self._reports

    def stop(self) -> None:
        """End all workers and close everything. Can be repeated, also after an interrupt."""
        if os.getpid() != self.owner or not self._open:
            return  # a forked child inherited this object; the workers are not its own
        if not self._has_ended:
            self._reports = self.reports()
            try:
                self.clean_up()
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
                "be interrupted, and ends when the call does. The pool no longer waits for it.",
                ForkshmWarning,
                stacklevel=3,
            )

    def _close(self) -> None:
        if hasattr(self, "tasks") and not self.tasks.closed:
            self.tasks.forget_sent()
        self.clean_up()
        # Each object is kept until it is closed.
        for thing in reversed(list(self._open)):
            thing.close()
            if thing in self._open:
                self._open.remove(thing)


# All worker groups of this process.
_worker_groups: weakref.WeakSet[WorkerGroup] = weakref.WeakSet()


def descriptors_open() -> int:
    """Return the number of fds that worker groups hold apart from their channels: pipes, and three for each worker."""
    return sum(worker_group.descriptors() for worker_group in list(_worker_groups))
