"""Between layers 1 and 2. The locks and values of ``multiprocessing``, in forkshm's shared memory.

They have the interface and the types of ``multiprocessing``'s, with two additions. They can be passed wherever a region
can, also to processes that started earlier. A process that is killed while it holds one, or waits for one, blocks no
other process.

    _word          one word of shared memory that names the process that holds the lock
    _slab          memory for small objects: thousands in one memory object, so that they need few fds
    _lock          Lock, RLock
    _semaphore     Semaphore, BoundedSemaphore
    _condition     Condition, over `forkshm.region.Condition`
    _event         Event
    _barrier       Barrier, over `forkshm.region.Barrier`
    _heap          BufferWrapper
    _sharedctypes  Value, Array, RawValue, RawArray
    _shared_memory SharedMemory, ShareableList
"""

from forkshm._help import publish
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
