"""The common parts of all locks in a region: the position, the header, and waiting."""

from __future__ import annotations

import errno
import math
import operator
import os
import time
from typing import TYPE_CHECKING, Any, ClassVar

from forkshm.backend import locks as _locks
from forkshm.errors import NotConstructedError, RegionAccessError, RegionClosedError, SyncError, UnsupportedError
from forkshm.region import _lifetime
from forkshm.region._table import Mode

if TYPE_CHECKING:
    from typing import Self

    from forkshm.region._mapped import MappedRegion

__all__ = ("HEADER", "LINE", "SLICE", "Placed", "checked_timeout", "give_back", "held", "take")

LINE = 64
"""Bytes of a cache line. Words that different processes write at the same time are in different lines."""
HEADER = LINE
"""Bytes of the header of each lock: 16 words, of which words 0 and 1 identify the lock."""
_MAGIC, _LAYOUT = 0, 1
# "FS", the version of the layout, and in the low byte the kind of lock.
_SIGNATURE = 0x46530100

SLICE = 0.1
"""Longest wait in one C call. No signal handler runs during the call, so this is how long Ctrl-C takes.

It also bounds the delay after a wakeup that is lost because it went to a process that was killed before it acted."""

held: dict[int, Any] = {}
"""The memory of every mutex that a thread of this process holds, by the mutex's address.

The C library links the mutexes that a thread holds by address, and the kernel follows these links when the thread dies.
So a held mutex must stay mapped, even if its Python object is gone."""

# A forked child holds nothing: locks belong to threads, and these are the parent's.
_lifetime.at_fork(in_child=held.clear)


class Placed:
    """Base class of the locks in a region.

    Guarantees:
        * The memory stays mapped while this object lives, until `detach`, and while a thread of this process holds the
          lock: ``region.close()`` raises `RegionBusyError`.
        * Attaching returns a complete lock of this kind or raises.

    This relies on:
        * Words of 4 bytes at multiples of 4 being read and written in one piece.
        * The signature being written last, after a system call, which is a full memory barrier.
    """

    SIZE: ClassVar[int] = HEADER
    """Size in the region, in bytes."""
    ALIGNMENT: ClassVar[int] = LINE
    """Required alignment of the lock's address, in bytes."""
    _KIND: ClassVar[int] = 0

    _region: MappedRegion
    _offset: int
    _address: int
    _words: memoryview | None

    def _place(self, region: MappedRegion, offset: int, size: int) -> memoryview:
        if _locks.locks_missing:
            raise UnsupportedError(
                f"cannot use a {type(self).__name__}: this system lacks {_locks.locks_missing}, which it needs",
                capability=_locks.locks_missing,
            )
        name = type(self).__name__
        offset = operator.index(offset)
        if region.mode is not Mode.read_write:
            raise RegionAccessError(
                errno.EACCES, f"cannot use a {name} in {region!r}, which is mapped {region.mode}: map it read_write"
            )
        if not 0 <= offset <= region.size - size:
            raise ValueError(
                f"{name} takes {size:,} bytes, which do not fit at offset {offset:,} into a region of "
                f"{region.size:,} bytes"
            )
        address = region.address + offset
        if address % self.ALIGNMENT:
            raise ValueError(
                f"{name} must start at a multiple of {self.ALIGNMENT} bytes: offset {offset:,} is at address "
                f"{address:#x}"
            )
        self._region, self._offset, self._address = region, offset, address
        words = region.buf[offset : offset + size].cast("I")
        self._words = words
        return words

    def _construct(self, region: MappedRegion, offset: int, size: int) -> memoryview:
        """Clear the memory of the lock. No process can attach to it until `_complete`."""
        words = self._place(region, offset, size)
        if any(self._address <= address < self._address + size for address in held):
            raise SyncError(f"cannot construct {self!r}: this process holds a lock at that offset")
        words[_MAGIC] = 0
        _locks.futex_wake(self._address, 0)
        for index in range(1, len(words)):
            words[index] = 0
        words[_LAYOUT] = _locks.LOCK_LAYOUT
        return words

    def _complete(self, words: memoryview) -> None:
        _locks.futex_wake(self._address, 0)
        words[_MAGIC] = _SIGNATURE | self._KIND

    @classmethod
    def _find(cls, region: MappedRegion, offset: int, size: int) -> tuple[Self, memoryview]:
        found = cls.__new__(cls)
        words = found._place(region, offset, size)
        if words[_MAGIC] != _SIGNATURE | cls._KIND:
            there = {kind._KIND: kind.__name__ for kind in _kinds(Placed)}.get(words[_MAGIC] - _SIGNATURE)
            raise NotConstructedError(
                f"cannot attach a {cls.__name__} at offset {offset:,} of {region!r}: there is "
                + (f"a {there}" if there else "none. The process that creates the region constructs the locks in it")
            )
        if words[_LAYOUT] != _locks.LOCK_LAYOUT:
            raise NotConstructedError(
                f"cannot attach a {cls.__name__} at offset {offset:,} of {region!r}: it was constructed by a process "
                f"with a different C library or word size ({words[_LAYOUT]:#x}, this process has "
                f"{_locks.LOCK_LAYOUT:#x})"
            )
        return found, words

    def _live(self) -> memoryview:
        words = self._words
        if words is None:
            raise RegionClosedError(f"cannot use {self!r}: it was detached in this process")
        return words

    def detach(self) -> None:
        """Release the region, so that it can be closed; the lock remains in it. Can be repeated."""
        self._words = None

    def __repr__(self) -> str:
        where = "detached" if self._words is None else f"at offset {self._offset:,} of {self._region!r}"
        return f"<{type(self).__name__} {where}>"

    def _arguments(self) -> tuple[Any, ...]:
        return (self._region, self._offset)

    def __reduce__(self) -> Any:
        # A forkshm channel sends the region as a descriptor; plain pickle refuses it.
        self._live()
        return type(self).attach, self._arguments()  # type: ignore[attr-defined]  # each kind has its own


def _kinds(kind: type[Placed]) -> list[type[Placed]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _kinds(child))]


def checked_timeout(timeout: float | None) -> float:
    """Return seconds to wait, infinite for None, or raise."""
    if timeout is None:
        return math.inf
    # As the *blocking* of threading.Lock.acquire, True would mean to wait forever, and here it means one second.
    if isinstance(timeout, bool) or not hasattr(timeout, "__float__"):
        raise TypeError(f"timeout must be None or a number of seconds, got {timeout!r}. 0 does not wait.")
    if not timeout >= 0:
        raise ValueError(f"timeout must be None, 0 or more seconds, got {timeout}")
    return timeout


def take(address: int, timeout: float) -> int:
    """Lock a bare robust mutex: 0, EOWNERDEAD, EDEADLK, ENOTRECOVERABLE, or EBUSY after *timeout*."""
    code = _locks.mutex_trylock(address)
    if code != errno.EBUSY or timeout <= 0:
        return code
    deadline = time.perf_counter() + timeout  # on Windows, time.monotonic() has a resolution of 16 ms
    while True:
        code = _locks.mutex_lock(address, max(min(SLICE, deadline - time.perf_counter()), 0.0))
        if code != errno.ETIMEDOUT:
            return code
        if time.perf_counter() >= deadline:
            return errno.EBUSY


def give_back(address: int) -> bool:
    """Unlock a bare mutex if this thread holds it, after an interruption between taking and recording it.

    Returns:
        Whether its last owner had died, and this was not yet recorded.
    """
    # EDEADLK: this thread holds it. 0 or EOWNERDEAD: it holds it now. EBUSY: another thread holds it, or, in musl,
    # perhaps this one; unlock() can tell.
    died = _locks.mutex_trylock(address) != errno.EBUSY and _locks.mutex_consistent(address) == 0
    _locks.mutex_unlock(address)
    return died


def mutex_made(address: int, kind: str) -> None:
    """Initialize a bare robust mutex, or raise."""
    code = _locks.mutex_init(address)
    if code != 0:
        raise SyncError(f"cannot construct a {kind}: the C library refused ({os.strerror(code)})")
