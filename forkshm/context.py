"""Layer 6. get_context(): the door shaped like multiprocessing."""

from __future__ import annotations

import multiprocessing.context
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm import channel as _channel
from forkshm.errors import UnsupportedError
from forkshm.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from forkshm.channel import Connection
    from forkshm.channel._manager import SyncManager

__all__ = ("ForkContext", "Manager", "Process", "get_context")

#: A process, as ``multiprocessing.Process``; on Linux it is forked.
Process = _multiprocess.context.ForkProcess


class ForkContext(_multiprocess.context.ForkContext, multiprocessing.context.BaseContext):
    """The context whose processes are forked, and whose pools are forkshm's.

    It is an instance of the base class of ``multiprocess`` and of that of
    ``multiprocessing``, so libraries that check accept it.
    """

    Process = Process

    def Pool(  # type: ignore[override]  # noqa: N802 - the standard library's name
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
    ) -> Pool:
        """Return a `forkshm.Pool` whose workers this context starts."""
        return Pool(processes, initializer, initargs, maxtasksperchild, context=self)

    def Queue(self, maxsize: int = 0) -> _channel.Queue:  # type: ignore[override]  # noqa: N802
        """Return a `forkshm.Queue`."""
        return _channel.Queue(maxsize)

    def JoinableQueue(self, maxsize: int = 0) -> _channel.JoinableQueue:  # type: ignore[override]  # noqa: N802
        """Return a `forkshm.JoinableQueue`."""
        return _channel.JoinableQueue(maxsize)

    def SimpleQueue(self) -> _channel.SimpleQueue:  # type: ignore[override]  # noqa: N802
        """Return a `forkshm.SimpleQueue`."""
        return _channel.SimpleQueue()

    def Pipe(self, duplex: bool = True) -> tuple[Connection, Connection]:  # type: ignore[override]  # noqa: N802
        """Return the two ends of a new pipe; see `forkshm.Pipe`."""
        return _channel.Pipe(duplex)

    def Manager(self) -> SyncManager:  # noqa: N802
        """Start a manager and return it; see `forkshm.Manager`."""
        from forkshm.channel._manager import SyncManager

        manager = SyncManager(ctx=self)
        manager.start()
        return manager


_fork = ForkContext()


def Manager() -> SyncManager:  # noqa: N802 - the standard library's name
    """Start a process that holds objects for others, and return its manager.

    The objects are those of ``multiprocessing``: ``dict``, ``list``, ``Queue``, ``Lock``, ``Namespace``, ``Array``
    and the rest; what you get are proxies. What they are given and what they return crosses as it does in every
    channel of forkshm: memory that is shared as a descriptor. The process ends with ``shutdown()``, at the end of a
    ``with`` block, when the manager is collected, and when the process that started it dies, however it does.

    Raises:
        OSError: The kernel refused the process.

    Fork and threads:
        Proxies may be used in any thread and any process forked later, and passed to others. The manager itself
        belongs to the process that started it.

    Example:
        >>> from forkshm import Manager
        >>> with Manager() as manager:
        ...     shared = manager.dict(a=1)
        ...     shared["b"] = 2
        ...     sorted(shared.items())
        [('a', 1), ('b', 2)]

    See Also:
        `multiprocessing.Manager`.
    """
    return _fork.Manager()


def get_context(method: str | None = None) -> ForkContext:
    """Return the context of a start method.

    Args:
        method: ``"fork"``, or None for the default, which on Linux is fork on every
            version of Python.

    Raises:
        UnsupportedError: The method is spawn or forkserver, which forkshm has not yet.
        ValueError: There is no such method.
    """
    if method in (None, "fork"):
        return _fork
    if method in ("spawn", "forkserver"):
        raise UnsupportedError(f"forkshm has no start method {method!r} yet: use 'fork'", capability=method)
    raise ValueError(f"cannot find context for {method!r}: the start method of forkshm is 'fork'")
