"""Locks in a region, for all processes that map it.

A killed holder never blocks other processes forever. Each lock starts with a header that identifies it
(``_placed.py``). The locks are built on robust mutexes of the C library and on futexes of the kernel.
"""

from __future__ import annotations

from forkshm._help import publish
from forkshm.region.locks._barrier import Barrier
from forkshm.region.locks._condition import Condition, waiting
from forkshm.region.locks._mutex import Mutex, RecursiveMutex
from forkshm.region.locks._placed import HEADER, LINE, SLICE, Placed, give_back, mutex_made, take
from forkshm.region.locks._rwlock import RWLock
from forkshm.region.locks._semaphore import Semaphore

__all__ = ["Barrier", "Condition", "Mutex", "RWLock", "RecursiveMutex", "Semaphore"]
# Used by `forkshm.sync`, which builds multiprocessing's locks on these.
__all__ += ["HEADER", "LINE", "SLICE", "Placed", "give_back", "mutex_made", "take", "waiting"]

publish(globals())
