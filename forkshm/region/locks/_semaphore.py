"""Semaphore: a number of permits."""

from __future__ import annotations

import functools
import operator
import time
from typing import TYPE_CHECKING, Any, ClassVar

from forkshm._interrupts import promptly
from forkshm.backend import locks as _locks
from forkshm.errors import SyncError
from forkshm.region.locks._placed import HEADER, LINE, SLICE, Placed, checked_timeout

if TYPE_CHECKING:
    from typing import Self

    from forkshm.region._mapped import MappedRegion

__all__ = ("Semaphore",)


class Semaphore(Placed):
    """A semaphore in a region: `acquire` takes a permit or waits for one, and `release` adds one.

    A permit has no owner. The permits of a killed process are lost, because its holdings are not recorded. The
    semaphore stays usable, and any thread can `release` a replacement. If that is not enough, use a `Mutex`, which
    records its owner.

    It is a ``sem_t`` of the C library, which a killed or stopped process never leaves locked.

    Args:
        region: A region mapped ``read_write``.
        offset: Offset in the region; see `Mutex`.
        value: Initial number of permits.

    Raises:
        ValueError: *value* is negative or more than 2**31 - 1, or as for `Mutex`. Other errors are as for `Mutex`.

    Fork and threads:
        Safe to use from any thread. Any process or thread may release what another one has acquired.

    Example:
        >>> from forkshm.region import Semaphore, anonymous_shared_memory
        >>> semaphore = Semaphore(anonymous_shared_memory(Semaphore.SIZE), value=2)
        >>> with semaphore:
        ...     semaphore.value
        1

    See Also:
        ``interprocess_semaphore`` of Boost.Interprocess; sem_overview(7).
    """

    SIZE: ClassVar[int] = HEADER + LINE
    _KIND: ClassVar[int] = 4

    def __init__(self, region: MappedRegion, offset: int = 0, value: int = 1) -> None:
        value = operator.index(value)
        if not 0 <= value < 1 << 31:
            raise ValueError(f"value must be between 0 and 2**31 - 1, got {value}")
        words = self._construct(region, offset, self.SIZE)
        code = _locks.sem_init(self._address + HEADER, value)
        if code != 0:
            raise SyncError(f"cannot construct {self!r}: the C library refused (errno {code})")
        self._complete(words)

    @classmethod
    def attach(cls, region: MappedRegion, offset: int = 0) -> Self:
        """Return the semaphore that this or another process constructed at *offset*.

        Raises:
            NotConstructedError: There is no complete semaphore at *offset*.
        """
        return cls._find(region, offset, cls.SIZE)[0]

    @property
    def value(self) -> int:
        """Number of free permits."""
        self._live()
        return _locks.sem_value(self._address + HEADER)

    def acquire(self, timeout: float | None = None) -> bool:
        """Take a permit, or wait for one.

        Args:
            timeout: Seconds; None waits forever, 0 does not wait.

        Returns:
            True if a permit was taken, False if *timeout* has passed.

        Raises:
            ValueError: *timeout* is negative.
        """
        answer: list[int] = []
        try:
            return self._take(answer, timeout)
        except BaseException:
            if 0 in answer:
                _locks.sem_post(self._address + HEADER)
            raise

    def __enter__(self) -> Self:
        answer: list[int] = []
        try:
            self._take(answer, None)
        except BaseException:
            if 0 in answer:
                _locks.sem_post(self._address + HEADER)
            raise
        return self

    @promptly
    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self, answer: list[int], timeout: float | None) -> bool:
        # Keeps the memory mapped if another thread detaches this object during the wait.
        words = self._live()
        seconds = checked_timeout(timeout)
        where = self._address + HEADER
        answer[:] = _locks.sem_try(where)
        if answer[0] == 0 or seconds == 0:
            return answer[0] == 0
        deadline = time.perf_counter() + seconds
        while words:
            answer[:] = _locks.sem_wait(where, max(min(SLICE, deadline - time.perf_counter()), 0.0))
            if answer[0] == 0:
                return True
            if time.perf_counter() >= deadline:
                break
        return False

    def _place(self, region: MappedRegion, offset: int, size: int) -> memoryview:
        words = super()._place(region, offset, size)
        self._post = functools.partial(_locks.sem_post, self._address + HEADER)
        return words

    # Gives a permit: a look-up, and not a call, after which a signal handler could run.
    _posted: Any = property(operator.methodcaller("_post"))

    @promptly
    def release(self, n: int = 1) -> None:
        """Add *n* permits, one after the other, and wake up to *n* waiters.

        Raises:
            ValueError: *n* is less than 1, or there would be more than 2**31 - 1 permits.
        """
        # No call, and no jump back where a single permit is given, so a signal handler that raises leaves it given.
        if self._words is None or n < 1:
            self._live()
            raise ValueError(f"n must be at least 1, got {n}")
        while self._posted == 0:
            if n == 1:
                return
            n -= 1
        raise ValueError(f"cannot release {self!r}: it has {self.value:,} permits, the most there can be")
