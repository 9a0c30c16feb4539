"""Semaphore and BoundedSemaphore.

The header has words that only the holder of a bare robust mutex behind them writes:

    value      free permits, while permits are not counted per process
    taken      permits held by processes: the sum of the entries, cached for speed
    initial    permits at the beginning
    most       the maximum number of permits
    sequence   changes with each release; waiters sleep on it
    untracked  whether `value` counts instead of the entries
    waiting    waiters; killed ones are counted until another waiter gives up
    entries    number of entries

Behind the mutex is an entry for each process that holds permits: its token, and their number.

A permit that a process has acquired and not released belongs to that process, and comes back when it dies. But a
semaphore may also be used as a signal, where one process acquires and another releases: then permits have no owner. The
first release by a process that holds none shows this use. From then on permits are counted as a whole, until all are
back.
"""

from __future__ import annotations

import errno
import math
import multiprocessing.synchronize
import operator
import time
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from forkshm import _multiprocess
from forkshm._interrupts import promptly
from forkshm.backend import locks as _locks
from forkshm.errors import SyncError
from forkshm.region.locks import HEADER, LINE, SLICE, Placed, give_back, mutex_made
from forkshm.region.locks import take as take_mutex
from forkshm.sync._slab import allocate
from forkshm.sync._word import deadline_of, has_died, token, warn_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.region import MappedRegion

__all__ = ("BoundedSemaphore", "Semaphore")

_T = TypeVar("_T")
_theirs: Any = _multiprocess.synchronize

_VALUE, _TAKEN, _INITIAL, _MOST, _SEQUENCE, _UNTRACKED, _WAITING, _ENTRIES = range(2, 10)
_WORD = 4
_MASK = 0xFFFFFFFF
# An interrupted release is tried again this often.
_ATTEMPTS = range(100)
_ENTRY = 16
# ``SEM_VALUE_MAX`` of Linux.
_MOST_PERMITS = 2**31 - 1
# Number of processes that can hold permits at a time and be tracked.
_LEAST_ENTRIES, _MOST_ENTRIES = 6, 1000


class _Permits(Placed):
    """The permits in shared memory."""

    _KIND: ClassVar[int] = 16

    def __init__(self, region: MappedRegion, offset: int, initial: int, most: int, entries: int) -> None:
        words = self._construct(region, offset, self.size_for(entries))
        words[_INITIAL], words[_MOST], words[_ENTRIES] = initial, most, entries
        self._ready(entries)
        mutex_made(self._address + HEADER, "Semaphore")
        self._complete(words)

    @classmethod
    def attach(cls, region: MappedRegion, offset: int) -> _Permits:
        """Return the existing permits at *offset*."""
        found, words = cls._find(region, offset, HEADER)
        entries = words[_ENTRIES]
        found._place(region, offset, cls.size_for(entries))
        found._ready(entries)
        return found

    @staticmethod
    def size_for(entries: int) -> int:
        """Return the bytes needed for permits with *entries* entries."""
        return HEADER + LINE + entries * _ENTRY

    def _ready(self, entries: int) -> None:
        start = self._offset + HEADER + LINE
        self._by_process = self._region.buf[start : start + entries * _ENTRY].cast("Q")
        self._guard = self._address + HEADER

    def guarded(self, action: Callable[[memoryview], _T]) -> _T:
        """Return the result of *action*, called under the mutex on consistent words."""
        words, guard = self._live(), self._guard
        try:
            code = take_mutex(guard, math.inf)
            if code == errno.EOWNERDEAD:
                self._repair(words)
                code = _locks.mutex_consistent(guard)
            if code != 0:
                raise SyncError(f"cannot use {self!r}: the C library refused (errno {code})")
            return action(words)
        except BaseException:
            if give_back(guard):
                self._repair(words)
            raise
        finally:
            _locks.mutex_unlock(guard)

    def _repair(self, words: memoryview) -> None:
        # An entry is changed by one store, and so is the value; only the cached sum has to be recomputed.
        words[_TAKEN] = sum(self._by_process[1::2])

    def available(self, words: memoryview) -> int:
        """Return the number of free permits."""
        return int(words[_VALUE] if words[_UNTRACKED] else words[_INITIAL] - words[_TAKEN])

    def _entry(self, me: int) -> int:
        """Return the position of this process's count, or -1."""
        entries = self._by_process
        for position in range(0, len(entries), 2):
            if entries[position] == me and entries[position + 1]:
                return position + 1
        return -1

    def _new_entry(self, me: int) -> int:
        entries = self._by_process
        for position in range(0, len(entries), 2):
            if entries[position + 1] == 0:
                entries[position] = me
                return position + 1
        return -1

    def take(self, words: memoryview, me: int, answer: list[bool]) -> bool:
        """Take a permit for this process if one is free; return whether it did. Needs the guard."""
        if self.available(words) <= 0:
            return False
        if not words[_UNTRACKED]:
            place = self._entry(me)
            if place < 0:
                place = self._new_entry(me)
            if place >= 0:
                # No call in between: an interrupted call gives back exactly the recorded permits.
                self._by_process[place] += 1
                words[_TAKEN] += 1
                answer[:] = (True,)
                return True
            self._untrack(words)
        words[_VALUE] -= 1
        answer[:] = (True,)
        return True

    def _untrack(self, words: memoryview) -> None:
        words[_VALUE] = words[_INITIAL] - words[_TAKEN]
        words[_UNTRACKED] = 1

    def give(self, words: memoryview, me: int, done: list[bool]) -> int:
        """Release a permit, or raise; return how many waiters may have to be woken. Needs the guard.

        *done* gets an item together with the change, so that an interrupted caller knows of it.
        """
        if self.available(words) >= words[_MOST]:
            raise ValueError("semaphore or lock released too many times")
        waiters = min(int(words[_WAITING]), 1)
        place = -1 if words[_UNTRACKED] else self._entry(me)
        if place < 0 and not words[_UNTRACKED]:
            self._untrack(words)
        # No call may come between these.
        words[_SEQUENCE] = (words[_SEQUENCE] + 1) & _MASK
        if place >= 0:
            self._by_process[place] -= 1
            words[_TAKEN] -= 1
        else:
            words[_VALUE] += 1
        done[:] = (True,)
        if words[_UNTRACKED] and words[_VALUE] == words[_INITIAL] > 0:
            # All permits are back, so they can be tracked per process again.
            for position in range(1, len(self._by_process), 2):
                self._by_process[position] = 0
            words[_TAKEN] = 0
            words[_UNTRACKED] = 0
        return waiters

    def wake(self, n: int) -> None:
        """Wake up to *n* waiters."""
        if n:
            _locks.futex_wake(self._address + _SEQUENCE * _WORD, n)

    def sleep(self, seen: int, seconds: float) -> bool:
        """Sleep until the next release; return True if there was none in *seconds*."""
        return _locks.futex_wait(self._address + _SEQUENCE * _WORD, seen, seconds) == errno.ETIMEDOUT

    def bring_back(self, words: memoryview) -> list[tuple[int, int]]:
        """Take back the permits of dead processes; return their tokens and counts. Needs the guard."""
        if words[_UNTRACKED] or words[_TAKEN] == 0:
            return []
        found, entries = [], self._by_process
        for position in range(0, len(entries), 2):
            count = entries[position + 1]
            if count and has_died(entries[position]):
                found.append((entries[position], count))
                entries[position + 1] = 0
                words[_TAKEN] -= count
        if found:
            words[_SEQUENCE] = (words[_SEQUENCE] + 1) & _MASK
        return found


class _Counting:
    """The common base of both semaphores."""

    _permits: _Permits
    kind = 1
    name = None

    def _make(self, value: int, most: int) -> None:
        value = operator.index(value)
        if not 0 <= value <= _MOST_PERMITS:
            raise ValueError(f"value must be between 0 and {_MOST_PERMITS:,}, got {value}")
        entries = min(max(value, _LEAST_ENTRIES), _MOST_ENTRIES)
        region, offset = allocate(_Permits.size_for(entries))
        self._permits = _Permits(region, offset, value, most, entries)

    def __reduce__(self) -> Any:
        extra = {name: value for name, value in vars(self).items() if name != "_permits"} or None
        return _rebuild, (type(self), self._permits._region, self._permits._offset, extra)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take a permit, waiting until one is free; return whether that succeeded.

        Args:
            block: Whether to wait at all.
            timeout: Seconds to wait; None waits forever.

        Returns:
            True if a permit was taken.
        """
        answer: list[bool] = []
        try:
            return self._acquire(deadline_of(block, timeout), answer)
        except BaseException:
            if answer:
                self.release()
            raise

    def _acquire(self, deadline: float, answer: list[bool]) -> bool:
        permits, me = self._permits, token()
        if permits.guarded(lambda words: permits.take(words, me, answer)):
            return True
        if not deadline:
            return self._after_deaths(me, answer)
        waiting = False

        def attempt(words: memoryview) -> int:
            nonlocal waiting
            if permits.take(words, me, answer):
                if waiting:
                    words[_WAITING] = max(words[_WAITING] - 1, 0)
                return -1
            if not waiting:
                words[_WAITING] += 1
                waiting = True
            return int(words[_SEQUENCE])

        try:
            while True:
                if (seen := permits.guarded(attempt)) < 0:
                    break
                left = deadline - time.perf_counter()
                if left <= 0:
                    permits.guarded(_waits_no_more)
                    return False
                if not permits.sleep(seen, min(left, SLICE)) or not self._after_deaths(me, answer):
                    continue
                permits.guarded(_waits_no_more)
                return True
        except BaseException:
            if waiting and not answer:
                permits.guarded(_waits_no_more)
                permits.wake(1)  # pass on a wakeup that this thread may have consumed
            raise
        return True

    def _after_deaths(self, me: int, answer: list[bool]) -> bool:
        """Take a permit that a dead process held; return whether there was one."""
        permits = self._permits
        back: list[tuple[int, int]] = []

        def attempt(words: memoryview) -> bool:
            back[:] = permits.bring_back(words)
            return bool(back) and permits.take(words, me, answer)

        taken = permits.guarded(attempt)
        for owner, count in back:
            permits.wake(count)
            warn_of(owner, f"{count} of the permits of a {type(self).__name__}", "they are back")
        return taken

    @promptly
    def release(self) -> None:
        """Release a permit.

        Raises:
            ValueError: The semaphore already has its maximum number of permits.
        """
        permits = self._permits
        done: list[bool] = []

        def attempt(words: memoryview) -> int:
            return permits.give(words, token(), done)

        try:
            permits.wake(permits.guarded(attempt))
        except ValueError:
            raise
        except BaseException:
            # The release takes effect whatever a signal handler raises.
            for _ in _ATTEMPTS:
                if done:
                    break
                try:
                    permits.guarded(attempt)
                except BaseException:  # noqa: S112 - the handler has raised again
                    continue
            permits.wake(1)
            raise

    def __enter__(self) -> bool:
        return self.acquire()

    @promptly
    def __exit__(self, *_: object) -> None:
        self.release()

    def get_value(self) -> int:
        """Return the number of free permits."""
        return self._permits.guarded(self._permits.available)

    # -- the interface of ``semaphore._semlock`` --------------------------------------------

    @property
    def _semlock(self) -> Any:
        return self

    @property
    def handle(self) -> int:
        """The address of the semaphore in this process."""
        return self._permits._address

    @property
    def maxvalue(self) -> int:
        """The maximum number of permits."""
        return int(self._permits._live()[_MOST])

    def locked(self) -> bool:
        """Return whether no permit is free."""
        return self.get_value() == 0

    def _get_value(self) -> int:
        return self.get_value()

    def _is_zero(self) -> bool:
        return self.get_value() == 0

    def _count(self) -> int:
        permits, me = self._permits, token()
        place = permits.guarded(lambda words: -1 if words[_UNTRACKED] else permits._entry(me))
        return int(permits._by_process[place]) if place >= 0 else 0

    def _is_mine(self) -> bool:
        return self._count() > 0


def _waits_no_more(words: memoryview) -> None:
    words[_WAITING] = max(words[_WAITING] - 1, 0)


def _rebuild(kind: Any, region: MappedRegion, offset: int, extra: dict[str, Any] | None) -> Any:
    made: Any = kind.__new__(kind)
    made._permits = _Permits.attach(region, offset)
    if extra:
        vars(made).update(extra)
    return made


class Semaphore(_Counting, multiprocessing.synchronize.Semaphore, _theirs.Semaphore):  # type: ignore[misc]
    """A `multiprocessing.Semaphore` in shared memory. It can be passed wherever a region can, and survives its holders.

    When a process is killed while it holds permits, waiters get them, with a `forkshm.ForkshmWarning` that names the
    dead process. This applies while each permit is released by the process that acquired it. In a semaphore that is
    used as a signal (one process acquires, another releases), permits have no owner, and none comes back by itself.

    Args:
        value: Initial number of permits.
        ctx: Ignored; for compatibility.

    Raises:
        ValueError: *value* is negative, or more than 2**31 - 1.
        RegionCreateError: The kernel refused memory for it.

    Fork and threads:
        Safe to use from any thread and process.

    Example:
        >>> import forkshm
        >>> semaphore = forkshm.Semaphore(2)
        >>> with semaphore:
        ...     semaphore.get_value()
        1

    See Also:
        `multiprocessing.Semaphore`; `forkshm.region.Semaphore`, which is ten times as fast and whose permits have no
        owner.
    """

    def __init__(self, value: int = 1, *, ctx: Any = None) -> None:
        self._make(value, _MOST_PERMITS)

    def __repr__(self) -> str:
        try:
            value: object = self.get_value()
        except Exception:
            value = "unknown"
        return f"<{type(self).__name__}(value={value})>"


class BoundedSemaphore(Semaphore, multiprocessing.synchronize.BoundedSemaphore, _theirs.BoundedSemaphore):  # type: ignore[misc]
    """A `Semaphore` that never has more permits than its initial *value*.

    Args:
        value: Initial number of permits.
        ctx: Ignored; for compatibility.

    Raises:
        ValueError: As for `Semaphore`. `release` raises it when all permits are already free.

    Fork and threads:
        As for `Semaphore`.

    Example:
        >>> import forkshm
        >>> forkshm.BoundedSemaphore(3)
        <BoundedSemaphore(value=3, maxvalue=3)>

    See Also:
        `multiprocessing.BoundedSemaphore`.
    """

    def __init__(self, value: int = 1, *, ctx: Any = None) -> None:
        self._make(value, value)

    def __repr__(self) -> str:
        try:
            value: object = self.get_value()
        except Exception:
            value = "unknown"
        return f"<{type(self).__name__}(value={value}, maxvalue={self.maxvalue})>"
