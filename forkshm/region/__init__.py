"""Layer 1 of 6. Builds on the kernel's operations, and provides bytes mapped in this process.

Regions are memory that users ask for and hold. The arena is memory that forkshm itself carves up to carry copies. The
kernel frees both when no process uses them.
"""

from forkshm._help import publish
from forkshm.backend import Advice
from forkshm.region._anonymous import anonymous_shared_memory, sparse_memory
from forkshm.region._attach import attach, own_parts, region_at, region_of
from forkshm.region._checks import map_refused
from forkshm.region._file import FileMapping
from forkshm.region._lifetime import at_fork, is_changing, leave_changes
from forkshm.region._mapped import MappedRegion, view_of
from forkshm.region._object import (
    Creation,
    Opened,
    SharedMemoryObject,
    checked_name,
    create_only,
    open_only,
    open_or_create,
    remove_on_exit,
    reopened,
)
from forkshm.region._owned_fd import OwnedFd
from forkshm.region._table import (
    Mapping,
    Mode,
    copy_on_write,
    give_back_all,
    mapping_at,
    mapping_of,
    read_only,
    read_private,
    read_write,
    region_fds,
    regions_mapped,
    round_up,
)
from forkshm.region._windows import WindowsSharedMemory
from forkshm.region.locks import Barrier, Condition, Mutex, RecursiveMutex, RWLock, Semaphore
from forkshm.region.pointers import OffsetPtr, Pointer, aligned, assign, construct, place

__all__ = [
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
]
# Used by other packages of forkshm.
__all__ += [
    "Mapping",
    "Opened",
    "OwnedFd",
    "at_fork",
    "attach",
    "checked_name",
    "give_back_all",
    "is_changing",
    "leave_changes",
    "map_refused",
    "mapping_at",
    "mapping_of",
    "own_parts",
    "region_at",
    "region_fds",
    "region_of",
    "regions_mapped",
    "reopened",
    "round_up",
    "sparse_memory",
    "view_of",
]

publish(globals())
