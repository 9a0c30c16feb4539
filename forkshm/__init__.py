"""Shared memory between processes, passed as descriptors and never as data.

    import forkshm as mp

General layout, in the order of the data's way; imports point up only:

    backend/       0  what this kernel can do
    region/        1  bytes mapped in this process, and the arena that carries copies
    descriptor/    2  small values that name those bytes
    pickler/       3  objects to and from (payload, descriptors)
    channel/       4  messages between processes
    pool/          5  processes that do the work
    context.py     6  the door shaped like multiprocessing
    doors/            what a person types: decorator, executor, containers
    aio.py            the door of asyncio
    accounting.py     what was moved, and a test that nothing was copied
    integrations/     optional libraries, loaded when first met
    errors.py         every exception
    _ledger.py        the counters, which all layers write to
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from forkshm._multiprocess import TimeoutError, current_process  # noqa: A004 - the standard library's name
from forkshm.accounting import Statistics, assert_zero_copy, statistics
from forkshm.channel import Connection, JoinableQueue, Pipe, Queue, SimpleQueue
from forkshm.context import (
    Manager,
    Process,
    get_all_start_methods,
    get_context,
    get_start_method,
    set_forkserver_preload,
    set_start_method,
)
from forkshm.errors import (
    BufferTooShort,
    ChannelBrokenError,
    ChannelClosedError,
    ChannelError,
    CopiedError,
    DeadlockError,
    ForkshmError,
    ForkshmWarning,
    LockTimeoutError,
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
    UnplaceableTypeError,
    UnsupportedError,
    WildPointerError,
    WorkerDiedError,
    WorkerError,
    WorkerStartError,
)
from forkshm.pickler import view
from forkshm.pool import AsyncResult, Pool, PoolStatistics
from forkshm.region import (
    Advice,
    Barrier,
    Condition,
    Creation,
    FileMapping,
    MappedRegion,
    Mode,
    Mutex,
    OffsetPtr,
    Pointer,
    RecursiveMutex,
    RWLock,
    Semaphore,
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

__all__ = (
    "Advice",
    "AsyncResult",
    "Barrier",
    "BufferTooShort",
    "ChannelBrokenError",
    "ChannelClosedError",
    "ChannelError",
    "Condition",
    "Connection",
    "CopiedError",
    "Creation",
    "DeadlockError",
    "Executor",
    "FileMapping",
    "ForkshmError",
    "ForkshmWarning",
    "JoinableQueue",
    "LockTimeoutError",
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
    "PoolStatistics",
    "Process",
    "Queue",
    "RWLock",
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
    "SyncError",
    "TaskTimeoutError",
    "TimeoutError",
    "UnplaceableTypeError",
    "UnsupportedError",
    "WildPointerError",
    "WindowsSharedMemory",
    "WorkerDiedError",
    "WorkerError",
    "WorkerStartError",
    "aio",
    "anonymous_shared_memory",
    "array",
    "asarray",
    "assert_zero_copy",
    "copy_on_write",
    "create_only",
    "current_process",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "get_all_start_methods",
    "get_context",
    "get_start_method",
    "ones",
    "ones_like",
    "open_only",
    "open_or_create",
    "parallel",
    "read_only",
    "read_private",
    "read_write",
    "remove_on_exit",
    "set_forkserver_preload",
    "set_start_method",
    "shared_allocations",
    "statistics",
    "view",
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


def __getattr__(name: str) -> Any:
    if name == "aio":
        return importlib.import_module("forkshm.aio")
    if name in _DOORS:
        value = globals()[name] = getattr(importlib.import_module("forkshm.doors"), name)
        return value
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
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
