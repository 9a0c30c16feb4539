"""Shared memory between processes, passed as descriptors instead of data.

    import forkshm as mp

Layers are numbered from the kernel up; each imports only from lower-numbered layers:

    backend/       0  what this kernel can do
    region/        1  bytes mapped in this process; in blocks/ the memory that carries copies
    sync/          2  multiprocessing's locks and values, in regions
    descriptor/    2  small values that name mapped bytes
    pickler/       3  objects to and from payloads and descriptors
    channel/       4  messages between processes: queues, pipes, managers
    processes/     4  child processes, by each start method
    pool/          5  workers, tasks, results
    spmd/          5  processes with ranks: team, launch, run, supervise
    context.py     6  the interface of multiprocessing
    executor/      6  the interface of concurrent.futures
    decorator/     6  parallel functions
    containers/    6  shared lists and dicts
    cluster/       6  executors on the nodes of a Dask cluster
    aio.py         6  the interface for asyncio
    accounting.py  6  what was moved, and `assert_zero_copy`
    queues.py ...     the other modules that multiprocessing has
    integrations/     optional libraries, imported when first met
    _commands/        python -m forkshm
    testing/          leak checks for tests
    errors.py         every exception
    _ledger.py        the counters that all layers write to
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

from forkshm import backend as _backend
from forkshm import errors as _errors
from forkshm._help import publish
from forkshm._multiprocess import AuthenticationError, BufferTooShort, ProcessError, TimeoutError  # noqa: A004
from forkshm._patch import patch, patched, unpatch
from forkshm.accounting import assert_zero_copy, statistics
from forkshm.channel import JoinableQueue, Pipe, Queue, SimpleQueue
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
    ChannelError,
    CopiedError,
    ForkshmError,
    ForkshmWarning,
    LockTimeoutError,
    NotPicklableError,
    PoolClosedError,
    RegionError,
    RegionNotFoundError,
    SerializationError,
    SyncError,
    TaskTimeoutError,
    UnsupportedError,
    WorkerDiedError,
    WorkerError,
)
from forkshm.pickler import view
from forkshm.pool import Pool, worker_state
from forkshm.region import (
    Creation,
    FileMapping,
    MappedRegion,
    Mode,
    SharedMemoryObject,
    anonymous_shared_memory,
    remove_on_exit,
)
from forkshm.spmd import launch, supervise, team, worker

if TYPE_CHECKING:
    from forkshm import aio, cluster, containers, decorator, executor, joblib, pandas, pytest, testing  # noqa: F401
    from forkshm.containers import SharedDict, SharedList
    from forkshm.decorator import parallel
    from forkshm.executor import Executor
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

__version__ = "0.2.0"

# Levels of the logger.
SUBDEBUG = 5
SUBWARNING = 25

__all__ = (
    "Array",
    "AuthenticationError",
    "Barrier",
    "BoundedSemaphore",
    "BufferTooShort",
    "ChannelError",
    "Condition",
    "CopiedError",
    "Creation",
    "Event",
    "Executor",
    "FileMapping",
    "ForkshmError",
    "ForkshmWarning",
    "JoinableQueue",
    "Lock",
    "LockTimeoutError",
    "Manager",
    "MappedRegion",
    "Mode",
    "NotPicklableError",
    "Pipe",
    "Pool",
    "PoolClosedError",
    "Process",
    "ProcessError",
    "Queue",
    "RLock",
    "RawArray",
    "RawValue",
    "RegionError",
    "RegionNotFoundError",
    "Semaphore",
    "SerializationError",
    "SharedArray",
    "SharedDict",
    "SharedList",
    "SharedMemoryObject",
    "SimpleQueue",
    "SyncError",
    "TaskTimeoutError",
    "TimeoutError",
    "UnsupportedError",
    "Value",
    "WorkerDiedError",
    "WorkerError",
    "active_children",
    "aio",
    "allow_connection_pickling",
    "anonymous_shared_memory",
    "array",
    "asarray",
    "assert_zero_copy",
    "cpu_count",
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
    "parallel",
    "parent_process",
    "patch",
    "patched",
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

# Imported when first used, because asyncio, concurrent.futures and multiprocessing.pool take long to import.
_LAZY = {
    "Executor": "executor",
    "ResultNotPicklableError": "pool._result_not_picklable",
    "SharedDict": "containers",
    "SharedList": "containers",
    "parallel": "decorator",
}

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

# Other modules that are imported when first used. `dir` leaves them out, because some need another library.
_OWN_MODULES = frozenset(
    {"aio", "cluster", "containers", "decorator", "executor", "joblib", "pandas", "pytest", "testing"}
)


def __getattr__(name: str) -> Any:
    if name in _MODULES or name in _OWN_MODULES:
        return importlib.import_module(f"forkshm.{name}")
    if name in _LAZY:
        value = globals()[name] = _taken_from(importlib.import_module(f"forkshm.{_LAZY[name]}"), name)
        return value
    if name in _errors.__all__:
        return getattr(_errors, name)
    if name not in _NUMPY:
        raise AttributeError(f"module 'forkshm' has no attribute {name!r}")
    try:
        from forkshm.integrations import numpy
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise _errors.MissingDependencyError(
            f"cannot use forkshm.{name}: NumPy is not installed. Run: pip install 'forkshm[numpy]'", extra="numpy"
        ) from error
    value = globals()[name] = _taken_from(numpy, name)
    return value


def _taken_from(module: Any, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        if not getattr(module.__spec__, "_initializing", False):
            raise
    raise _errors.ForkshmError(
        f"cannot use forkshm.{name} here: this signal handler or finalizer has interrupted the import that it needs. "
        f"Use forkshm.{name} once before, for example at the start of the program."
    )


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "ResultNotPicklableError", "SUBDEBUG", "SUBWARNING"})


def _warn_of_experiments(found: list[str]) -> None:
    # Not in spawned processes, which would all repeat the warning.
    if found and "--multiprocessing-fork" not in sys.argv:
        warnings.warn(f"forkshm on {'; '.join(found)}", _errors.ExperimentalWarning, stacklevel=3)


publish(globals())
_warn_of_experiments(_backend.experiments())
