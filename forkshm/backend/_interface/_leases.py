"""Leases: the kernel counts who uses a part of a memory object, and forgets a process that ends."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Leases",)


class Leases(abc.ABC):
    """Leases: the kernel counts who uses a part of a memory object, and forgets a process that ends."""

    leases_are_handles: bool = False
    """If true, an fd leases the whole object; `replace`, `own_pages` and `discard` are unavailable.
    Otherwise leases are locks on bytes; see `lock_shared`."""

    one_fd_leases_many: bool = False
    """Whether an fd that holds several bytes is as cheap to send as one that holds a single byte."""

    def unlocking(self, fd: int, position: int) -> Iterator[object]:
        """Return an iterator that unlocks, like `unlock`, when it is advanced to its single item.

        It lets a caller check a condition and unlock with no signal handler in between.
        """
        return map(self.unlock, (fd,), (position,))

    @abc.abstractmethod
    def lock_shared(self, fd: int, position: int) -> None:
        """Make the open file description of *fd* hold one byte, together with other holders."""

    @abc.abstractmethod
    def unlock(self, fd: int, position: int) -> None:
        """Release the byte."""

    @abc.abstractmethod
    def is_held(self, fd: int, position: int) -> bool:
        """Return whether any *other* open file description holds the byte."""

    def is_abandoned(self, address: int, size: int) -> bool:
        """Return whether the creator of the object mapped there has given it up; only if `leases_are_handles`."""
        raise NotImplementedError

    def give_up(self, address: int, size: int) -> None:
        """Mark an object created here as given up; only if `leases_are_handles`."""
        raise NotImplementedError
