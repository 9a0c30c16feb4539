"""The contract of a backend, by subject: `Backend` is all of it."""

from __future__ import annotations

from forkshm.backend._interface._leases import Leases
from forkshm.backend._interface._limits import Limits
from forkshm.backend._interface._locks import HasLocks, Locks
from forkshm.backend._interface._memory import UNKNOWN, Access, Advice, Identity, MappedFile, Memory
from forkshm.backend._interface._messages import Callee, HasFileno, Messages, MessageSocket, Poller
from forkshm.backend._interface._processes import Processes

__all__ = (
    "UNKNOWN",
    "Access",
    "Advice",
    "Backend",
    "Callee",
    "HasFileno",
    "Identity",
    "Locks",
    "MappedFile",
    "MessageSocket",
    "Poller",
)


class Backend(Memory, Leases, Messages, Processes, HasLocks, Limits):
    """The operations of one operating system.

    An fd is a number by which this process refers to a kernel object. The layers above pass fds only to the methods
    of this class: on some systems an fd is not a file descriptor, or stands for several.

    Every method raises ``OSError`` with the kernel's errno when the kernel refuses. A method that raises leaves nothing
    behind.
    """

    name: str
    """"linux", "posix" or "windows"."""
