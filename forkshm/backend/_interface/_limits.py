"""What this process may have: open files, memory, cores."""

from __future__ import annotations

import abc
import errno
import os
from typing import TYPE_CHECKING

from forkshm.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = ("Limits",)


class Limits(abc.ABC):
    """What this process may have: open files, memory, cores."""

    @abc.abstractmethod
    def raise_fd_limit(self) -> bool:
        """Raise the soft limit on open files to the hard one; return whether there are more now.

        Every method here that opens an fd does so when few are left: nobody who needs few has it changed.
        """

    @abc.abstractmethod
    def fd_limit(self) -> int:
        """Return the soft limit on open files, which is also one on the fds of a user that are on their way."""

    @abc.abstractmethod
    def is_scarce(self, fd: int) -> bool:
        """Whether *fd*, just opened, shows that the hard limit is near."""

    def more_fds(self) -> int:
        """How many files are open for fds that take more than one."""
        return 0

    def handles(self) -> frozenset[tuple[int, str]]:
        """Return the fds of this process and what they are, but those that are kept on purpose; not on all systems."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def memory_left(self) -> int | None:
        """Return how many bytes this process can be given before the kernel kills for want of them, at most.

        None where no limit is known. It counts limits on groups of processes, not what the machine has.
        """
        return None

    @abc.abstractmethod
    def usable_cores(self) -> int:
        """Return how many cores this process may use, by its affinity and the quotas of its control groups."""

    def default_workers(self) -> int:
        """Return how many workers to start when the caller does not say.

        These are as many as `usable_cores`, unless the user gave Python a number (``-X cpu_count``,
        ``PYTHON_CPU_COUNT``).
        """
        ask: Callable[[], int | None] | None = getattr(os, "process_cpu_count", None)  # since Python 3.13
        affinity = getattr(os, "sched_getaffinity", None)
        here = len(affinity(0)) if affinity is not None else os.cpu_count()
        if ask is not None and (asked := ask()) and asked != here:
            return asked
        return self.usable_cores()

    def use_cpus(self, cpus: Collection[int] | None) -> frozenset[int]:
        """Let this thread, and what it starts, run on these cores only; return those it may use now.

        Those are fewer when the kernel does not let it have some of them, and it refuses when that is all.
        With None nothing changes.

        Raises:
            UnsupportedError: This system chooses itself.
        """
        raise UnsupportedError(
            "cpu_ids: this system does not let a process choose its cores; leave it out", capability="cpu affinity"
        )
