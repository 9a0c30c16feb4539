"""Types of the modules that are named like those of multiprocessing. This file is never run."""

from __future__ import annotations

import multiprocessing.process
import multiprocessing.util
from typing import Any, assert_type

import forkshm
import forkshm.connection
import forkshm.dummy.connection
import forkshm.heap
import forkshm.queues
from forkshm import managers, process, synchronize, util
from forkshm.shared_memory import ShareableList, SharedMemory
from forkshm.sharedctypes import RawValue, copy


def never_called() -> None:
    assert_type(forkshm.queues.Queue(3), forkshm.Queue)
    assert_type(forkshm.connection.Pipe()[0], forkshm.connection.Connection)
    assert_type(forkshm.heap.BufferWrapper(8), forkshm.heap.BufferWrapper)
    assert_type(forkshm.dummy.connection.Listener(), forkshm.dummy.connection.Listener)
    with managers.SharedMemoryManager() as manager:
        assert_type(manager.SharedMemory(8), SharedMemory)
        assert_type(manager.ShareableList([1]), ShareableList)
    assert_type(synchronize.Lock().acquire(timeout=1.0), bool)
    assert_type(process.current_process(), multiprocessing.process.BaseProcess)
    assert_type(util.get_temp_dir(), str)
    assert_type(copy(RawValue("i")).value, Any)
    forkshm.queues.no_such_name  # type: ignore[attr-defined]  # noqa: B018
    util.no_such_name  # type: ignore[attr-defined]  # noqa: B018
