"""Leases: the kernel counts who uses a part of a memory object, and forgets a process that ends."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Leases",)


class Leases(abc.ABC):
    """Leases: the kernel counts who uses a part of a memory object, and forgets a process that ends."""

    #: To have an fd of a memory object is to hold all of it: there is one lease for each object, its fds are counted,
    #: and `replace`, `own_pages` and `discard` do not exist. Else leases are on bytes; see `lock_shared`.
    leases_are_handles: bool = False

    def unlocking(self, fd: int, position: int) -> Iterator[object]:
        """Return an iterator that unlocks, as `unlock`, when it is asked for its one item.

        So a caller can check a condition and unlock with no signal handler in between.
        """
        return map(self.unlock, (fd,), (position,))

    @abc.abstractmethod
    def lock_shared(self, fd: int, position: int) -> None:
        """Let the open file description of *fd* hold one byte, beside other holders."""

    @abc.abstractmethod
    def unlock(self, fd: int, position: int) -> None:
        """Let go of the byte."""

    @abc.abstractmethod
    def is_held(self, fd: int, position: int) -> bool:
        """Tell whether any *other* open file description holds the byte."""

    def is_abandoned(self, address: int, size: int) -> bool:
        """Whether who made an object, which is mapped there, has done with it; where `leases_are_handles`."""
        raise NotImplementedError

    def give_up(self, address: int, size: int) -> None:
        """Have done with an object made here; where `leases_are_handles`."""
        raise NotImplementedError
