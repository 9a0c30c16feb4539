"""The limits of this process: open files, memory, cores."""

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
    """The limits of this process: open files, memory, cores."""

    @abc.abstractmethod
    def raise_fd_limit(self) -> bool:
        """Raise the soft limit on open files to the hard one; return whether the limit is higher now.

        Every method here that opens an fd raises the limit itself when few fds are left. Processes that need few fds
        keep theirs.
        """

    @abc.abstractmethod
    def fd_limit(self) -> int:
        """Return the soft limit on open files, which also limits the fds that a user has in flight."""

    @abc.abstractmethod
    def is_scarce(self, fd: int) -> bool:
        """Return whether the number of the newly opened *fd* shows that the hard limit is near."""

    def more_fds(self) -> int:
        """Return the number of open files beyond one per fd; nonzero where an fd may stand for several files."""
        return 0

    def handles(self) -> frozenset[tuple[int, str]]:
        """Return the fds of this process with descriptions, except those kept on purpose; ``ENOSYS`` where unknown."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def memory_left(self) -> int | None:
        """Return the maximum bytes this process can get before the kernel kills a process for memory.

        None if no limit is known. Only limits on groups of processes count, not the memory of the machine.
        """
        return None

    @abc.abstractmethod
    def usable_cores(self) -> int:
        """Return the number of cores this process may use, by its affinity and the quotas of its control groups."""

    def default_workers(self) -> int:
        """Return the default number of workers.

        It equals `usable_cores`, unless the user gave Python a number (``-X cpu_count``,
        ``PYTHON_CPU_COUNT``).
        """
        ask: Callable[[], int | None] | None = getattr(os, "process_cpu_count", None)  # since Python 3.13
        affinity = getattr(os, "sched_getaffinity", None)
        here = len(affinity(0)) if affinity is not None else os.cpu_count()
        if ask is not None and (asked := ask()) and asked != here:
            return asked
        return self.usable_cores()

    def use_cpus(self, cpus: Collection[int] | None) -> frozenset[int]:
        """Restrict this thread, and the threads and processes it starts, to these cores; return those it may use now.

        The result has fewer cores if the kernel allows only some of *cpus*. If it allows none, the call fails.
        With None nothing changes.

        Raises:
            UnsupportedError: This system does not let a process choose its cores.
        """
        raise UnsupportedError(
            "cannot apply cpu_ids: this system does not let a process choose its cores. Leave it out",
            capability="cpu affinity",
        )
