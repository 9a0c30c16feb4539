"""Mutex and RecursiveMutex: mutual exclusion that survives the death of a holder.

The mutex is a robust, process-shared mutex of the C library. The kernel has a list of the mutexes that a thread holds.
When the thread ends, for whatever reason, the next thread that acquires the mutex is informed. forkshm adds a header of
three words that only the holder writes:

    owner       the holder's thread id, to detect misuse and to undo an interrupted call
    count       how often the holder has acquired it
    state       sound, a holder died, or given up
"""

from __future__ import annotations

import errno
import functools
import operator
import os
from threading import get_native_id
from typing import TYPE_CHECKING, Any, ClassVar

from forkshm._interrupts import here, promptly
from forkshm.backend import kernel
from forkshm.backend import locks as _locks
from forkshm.errors import DeadlockError, NotOwnerError, NotRecoverableError, SyncError
from forkshm.region.locks._placed import HEADER, LINE, Placed, checked_timeout, give_back, held, mutex_made, take

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from forkshm.region._mapped import MappedRegion

__all__ = ("Mutex", "RecursiveMutex")

_OWNER, _COUNT, _STATE = 2, 3, 4
_SOUND, _DIED, _GIVEN_UP = 0, 1, 2

_trylock, _unlock = _locks.mutex_trylock, _locks.mutex_unlock

# Number of attempts before the thread sleeps, if the holder may run on another core meanwhile.
_LOOKS = range(12 if kernel.usable_cores() > 1 else 0)


class Mutex(Placed):
    """A robust mutex in a region, for the threads of all processes that map the region.

    When a holder dies, even by SIGKILL, the next thread acquires the mutex and finds `owner_died` true. The guarded
    data may then be half changed. Repair the data and call `make_consistent`, or pass *repair*, after which the mutex
    is marked consistent. If the mutex is released without either, it becomes unusable: every later `acquire` raises
    `NotRecoverableError` without waiting.

    The constructor creates a new mutex and overwrites the bytes at *offset*. Call it in one process before the others
    use the mutex; the others call `attach`.

    Args:
        region: A region mapped ``read_write``. It cannot be closed while this object is alive, unless you call
            `detach`.
        offset: Offset in the region. The address must be a multiple of `ALIGNMENT`; the mutex takes `SIZE` bytes.
        repair: Called without arguments after a holder died, by the next thread that acquires the mutex, which it
            holds. If *repair* returns, the mutex is consistent. If it raises, the acquiring call raises that exception,
            and the next thread repairs.

    Raises:
        ValueError: *offset* is not aligned, or too close to the end.
        RegionAccessError: The region is not ``read_write``.
        RegionClosedError: The region was closed.
        SyncError: This process holds a lock in that range.
        UnsupportedError: This system has no robust mutexes.

    Fork and threads:
        Safe to use from any thread. The holder is a thread, not a process: a forked child does not hold the mutex and
        waits like any other process. The end of a thread counts like the death of a process. All processes must use the
        same C library, word size and PID namespace. A mutex in a file is invalid after a reboot; construct it again.

        A wait wakes every 0.1 s to let KeyboardInterrupt through, which leaves the mutex as it was before the call.

    Example:
        >>> from forkshm import anonymous_shared_memory
        >>> from forkshm.region import Mutex
        >>> region = anonymous_shared_memory(Mutex.SIZE)
        >>> mutex = Mutex(region)
        >>> with mutex:
        ...     mutex.owner_died
        False
        >>> mutex.acquire(timeout=0)
        True
        >>> mutex.release()

    See Also:
        ``interprocess_mutex`` of Boost.Interprocess; pthread_mutexattr_setrobust(3).
    """

    SIZE: ClassVar[int] = HEADER + LINE
    _KIND: ClassVar[int] = 1

    _repair: Callable[[], object] | None

    def __init__(self, region: MappedRegion, offset: int = 0, repair: Callable[[], object] | None = None) -> None:
        words = self._construct(region, offset, self.SIZE)
        mutex_made(self._address + HEADER, type(self).__name__)
        self._ready(repair)
        self._complete(words)

    @classmethod
    def attach(cls, region: MappedRegion, offset: int = 0, repair: Callable[[], object] | None = None) -> Self:
        """Return the mutex that this or another process constructed at *offset*.

        Args:
            region: As for the constructor.
            offset: As for the constructor.
            repair: As for the constructor; it applies to this object only, and other processes pass their own.

        Raises:
            NotConstructedError: There is no complete mutex of this kind at *offset*.
        """
        found, _ = cls._find(region, offset, cls.SIZE)
        found._ready(repair)
        return found

    def _ready(self, repair: Callable[[], object] | None) -> None:
        self._mutex = self._address + HEADER
        self._unlock = functools.partial(_unlock, self._mutex)
        self._repair = repair

    def _arguments(self) -> tuple[Any, ...]:
        return (*super()._arguments(), self._repair)

    @property
    def owner_died(self) -> bool:
        """Whether a holder died and `make_consistent` has not been called since."""
        return self._live()[_STATE] != _SOUND

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait until this thread holds the mutex.

        Args:
            timeout: Seconds; None waits forever, 0 does not wait.

        Returns:
            True if this thread now holds the mutex, False if *timeout* has passed.

        Raises:
            NotRecoverableError: A holder died, and the next one released the mutex without `make_consistent`.
            DeadlockError: This thread already holds the mutex. Use `RecursiveMutex`.
            ValueError: *timeout* is negative.
        """
        words = self._live()
        me = get_native_id()
        before = words[_COUNT] if words[_OWNER] == me else 0
        try:
            return self._take(words, me, timeout)
        except BaseException:
            # Also undoes a KeyboardInterrupt that came after the lock was taken and before that was recorded.
            self._undo(words, me, before)
            raise

    def __enter__(self) -> Self:
        words = self._live()
        me = get_native_id()
        before = words[_COUNT] if words[_OWNER] == me else 0
        try:
            self._take(words, me, None)
        except BaseException:
            self._undo(words, me, before)
            raise
        return self

    @promptly
    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        words = self._words
        # A wait that was interrupted twice may have left the block without the lock.
        if kind is None or words is None or words[_OWNER] == here.native_id:
            self.release()

    @promptly
    def release(self) -> None:
        """Release the mutex.

        Raises:
            NotOwnerError: This thread does not hold the mutex.
        """
        words = self._words
        # No call from here to the unlock, so a signal handler that raises leaves the mutex released.
        if words is None or words[_OWNER] != here.native_id:
            self._live()
            raise self._not_mine("release")
        if words[_COUNT] > 1:
            words[_COUNT] -= 1
            return
        if words[_STATE] == _DIED:
            words[_STATE] = _GIVEN_UP
        self._let_go(words)

    def make_consistent(self) -> None:
        """Mark the guarded data as repaired after a holder died; otherwise do nothing.

        Raises:
            NotOwnerError: This thread does not hold the mutex.
        """
        words = self._live()
        if words[_OWNER] != get_native_id():
            raise self._not_mine("make consistent")
        words[_STATE] = _SOUND

    def _take(self, words: memoryview, me: int, timeout: float | None) -> bool:
        code = _trylock(self._mutex)
        if code == errno.EBUSY and timeout != 0 and words[_OWNER] != me:
            # Locks are mostly held briefly. To sleep and be woken would take ten times as long.
            for _ in _LOOKS:
                code = _trylock(self._mutex)
                if code != errno.EBUSY:
                    break
        if code != 0 or timeout is not None:
            seconds = checked_timeout(timeout)
            if code == errno.EBUSY:
                # musl's trylock does not report that this thread holds it; glibc's has returned EDEADLK.
                mine = _locks.LOCK_LAYOUT >> 8 != 1 and words[_OWNER] == me
                code = errno.EDEADLK if mine else take(self._mutex, seconds)
            if code == errno.EBUSY:
                return False
            if code == errno.EDEADLK:
                self._again(words)
                return True
            if code == errno.EOWNERDEAD:
                # From here on the header keeps the state, where an interrupted call cannot lose it. It is written
                # before the mutex is marked consistent: if this thread dies in between, the next one finds the death
                # again.
                words[_STATE] |= _DIED
                _locks.mutex_consistent(self._mutex)
            elif code != 0:
                raise SyncError(f"cannot acquire {self!r}: {os.strerror(code)}")
        words[_OWNER] = me
        words[_COUNT] = 1
        held[self._mutex] = words
        if words[_STATE] != _SOUND:
            self._inherit(words)
        return True

    def _again(self, words: memoryview) -> None:
        raise DeadlockError(f"cannot acquire {self!r}: this thread already holds it. Use a RecursiveMutex for that.")

    def _inherit(self, words: memoryview) -> None:
        if words[_STATE] & _GIVEN_UP:
            raise NotRecoverableError(
                f"cannot acquire {self!r}: a process died while it held the mutex, and the next holder released it "
                "without make_consistent(), so the guarded data is in an unknown state. Construct the data and "
                "the mutex again."
            )
        if self._repair is not None:
            self._repair()
            words[_STATE] = _SOUND

    # Unlocks: a look-up, and not a call, after which a signal handler could run.
    _unlocked: Any = property(operator.methodcaller("_unlock"))

    @promptly
    def _let_go(self, words: memoryview) -> None:
        # No call between these.
        mutex = self._mutex
        if mutex in held:
            del held[mutex]
        words[_COUNT] = 0
        words[_OWNER] = 0
        if self._unlocked != 0:
            raise self._not_mine("release")

    def _undo(self, words: memoryview, me: int, before: int) -> None:
        if before:
            words[_COUNT] = before
        elif words[_OWNER] == me:
            self._let_go(words)
        elif give_back(self._mutex):
            words[_STATE] |= _DIED

    def _is_mine(self) -> bool:
        return bool(self._live()[_OWNER] == get_native_id())

    def _not_mine(self, what: str) -> NotOwnerError:
        words = self._words
        owner = words[_OWNER] if words is not None else 0
        who = f"thread {owner} does" if owner else "no thread does"
        return NotOwnerError(f"cannot {what} {self!r}: this thread ({get_native_id()}) does not hold it, {who}")

    def _count(self) -> int:
        """Return how often this thread, the holder, has acquired the mutex."""
        return int(self._live()[_COUNT])

    def _release_all(self) -> None:
        words = self._live()
        if words[_STATE] == _DIED:
            words[_STATE] = _GIVEN_UP
        self._let_go(words)

    def _acquire_again(self, count: int) -> None:
        try:
            if not self._is_mine():
                self.acquire()
        finally:
            if self._is_mine():
                self._live()[_COUNT] = count


class RecursiveMutex(Mutex):
    """A `Mutex` that its holder may acquire again; it must release it as often.

    Args:
        region: As for `Mutex`.
        offset: As for `Mutex`.
        repair: As for `Mutex`.

    Raises:
        ValueError: As for `Mutex`, as are other errors.

    Fork and threads:
        As for `Mutex`. After the death of a holder, the next thread holds the mutex once.

    Example:
        >>> from forkshm import anonymous_shared_memory
        >>> from forkshm.region import RecursiveMutex
        >>> mutex = RecursiveMutex(anonymous_shared_memory(RecursiveMutex.SIZE))
        >>> with mutex, mutex:
        ...     mutex.acquire(timeout=0)
        True
        >>> mutex.release()

    See Also:
        ``interprocess_recursive_mutex`` of Boost.Interprocess.
    """

    _KIND: ClassVar[int] = 2

    def _again(self, words: memoryview) -> None:
        words[_COUNT] += 1
