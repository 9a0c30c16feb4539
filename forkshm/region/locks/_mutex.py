"""Mutex and RecursiveMutex: one at a time, whoever dies.

The mutex is the C library's: robust and shared between processes. The kernel keeps a list of the
mutexes that a thread holds, and when the thread ends, in whichever way, the next one is told. What is
ours is the header, three words that only the holder writes:

    owner       the holder's thread id; it tells misuse, and what an interrupted call has to undo
    count       how often the holder has it
    state       sound, a holder died, or given up
"""

from __future__ import annotations

import errno
import os
from threading import get_native_id
from typing import TYPE_CHECKING, Any, ClassVar

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

#: How often one looks before it sleeps, where there are others on whose cores the holder may go on.
_LOOKS = range(12 if kernel.usable_cores() > 1 else 0)


class Mutex(Placed):
    """A lock in a region, for the threads of all processes that map it.

    It is robust: when a holder dies, by whatever signal, the next one gets the lock and finds
    `owner_died` true. What the mutex guards may be half changed then. Repair it and call
    `make_consistent`, or pass *repair*, which does both. If you release it without, nobody can use it
    any more: every later `acquire` raises `NotRecoverableError`, and none of them waits.

    The constructor makes a new mutex at that place, whatever was there. Let one process do that, before
    it tells the others; they call `attach`.

    Args:
        region: A region mapped ``read_write``. It cannot be closed while this object is alive, unless
            you `detach` it.
        offset: Where in the region; the address must be a multiple of `ALIGNMENT`, and `SIZE` bytes
            are taken.
        repair: Called without arguments, with the mutex held, by whoever acquires it next after a
            holder died. When it returns, the mutex is consistent. When it raises, the acquiring call
            raises that, and the next one repairs.

    Raises:
        ValueError: *offset* is not aligned, or too near to the end.
        RegionAccessError: The region is not ``read_write``.
        RegionClosedError: The region was closed.
        SyncError: This process holds a lock at that place.
        UnsupportedError: This system has no robust mutexes.

    Fork and threads:
        Safe to use from any thread. A thread holds it, not a process: a child forked meanwhile does
        not, and waits like everybody else. A thread that ends is as dead as a process. All processes
        must use the same C library, word size and PID namespace. In a file, a mutex is worth nothing
        after a reboot: construct it anew.

        A wait looks up every 0.1 s, so that KeyboardInterrupt gets through; it leaves the mutex as it
        was before the call.

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
        """Use the one that was constructed there, in this process or another.

        Args:
            region: As for the constructor.
            offset: As for the constructor.
            repair: As for the constructor; it is this object's, and other processes have their own.

        Raises:
            NotConstructedError: There is none, or something else, or it is not complete yet.
        """
        found, _ = cls._find(region, offset, cls.SIZE)
        found._ready(repair)
        return found

    def _ready(self, repair: Callable[[], object] | None) -> None:
        self._mutex = self._address + HEADER
        self._repair = repair

    def _arguments(self) -> tuple[Any, ...]:
        return (*super()._arguments(), self._repair)

    @property
    def owner_died(self) -> bool:
        """Whether a holder died, and nobody has called `make_consistent` since."""
        return self._live()[_STATE] != _SOUND

    def acquire(self, timeout: float | None = None) -> bool:
        """Wait until this thread holds the mutex.

        Args:
            timeout: Seconds; None waits for ever, 0 only looks.

        Returns:
            Whether this thread has it now. False only after *timeout*.

        Raises:
            NotRecoverableError: A holder died, and the next one released it as it was.
            DeadlockError: This thread has it already. Use `RecursiveMutex`.
            ValueError: *timeout* is negative.
        """
        words = self._live()
        me = get_native_id()
        before = words[_COUNT] if words[_OWNER] == me else 0
        try:
            return self._take(words, me, timeout)
        except BaseException:
            # Also a KeyboardInterrupt that came after the lock, and before anybody knew.
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

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        # A wait that was interrupted twice may have left the block without the lock.
        if kind is None or self._is_mine():
            self.release()

    def release(self) -> None:
        """Let the next one have it.

        Raises:
            NotOwnerError: This thread does not hold it.
        """
        words = self._live()
        if words[_OWNER] != get_native_id():
            raise self._not_mine("release")
        if words[_COUNT] > 1:
            words[_COUNT] -= 1
            return
        if words[_STATE] == _DIED:
            words[_STATE] = _GIVEN_UP
        self._let_go(words)

    def make_consistent(self) -> None:
        """Say that what the mutex guards is in order again, after a holder died. Else nothing happens.

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
            # Held for a moment, mostly: to sleep, and to be woken, would take ten times as long.
            for _ in _LOOKS:
                code = _trylock(self._mutex)
                if code != errno.EBUSY:
                    break
        if code != 0 or timeout is not None:
            seconds = checked_timeout(timeout)
            if code == errno.EBUSY:
                # musl's trylock does not tell one's own; glibc's has said EDEADLK.
                mine = _locks.LOCK_LAYOUT >> 8 != 1 and words[_OWNER] == me
                code = errno.EDEADLK if mine else take(self._mutex, seconds)
            if code == errno.EBUSY:
                return False
            if code == errno.EDEADLK:
                self._again(words)
                return True
            if code == errno.EOWNERDEAD:
                # From here on the state is kept in our word, where an interrupted call cannot lose it. First
                # the word: who dies between the two lines leaves it to be found again.
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
        raise DeadlockError(f"cannot acquire {self!r}: this thread holds it already; a RecursiveMutex allows that")

    def _inherit(self, words: memoryview) -> None:
        if words[_STATE] & _GIVEN_UP:
            raise NotRecoverableError(
                f"cannot acquire {self!r}: a process died while it held the mutex, and the next one released it "
                "without make_consistent(); what it guards is in an unknown state: construct both anew"
            )
        if self._repair is not None:
            self._repair()
            words[_STATE] = _SOUND

    def _let_go(self, words: memoryview) -> None:
        # No call between the words and the unlock: a signal handler could run after it.
        held.pop(self._mutex, None)
        words[_COUNT] = 0
        words[_OWNER] = 0
        if _unlock(self._mutex) != 0:
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
        who = f"thread {owner} does" if owner else "nobody does"
        return NotOwnerError(f"cannot {what} {self!r}: this thread ({get_native_id()}) does not hold it, {who}")

    def _count(self) -> int:
        """How often this thread, which holds it, has it."""
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
    """A `Mutex` that a thread may acquire again while it holds it, and releases as often.

    Args:
        region: As for `Mutex`.
        offset: As for `Mutex`.
        repair: As for `Mutex`.

    Raises:
        ValueError: As for `Mutex`; so are the other errors.

    Fork and threads:
        As for `Mutex`. However often it was held by one who died, the next one has it once.

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
