"""Layer 1 of 6. Takes what the kernel offers, hands on bytes mapped in this process.

Regions are what users ask for and hold; the arena is memory that forkshm carves up
itself to carry copies. Both end when the kernel sees that nobody uses them.
"""

from forkshm.backend import Advice
from forkshm.region._anonymous import anonymous_shared_memory
from forkshm.region._file import FileMapping
from forkshm.region._mapped import MappedRegion
from forkshm.region._object import (
    Creation,
    SharedMemoryObject,
    create_only,
    open_only,
    open_or_create,
    remove_on_exit,
)
from forkshm.region._offset_ptr import OffsetPtr, Pointer
from forkshm.region._place import aligned, assign, construct, place
from forkshm.region._sync import Barrier, Condition, Mutex, RecursiveMutex, RWLock, Semaphore
from forkshm.region._table import Mode, copy_on_write, read_only, read_private, read_write
from forkshm.region._windows import WindowsSharedMemory

__all__ = (
    "Advice",
    "Barrier",
    "Condition",
    "Creation",
    "FileMapping",
    "MappedRegion",
    "Mode",
    "Mutex",
    "OffsetPtr",
    "Pointer",
    "RWLock",
    "RecursiveMutex",
    "Semaphore",
    "SharedMemoryObject",
    "WindowsSharedMemory",
    "aligned",
    "anonymous_shared_memory",
    "assign",
    "construct",
    "copy_on_write",
    "create_only",
    "open_only",
    "open_or_create",
    "place",
    "read_only",
    "read_private",
    "read_write",
    "remove_on_exit",
)
