"""Shared memory between processes, passed as descriptors and never as data.

    import forkshm as mp

General layout, in the order of the data's way; imports point up only:

    backend/       0  what this kernel can do
    region/        1  bytes mapped in this process, and the arena that carries copies
    sync/             multiprocessing's locks and values, in that memory
    descriptor/    2  small values that name those bytes
    pickler/       3  objects to and from (payload, descriptors)
    channel/       4  messages between processes
    pool/          5  processes that do the work
    workers/          processes that run the same code, each with a rank
    context.py     6  the door shaped like multiprocessing
    doors/            what a person types: decorator, executor, containers
    aio.py            the door of asyncio
    queues.py ...     and the other modules that multiprocessing has
    accounting.py     what was moved, and a test that nothing was copied
    integrations/     optional libraries, loaded when first met
    errors.py         every exception
    _ledger.py        the counters, which all layers write to
    _leaks.py         what is held at the end, when asked for
    _commands/        python -m forkshm
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from forkshm import _signatures
from forkshm._multiprocess import AuthenticationError, BufferTooShort, ProcessError, TimeoutError  # noqa: A004
from forkshm._patch import patch, patched, unpatch
from forkshm.accounting import Statistics, assert_zero_copy, statistics
from forkshm.channel import Connection, JoinableQueue, Pipe, Queue, SimpleQueue
from forkshm.context import (
    Array,
    Barrier,
    BoundedSemaphore,
    Condition,
    Event,
    Lock,
    Manager,
    Process,
    RawArray,
    RawValue,
    RLock,
    Semaphore,
    Value,
    active_children,
    allow_connection_pickling,
    cpu_count,
    current_process,
    freeze_support,
    get_all_start_methods,
    get_context,
    get_logger,
    get_start_method,
    log_to_stderr,
    parent_process,
    reducer,
    set_executable,
    set_forkserver_preload,
    set_start_method,
)
from forkshm.errors import (
    ChannelBrokenError,
    ChannelClosedError,
    ChannelError,
    CopiedError,
    CrashLoopError,
    DeadlockError,
    ForkshmError,
    ForkshmWarning,
    LockTimeoutError,
    MainGuardError,
    MissingDependencyError,
    NotConstructedError,
    NotOwnerError,
    NotPicklableError,
    NotRecoverableError,
    NotUnpicklableError,
    PoolClosedError,
    RegionAccessError,
    RegionAddressError,
    RegionBusyError,
    RegionClosedError,
    RegionCreateError,
    RegionError,
    RegionExistsError,
    RegionGoneError,
    RegionNotFoundError,
    SerializationError,
    SyncError,
    TaskTimeoutError,
    TeamBrokenError,
    UnplaceableTypeError,
    UnsupportedError,
    WildPointerError,
    WorkerDiedError,
    WorkerError,
    WorkerStartError,
)
from forkshm.pickler import view
from forkshm.pool import AsyncResult, Pool, PoolReport, PoolStatistics, worker_state
from forkshm.region import (
    Advice,
    Creation,
    FileMapping,
    MappedRegion,
    Mode,
    Mutex,
    OffsetPtr,
    Pointer,
    RecursiveMutex,
    RWLock,
    SharedMemoryObject,
    WindowsSharedMemory,
    anonymous_shared_memory,
    copy_on_write,
    create_only,
    open_only,
    open_or_create,
    read_only,
    read_private,
    read_write,
    remove_on_exit,
)
from forkshm.workers import Launch, Supervised, Team, Worker, launch, supervise, team, worker

if TYPE_CHECKING:
    from forkshm import aio
    from forkshm.doors import Executor, ParallelFunction, SharedDict, SharedList, parallel
    from forkshm.integrations.numpy import (
        SharedArray,
        array,
        asarray,
        empty,
        empty_like,
        full,
        full_like,
        ones,
        ones_like,
        shared_allocations,
        zeros,
        zeros_like,
    )

__version__ = "0.1.0.dev0"

# Levels of the logger.
SUBDEBUG = 5
SUBWARNING = 25

__all__ = (
    "Advice",
    "Array",
    "AsyncResult",
    "AuthenticationError",
    "Barrier",
    "BoundedSemaphore",
    "BufferTooShort",
    "ChannelBrokenError",
    "ChannelClosedError",
    "ChannelError",
    "Condition",
    "Connection",
    "CopiedError",
    "CrashLoopError",
    "Creation",
    "DeadlockError",
    "Event",
    "Executor",
    "FileMapping",
    "ForkshmError",
    "ForkshmWarning",
    "JoinableQueue",
    "Launch",
    "Lock",
    "LockTimeoutError",
    "MainGuardError",
    "Manager",
    "MappedRegion",
    "MissingDependencyError",
    "Mode",
    "Mutex",
    "NotConstructedError",
    "NotOwnerError",
    "NotPicklableError",
    "NotRecoverableError",
    "NotUnpicklableError",
    "OffsetPtr",
    "ParallelFunction",
    "Pipe",
    "Pointer",
    "Pool",
    "PoolClosedError",
    "PoolReport",
    "PoolStatistics",
    "Process",
    "ProcessError",
    "Queue",
    "RLock",
    "RWLock",
    "RawArray",
    "RawValue",
    "RecursiveMutex",
    "RegionAccessError",
    "RegionAddressError",
    "RegionBusyError",
    "RegionClosedError",
    "RegionCreateError",
    "RegionError",
    "RegionExistsError",
    "RegionGoneError",
    "RegionNotFoundError",
    "Semaphore",
    "SerializationError",
    "SharedArray",
    "SharedDict",
    "SharedList",
    "SharedMemoryObject",
    "SimpleQueue",
    "Statistics",
    "Supervised",
    "SyncError",
    "TaskTimeoutError",
    "Team",
    "TeamBrokenError",
    "TimeoutError",
    "UnplaceableTypeError",
    "UnsupportedError",
    "Value",
    "WildPointerError",
    "WindowsSharedMemory",
    "Worker",
    "WorkerDiedError",
    "WorkerError",
    "WorkerStartError",
    "active_children",
    "aio",
    "allow_connection_pickling",
    "anonymous_shared_memory",
    "array",
    "asarray",
    "assert_zero_copy",
    "copy_on_write",
    "cpu_count",
    "create_only",
    "current_process",
    "empty",
    "empty_like",
    "freeze_support",
    "full",
    "full_like",
    "get_all_start_methods",
    "get_context",
    "get_logger",
    "get_start_method",
    "launch",
    "log_to_stderr",
    "ones",
    "ones_like",
    "open_only",
    "open_or_create",
    "parallel",
    "parent_process",
    "patch",
    "patched",
    "read_only",
    "read_private",
    "read_write",
    "reducer",
    "remove_on_exit",
    "set_executable",
    "set_forkserver_preload",
    "set_start_method",
    "shared_allocations",
    "statistics",
    "supervise",
    "team",
    "unpatch",
    "view",
    "worker",
    "worker_state",
    "zeros",
    "zeros_like",
)

# Found when first used, so that who needs none of them does not wait for asyncio and concurrent.futures.
_DOORS = frozenset({"Executor", "ParallelFunction", "SharedDict", "SharedList", "parallel"})

# Names that need NumPy: found when first used, so that forkshm works without it.
_NUMPY = frozenset(
    {
        "SharedArray",
        "array",
        "asarray",
        "empty",
        "empty_like",
        "full",
        "full_like",
        "ones",
        "ones_like",
        "shared_allocations",
        "zeros",
        "zeros_like",
    }
)

# Modules that multiprocessing has, too: imported when first used.
_MODULES = frozenset(
    {
        "connection",
        "context",
        "dummy",
        "forkserver",
        "heap",
        "managers",
        "pool",
        "process",
        "queues",
        "reduction",
        "resource_sharer",
        "resource_tracker",
        "shared_memory",
        "sharedctypes",
        "spawn",
        "synchronize",
        "util",
    }
)


def _found(value: Any) -> Any:
    """Return *value*, which was found when it was first used, with signatures that read well."""
    if _signatures.is_interactive():
        _signatures.unquote(value)
    return value


def __getattr__(name: str) -> Any:
    if name == "aio":
        module = importlib.import_module("forkshm.aio")
        _found(module.Pool)
        return module
    if name in _MODULES:
        return importlib.import_module(f"forkshm.{name}")
    if name == "ResultNotPicklableError":
        return importlib.import_module("forkshm._result_not_picklable").ResultNotPicklableError
    if name in _DOORS:
        value = globals()[name] = getattr(importlib.import_module("forkshm.doors"), name)
        return _found(value)
    if name not in _NUMPY:
        raise AttributeError(f"module 'forkshm' has no attribute {name!r}")
    try:
        from forkshm.integrations import numpy
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise MissingDependencyError(
            f"forkshm.{name} needs NumPy: pip install 'forkshm[numpy]'", extra="numpy"
        ) from error
    value = globals()[name] = getattr(numpy, name)
    return _found(value)


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "ResultNotPicklableError", "SUBDEBUG", "SUBWARNING"})


if _signatures.is_interactive():
    for _name in __all__:
        _found(globals().get(_name))
