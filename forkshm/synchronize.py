"""The module ``multiprocessing.synchronize`` for forkshm; other names are those of ``multiprocess``."""

from typing import TYPE_CHECKING

from forkshm import _multiprocess
from forkshm.sync import Barrier, BoundedSemaphore, Condition, Event, Lock, RLock, Semaphore

if TYPE_CHECKING:
    from multiprocessing.synchronize import SemLock

    SEM_VALUE_MAX: int

__all__ = (
    "SEM_VALUE_MAX",
    "Barrier",
    "BoundedSemaphore",
    "Condition",
    "Event",
    "Lock",
    "RLock",
    "SemLock",
    "Semaphore",
)

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("synchronize", globals())
