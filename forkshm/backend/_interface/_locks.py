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
    """Locks in shared memory: what `forkshm.region` builds its own on. Codes are errno's, 0 is success."""

    @property
    def MUTEX_SIZE(self) -> int:  # noqa: N802
        """Room for a mutex."""
        ...

    @property
    def SEMAPHORE_SIZE(self) -> int:  # noqa: N802
        """Room for a semaphore."""
        ...

    @property
    def LOCK_LAYOUT(self) -> int:  # noqa: N802
        """How this process lays them out; processes that differ must not share them."""
        ...

    @property
    def locks_missing(self) -> str | None:
        """What this system lacks for them, or None."""
        ...

    @property
    def mutex_init(self) -> Callable[[int], int]:
        """Make a mutex at an address."""
        ...

    @property
    def mutex_trylock(self) -> Callable[[int], int]:
        """0, EBUSY, EOWNERDEAD (taken), ENOTRECOVERABLE, or EDEADLK (this thread has it)."""
        ...

    @property
    def mutex_lock(self) -> Callable[[int, float], int]:
        """The same, and after so many seconds ETIMEDOUT."""
        ...

    @property
    def mutex_unlock(self) -> Callable[[int], int]:
        """0, or EPERM: this thread does not have it."""
        ...

    @property
    def mutex_consistent(self) -> Callable[[int], int]:
        """0, or EINVAL: its last owner did not die."""
        ...

    @property
    def sem_init(self) -> Callable[[int, int], int]:
        """Make a semaphore."""
        ...

    @property
    def sem_post(self) -> Callable[[int], int]:
        """Give a permit: 0, or -1: there are too many."""
        ...

    @property
    def sem_try(self) -> Callable[[int], Iterator[int]]:
        """Return a call that is made by whoever asks for its one result: 0 when a permit was taken, else -1."""
        ...

    @property
    def sem_wait(self) -> Callable[[int, float], Iterator[int]]:
        """The same, and waits so many seconds; -1 also after a signal."""
        ...

    @property
    def sem_value(self) -> Callable[[int], int]:
        """Permits that are there."""
        ...

    @property
    def futex_wait(self) -> Callable[[int, int, float], int]:
        """Wait for a wake-up while the word is that: 0, EAGAIN (it is not), ETIMEDOUT, or EINTR."""
        ...

    @property
    def futex_wake(self) -> Callable[[int, int], int]:
        """Wake up to so many; a full memory barrier."""
        ...


class HasLocks(abc.ABC):
    """Locks in shared memory."""

    #: Locks in shared memory.
    locks: Locks
