"""Watches channels and processes for an event loop that cannot, such as those of Windows, which watch only sockets.

One thread waits for all of them, and makes the loop check. Until the loop has checked, the thread waits for nothing
else, so that nothing is reported twice.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

from forkshm import _interrupts
from forkshm.backend import kernel

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

__all__ = ("SelectorThread",)


class Watchable(Protocol):
    """An end of a channel, or a process."""

    def fileno(self) -> int:
        """Return the fd."""
        ...

    def close(self) -> None:
        """Close the fd."""
        ...


class SelectorThread:
    """A thread that calls the method *look* in a loop whenever an object that it watches is ready.

    It owns the watched objects, because it may be waiting for one that is removed. It keeps nothing else alive.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, look: Callable[[], None]) -> None:
        self._loop = loop
        self._look = weakref.WeakMethod(look)
        self._lock = _interrupts.Lock()
        self._watched: dict[object, Watchable] = {}
        self._dropped: list[Watchable] = []
        self._is_looked_for = False
        self._ended = False
        self._wait_at, self._wake_end = kernel.create_wakeup()
        try:
            self._thread = threading.Thread(target=self._run, name="forkshm-aio-watcher", daemon=True)
            self._thread.start()
        except BaseException:
            self._close_all()
            raise

    def watch(self, source: object, end: Watchable) -> None:
        """Watch *end* under the key *source*. The thread closes it when it is removed."""
        with self._lock:
            self._watched[source] = end
            kernel.wake(self._wake_end, 1)

    def unwatch(self, source: object) -> None:
        """Stop watching the object of this key."""
        with self._lock:
            self._dropped.append(self._watched.pop(source))
            kernel.wake(self._wake_end, 1)

    def close(self) -> None:
        """Stop watching all objects, and end the thread. Closing twice is allowed."""
        with self._lock:
            if not self._ended:
                self._ended = True
                kernel.wake(self._wake_end, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _close_all(self) -> None:
        for end in (*self._watched.values(), *self._dropped):
            end.close()
        self._watched.clear()
        self._dropped.clear()
        kernel.close(self._wait_at)
        kernel.close(self._wake_end)

    def _run(self) -> None:
        try:
            self._wait()
        finally:
            self._close_all()

    def _wait(self) -> None:
        while True:
            with self._lock:
                dropped, self._dropped = self._dropped, []
                watched = [] if self._is_looked_for else list(self._watched.values())
                ended = self._ended
            for end in dropped:
                end.close()
            del dropped
            if ended:
                return
            poller = kernel.poller()
            poller.register(self._wait_at)
            for end in watched:
                poller.register(end.fileno())
            del watched
            if any(fd != self._wait_at for fd, _ in poller.poll()):
                self._is_looked_for = True
                with contextlib.suppress(RuntimeError):  # the loop is closed, and this thread will be soon
                    self._loop.call_soon_threadsafe(self._looked)

    def _looked(self) -> None:
        try:
            look = self._look()
            if look is not None:
                look()
        finally:
            with self._lock:
                self._is_looked_for = False
                if not self._ended:
                    kernel.wake(self._wake_end, 1)
