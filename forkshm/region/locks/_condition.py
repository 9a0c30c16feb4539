"""Condition: wait until another thread or process notifies."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, ClassVar

from forkshm._interrupts import promptly
from forkshm.backend import locks as _locks
from forkshm.errors import NotRecoverableError
from forkshm.region.locks._placed import SLICE, Placed, checked_timeout

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from forkshm.region._mapped import MappedRegion
    from forkshm.region.locks._mutex import Mutex

__all__ = ("Condition",)

_SEQUENCE, _WAITING, _SIGNALS, _ALL = 2, 3, 4, 5
_WORD = 4
_MASK = 0xFFFFFFFF


class Condition(Placed):
    """A condition variable in a region: wait until another process or thread notifies.

    It does not use ``pthread_cond_t``, because in glibc a killed waiter can block notifying threads. It consists of a
    futex and four words, which only the holder of the mutex writes:

    - *sequence*: number of notifications; waiters sleep on this word
    - *waiting*: number of waiters; killed ones count until the next `notify_all`
    - *signals*: number of waiters that were notified and have not returned yet
    - *all*: sequence at the last `notify_all`, which releases all earlier waiters

    A killed waiter does no harm: another waiter receives its notification.

    Args:
        region: A region mapped ``read_write``.
        offset: Offset in the region; see `Mutex`.
        mutex: The `Mutex` or `RecursiveMutex` that guards the awaited state. All processes must use the same mutex with
            this condition.

    Raises:
        ValueError: As for `Mutex`, as are other errors.

    Fork and threads:
        As for `Mutex`. If the notifying process may die, wait with a timeout.

    Example:
        >>> from forkshm.region import Condition, Mutex, anonymous_shared_memory
        >>> region = anonymous_shared_memory(Mutex.SIZE + Condition.SIZE)
        >>> condition = Condition(region, Mutex.SIZE, Mutex(region))
        >>> with condition:
        ...     condition.notify_all()
        ...     condition.wait(timeout=0.01)
        False

    See Also:
        ``interprocess_condition`` of Boost.Interprocess; `threading.Condition`; futex(2).
    """

    _KIND: ClassVar[int] = 3

    _mutex: Mutex

    def __init__(self, region: MappedRegion, offset: int, mutex: Mutex) -> None:
        words = self._construct(region, offset, self.SIZE)
        self._mutex = mutex
        self._complete(words)

    @classmethod
    def attach(cls, region: MappedRegion, offset: int, mutex: Mutex) -> Self:
        """Return the condition that this or another process constructed at *offset*.

        Args:
            region: As for the constructor.
            offset: As for the constructor.
            mutex: The attached mutex, the same as in the other processes.

        Raises:
            NotConstructedError: There is no complete condition at *offset*.
        """
        found, _ = cls._find(region, offset, cls.SIZE)
        found._mutex = mutex
        return found

    def _arguments(self) -> tuple[Any, ...]:
        return (*super()._arguments(), self._mutex)

    @property
    def mutex(self) -> Mutex:
        """The mutex, as given."""
        return self._mutex

    def acquire(self, timeout: float | None = None) -> bool:
        """Acquire the mutex."""
        return self._mutex.acquire(timeout)

    @promptly
    def release(self) -> None:
        """Release the mutex."""
        self._mutex.release()

    def __enter__(self) -> Self:
        self._mutex.__enter__()
        return self

    @promptly
    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._mutex.__exit__(kind, error, traceback)

    def wait(self, timeout: float | None = None) -> bool:
        """Release the mutex, wait for a notification, and acquire the mutex again.

        As with every condition, check the awaited state again afterwards: another waiter may have changed it, and after
        a waiter was killed, another one may return without a notification. `wait_for` does this check.

        If a holder dies during the wait, ``mutex.owner_died`` is true afterwards.

        Args:
            timeout: Seconds to wait for the notification; None waits forever.

        Returns:
            True after a notification, False if *timeout* has passed.

        Raises:
            NotOwnerError: This thread does not hold the mutex.
            NotRecoverableError: See `Mutex`; the mutex is then not held.
            ValueError: *timeout* is negative.
        """
        words = self._live()
        deadline = time.perf_counter() + checked_timeout(timeout)
        if not self._mutex._is_mine():
            raise self._mutex._not_mine("wait with")
        first = seen = words[_SEQUENCE]
        words[_WAITING] += 1
        count = self._mutex._count()
        try:
            while True:
                try:
                    self._mutex._release_all()
                    self._sleep(words, seen, deadline)
                finally:
                    self._acquire_again(count)
                if self._may_go(words, first):
                    return True
                if time.perf_counter() >= deadline:
                    self._withdraw(words, first)
                    return False
                seen = words[_SEQUENCE]
        except NotRecoverableError:
            raise
        except BaseException:
            # To acquire the mutex may itself have been interrupted.
            self._acquire_again(count)
            self._withdraw(words, first)
            raise

    @promptly
    def _acquire_again(self, count: int) -> None:
        try:
            self._mutex._acquire_again(count)
        except NotRecoverableError:
            raise
        except BaseException:
            # A signal handler has raised. If it raises again, the mutex may be held by a process that never releases
            # it, and a user wants to end this.
            self._mutex._acquire_again(count)
            raise

    def _sleep(self, words: memoryview, seen: int, deadline: float) -> None:
        where = self._address + _SEQUENCE * _WORD
        while words[_SEQUENCE] == seen:
            left = deadline - time.perf_counter()
            if left <= 0:
                return
            _locks.futex_wait(where, seen, min(left, SLICE))

    def _may_go(self, words: memoryview, first: int) -> bool:
        if _precedes(first, words[_ALL]):
            return True
        if words[_SIGNALS] == 0 or not _precedes(first, words[_SEQUENCE]):
            return False
        words[_SIGNALS] -= 1
        words[_WAITING] -= 1
        return True

    def _withdraw(self, words: memoryview, first: int) -> None:
        if not _precedes(first, words[_ALL]):
            words[_WAITING] = max(words[_WAITING] - 1, 0)
            words[_SIGNALS] = min(words[_SIGNALS], words[_WAITING])

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait until *predicate*, called with the mutex held, is true.

        Args:
            predicate: Called without arguments, at once and after each notification.
            timeout: Total time in seconds; None waits forever.

        Returns:
            The last result of *predicate* as a bool; False only after *timeout*.

        Raises:
            NotOwnerError: This thread does not hold the mutex.
            ValueError: *timeout* is negative.
        """
        deadline = time.perf_counter() + checked_timeout(timeout)
        if not self._mutex._is_mine():
            raise self._mutex._not_mine("wait with")
        while not predicate():
            if not self.wait(max(deadline - time.perf_counter(), 0.0)):
                return bool(predicate())
        return True

    def notify(self, n: int = 1) -> None:
        """Wake up to *n* waiters.

        They continue when this thread releases the mutex.

        Raises:
            NotOwnerError: This thread does not hold the mutex.
            ValueError: *n* is negative.
        """
        words = self._live()
        if n < 0:
            raise ValueError(f"n must be 0 or more, got {n}")
        if not self._mutex._is_mine():
            raise self._mutex._not_mine("notify with")
        left = words[_WAITING] - words[_SIGNALS]
        if n == 0 or left == 0:
            return
        sequence = (words[_SEQUENCE] + 1) & _MASK
        if n < left:
            words[_SIGNALS] += n
            words[_SEQUENCE] = sequence
        else:
            # Write the sequence first: if this thread dies in between, no later waiter is released by mistake.
            words[_SEQUENCE] = sequence
            words[_ALL] = sequence
            words[_SIGNALS] = words[_WAITING] = 0
        _locks.futex_wake(self._address + _SEQUENCE * _WORD, n)

    def notify_all(self) -> None:
        """Wake all waiters.

        Raises:
            NotOwnerError: This thread does not hold the mutex.
        """
        self.notify(_MASK)


def waiting(condition: Condition) -> int:
    """Return the number of waiters."""
    return int(condition._live()[_WAITING])


def _precedes(first: int, second: int) -> bool:
    """Return whether *first* precedes *second*, for sequence numbers that wrap at 2**32."""
    return 0 < (second - first) & _MASK < 1 << 31
