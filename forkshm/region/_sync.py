"""Locks that live in a region: whoever maps it, from whichever process, can use them.

None of them blocks the others for ever when its holder is killed. They all start with a header that
says what they are (``_placed.py``), and are built on two things of the platform: robust mutexes of the C
library, and futexes of the kernel.
"""

from __future__ import annotations

from forkshm.region._barrier import Barrier
from forkshm.region._condition import Condition
from forkshm.region._mutex import Mutex, RecursiveMutex
from forkshm.region._rwlock import RWLock
from forkshm.region._semaphore import Semaphore

__all__ = ("Barrier", "Condition", "Mutex", "RWLock", "RecursiveMutex", "Semaphore")
