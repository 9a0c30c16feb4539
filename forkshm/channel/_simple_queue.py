"""SimpleQueue: one socket that all processes share."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from forkshm.channel._connection import Connection, Pipe
from forkshm.errors import NotPicklableError
from forkshm.pickler import register

if TYPE_CHECKING:
    from forkshm._multiprocess import context

__all__ = ("SimpleQueue", "only_shared")

# For queues whose senders wait for room: about 700 small items, or 100 MiB of items of any size.
_SIMPLE_SOCKET_BUFFER = 2**18


class SimpleQueue:
    """Create a queue without a size limit or a thread: `put` waits while the kernel's buffer is full.

    Every process that has the queue may put and get: processes forked after it was made, and processes that received
    it. Each item goes to one receiver. Items stay when the process that put them ends. The kernel frees the queue and
    its items when the last process has closed it or ended.

    Args:
        ctx: Accepted for compatibility with ``multiprocessing`` and not used.

    Raises:
        OSError: The limit on open files is reached.

    Fork and threads:
        Safe to use from any process and any thread. A killed process never blocks the others. It loses at most
        the item that it had taken.

    Example:
        >>> from forkshm import SimpleQueue
        >>> queue = SimpleQueue()
        >>> queue.put("hello")
        >>> queue.get()
        'hello'
        >>> queue.close()

    See Also:
        `multiprocessing.SimpleQueue`.
    """

    def __init__(self, *, ctx: context.BaseContext | None = None) -> None:
        reader, writer = Pipe(duplex=False, ctx=ctx)
        writer.grow(_SIMPLE_SOCKET_BUFFER)
        self._ready(reader, writer)

    def _ready(self, reader: Connection, writer: Connection) -> None:
        # The standard library's names: its pools and executors, run over forkshm contexts, use the ends directly
        # and take the locks, which guard nothing here.
        self._reader, self._writer = reader, writer
        self._rlock, self._wlock = threading.Lock(), threading.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'closed' if self._reader.closed else f'fd {self._reader.fileno()}'}>"

    def put(self, obj: Any) -> None:
        """Put an object. Wait while the kernel's buffer is full, or about 100 MiB of copies are in the queue.

        Raises:
            OSError: This process closed the queue.
            Exception: Whatever pickling *obj* raises.
        """
        self._writer.send(obj)

    def get(self) -> Any:
        """Wait for an item, take it and return it.

        Raises:
            OSError: This process closed the queue.
            Exception: Whatever unpickling raises; the item is used up.
        """
        return self._reader.recv()

    def empty(self) -> bool:
        """Return whether the queue is empty now.

        Raises:
            OSError: This process closed the queue.
        """
        return not self._reader.poll()

    def close(self) -> None:
        """Close the queue in this process; other processes may go on. Closing twice is allowed."""
        self._writer.close()
        self._reader.close()

    def __reduce__(self) -> Any:
        raise only_shared(self)


def only_shared(what: object) -> NotPicklableError:
    return NotPicklableError(
        f"cannot pickle {what!r}: plain pickle cannot carry its fds. "
        "Pass it to a forked process, or send it through a queue or pipe of forkshm."
    )


def reduce_simple_queue(what: SimpleQueue) -> Any:
    """Return what to pickle for a queue; the receiver gets the same queue."""
    return rebuild_simple_queue, (what._reader, what._writer)


def rebuild_simple_queue(reader: Connection, writer: Connection) -> SimpleQueue:
    """Return the queue that arrived."""
    found = SimpleQueue.__new__(SimpleQueue)
    found._ready(reader, writer)
    return found


register(SimpleQueue, reduce_simple_queue)
