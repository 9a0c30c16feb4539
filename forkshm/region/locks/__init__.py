"""Locks that live in a region: whoever maps it, from whichever process, can use them.

None of them blocks the others for ever when its holder is killed. They all start with a header that
says what they are (``_placed.py``), and are built on two things of the platform: robust mutexes of the C
library, and futexes of the kernel.
"""

from __future__ import annotations

from forkshm._public import publish
from forkshm.region.locks._barrier import Barrier
from forkshm.region.locks._condition import Condition, waiting
from forkshm.region.locks._mutex import Mutex, RecursiveMutex
from forkshm.region.locks._placed import HEADER, LINE, SLICE, Placed, give_back, mutex_made, take
from forkshm.region.locks._rwlock import RWLock
from forkshm.region.locks._semaphore import Semaphore

__all__ = ["Barrier", "Condition", "Mutex", "RWLock", "RecursiveMutex", "Semaphore"]
# For multiprocessing's locks, which are built on these.
__all__ += ["HEADER", "LINE", "SLICE", "Placed", "give_back", "mutex_made", "take", "waiting"]

publish(globals())
