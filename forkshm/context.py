"""Layer 6: contexts with the interface of multiprocessing."""

from __future__ import annotations

import multiprocessing.context
import sys
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess, _system, processes
from forkshm import channel as _channel
from forkshm._multiprocess import AuthenticationError, BufferTooShort, ProcessError, TimeoutError  # noqa: A004
from forkshm.pool import Pool
from forkshm.processes import ForkProcess, ForkServerProcess, Process, SpawnProcess
from forkshm.region import family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from multiprocessing.context import BaseContext

    from forkshm import sync as _sync
    from forkshm.channel import Connection, OnError
    from forkshm.pool.manager import SyncManager

__all__ = (
    "Array",
    "AuthenticationError",
    "Barrier",
    "BaseContext",
    "BoundedSemaphore",
    "BufferTooShort",
    "Condition",
    "DefaultContext",
    "Event",
    "ForkContext",
    "ForkProcess",
    "ForkServerContext",
    "ForkServerProcess",
    "Lock",
    "Manager",
    "Process",
    "ProcessError",
    "RLock",
    "RawArray",
    "RawValue",
    "Semaphore",
    "SpawnContext",
    "SpawnProcess",
    "TimeoutError",
    "Value",
    "active_children",
    "allow_connection_pickling",
    "cpu_count",
    "current_process",
    "default_context",
    "freeze_support",
    "get_all_start_methods",
    "get_context",
    "get_logger",
    "get_start_method",
    "log_to_stderr",
    "parent_process",
    "reducer",
    "set_executable",
    "set_forkserver_preload",
    "set_start_method",
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("context", globals())

if TYPE_CHECKING:
    _Base = multiprocessing.context.BaseContext
else:
    _Base = object


class _Doors(_Base):
    """Factory methods of the contexts; the other methods are inherited from ``multiprocess``."""

    def Pool(  # type: ignore[override]  # noqa: N802 - the standard library's name
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        **options: Any,
    ) -> Pool:
        """Return a `forkshm.Pool` whose workers this context starts; *options* are those of the class."""
        return Pool(processes, initializer, initargs, maxtasksperchild, context=self.get_context(), **options)

    def set_forkserver_preload(self, module_names: Any, *, on_error: Any = "ignore") -> None:
        """Set the modules that the fork server imports before it forks; see `forkshm.set_forkserver_preload`.

        Args:
            module_names: Names of modules.
            on_error: What to do if a module cannot be imported. "ignore" skips it, "warn" prints an ImportWarning on
                the server's stderr, and "fail" ends the server, so that starting a process raises.

        Raises:
            ValueError: *on_error* is not one of these.
            TypeError: A name is not a string.
        """
        processes.set_forkserver_preload(module_names, on_error=on_error)

    def get_context(self, method: str | None = None) -> Any:
        """Return the context of a start method; see `forkshm.get_context`."""
        return self if method is None else get_context(method)

    def Queue(  # type: ignore[override]  # noqa: N802
        self, maxsize: int = 0, *, on_error: OnError = "print"
    ) -> _channel.Queue:
        """Return a `forkshm.Queue`."""
        return _channel.Queue(maxsize, ctx=self.get_context(), on_error=on_error)

    def JoinableQueue(  # type: ignore[override]  # noqa: N802
        self, maxsize: int = 0, *, on_error: OnError = "print"
    ) -> _channel.JoinableQueue:
        """Return a `forkshm.JoinableQueue`."""
        return _channel.JoinableQueue(maxsize, ctx=self.get_context(), on_error=on_error)

    # Locks and values in shared memory are the same for all start methods. Their modules are imported on first use.

    def Lock(self) -> _sync.Lock:  # noqa: N802
        """Return a lock; see `forkshm.synchronize.Lock`.

        Example:
            >>> import forkshm
            >>> with forkshm.Lock() as is_acquired:
            ...     is_acquired
            True
        """
        from forkshm.sync import Lock

        return Lock()

    def RLock(self) -> _sync.RLock:  # noqa: N802
        """Return a lock that its holder can acquire again; see `forkshm.synchronize.RLock`.

        Example:
            >>> import forkshm
            >>> lock = forkshm.RLock()
            >>> with lock, lock:
            ...     "acquired twice"
            'acquired twice'
        """
        from forkshm.sync import RLock

        return RLock()

    def Semaphore(self, value: int = 1) -> _sync.Semaphore:  # noqa: N802
        """Return a semaphore with *value* permits; see `forkshm.synchronize.Semaphore`.

        Example:
            >>> import forkshm
            >>> semaphore = forkshm.Semaphore(2)
            >>> [semaphore.acquire(block=False) for _ in range(3)]
            [True, True, False]
        """
        from forkshm.sync import Semaphore

        return Semaphore(value)

    def BoundedSemaphore(self, value: int = 1) -> _sync.BoundedSemaphore:  # noqa: N802
        """Return a semaphore that raises ValueError if it is released too often.

        See `forkshm.synchronize.BoundedSemaphore`.
        """
        from forkshm.sync import BoundedSemaphore

        return BoundedSemaphore(value)

    def Condition(self, lock: Any = None) -> _sync.Condition:  # noqa: N802
        """Return a condition; see `forkshm.synchronize.Condition`.

        Args:
            lock: A `Lock` or `RLock`; by default a new `RLock`.

        Example:
            >>> import forkshm
            >>> condition = forkshm.Condition()
            >>> with condition:
            ...     condition.wait(timeout=0.01)  # nobody notifies
            False
        """
        from forkshm.sync import Condition

        return Condition(lock)

    def Event(self) -> _sync.Event:  # noqa: N802
        """Return an event; see `forkshm.synchronize.Event`.

        Example:
            >>> import forkshm
            >>> event = forkshm.Event()
            >>> process = forkshm.Process(target=event.set)
            >>> process.start()
            >>> event.wait()
            True
            >>> process.join()
        """
        from forkshm.sync import Event

        return Event()

    def Barrier(  # noqa: N802
        self, parties: int, action: Callable[[], object] | None = None, timeout: float | None = None
    ) -> _sync.Barrier:
        """Return a barrier; see `forkshm.synchronize.Barrier`.

        Args:
            parties: Number of processes or threads that wait for each other.
            action: Called by one of them each time all have arrived.
            timeout: Default of `wait`, in seconds.

        Example:
            >>> import forkshm
            >>> barrier = forkshm.Barrier(2)
            >>> process = forkshm.Process(target=barrier.wait)
            >>> process.start()
            >>> barrier.wait() in (0, 1)
            True
            >>> process.join()
        """
        from forkshm.sync import Barrier

        return Barrier(parties, action, timeout)

    def RawValue(self, typecode_or_type: Any, *args: Any) -> Any:  # noqa: N802
        """Return a ctypes object in shared memory, without a lock; see `forkshm.sharedctypes.RawValue`."""
        from forkshm.sync.sharedctypes import RawValue

        return RawValue(typecode_or_type, *args)

    def RawArray(self, typecode_or_type: Any, size_or_initializer: Any) -> Any:  # noqa: N802
        """Return a ctypes array in shared memory, without a lock; see `forkshm.sharedctypes.RawArray`."""
        from forkshm.sync.sharedctypes import RawArray

        return RawArray(typecode_or_type, size_or_initializer)

    def Value(self, typecode_or_type: Any, *args: Any, lock: Any = True) -> Any:  # noqa: N802
        """Return a ctypes object in shared memory, with a lock; see `forkshm.sharedctypes.Value`.

        Args:
            typecode_or_type: A ctypes type, or a type code of the module ``array``: ``"q"`` is a signed 64-bit integer.
            args: Initial value.
            lock: False for an object without a lock, or the lock to use.

        Example:
            >>> import forkshm
            >>> counter = forkshm.Value("q", 41)
            >>> with counter.get_lock():
            ...     counter.value += 1
            >>> counter.value
            42
        """
        from forkshm.sync.sharedctypes import Value

        return Value(typecode_or_type, *args, lock=lock)

    def Array(self, typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True) -> Any:  # noqa: N802
        """Return a ctypes array in shared memory, with a lock; see `forkshm.sharedctypes.Array`.

        `forkshm.zeros` returns a NumPy array in shared memory instead.

        Args:
            typecode_or_type: A ctypes type, or a type code of the module ``array``: ``"d"`` is a float.
            size_or_initializer: The number of elements, or the elements.
            lock: False for an array without a lock, or the lock to use.

        Example:
            >>> import forkshm
            >>> array = forkshm.Array("d", [1.5, 2.5])
            >>> array[:]
            [1.5, 2.5]
        """
        from forkshm.sync.sharedctypes import Array

        return Array(typecode_or_type, size_or_initializer, lock=lock)

    def SimpleQueue(self) -> _channel.SimpleQueue:  # type: ignore[override]  # noqa: N802
        """Return a `forkshm.SimpleQueue`."""
        return _channel.SimpleQueue(ctx=self.get_context())

    def Pipe(self, duplex: bool = True) -> tuple[Connection, Connection]:  # type: ignore[override]  # noqa: N802
        """Return the two ends of a new pipe; see `forkshm.Pipe`."""
        return _channel.Pipe(duplex, ctx=self.get_context())

    def Manager(self) -> SyncManager:  # noqa: N802
        """Start a manager and return it; see `forkshm.Manager`."""
        from forkshm.pool.manager import SyncManager

        manager = SyncManager(ctx=self.get_context())
        manager.start()
        return manager

    def freeze_support(self) -> None:
        """Run the code of a spawned process and exit, if this is a spawned process of a frozen program."""
        # The other library asks for the start method first, which chooses the default for good.
        if getattr(sys, "frozen", False) and self.get_start_method(allow_none=True) in ("spawn", None):
            _multiprocess.spawn.freeze_support()


if sys.platform != "win32":
    _Forking = _multiprocess.context.ForkContext
    _ServerForking = _multiprocess.context.ForkServerContext
else:
    _Forking = _ServerForking = processes.NoFork


class ForkContext(_Doors, _Forking, multiprocessing.context.BaseContext):
    """The context whose processes are forked.

    Like the other contexts, it derives from the base contexts of ``multiprocess`` and of ``multiprocessing``, so
    libraries that check for either accept it.
    """

    Process = ForkProcess


class SpawnContext(_Doors, _multiprocess.context.SpawnContext, multiprocessing.context.BaseContext):
    """The context whose processes are fresh interpreters."""

    Process = SpawnProcess


class ForkServerContext(_Doors, _ServerForking, multiprocessing.context.BaseContext):
    """The context whose processes are forked by a server process that has no threads."""

    Process = ForkServerProcess


_contexts: dict[str, ForkContext | SpawnContext | ForkServerContext] = (
    {"fork": ForkContext(), "spawn": SpawnContext(), "forkserver": ForkServerContext()}
    if _system.CAN_FORK
    else {"spawn": SpawnContext()}
)


class DefaultContext(_Doors, _multiprocess.context.DefaultContext, multiprocessing.context.BaseContext):
    """The context behind this package's functions; its start method is set once."""

    _actual_context: Any
    _default_context: Any
    Process = Process  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(next(iter(_contexts.values())))

    def get_context(self, method: str | None = None) -> Any:
        """Return the context of a start method.

        Args:
            method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; None for the current start method. The default is fork
                on every version of Python, and spawn on systems that cannot fork.

        Raises:
            ValueError: *method* is unknown.
            UnsupportedError: This system cannot fork; use ``"spawn"``.

        Example:
            >>> import forkshm
            >>> context = forkshm.get_context("fork")
            >>> with context.Pool(1) as pool:
            ...     pool.apply(abs, (-1,))
            1
        """
        if method is None:
            if self._actual_context is None:
                self._actual_context = self._default_context
            return self._actual_context
        try:
            return _contexts[method]
        except KeyError:
            if method in ("fork", "forkserver"):
                processes.NoFork()
            raise ValueError(f"cannot find context for {method!r}: use one of {', '.join(_contexts)}") from None

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Set how processes are started by default.

        Args:
            method: As for `get_context`; with *force*, None restores the default.
            force: Set it even if it was set or used before.

        Raises:
            RuntimeError: The start method was set or used before, and *force* is false.
            ValueError: *method* is unknown.
        """
        if self._actual_context is not None and not force:
            raise RuntimeError("context has already been set")
        self._actual_context = None if method is None else self.get_context(method)
        # Locks and values of multiprocess look up the start method in its own default context.
        _multiprocess.context._default_context.set_start_method(method, force=True)

    def get_start_method(self, allow_none: bool = False) -> str | None:  # type: ignore[override]
        """Return the start method; if none was set, fix the default, or return None with *allow_none*."""
        if self._actual_context is None and allow_none:
            return None
        return str(self.get_context()._name)

    def get_all_start_methods(self) -> list[str]:
        """Return the supported start methods, the default first."""
        return list(_contexts)


default_context = DefaultContext()
_multiprocess.default_context = default_context
processes.register()
family.begin()
# The functions of multiprocessing.
Array = default_context.Array
Barrier = default_context.Barrier
BoundedSemaphore = default_context.BoundedSemaphore
Condition = default_context.Condition
Event = default_context.Event
Lock = default_context.Lock
RLock = default_context.RLock
RawArray = default_context.RawArray
RawValue = default_context.RawValue
Semaphore = default_context.Semaphore
Value = default_context.Value
active_children = default_context.active_children
allow_connection_pickling = default_context.allow_connection_pickling
cpu_count = default_context.cpu_count
current_process = default_context.current_process
freeze_support = default_context.freeze_support
get_all_start_methods = default_context.get_all_start_methods
get_context = default_context.get_context
get_logger = default_context.get_logger
get_start_method = default_context.get_start_method
log_to_stderr = default_context.log_to_stderr
parent_process = default_context.parent_process
reducer = default_context.reducer
set_executable = default_context.set_executable
set_forkserver_preload = default_context.set_forkserver_preload
set_start_method = default_context.set_start_method


def Manager() -> SyncManager:  # noqa: N802 - the standard library's name
    """Return the manager of a new process that holds objects for other processes.

    The objects are those of ``multiprocessing``: ``dict``, ``list``, ``Queue``, ``Lock``, ``Namespace``, ``Array`` and
    so on. The manager returns proxies for them. Arguments and results of proxies are sent as in every channel of
    forkshm: shared memory as descriptors. The process ends with ``shutdown()``, at the end of a ``with`` block, when
    the manager is garbage-collected, and when the process that started it ends, even if it is killed.

    Raises:
        OSError: The kernel refused the process.

    Fork and threads:
        Proxies may be used in any thread and in processes forked later, and may be passed to other processes. The
        manager itself belongs to the process that started it.

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
    return default_context.Manager()
