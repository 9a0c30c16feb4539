"""RWLock: several readers, or one writer.

The header has three words:

    readers     number of slots
    state       sound, a writer writes, a writer died, or given up; only the holder of a slot may use it
    writer      thread id of the writer that has the writer mutex, or 0; readers sleep on this word

Bare robust mutexes follow: the writer mutex, which a writer takes first, and the slots. A reader takes one slot, a
writer all of them.

The death of a writer needs no report from the kernel: a thread that has a slot and reads that a writer writes knows it.
"""

from __future__ import annotations

import errno
import math
import operator
import threading
import time
from threading import get_native_id
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from forkshm._interrupts import promptly
from forkshm.backend import locks as _locks
from forkshm.errors import DeadlockError, LockTimeoutError, NotOwnerError, NotRecoverableError, SyncError
from forkshm.region import _lifetime
from forkshm.region.locks._placed import HEADER, LINE, SLICE, Placed, checked_timeout, give_back, held, mutex_made, take

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from forkshm.region._mapped import MappedRegion

__all__ = ("RWLock",)

_READERS, _STATE, _WRITER = 2, 3, 4
_SOUND, _WRITING, _DIED, _GIVEN_UP = 0, 1, 2, 3

_WORD = 4
_MASK = 0xFFFFFFFF

# An interrupted release or restoration is tried again this often.
_ATTEMPTS = range(100)


class _Hold(NamedTuple):
    """A thread's hold of one `RWLock`."""

    # The slot, or None for writing, which holds all slots.
    slot: int | None
    # How often the thread has acquired the lock.
    times: int


class _Holds(threading.local):
    """The holds of this thread, by the address of the lock."""

    def __init__(self) -> None:
        self.by_address: dict[int, _Hold] = {}


_holds = _Holds()
# The forking thread continues in the child with another id, and holds nothing.
_lifetime.at_fork(in_child=lambda: setattr(_holds, "by_address", {}))


class RWLock(Placed):
    """A robust lock in a region that several readers or one writer can hold.

    A reader that dies releases its hold. After a writer died, the next reader or writer finds `owner_died` true. To
    repair the guarded data, hold the lock for writing and call `make_consistent`, or pass *repair*. If a writer
    releases the lock without either, the lock becomes unusable and raises `NotRecoverableError`.

    The lock has one mutex for each simultaneous reader. A reader takes any free mutex, and a writer takes all of them.
    Reading therefore costs as much as one mutex, and readers do not disturb each other; writing costs *readers* times
    as much. A waiting writer goes before readers that arrive later.

    Args:
        region: A region mapped ``read_write``.
        offset: Offset in the region; see `Mutex`. The lock takes ``size_for(readers)`` bytes; `SIZE` is the size for 16
            readers.
        readers: Maximum number of simultaneous readers; further readers wait.
        repair: As for `Mutex`; called with the lock held for writing.

    Raises:
        ValueError: *readers* is less than 1 or more than 1,000, or as for `Mutex`. Other errors are as for `Mutex`.

    Fork and threads:
        As for `Mutex`. A reading thread may acquire the lock for reading again. It must release the lock before it can
        write, because two readers that upgrade would wait for each other.

    Example:
        >>> from forkshm import anonymous_shared_memory
        >>> from forkshm.region import RWLock
        >>> lock = RWLock(anonymous_shared_memory(RWLock.SIZE))
        >>> with lock.read(), lock.read(timeout=1):
        ...     pass
        >>> with lock.write():
        ...     lock.owner_died
        False

    See Also:
        ``interprocess_sharable_mutex`` of Boost.Interprocess; brlock of old Linux kernels.
    """

    SIZE: ClassVar[int] = HEADER + LINE + 16 * LINE
    _KIND: ClassVar[int] = 5
    _MOST: ClassVar[int] = 1000

    _slots: range
    _repair: Callable[[], object] | None

    def __init__(
        self,
        region: MappedRegion,
        offset: int = 0,
        readers: int = 16,
        repair: Callable[[], object] | None = None,
    ) -> None:
        words = self._construct(region, offset, self.size_for(readers))
        words[_READERS] = readers
        self._ready(readers, repair)
        for mutex in (self._gate, *self._slots):
            mutex_made(mutex, "RWLock")
        self._complete(words)

    @classmethod
    def attach(cls, region: MappedRegion, offset: int = 0, repair: Callable[[], object] | None = None) -> Self:
        """Return the lock that this or another process constructed at *offset*.

        Args:
            region: As for the constructor.
            offset: As for the constructor.
            repair: As for the constructor; it applies to this object only, and other processes pass their own.

        Raises:
            NotConstructedError: There is no complete lock of this kind at *offset*.
        """
        found, words = cls._find(region, offset, HEADER)
        readers = words[_READERS]
        found._place(region, offset, cls.size_for(readers))
        found._ready(readers, repair)
        return found

    @classmethod
    def size_for(cls, readers: int) -> int:
        """Return the size in bytes of a lock for *readers* readers.

        Raises:
            ValueError: *readers* is less than 1 or more than 1,000.
        """
        readers = operator.index(readers)
        if not 1 <= readers <= cls._MOST:
            raise ValueError(f"readers must be between 1 and {cls._MOST:,}, got {readers:,}")
        return HEADER + LINE + readers * LINE

    def _ready(self, readers: int, repair: Callable[[], object] | None) -> None:
        self._gate = self._address + HEADER
        first = self._gate + LINE
        self._slots = range(first, first + readers * LINE, LINE)
        self._repair = repair

    def _arguments(self) -> tuple[Any, ...]:
        return (*super()._arguments(), self._repair)

    @property
    def owner_died(self) -> bool:
        """Whether a writer died and `make_consistent` has not been called since.

        The first thread that acquires the lock after the death detects it.
        """
        return self._live()[_STATE] in (_DIED, _GIVEN_UP)

    def read(self, timeout: float | None = None) -> _Section:
        """Return a context manager that holds the lock for reading.

        Entering it raises `LockTimeoutError` if the lock is not acquired within *timeout* seconds.
        """
        return _Section(self, self._read, timeout)

    def write(self, timeout: float | None = None) -> _Section:
        """Return a context manager that holds the lock for writing.

        Entering it raises `LockTimeoutError` if the lock is not acquired within *timeout* seconds.
        """
        return _Section(self, self._write, timeout)

    def acquire_read(self, timeout: float | None = None) -> bool:
        """Acquire the lock for reading.

        Args:
            timeout: Seconds; None waits forever, 0 does not wait.

        Returns:
            True if the lock was acquired, False if *timeout* has passed.

        Raises:
            NotRecoverableError: A writer died, and the next one released the lock without `make_consistent`.
            DeadlockError: This thread holds the lock for writing.
            ValueError: *timeout* is negative.
        """
        before = _holds.by_address.get(self._address)
        try:
            return self._read(timeout)
        except BaseException:
            self._undo(before)
            raise

    def acquire_write(self, timeout: float | None = None) -> bool:
        """Acquire the lock for writing.

        Args:
            timeout: Seconds; None waits forever, 0 does not wait.

        Returns:
            True if the lock was acquired, False if *timeout* has passed; the lock is then not held.

        Raises:
            NotRecoverableError: A writer died, and the next one released the lock without `make_consistent`.
            DeadlockError: This thread already holds the lock.
            ValueError: *timeout* is negative.
        """
        before = _holds.by_address.get(self._address)
        try:
            return self._write(timeout)
        except BaseException:
            self._undo(before)
            raise

    @promptly
    def release(self) -> None:
        """Release this thread's latest hold of the lock.

        Raises:
            NotOwnerError: This thread does not hold the lock.
        """
        address, words = self._address, self._words
        # No call before the ``try``, so a signal handler that raises leaves the lock released.
        mine = _holds.by_address
        if words is None or address not in mine:
            self._live()
            raise NotOwnerError(f"cannot release {self!r}: this thread ({get_native_id()}) does not hold it")
        slot, times = mine[address]
        if times > 1:
            try:
                mine[address] = _Hold(slot, times - 1)
            except BaseException:
                mine[address] = _Hold(slot, times - 1)
                raise
            return
        if slot is None:
            words[_STATE] = _SOUND if words[_STATE] == _WRITING else _GIVEN_UP
        try:
            self._leave_all(words) if slot is None else self._leave(slot)
        except BaseException:
            # Interrupted. What was done already is not done twice.
            for _ in _ATTEMPTS:
                try:
                    self._leave_all(words) if slot is None else self._leave(slot)
                except BaseException:  # noqa: S112 - a handler has raised again
                    continue
                break
            raise
        finally:
            if address in mine:
                del mine[address]

    def make_consistent(self) -> None:
        """Mark the guarded data as repaired after a writer died; otherwise do nothing.

        Raises:
            NotOwnerError: This thread does not hold the lock for writing.
        """
        words = self._live()
        hold = _holds.by_address.get(self._address)
        if hold is None or hold.slot is not None:
            raise NotOwnerError(
                f"cannot make consistent {self!r}: this thread ({get_native_id()}) does not hold it for writing"
            )
        words[_STATE] = _WRITING

    def _read(self, timeout: float | None) -> bool:
        words = self._live()
        deadline = time.perf_counter() + checked_timeout(timeout)
        hold = _holds.by_address.get(self._address)
        if hold is not None:
            if hold.slot is None:
                raise DeadlockError(f"cannot acquire {self!r} for reading: this thread holds it for writing")
            _holds.by_address[self._address] = hold._replace(times=hold.times + 1)
            return True
        slot = self._free_slot(words, deadline)
        if slot is None:
            return False
        held[slot] = get_native_id(), words
        _holds.by_address[self._address] = _Hold(slot, 1)
        if words[_STATE] == _WRITING:
            # No writer holds the lock, because this thread has a slot. So the writer that wrote this state died.
            words[_STATE] = _DIED
        if words[_STATE] == _GIVEN_UP:
            raise self._given_up()
        if words[_STATE] == _DIED and self._repair is not None:
            return self._repair_first(words, slot, deadline)
        return True

    def _free_slot(self, words: memoryview, deadline: float) -> int | None:
        slots = self._slots
        start = get_native_id() % len(slots)
        while True:
            writer = words[_WRITER]
            if writer and self._enter(self._gate) == 0:
                # The writer has died or has just released the writer mutex.
                self._no_writer(words)
                self._leave(self._gate)
                writer = 0
            if not writer:
                for number in range(start, start + len(slots)):
                    slot: int = slots[number % len(slots)]
                    if self._enter(slot) == 0:
                        return slot
            now = time.perf_counter()
            if now >= deadline:
                return None
            if writer:
                _locks.futex_wait(self._address + _WRITER * _WORD, writer, min(deadline - now, SLICE))
                continue
            # Wait briefly, because another slot may become free first.
            brief = min(deadline - now, SLICE / 10)
            slot = slots[start]
            code = self._enter(slot, now + brief)
            if code == 0:
                return slot
            if code == errno.EDEADLK:
                time.sleep(brief)  # this thread holds the slot, through another mapping

    def _write(self, timeout: float | None) -> bool:
        words = self._live()
        deadline = time.perf_counter() + checked_timeout(timeout)
        if self._address in _holds.by_address:
            raise DeadlockError(f"cannot acquire {self!r} for writing: this thread already holds it. Release it first.")
        if not self._all_slots(words, deadline):
            return False
        _holds.by_address[self._address] = _Hold(None, 1)
        if words[_STATE] == _GIVEN_UP:
            raise self._given_up()
        # If another writer wrote this state, it died.
        words[_STATE] = _DIED if words[_STATE] != _SOUND else _WRITING
        if words[_STATE] == _DIED and self._repair is not None:
            self._repair()
            words[_STATE] = _WRITING
        return True

    def _all_slots(self, words: memoryview, deadline: float) -> bool:
        for mutex in (self._gate, *self._slots):
            code = self._enter(mutex, deadline)
            if code == errno.EDEADLK:
                raise DeadlockError(f"cannot acquire {self!r} for writing: this thread has it through another mapping")
            if code != 0:
                self._leave_all(words, mutex)
                return False
            if mutex == self._gate:
                # The slots are in the same memory: one entry keeps it mapped.
                held[mutex] = get_native_id(), words
                words[_WRITER] = get_native_id()
        return True

    def _repair_first(self, words: memoryview, slot: int, deadline: float) -> bool:
        """Become a writer, which repairs the data, and then a reader again."""
        self.release()
        if not self._write(max(deadline - time.perf_counter(), 0.0) if math.isfinite(deadline) else None):
            return False
        words[_STATE] = _SOUND
        held[slot] = get_native_id(), words
        _holds.by_address[self._address] = _Hold(slot, 1)
        self._leave_all(words, keep=slot)
        return True

    def _enter(self, mutex: int, deadline: float = 0.0) -> int:
        """Lock a bare mutex: 0, EBUSY or EDEADLK."""
        code = _locks.mutex_trylock(mutex)
        if code == 0:
            return 0
        if code == errno.EBUSY:
            code = take(mutex, deadline - time.perf_counter())
        if code == errno.EOWNERDEAD:
            code = _locks.mutex_consistent(mutex)
        if code not in (0, errno.EBUSY, errno.EDEADLK):
            raise SyncError(f"cannot acquire {self!r}: a part of it is unusable (errno {code})")
        return code

    def _leave(self, mutex: int) -> None:
        _unpin(mutex)
        _locks.mutex_unlock(mutex)

    def _leave_all(self, words: memoryview, until: int | None = None, keep: int | None = None) -> None:
        """Release the slots before *until*, and then the writer mutex: its next holder finds the slots free."""
        if until == self._gate:
            return
        for slot in self._slots:
            if slot == until:
                break
            if slot != keep:
                _locks.mutex_unlock(slot)
        if words[_WRITER] == get_native_id():
            self._no_writer(words)
        self._leave(self._gate)

    def _no_writer(self, words: memoryview) -> None:
        # Only for the thread that has the writer mutex.
        if words[_WRITER] != 0:
            words[_WRITER] = 0
            _locks.futex_wake(self._address + _WRITER * _WORD, _MASK)

    @promptly
    def _undo(self, before: _Hold | None) -> None:
        """Restore the state before a call that raised or was interrupted."""
        for _ in _ATTEMPTS:
            try:
                self._restore(before)
            except BaseException:  # noqa: S112 - a handler has raised again
                continue
            return

    def _restore(self, before: _Hold | None) -> None:
        # Can be repeated.
        if before is not None:
            _holds.by_address[self._address] = before
            return
        words = self._words
        if words is None:
            return
        now = _holds.by_address.get(self._address)
        if now is not None and now.slot is None and words[_STATE] == _WRITING:
            words[_STATE] = _SOUND
        if words[_WRITER] == get_native_id():
            self._no_writer(words)
        for mutex in (*self._slots, self._gate):
            _unpin(mutex)
            give_back(mutex)
        _holds.by_address.pop(self._address, None)

    def _given_up(self) -> NotRecoverableError:
        return NotRecoverableError(
            f"cannot acquire {self!r}: a writer died, and the next one released the lock without make_consistent(), so "
            "the guarded data is in an unknown state. Construct the data and the lock again."
        )


def _unpin(mutex: int) -> None:
    pin = held.get(mutex)
    if pin is not None and pin[0] == get_native_id():
        held.pop(mutex, None)


class _Section:
    """A ``with`` block that holds the lock for reading or writing."""

    def __init__(self, lock: RWLock, take: Callable[[float | None], bool], timeout: float | None) -> None:
        self._lock, self._take, self._timeout = lock, take, timeout

    def __enter__(self) -> RWLock:
        before = _holds.by_address.get(self._lock._address)
        try:
            if not self._take(self._timeout):
                raise LockTimeoutError(f"cannot acquire {self._lock!r} within {self._timeout} seconds")
        except BaseException:
            self._lock._undo(before)
            raise
        return self._lock

    @promptly
    def __exit__(self, *_: object) -> None:
        self._lock.release()
