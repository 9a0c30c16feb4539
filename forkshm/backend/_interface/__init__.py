"""The contract of a backend, by subject: `Backend` is all of it."""

from __future__ import annotations

from forkshm.backend._interface._leases import Leases
from forkshm.backend._interface._limits import Limits
from forkshm.backend._interface._locks import HasLocks, Locks
from forkshm.backend._interface._memory import Access, Advice, Identity, MappedFile, Memory
from forkshm.backend._interface._messages import Callee, HasFileno, Messages, MessageSocket, Poller
from forkshm.backend._interface._processes import Processes

__all__ = (
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

    An fd is a number by which this process knows something of the kernel. No layer above does anything with it but what
    is written here: on some systems it is not a file descriptor, or more than one.

    Every method raises ``OSError`` with the kernel's errno when it is refused. A method that raises leaves nothing
    behind.
    """

    #: "linux", "posix" or "windows".
    name: str
