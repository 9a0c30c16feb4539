"""Between layers 1 and 2. The locks and values of ``multiprocessing``, in shared memory of ours.

They have the interface and the types of ``multiprocessing``'s, and two things more: they cross wherever a region does,
to processes that started earlier as well, and a process that is killed while it holds one, or waits for one, blocks
nobody.

    _word          one word of shared memory that names the process that has the lock
    _slab          where small objects live: thousands in one memory object, so that they cost no fds
    _lock          Lock, RLock
    _semaphore     Semaphore, BoundedSemaphore
    _condition     Condition, over `forkshm.region.Condition`
    _event         Event
    _barrier       Barrier, over `forkshm.region.Barrier`
    _heap          BufferWrapper
    _sharedctypes  Value, Array, RawValue, RawArray
    _shared_memory SharedMemory, ShareableList
"""

from forkshm._public import publish
from forkshm.sync._barrier import Barrier
from forkshm.sync._condition import Condition
from forkshm.sync._event import Event
from forkshm.sync._lock import Lock, RLock
from forkshm.sync._semaphore import BoundedSemaphore, Semaphore
from forkshm.sync.heap import BufferWrapper

__all__ = (
    "Barrier",
    "BoundedSemaphore",
    "BufferWrapper",
    "Condition",
    "Event",
    "Lock",
    "RLock",
    "Semaphore",
)

publish(globals())
