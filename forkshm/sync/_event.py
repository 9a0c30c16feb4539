"""Event: a flag in shared memory.

    flag      whether it is set
    sequence  changes with each `set`; waiters sleep on it

There is no lock, so none can be held by a dead process.
"""

from __future__ import annotations

import math
import multiprocessing.synchronize
import time
from typing import TYPE_CHECKING, Any, ClassVar

from forkshm import _multiprocess
from forkshm.backend import locks as _locks
from forkshm.region.locks import SLICE, Placed
from forkshm.sync._slab import allocate

if TYPE_CHECKING:
    from forkshm.region import MappedRegion

__all__ = ("Event",)

_theirs: Any = _multiprocess.synchronize
_FLAG, _SEQUENCE = 2, 3
_WORD = 4
_MASK = 0xFFFFFFFF


class _Flag(Placed):
    """The words in shared memory."""

    _KIND: ClassVar[int] = 17

    def __init__(self, region: MappedRegion, offset: int) -> None:
        self._complete(self._construct(region, offset, self.SIZE))

    @classmethod
    def attach(cls, region: MappedRegion, offset: int) -> _Flag:
        """Return the existing flag at *offset*."""
        return cls._find(region, offset, cls.SIZE)[0]

    def set(self) -> None:
        words = self._live()
        words[_FLAG] = 1
        words[_SEQUENCE] = (words[_SEQUENCE] + 1) & _MASK
        _locks.futex_wake(self._address + _SEQUENCE * _WORD, _MASK)

    def wait(self, deadline: float) -> bool:
        words = self._live()
        seen = words[_SEQUENCE]
        while not words[_FLAG] and words[_SEQUENCE] == seen:
            left = deadline - time.perf_counter()
            if left <= 0:
                return False
            _locks.futex_wait(self._address + _SEQUENCE * _WORD, seen, min(left, SLICE))
        return True


class Event(multiprocessing.synchronize.Event, _theirs.Event):  # type: ignore[misc]
    """A `multiprocessing.Event` in shared memory, which can be passed wherever a region can.

    A process that is killed while it waits for, sets or clears the event blocks no other process.

    Args:
        ctx: Ignored; for compatibility.

    Raises:
        RegionCreateError: The kernel refused memory for it.

    Fork and threads:
        Safe to use from any thread and process.

    Example:
        >>> import forkshm
        >>> event = forkshm.Event()
        >>> event.set()
        >>> event.wait(timeout=1)
        True

    See Also:
        `multiprocessing.Event`.
    """

    def __init__(self, *, ctx: Any = None) -> None:
        self._flag = _Flag(*allocate(_Flag.SIZE))

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self._flag._region, self._flag._offset)

    def is_set(self) -> bool:
        """Return whether the event is set."""
        return bool(self._flag._live()[_FLAG])

    def set(self) -> None:
        """Set the event, and wake all waiters."""
        self._flag.set()

    def clear(self) -> None:
        """Clear the event: later calls of `wait` block."""
        self._flag._live()[_FLAG] = 0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the event is set; return whether it was.

        Args:
            timeout: Seconds; None waits forever.

        Returns:
            True if the event was set; False only after *timeout*.
        """
        return self._flag.wait(math.inf if timeout is None else time.perf_counter() + timeout)

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} at {id(self):#x} {'set' if self.is_set() else 'unset'}>"


def _rebuild(kind: Any, region: MappedRegion, offset: int) -> Any:
    made: Any = kind.__new__(kind)
    made._flag = _Flag.attach(region, offset)
    return made
