"""supervise(): run long-lived workers that are replaced when they end."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import logging
import math
import operator
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess, _system
from forkshm._interrupts import promptly
from forkshm.backend import UNKNOWN, kernel
from forkshm.channel import PrivateFd
from forkshm.errors import ChannelClosedError, CrashLoopError, UnsupportedError, WorkerDiedError, WorkerStartError
from forkshm.processes import exit_code, let_have_children
from forkshm.region import OwnedFd
from forkshm.spmd._monitor import wait_gone

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.backend import Identity

__all__ = ("Supervised", "supervise")

# A worker that has run this long was healthy: the crash count and the pause are reset.
STEADY_SECONDS = 5.0
# First pause before a worker that ended earlier is replaced; doubled each time.
BACKOFF_SECONDS = 0.1
MOST_BACKOFF_SECONDS = 30.0

# A worker that has closed its fds checks this often whether it should stop.
_LOOK_SECONDS = 0.1

_log = logging.getLogger("forkshm.supervise")

_set_wakeup = functools.partial(signal.set_wakeup_fd, warn_on_full_buffer=False)

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Supervised:
    """The argument of a function run by `forkshm.supervise`.

    Attributes:
        rank: Rank of this worker, from 0; its replacement has the same rank.
        size: Number of workers.
        generation: Number of workers that had this rank before.
    """

    def __init__(self, rank: int, size: int, generation: int) -> None:
        self.rank, self.size, self.generation = rank, size, generation
        self._stopping = False
        self._read_end, self._write_end = OwnedFd(), OwnedFd()
        self._read_end.fd, self._write_end.fd = kernel.create_wakeup()
        self._read_end.own()
        self._write_end.own()
        if sys.platform != "win32":  # there is no fork
            os.set_blocking(self._read_end.fd, False)  # several threads may wait

    @property
    def stopping(self) -> bool:
        """Whether the worker should finish its work and return."""
        return self._stopping

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker should stop.

        Args:
            timeout: Seconds; None waits forever, 0 only checks.

        Returns:
            True if the worker should stop, False if *timeout* has passed.
        """
        assert sys.platform != "win32"  # there is no fork
        until = math.inf if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        if self._read_end.is_intact():
            poll.register(self._read_end.fd, select.POLLIN)
            self._poll_until(poll, until)
        while not self._stopping and not self._read_end.is_intact() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_SECONDS))  # *fn* has closed the fd
        return self._stopping

    def _poll_until(self, poll: Any, until: float) -> None:
        # A signal may arrive just before the kernel begins to wait. Python would run its handler after the wait, so for
        # the wait the signal itself writes to the fd; see `signal.set_wakeup_fd`. Not longer: *fn* may close the fd.
        is_main = threading.current_thread() is threading.main_thread()
        before: list[int] = []
        try:
            if is_main:
                before.extend(map(_set_wakeup, (self._write_end.fd,)))
            while True:
                if self._stopping:
                    break
                left = until - time.monotonic()
                if not poll.poll(None if left == math.inf else math.ceil(max(left, 0.0) * 1000)):
                    return
                if self.stopping:
                    break
                with contextlib.suppress(BlockingIOError):  # another signal
                    os.read(self._read_end.fd, 4096)
        finally:
            for wakeup in before:
                signal.set_wakeup_fd(wakeup)
        self._make_readable()

    def fileno(self) -> int:
        """Return an fd that becomes readable when the worker should stop, for use with select or poll.

        Give them a timeout: Python runs no signal handler inside a system call that it was just about to make, so a
        signal that arrives at that moment is noticed when the call returns. `wait` has no such gap.
        """
        return self._read_end.fd

    def _stop(self, number: int, frame: Any) -> None:
        self._stopping = True
        self._make_readable()

    def _make_readable(self) -> None:
        if self._write_end.is_intact():
            with contextlib.suppress(BlockingIOError):
                os.write(self._write_end.fd, b".")


def supervise(
    fn: Callable[[Supervised], object],
    workers: int | None = None,
    *,
    drain_timeout: float = 30.0,
    max_crashes: int = 8,
    on_reload: Callable[[], object] | None = None,
) -> None:
    """Keep a fixed number of workers running *fn* until SIGTERM or SIGINT.

    Each worker is forked from this process and calls ``fn(me)``, which should run until ``me.stopping`` is true. A
    worker that ends is replaced: at once if it ran for 5 seconds, otherwise after a pause that starts at 0.1 s and
    doubles.

    SIGTERM and SIGINT drain: the workers are told to stop, and the call returns when all have ended. A second signal
    kills them. SIGHUP replaces the workers one at a time, so at most one is missing.

    Args:
        fn: Runs in each worker with a `Supervised` as its argument. An exception is printed like an uncaught exception
            of a program.
        workers: Number of workers; by default the number of cores that this process may use.
        drain_timeout: Time that a worker gets to stop before it is killed.
        max_crashes: Number of consecutive failures of one rank, each within 5 seconds, that count as a crash loop.
        on_reload: Called in this process at SIGHUP, before the first worker is replaced. New workers see its changes.

    Raises:
        ValueError: *workers* or *max_crashes* is less than 1, or this is not the main thread, which alone gets signals.
        CrashLoopError: The workers of one rank keep failing; ``__cause__`` says how the last one ended. The other
            workers were drained.
        WorkerStartError: The kernel refused one of the first workers. Later refusals are retried, with pauses.
        Exception: *on_reload* raised it; the workers were drained.

    Fork and threads:
        Call it from the main thread. Workers may be forked at any time, so start no other threads in this process.
        Workers end when this process ends, even if it is killed. Starts and ends of workers are logged by
        ``logging.getLogger("forkshm.supervise")``.

    Example:
        >>> import forkshm, os, signal
        >>> started = forkshm.zeros(2)
        >>> def serve(me):
        ...     started[me.rank] = 1
        ...     if started.all():
        ...         os.kill(os.getppid(), signal.SIGTERM)
        ...     me.wait()
        >>> forkshm.supervise(serve, workers=2)
        >>> started.tolist()
        [1.0, 1.0]
    """
    if workers is None:
        workers = kernel.default_workers()
    if operator.index(workers) < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if operator.index(max_crashes) < 1:
        raise ValueError(f"max_crashes must be at least 1, got {max_crashes}")
    if not _system.CAN_FORK:
        raise UnsupportedError(
            "cannot supervise workers: they are forked, and this system cannot fork. Start forkshm.Process objects and "
            "join them.",
            capability="fork",
        )
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("supervise must be called in the main thread: no other thread gets signals")
    supervisor = _Supervisor(fn, workers, drain_timeout, max_crashes, on_reload)
    try:
        supervisor.run()
    finally:
        supervisor.end()


@dataclasses.dataclass
class _Place:
    """State of one rank: its current worker and its crash history."""

    rank: int
    generation: int = -1
    process: Any = None
    sentinel: int = -1
    # What the sentinel refers to.
    file: Identity = UNKNOWN
    began: float = 0.0
    # When to start the next worker, if none is running.
    due: float = 0.0
    pause: float = 0.0
    crashes: int = 0
    # When to kill a worker that was told to stop.
    deadline: float = math.inf
    # Whether a reload must still replace the worker.
    old: bool = False


class _Supervisor:
    _poll: Any

    def __init__(
        self,
        fn: Callable[[Supervised], object],
        size: int,
        drain_timeout: float,
        max_crashes: int,
        on_reload: Callable[[], object] | None,
    ) -> None:
        self._fn = fn
        self._drain_timeout = drain_timeout
        self._max_crashes = max_crashes
        self._on_reload = on_reload
        self._places = [_Place(rank) for rank in range(size)]
        self._asked_to_stop = 0
        self._asked_to_reload = False
        self._make_process: Any = _multiprocess.default_context.get_context("fork").Process
        # The kernel kills the workers when the write end of the lifeline is closed, so no child may hold it.
        self._lifeline, self._lifeline_end = OwnedFd(), PrivateFd()
        self._read_end, self._write_end = OwnedFd(), OwnedFd()
        # The signal handlers before this, in C and in Python, and the wakeup fd, once these were replaced.
        self._actions: dict[int, Any] = {}
        self._handlers: dict[int, Any] = {}
        self._wakeup: list[int] = []

    def _begin(self) -> None:
        # No call between the creation of fds and their assignment to their owners.
        self._read_end.fd, self._write_end.fd = kernel.create_wakeup()
        self._lifeline.fd, self._lifeline_end.fd = kernel.create_lifeline()
        for end in (self._read_end, self._write_end, self._lifeline, self._lifeline_end):
            end.own()
        assert sys.platform != "win32"  # there is no fork
        self._poll = select.poll()
        self._poll.register(self._read_end.fd, select.POLLIN)
        self._actions = _interrupts.actions_of(_SIGNALS)
        self._handlers = _interrupts.handlers_of(_SIGNALS)
        for number in _SIGNALS:
            signal.signal(number, self._asked)
        # The wakeup fd is written when the signal arrives. Python runs the handler later, perhaps only after a wait.
        # One C call replaces it and keeps the one before.
        self._wakeup.extend(map(_set_wakeup, (self._write_end.fd,)))

    @promptly
    def end(self) -> None:
        """Kill the workers that still run, and restore the signal handlers."""
        _interrupts.repeat(self._end)

    def _end(self) -> None:
        # Can be repeated. It takes longer than the time between two signals of a timer, whose handler may raise.
        try:
            with _interrupts.held_back():
                self._kill()
                for wakeup in self._wakeup:
                    signal.set_wakeup_fd(wakeup)
                for end in (self._read_end, self._write_end, self._lifeline, self._lifeline_end):
                    end.close()
        finally:
            _interrupts.install(self._handlers, self._actions)

    def _asked(self, number: int, frame: Any) -> None:
        if sys.platform != "win32" and number == signal.SIGHUP:
            self._asked_to_reload = True
        else:
            self._asked_to_stop += 1

    # -- the loop -------------------------------------------------------------------------

    def run(self) -> None:
        self._begin()
        for place in self._places:
            self._start(place)
        while not self._asked_to_stop:
            if self._asked_to_reload:
                self._asked_to_reload = False
                self._reload()
            now = time.monotonic()
            for place in self._places:
                if place.process is None and place.due <= now and not self._asked_to_stop:
                    self._start_again(place)
            self._replace_one()
            self._wait()
        self._drain()

    def _reload(self) -> None:
        _log.info("reload: replacing %d workers", len(self._places))
        if self._on_reload is not None:
            try:
                self._on_reload()
            except BaseException:
                self._drain()
                raise
        self._check()
        for place in self._places:
            place.old = place.process is not None
            place.crashes = 0

    def _replace_one(self) -> None:
        """Ask one worker to stop, unless another is still stopping."""
        if any(place.deadline != math.inf for place in self._places):
            return
        for place in self._places:
            if place.old and place.process is not None:
                self._tell_to_stop(place)
                return

    def _drain(self) -> None:
        for place in self._places:
            if place.process is not None and place.deadline == math.inf:
                self._tell_to_stop(place)
        while any(place.process is not None for place in self._places):
            if self._asked_to_stop > 1:
                self._kill()
                return
            self._wait(stopping=True)

    def _wait(self, *, stopping: bool = False) -> None:
        """Wait until something happens or is due."""
        now = time.monotonic()
        for place in self._places:
            if place.deadline <= now:
                _log.warning("worker %d (pid %d) did not stop in time; killing it", place.rank, place.process.pid)
                self._send(place, _system.SIGKILL)
                place.deadline = now + self._drain_timeout
        moments = [place.deadline for place in self._places]
        if not stopping:
            moments += [place.due for place in self._places if place.process is None]
        left = min(moments) - now
        self._check()
        for fd, _ in self._poll.poll(None if left == math.inf else math.ceil(max(left, 0.0) * 1000)):
            if fd == self._read_end.fd:
                os.read(fd, 4096)
                continue
            for place in self._places:
                if place.sentinel == fd:
                    self._reap(place, stopping=stopping)
                    break

    def _check(self) -> None:
        """Raise `ChannelClosedError` if *on_reload* or a signal handler has closed the fds that this needs."""
        if not self._lifeline_end.is_intact() or not self._read_end.is_intact():
            raise ChannelClosedError(
                errno.EBADF,
                "cannot go on supervising: other code in this process, for example on_reload, has closed fds that "
                "supervise uses. Close only fds that your code has opened.",
            )

    # -- one worker -----------------------------------------------------------------------

    def _start(self, place: _Place) -> None:
        """Start a worker.

        Raises:
            WorkerStartError: The kernel refused.
        """
        assert sys.platform != "win32"  # there is no fork
        place.generation += 1
        # In the child, a signal must not run the handlers of this process.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process = self._make_process(target=self._work, args=(place.rank, place.generation), daemon=True)
            place.process = process
            process.start()
            # No call between the creation of the fd and this store.
            place.sentinel = kernel.open_process(process.pid, process.sentinel)
            place.file = kernel.file_of(place.sentinel)
        except OSError as error:
            if not _interrupts.is_of_kernel(error):  # raised by a signal handler
                raise
            raise WorkerStartError(
                error.errno or 0,
                f"cannot start worker {place.rank + 1} of {len(self._places)} {_system.why_refused(error)}",
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._poll.register(place.sentinel, select.POLLIN)
        place.began = time.monotonic()
        place.deadline = math.inf
        place.old = False

    def _start_again(self, place: _Place) -> None:
        try:
            self._start(place)
        except WorkerStartError as error:
            self._kill_one(place)  # the process may run, and not be monitored
            self._pause(place)
            _log.warning("%s; next attempt in %.1f s", error, place.pause)

    def _work(self, rank: int, generation: int) -> None:
        assert sys.platform != "win32"  # there is no fork
        armed = OwnedFd(kernel.die_with(self._lifeline.fd))
        armed.own()  # *fn* may close all fds
        let_have_children()
        signal.set_wakeup_fd(-1)
        me = Supervised(rank, len(self._places), generation)
        signal.signal(signal.SIGTERM, me._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for place in self._places:
            if place.sentinel >= 0:
                kernel.close_own(kernel.closing(place.sentinel, place.file))
        self._read_end.close()
        self._write_end.close()
        try:
            self._fn(me)
        finally:
            armed.close()

    def _tell_to_stop(self, place: _Place) -> None:
        self._send(place, signal.SIGTERM)
        place.deadline = time.monotonic() + self._drain_timeout

    def _send(self, place: _Place, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if kernel.refers_to(place.sentinel, place.file):
                kernel.signal_process(place.sentinel, place.process.pid, number)

    def _collect(self, place: _Place) -> int | None:
        """Reap a worker that ends. Can be repeated after an interrupt."""
        sentinel = place.sentinel
        if sentinel < 0:  # its start was interrupted
            with contextlib.suppress(ValueError):  # it was closed, or did not start
                wait_gone(place.process.sentinel)
        elif kernel.refers_to(sentinel, place.file):
            wait_gone(sentinel)
        exitcode = exit_code(place.process, kernel.COLLECT_SECONDS)
        if sentinel >= 0:
            with contextlib.suppress(KeyError):
                self._poll.unregister(sentinel)
        closing = kernel.closing(sentinel, place.file) if sentinel >= 0 else iter(())
        # No call between these stores and the call that closes.
        place.process, place.sentinel, place.file = None, -1, UNKNOWN
        kernel.close_own(closing)
        return exitcode

    def _pause(self, place: _Place) -> None:
        place.pause = min(max(2 * place.pause, BACKOFF_SECONDS), MOST_BACKOFF_SECONDS)
        place.due = time.monotonic() + place.pause

    def _reap(self, place: _Place, *, stopping: bool) -> None:
        pid = place.process.pid
        exitcode = self._collect(place)
        lived = time.monotonic() - place.began
        told, place.deadline = place.deadline != math.inf, math.inf
        place.due = 0.0
        if told:
            place.pause = 0.0
            return
        if lived >= STEADY_SECONDS:
            place.crashes, place.pause = 0, 0.0
        else:
            self._pause(place)
        if exitcode == 0:
            _log.info("worker %d (pid %d) returned after %.1f s", place.rank, pid, lived)
            return
        place.crashes += 1
        how = WorkerDiedError(pid, exitcode, name=f"worker {place.rank} of {len(self._places)}", task=_name(self._fn))
        how.rank = place.rank
        if place.crashes >= self._max_crashes and not stopping:
            self._drain()
            raise CrashLoopError(
                f"worker {place.rank} failed {place.crashes} times in a row, the last time after {lived:.2f} s. Its "
                "traceback is on stderr.",
                rank=place.rank,
            ) from how
        _log.warning(
            "%s. It had run for %.1f s; a replacement starts in %.1f s",
            how,
            lived,
            max(place.due - time.monotonic(), 0),
        )

    def _kill(self) -> None:
        """Kill all running workers."""
        for place in self._places:
            self._kill_one(place)

    def _kill_one(self, place: _Place) -> None:
        if place.process is not None:
            with contextlib.suppress(ValueError, AttributeError):  # it was closed, or did not start
                place.process.kill()
            self._collect(place)


def _name(fn: Callable[..., object]) -> str:
    return f"{getattr(fn, '__qualname__', type(fn).__name__)}()"
