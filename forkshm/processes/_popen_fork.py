"""Handles of child processes: how they are started, watched and reaped.

``multiprocess`` watches a child through a pipe whose other end the child holds. That pipe stays open while a grandchild
inherits it, and closes early if the child closes all its fds. Here the sentinel of a child comes from the backend: on
Linux it is a pidfd, opened before anything in this process can reap the child.

Several threads may wait for one child. The exit code is read without reaping (waitid(2), ``WNOWAIT``) and stored, and
the child is reaped afterwards. An interruption at any point leaves a state in which the next call does the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess, _system
from forkshm.backend import UNKNOWN as UNKNOWN_FILE
from forkshm.backend import kernel
from forkshm.region import leave_changes

assert sys.platform != "win32"  # there, process handles come from the system

if TYPE_CHECKING:
    import multiprocessing.popen_fork as popen_fork
    from collections.abc import Callable, Iterable, Iterator

    from forkshm.backend import Identity
else:
    popen_fork = _multiprocess.popen_fork

__all__ = (
    "FIRST_PAUSE",
    "LAST_PAUSE",
    "UNKNOWN",
    "Child",
    "ForkPopen",
    "close_all",
    "closings",
    "finish",
    "in_milliseconds",
)

UNKNOWN = 255
"""The exit code of a child that other code reaped, or that the kernel reaped because SIGCHLD is ignored, if the system
does not keep the code.

``multiprocess`` reports the same number when it cannot know the code."""
# Arguments for `map` and `starmap` to make a call without arguments once.
_ONCE: tuple[tuple[()], ...] = ((),)
_FIRST = (0,)
FIRST_PAUSE, LAST_PAUSE = 0.0005, 0.01
"""Pauses between checks, where no sentinel reports the end, or reports it before the kernel has the exit code."""


def in_milliseconds(seconds: float | None) -> int | None:
    """Return *seconds* as a timeout for a poller, rounded up."""
    return None if seconds is None else math.ceil(max(seconds, 0.0) * 1000)


class _Lock:
    """Guards waitpid(2) where waitid(2) is missing: its result must be stored before another thread asks."""

    def __init__(self) -> None:
        self.renew()
        _system.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.held = _interrupts.RLock()


_reaping = _Lock()


def closings(fds: Iterable[int]) -> list[Iterator[object]]:
    """Return iterators that close the fds, as long as these refer to the same files."""
    return [kernel.closing(fd, kernel.file_of(fd)) for fd in fds]


@_interrupts.promptly
def close_all(*some: Iterator[object], close_own: Callable[[Iterator[object]], None] = kernel.close_own) -> None:
    """Advance the iterators that `closings` has returned."""
    try:
        for closing in some:
            close_own(closing)
    except BaseException:  # a signal handler has raised
        for closing in some:
            close_own(closing)
        raise


@_interrupts.promptly
def finish(finalizer: Any) -> None:
    """Call the finalizer of a child, which may be None. Can be repeated.

    A finalizer of multiprocess that is interrupted before it has called its function never calls it.
    """
    if finalizer is not None:
        if finalizer._callback is close_all:
            close_all(*finalizer._args)
        finalizer()


class Child(popen_fork.Popen):
    """Common base of forked and spawned children, whose parent is this process."""

    pid: int
    sentinel: int
    returncode: int | None
    status_is_lost = False
    """Whether other code took the exit code."""
    # Whether the child was reaped.
    _is_reaped = False
    # The result of waitpid(2), after `_end`.
    _ended: list[tuple[int, int]]
    # What the sentinel refers to, because its number may have been closed and used again.
    _watched: Identity = UNKNOWN_FILE

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code, or None while the child runs."""
        if self.returncode is None and flag != os.WNOHANG:
            return self.wait()
        if not self._is_reaped:
            self._reap()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the child has ended, for at most *timeout* seconds; return the exit code or None."""
        if self.returncode is None:
            deadline = None if timeout is None else time.monotonic() + timeout
            pause = FIRST_PAUSE
            self._wait_for_end(timeout)
            # A pidfd is readable once there is an exit code. A pipe may be readable earlier; see the module docstring.
            while self.poll() is None and (left := 1.0 if deadline is None else deadline - time.monotonic()) > 0:
                time.sleep(min(pause, left))
                pause = min(2 * pause, LAST_PAUSE)
        return self.poll()

    def close(self) -> None:
        """Close the fds. Can be repeated."""
        finish(self.finalizer)

    def _is_watched(self) -> bool:
        """Return whether the sentinel is open, and its number was not used again."""
        return kernel.refers_to(self.sentinel, self._watched)

    def _wait_for_end(self, timeout: float | None) -> None:
        if not self._is_watched():
            return  # `wait` polls instead
        poll = kernel.poller()
        poll.register(self.sentinel, kernel.READABLE)
        try:
            poll.poll(in_milliseconds(timeout))
        except OSError as error:
            if not _interrupts.is_of_kernel(error):  # raised by a signal handler
                raise
            # ENOMEM: `wait` polls instead.

    def _reap(self) -> None:
        if not kernel.can_look_at_exits:
            with _reaping.held:
                self._reap_at_once()
            return
        try:
            code = kernel.exit_of(self.pid, reap=False)
            if code is None:
                return
            if self.returncode is None:
                self.returncode = code
            kernel.exit_of(self.pid, reap=True)
        except ChildProcessError:
            self._is_gone()
            return
        self._is_reaped = True

    def _reap_at_once(self) -> None:
        if self.returncode is not None:
            self._is_reaped = True
            return
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            self._is_gone()
            return
        if pid == self.pid:
            self.returncode = os.waitstatus_to_exitcode(status)
            self._is_reaped = True

    def _is_gone(self) -> None:
        # Another thread may have reaped it, after storing the exit code.
        if self.returncode is None:
            code = self._kept_code()
            self.status_is_lost = code is None
            self.returncode = UNKNOWN if code is None else code
        self._is_reaped = True

    def _kept_code(self) -> int | None:
        """Return the exit code that the kernel keeps for the sentinel, or None."""
        return kernel.exit_of_reaped(self.sentinel) if self._is_watched() else None

    # With defaults, because the names of the base class's module may be gone when the program ends.
    def terminate(self, number: int = signal.SIGTERM) -> None:
        """Send SIGTERM."""
        self._send_signal(number)

    def kill(self, number: int = _system.SIGKILL) -> None:
        """Send SIGKILL."""
        self._send_signal(number)

    def _send_signal(self, sig: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                if kernel.refers_to(self.sentinel, self._watched):
                    kernel.signal_process(self.sentinel, self.pid, sig)
                elif self.poll() is None:
                    os.kill(self.pid, sig)

    def _end(self) -> None:
        """Kill and reap a child that was started but cannot be watched. Can be repeated."""
        if self._ended:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, _system.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            # One C call, because the kernel may give the pid to another process.
            self._ended += map(os.waitpid, (self.pid,), (0,))


class ForkPopen(Child):
    """A forked child.

    Args:
        process: The process object.
        birth: The result of ``kernel.forking()``.

    Raises:
        OSError: The kernel refused a pipe or the fork. No fd and no process is left.
    """

    def __init__(self, process: Any, birth: int) -> None:
        self._birth = birth
        self._ended = []
        try:
            super().__init__(process)
        except BaseException:
            if getattr(self, "finalizer", None) is not None:  # interrupted after `_launch`
                self.end_unwatched()
            raise

    def _launch(self, process_obj: Any) -> None:
        # The child learns from this pipe that this process has ended.
        pipes: list[tuple[int, int]] = []
        pids: list[int] = []
        fds: list[int] = []
        try:
            # Each is created and recorded in one C call: an interrupted start leaves neither fds nor a process.
            pipes.extend(itertools.starmap(os.pipe, _ONCE))
            pids.extend(itertools.starmap(os.fork, _ONCE))
            if pids[0] == 0:
                self._be_child(process_obj, *pipes[0])
            self.pid = pids[0]
            # The child's end is closed first, to make room for the next fd.
            fds += pipes[0]
            del pipes[0]
            next(map(os.close, map(fds.pop, _FIRST)))
            self.sentinel = kernel.open_process(self.pid, self._birth)
            fds.insert(0, self.sentinel)
            self._watched = kernel.file_of(self.sentinel)
            self.finalizer = _multiprocess.util.Finalize(self, close_all, closings(fds))
        except BaseException:
            if pids and pids[0] == 0:
                os._exit(1)

            def undo() -> None:
                nonlocal fds
                if pipes:
                    # No call between these changes.
                    fds += pipes[0]
                    del pipes[0]
                kernel.close_all(fds)
                if pids:
                    self.pid = pids[0]
                    self._end()

            _interrupts.repeat(undo)
            raise

    @_interrupts.promptly
    def end_unwatched(self) -> None:
        """End a child without an owner, and close its fds."""
        _interrupts.repeat(self._end_and_close)

    def _end_and_close(self) -> None:
        # Waiting for the end may take longer than the time between two signals, whose handlers may raise.
        with _interrupts.held_back():
            self._end()
            finish(self.finalizer)

    def _be_child(self, process_obj: Any, read_end: int, write_end: int) -> None:
        code = 1
        # From Python 3.13 on, children run the exit functions that they have registered themselves.
        exit_functions: Any = getattr(popen_fork, "atexit", None)
        try:
            if exit_functions is not None:
                exit_functions._clear()
                util: Any = _multiprocess.util
                exit_functions.register(util._exit_function)
            leave_changes()
            os.close(write_end)
            code = process_obj._bootstrap(parent_sentinel=read_end)
        finally:
            if exit_functions is not None:
                exit_functions._run_exitfuncs()
            os._exit(code)
