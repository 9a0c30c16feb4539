"""Waiting for messages in pipes, and for processes."""

from __future__ import annotations

import _winapi as _win  # CPython's own
import contextlib
import errno
import sys
import time
from typing import TYPE_CHECKING, Any

from forkshm.backend.windows import _winapi

if TYPE_CHECKING:
    from collections.abc import Sequence

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

from forkshm.backend.windows._in_flight import outgoing  # noqa: E402 - after the platform check

__all__ = ("MORE_DATA", "PAUSE", "PENDING", "Poll", "aborted", "open_ends", "wait_any", "wait_for", "wait_readable")

PAUSE = 0.25
# Pause between looks while this process has handles in flight. They may keep open an end whose closing it waits for.
_PAUSE_WITH_HANDLES = 0.02

PENDING, _ABORTED, MORE_DATA = 997, 995, _winapi.MORE_DATA


# Handles of ends open here. A `Poll` waits for them differently than for processes.
open_ends: set[int] = set()


def aborted(overlapped: Any) -> bool:
    """Cancel a pending operation; return False if it has completed meanwhile."""
    overlapped.cancel()
    try:
        return bool(overlapped.GetOverlappedResult(True)[1] == _ABORTED)
    except OSError as error:
        if error.winerror == _ABORTED:
            return True
        raise


def wait_any(handles: Sequence[int], seconds: float) -> int:
    """Wait for one of the handles; return its index. A handled signal counts as a timeout."""
    try:
        return int(_win.WaitForMultipleObjects(handles, False, int(seconds * 1000)))
    except InterruptedError as error:
        if error.errno != errno.EINTR:  # a signal handler raised this exception
            raise
        return int(_win.WAIT_TIMEOUT)


def _is_ready(handle: int) -> bool:
    try:
        return bool(_win.PeekNamedPipe(handle)[0])
    except OSError as error:
        if error.winerror in (_winapi.NO_SUCH_HANDLE, _winapi.NO_SUCH_FUNCTION):
            raise OSError(errno.EBADF, f"handle {handle} is not an open pipe") from error
        return True  # the pipe is broken, which the receiver has to learn


def wait_for(pipes: Sequence[int], others: Sequence[int], seconds: float | None) -> list[int]:
    """Wait until a pipe has a message or another handle is signaled; return the handles that are ready."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        ready = [handle for handle in pipes if _is_ready(handle)]
        ready += [handle for handle in others if _winapi.wait(handle, 0) == _winapi.WAIT_OBJECT_0]
        if ready:
            return ready
        left = _PAUSE_WITH_HANDLES if outgoing.sweep() else PAUSE
        if deadline is not None:
            left = min(left, deadline - time.monotonic())
        if left <= 0:
            return ready
        # A read of zero bytes completes when a message is there, and leaves the message in the pipe.
        reads = []
        try:
            for handle in pipes:
                try:
                    overlapped, code = _win.ReadFile(handle, 0, True)
                except OSError:
                    break  # the pipe is broken: the check above sees it next time
                if code != PENDING:
                    break
                reads.append(overlapped)
            else:
                events = [overlapped.event for overlapped in reads]
                # The kernel waits for 64 handles at most. With more, the others are polled in between.
                some = [*events, *others][:63]
                if len(events) + len(others) > 63:
                    left = min(left, 0.01)
                if some:
                    which = wait_any(some, max(left, 0.001)) - len(events)
                    if 0 <= which < len(others):
                        return [others[which]]  # a semaphore has already counted this wait, so it must not be repeated
                else:
                    time.sleep(left)
        finally:
            for overlapped in reads:
                with contextlib.suppress(OSError):
                    aborted(overlapped)


def wait_readable(handle: int, seconds: float | None) -> bool:
    """Wait until a message is there or the pipe is broken."""
    if handle < 0:
        raise OSError(errno.EBADF, "this end of a pipe was closed")
    return bool(wait_for([handle], [], seconds))


class Poll:
    """The part of ``select.poll`` that is used, for pipes and processes."""

    def __init__(self) -> None:
        self._pipes: list[int] = []
        self._others: list[int] = []

    def register(self, fd: int, eventmask: int = 1, /) -> None:
        """Watch a pipe for messages, or another handle for being signaled."""
        (self._pipes if fd in open_ends else self._others).append(fd)

    def unregister(self, fd: int, /) -> None:
        """Stop watching a handle."""
        (self._pipes if fd in self._pipes else self._others).remove(fd)

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """Wait for up to *timeout* milliseconds, or forever; return the ready handles, each with its events."""
        ready = wait_for(self._pipes, self._others, None if timeout is None else timeout / 1000)
        return [(handle, 1) for handle in ready]
