"""Condition: that of `forkshm.region`, over a lock with the interface of `multiprocessing`."""

from __future__ import annotations

import functools
import multiprocessing.synchronize
import operator
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _multiprocess
from forkshm.region import Condition as RegionCondition
from forkshm.region.locks import waiting
from forkshm.sync._lock import Lock, RLock
from forkshm.sync._slab import allocate

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.region import MappedRegion

__all__ = ("Condition",)

_theirs: Any = _multiprocess.synchronize


class _Guard:
    """A lock, with the interface that a condition of `forkshm.region` needs."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock
        self.core = lock._core if isinstance(lock, (Lock, RLock)) else None

    def _is_mine(self) -> bool:
        return bool(self.lock._semlock._is_mine())

    def _not_mine(self, what: str) -> Exception:
        return AssertionError(
            f"cannot {what} this condition: this thread does not hold its lock, {self.lock!r}; must acquire() the "
            "condition first"
        )

    def _count(self) -> int:
        return int(self.lock._semlock._count())

    def _release_all(self) -> None:
        if self.core is not None:
            self.core.release_all()
            return
        for _ in range(self._count()):
            self.lock.release()

    def _acquire_again(self, count: int) -> None:
        if self.core is not None:
            self.core.acquire_again(count)
            return
        for _ in range(count - (self._count() if self._is_mine() else 0)):
            self.lock.acquire()


class _Number:
    """A stand-in for a semaphore of the standard library's condition; only its value is read."""

    def __init__(self, value: Callable[[], int]) -> None:
        self.get_value = value


class Condition(_interrupts.Entered, multiprocessing.synchronize.Condition, _theirs.Condition):  # type: ignore[misc]
    """A `multiprocessing.Condition` in shared memory, which can be passed wherever a region can.

    `notify` never waits for a waiter, so a killed waiter blocks no other process. Another waiter takes a notification
    that had gone to the killed one. When a process is killed while it holds the lock, the next one gets it, as with
    `Lock`.

    Args:
        lock: A `Lock` or `RLock`; by default a new `RLock`.
        ctx: Ignored; for compatibility.

    Raises:
        RegionCreateError: The kernel refused memory for it.

    Fork and threads:
        Safe to use from any thread and process. Wait with a timeout, or in a loop with one, if the notifying process
        may die.

    Example:
        >>> import forkshm
        >>> condition = forkshm.Condition()
        >>> with condition:
        ...     condition.notify_all()
        ...     condition.wait(timeout=0.01)
        False

    See Also:
        `multiprocessing.Condition`; `forkshm.region.Condition`.
    """

    def __init__(self, lock: Any = None, *, ctx: Any = None) -> None:
        lock = lock if lock is not None else RLock()
        region, offset = allocate(RegionCondition.SIZE)
        self._adopt(lock, RegionCondition(region, offset, _Guard(lock)))  # type: ignore[arg-type]

    def _adopt(self, lock: Any, inner: RegionCondition) -> None:
        self._lock = lock
        self._inner = inner
        self.acquire = lock.acquire  # type: ignore[method-assign]
        self.release = lock.release  # type: ignore[method-assign]
        # The standard library's tests, and other programs, look at these attributes.
        self._sleeping_count = _Number(functools.partial(waiting, inner))
        self._woken_count = self._wait_semaphore = _Number(int)

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self._inner._region, self._inner._offset, self._lock)

    # `Entered` needs a C function.
    __exit__: Any = property(operator.attrgetter("_lock.__exit__"))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}({self._lock!r}, {waiting(self._inner)})>"

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait for a notification, and acquire the lock again.

        Args:
            timeout: Seconds to wait for the notification; None waits forever.

        Returns:
            True if there was a notification, False after *timeout*.

        Raises:
            AssertionError: This thread does not hold the lock.
        """
        return self._inner.wait(None if timeout is None else max(timeout, 0.0))

    def notify(self, n: int = 1) -> None:
        """Wake *n* waiters, or all if there are fewer.

        Raises:
            AssertionError: This thread does not hold the lock.
        """
        self._inner.notify(max(n, 0))

    def notify_all(self) -> None:
        """Wake all waiters.

        Raises:
            AssertionError: This thread does not hold the lock.
        """
        self._inner.notify_all()

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        """Wait until *predicate*, called with the lock held, is true.

        Args:
            predicate: Called without arguments, at once and after each notification.
            timeout: Seconds in total; None waits forever.

        Returns:
            The last result of *predicate*.

        Raises:
            AssertionError: This thread does not hold the lock.
        """
        last: list[Any] = []

        def ask() -> Any:
            last[:] = (predicate(),)
            return last[0]

        if not ask():
            self._inner.wait_for(ask, None if timeout is None else max(timeout, 0.0))
        return last[0]


def _rebuild(kind: Any, region: MappedRegion, offset: int, lock: Any) -> Any:
    made: Any = kind.__new__(kind)
    guard: Any = _Guard(lock)
    made._adopt(lock, RegionCondition.attach(region, offset, guard))
    return made
