"""Locks in shared memory."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = (
    "HasLocks",
    "Locks",
)


class Locks(Protocol):
    """Locks in shared memory, on which `forkshm.region` builds its own. Codes are errno values; 0 is success."""

    @property
    def MUTEX_SIZE(self) -> int:  # noqa: N802
        """The bytes that a mutex needs."""
        ...

    @property
    def SEMAPHORE_SIZE(self) -> int:  # noqa: N802
        """The bytes that a semaphore needs."""
        ...

    @property
    def LOCK_LAYOUT(self) -> int:  # noqa: N802
        """The layout of locks in this process; processes with different layouts must not share locks."""
        ...

    @property
    def locks_missing(self) -> str | None:
        """The capability for locks that this system lacks, or None."""
        ...

    @property
    def mutex_init(self) -> Callable[[int], int]:
        """Initialize a mutex at an address."""
        ...

    @property
    def mutex_trylock(self) -> Callable[[int], int]:
        """Try to lock: 0, EBUSY, EOWNERDEAD (locked), ENOTRECOVERABLE, or EDEADLK (this thread holds it)."""
        ...

    @property
    def mutex_lock(self) -> Callable[[int, float], int]:
        """Lock: the codes of `mutex_trylock`, or ETIMEDOUT after the given seconds."""
        ...

    @property
    def mutex_unlock(self) -> Callable[[int], int]:
        """Unlock: 0, or EPERM (this thread does not hold it)."""
        ...

    @property
    def mutex_consistent(self) -> Callable[[int], int]:
        """Mark as repaired: 0, or EINVAL (the last owner did not die)."""
        ...

    @property
    def sem_init(self) -> Callable[[int, int], int]:
        """Initialize a semaphore at an address."""
        ...

    @property
    def sem_post(self) -> Callable[[int], int]:
        """Release a permit: 0, or -1 (there are too many)."""
        ...

    @property
    def sem_try(self) -> Callable[[int], Iterator[int]]:
        """Return an iterator that tries to take a permit when it is advanced: 0 if one was taken, else -1."""
        ...

    @property
    def sem_wait(self) -> Callable[[int, float], Iterator[int]]:
        """Return an iterator like that of `sem_try` that waits for the given seconds; -1 also after a signal."""
        ...

    @property
    def sem_value(self) -> Callable[[int], int]:
        """The number of free permits."""
        ...

    @property
    def futex_wait(self) -> Callable[[int, int, float], int]:
        """Wait for a wakeup while the word has the given value: 0, EAGAIN (it differs), ETIMEDOUT, or EINTR."""
        ...

    @property
    def futex_wake(self) -> Callable[[int, int], int]:
        """Wake up to the given number of waiters; a full memory barrier."""
        ...


class HasLocks(abc.ABC):
    """Locks in shared memory."""

    locks: Locks
    """Locks in shared memory."""
