"""Layer 1 of 6. Takes what the kernel offers, hands on bytes mapped in this process.

Regions are what users ask for and hold; the arena is memory that forkshm carves up
itself to carry copies. Both end when the kernel sees that nobody uses them.
"""

from forkshm.backend import Advice
from forkshm.region._anonymous import anonymous_shared_memory
from forkshm.region._file import FileMapping
from forkshm.region._mapped import MappedRegion
from forkshm.region._object import Creation, SharedMemoryObject, remove_on_exit
from forkshm.region._table import Mode
from forkshm.region._windows import WindowsSharedMemory

__all__ = (
    "Advice",
    "Creation",
    "FileMapping",
    "MappedRegion",
    "Mode",
    "SharedMemoryObject",
    "WindowsSharedMemory",
    "anonymous_shared_memory",
    "remove_on_exit",
)
