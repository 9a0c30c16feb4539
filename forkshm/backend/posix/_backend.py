"""The backend for macOS, the BSDs, and Linux on request: it uses only what all POSIX systems have.

An fd may have *companions* here: fds that travel in the same messages, are duplicated and inherited with it, and are
closed with it. They make up for missing features:

* An end of a channel is a SOCK_DGRAM socket, which keeps messages whole and delivers each to one receiver. It
  cannot report that its peers are gone. Its companion does: an end of a stream on which nothing is ever sent.
* A lease on a byte is the writing end of a pipe, a companion of the fd that holds the lease. The process that carves up
  the memory keeps the reading end. It hangs up once no process and no message holds the byte.

A memory object has one extra page, its label. It holds the creator, the size, and an identity, which fstat(2) of macOS
does not report.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from forkshm import _interrupts, _system
from forkshm.backend import _groups
from forkshm.backend.posix import _record_locks
from forkshm.backend.posix._whole import surely, whole

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._unix import Unix  # noqa: E402 - after the platform check
from forkshm.backend.posix._births import Births  # noqa: E402
from forkshm.backend.posix._messages import Messages  # noqa: E402
from forkshm.backend.posix._waiting import wait  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator


_OPEN_MAX = 10_240


class PosixBackend(Messages):
    """A POSIX system with shm_open(3), record locks, and fds in messages."""

    name = "posix"
    locks = _record_locks
    # A pipe reports the end of a process before the kernel has its exit code.
    COLLECT_SECONDS = 5.0

    def __init__(self) -> None:
        super().__init__()
        self._births = Births()
        _system.register_at_fork(after_in_child=self._in_child)

    def _in_child(self) -> None:
        # Leases that the parent has lent are the parent's to wait for.
        for identity, _ in self._made.values():
            self._forget(identity)
        self._made.clear()
        self._counting = _interrupts.RLock()
        self._births.in_child(self)

    def raise_fd_limit(self) -> bool:
        if super().raise_fd_limit():
            return True
        # macOS reports no hard limit, but accepts at most this value.
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = os.sysconf("SC_OPEN_MAX") if soft < 0 else max(soft, _OPEN_MAX)
        if soft < most and resource.getrlimit(resource.RLIMIT_NOFILE)[1] == resource.RLIM_INFINITY:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.RLIM_INFINITY))
                return True
        return False

    def more_fds(self) -> int:
        companions = sum(len(companions.all) for companions in list(self._companions.values()))
        return companions + sum(len(readers) for made in list(self._objects.values()) for readers in made.lent.values())

    @contextlib.contextmanager
    def forking(self) -> Iterator[int]:
        ends: list[int] = []
        try:
            self._begin_birth(ends, forked=True)
            yield ends[0]
        finally:
            if ends:
                self._births.end(ends[1])

    @contextlib.contextmanager
    def spawning(self) -> Iterator[tuple[int, int]]:
        ends: list[int] = []
        try:
            self._begin_birth(ends, forked=False)
            yield ends[0], ends[1]
        finally:
            if ends:
                self._births.end(ends[1])

    @whole
    def _begin_birth(self, ends: list[int], *, forked: bool) -> None:
        ends += self._pipe()
        self._births.begin(*ends, forked=forked)

    @surely
    def hold_birth(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._births.hold(fd, self.file_of(fd))

    @whole
    def open_process(self, pid: int, sentinel: int = -1) -> int:
        return Unix.duplicate(self, sentinel)

    def signal_process(self, process: int, pid: int, number: int) -> None:
        # A child's pid is not reused until the child is collected.
        if wait(0.0, process, None):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        os.kill(pid, number)

    def is_stopped(self, pid: int) -> bool | None:
        if sys.platform != "darwin" and hasattr(os, "waitid"):
            try:
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return None
                return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:
                pass  # a child of the fork server
            except OSError:
                return None
        try:
            listed = subprocess.run(  # noqa: S603
                ["ps", "-o", "state=", "-p", str(pid)],  # noqa: S607 - found on the PATH
                capture_output=True,
                check=False,
                text=True,
            )
        except OSError:
            return None
        state = listed.stdout.strip()[:1]
        return None if state in ("", "Z", "X") else state in ("T", "t")

    def is_running(self, pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # the pid belongs to a process of another user
        return True

    def process_token(self) -> int:
        return _record_locks.process_token()

    def is_alive(self, token: int) -> bool:
        return _record_locks.is_alive(token)

    def usable_cores(self) -> int:
        if sys.platform != "darwin" and hasattr(os, "sched_getaffinity"):
            return _groups.within_quota(len(os.sched_getaffinity(0)))
        return os.cpu_count() or 1

    def die_with(self, lifeline: int) -> int:
        # POSIX has no signal for the closing of a pipe, so a thread waits for it.
        own = Unix.duplicate(self, lifeline)
        pid = os.getpid()

        def wait() -> None:
            while os.getpid() == pid:
                try:
                    if os.read(own, 1) == b"":
                        os.kill(pid, signal.SIGKILL)
                except InterruptedError:
                    continue
                except OSError:
                    return  # closed

        threading.Thread(target=wait, name="forkshm-lifeline", daemon=True).start()
        return own
