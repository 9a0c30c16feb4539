"""Handles of processes that are not forked from this one: spawned, or forked by the fork server."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess
from forkshm.backend import kernel

assert sys.platform != "win32"  # there, process handles come from the system

from forkshm.processes._popen_fork import (  # noqa: E402 - after the platform check
    FIRST_PAUSE,
    LAST_PAUSE,
    UNKNOWN,
    Child,
    close_all,
    closings,
    finish,
    in_milliseconds,
)

if TYPE_CHECKING:
    import multiprocessing.popen_forkserver as popen_forkserver
    import multiprocessing.popen_spawn_posix as popen_spawn_posix

    from forkshm.backend import Identity
else:
    popen_forkserver = _multiprocess.popen_forkserver
    popen_spawn_posix = _multiprocess.popen_spawn_posix

__all__ = ("ForkServerPopen", "SpawnPopen")

# Number of fds that ``multiprocess`` opens for a process of the fork server (a socket, two pipes and a duplicate), and
# a few spare ones.
_FORK_SERVER_FDS = 8
# Content of the buffer until the exit code has arrived; no exit code has these eight bytes.
_NOT_YET = b"\x7f" * 8


class SpawnPopen(Child, popen_spawn_posix.Popen):
    """A child with a fresh interpreter.

    Args:
        process: The process object.
        birth: The first fd from ``kernel.spawning()``.

    Raises:
        OSError: The kernel refused a pipe or the process, or the child died before it had read its process object.
    """

    def __init__(self, process: Any, birth: int) -> None:
        self._start_birth = birth
        self._ended = []
        super().__init__(process)

    def _launch(self, process_obj: Any) -> None:
        self.pid = 0
        watched = -1
        try:
            super()._launch(process_obj)  # type: ignore[misc]  # private, and so not in the stubs
            watched = kernel.open_process(self.pid, self._start_birth)
            os.dup2(watched, self.sentinel, inheritable=False)
            self._watched = kernel.file_of(self.sentinel)
            _close_only_own(self)
        except BaseException:
            _interrupts.repeat(self._undo)
            raise
        finally:
            if watched >= 0:
                os.close(watched)

    def _undo(self) -> None:
        if self.pid:
            self._end()
        finish(self.finalizer)


class ForkServerPopen(popen_forkserver.Popen):
    """A process of the fork server, which reports how it ended by eight bytes through the sentinel.

    Raises:
        OSError: The limit on open files is reached, or the fork server cannot be started or called.
    """

    def _launch(self, process_obj: Any) -> None:
        self._status = bytearray(_NOT_YET)
        _make_room(_FORK_SERVER_FDS)
        try:
            super()._launch(process_obj)  # type: ignore[misc]  # private, and so not in the stubs
            self._watched = kernel.file_of(self.sentinel)
            _close_only_own(self)
        except BaseException:
            _interrupts.repeat(self.close)
            raise

    _watched: Identity = Child._watched
    status_is_lost = False
    terminate, kill = Child.terminate, Child.kill
    close: Any = Child.close

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code, or None while the process runs."""
        if self.returncode is None:
            self.wait(0.0 if flag == os.WNOHANG else None)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the process has ended, for at most *timeout* seconds; return the exit code or None."""
        if self.returncode is None and not kernel.refers_to(self.sentinel, self._watched):
            return self._wait_without_sentinel(timeout)
        if self.returncode is None:
            poll = kernel.poller()
            poll.register(self.sentinel, kernel.READABLE)
            if not poll.poll(in_milliseconds(timeout)):
                return None
            # The bytes arrive in the buffer before another thread or a Python signal handler can run. A thread that
            # reads later finds the end of the pipe, and the bytes in the buffer.
            if self._status == _NOT_YET:
                with contextlib.suppress(OSError):
                    os.readv(self.sentinel, [self._status])
            if self._status == _NOT_YET:
                self.returncode = UNKNOWN  # the fork server itself was killed
            else:
                self.returncode = int.from_bytes(self._status, sys.byteorder, signed=True)
        return self.returncode

    def _wait_without_sentinel(self, timeout: float | None) -> int | None:
        # Either another thread has closed the process, after it had stored the exit code, or other code has closed the
        # sentinel, and with it the exit code.
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        pause = FIRST_PAUSE
        while self.returncode is None:
            if not kernel.is_running(self.pid):
                self.status_is_lost = True
                self.returncode = UNKNOWN
            elif (left := deadline - time.monotonic()) > 0:
                time.sleep(min(pause, left))
                pause = min(2 * pause, LAST_PAUSE)
            else:
                break
        return self.returncode


def _close_only_own(popen: Any) -> None:
    """Make the finalizer of multiprocess close only what its fds refer to now."""
    finalizer = popen.finalizer
    owned = closings(finalizer._args)
    # No call between these stores.
    finalizer._callback, finalizer._args = close_all, owned


def _make_room(count: int) -> None:
    """Raise unless *count* fds can be opened; multiprocess leaks some when it cannot get all of them."""
    fds: list[int] = []
    try:
        fds.append(kernel.open_file(os.devnull, writable=False))
        while True:
            if len(fds) >= count:
                break
            fds.append(kernel.duplicate(fds[0]))
    finally:
        kernel.close_all(fds)
