"""The contract of a backend."""

from __future__ import annotations

import abc
import enum
import socket
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer


class Access(str, enum.Enum):
    """What a mapping may do with the memory behind it."""

    #: Reads; sees what others write.
    READ = "read"
    #: Reads and writes; everybody sees it.
    SHARED = "shared"
    #: Reads and writes; nobody else sees the writes.
    PRIVATE = "private"
    #: Reads; may or may not see what others write later.
    SNAPSHOT = "snapshot"


class Advice(str, enum.Enum):
    """How memory is going to be used; Boost.Interprocess' ``advice_types``, and three of Linux.

    A member equals its name.
    """

    #: Nothing special.
    normal = "normal"
    #: From front to back: read ahead, and drop what was read.
    sequential = "sequential"
    #: Here and there: do not read ahead.
    random = "random"
    #: Soon: read now.
    willneed = "willneed"
    #: Not soon: may be dropped from memory. No byte is lost.
    dontneed = "dontneed"
    #: Use huge pages where the kernel has them.
    huge_pages = "huge_pages"
    #: Take memory for all pages now, instead of when each is first touched.
    populate = "populate"

    def __str__(self) -> str:
        return self.value


#: The kernel's own name for a memory object, device and inode: unique while the object lives.
Identity: TypeAlias = tuple[int, int]


class Backend(abc.ABC):
    """The operations of one operating system.

    Every method raises ``OSError`` with the kernel's errno when it is refused, and
    leaves nothing behind when it raises.
    """

    #: Mappings start and end on multiples of this many bytes.
    page_size: int

    # -- the limit on open files ------------------------------------------------------

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

    @abc.abstractmethod
    def duplicate(self, fd: int) -> int:
        """Return another fd of the same open file description."""

    # -- memory objects -------------------------------------------------------------

    @abc.abstractmethod
    def create_memory(self, size: int, label: str, *, sealable: bool = True) -> int:
        """Create a zero-filled memory object without a name; return its fd.

        It can never shrink, so no process can turn another's reads into SIGBUS. One that is not *sealable*
        refuses `seal_writes`, for ever and to all.
        *label* and the pid of the creator are shown in ``/proc/<pid>/maps``.
        """

    @abc.abstractmethod
    def open_named(self, name: str, *, create: bool, writable: bool, permissions: int = 0) -> int:
        """Open the object *name* of the system, or create it with size 0; return its fd.

        What is there is not opened by *create*, but ``EEXIST``. Symbolic links are not followed.
        """

    @abc.abstractmethod
    def unlink_named(self, name: str) -> None:
        """Take the name away; the object lives until nobody uses it."""

    @abc.abstractmethod
    def resize(self, fd: int, size: int) -> None:
        """Give an object a size, and reserve its memory; new bytes are zero.

        When there is no room (``ENOSPC``), the size is what it was.
        """

    @abc.abstractmethod
    def seal_writes(self, fd: int) -> None:
        """Forbid for ever new writable mappings, writes and changes of size. Existing mappings stay."""

    @abc.abstractmethod
    def reopen(self, fd: int) -> int:
        """Open the same object again: a new open file description, with its own locks."""

    @abc.abstractmethod
    def open_remote(self, pid: int, fd: int, identity: Identity) -> int:
        """Open the object that process *pid* knows as *fd*, if it is still that object.

        It is looked at before it is opened: opening a stranger can have effects. When
        it is another object, the errno is ``ESTALE``.
        """

    @abc.abstractmethod
    def may_write(self, fd: int) -> bool:
        """Whether *fd* was opened for writing, too."""

    @abc.abstractmethod
    def identify(self, fd: int) -> tuple[Identity, int]:
        """Return the identity and the size in bytes of the object behind *fd*."""

    def memory_left(self) -> int | None:
        """Return how many bytes this process can be given before the kernel kills for want of them, at most.

        None where no limit is known. It counts limits on groups of processes, not what the machine has.
        """
        return None

    # -- mappings -------------------------------------------------------------------

    @abc.abstractmethod
    def map(self, fd: int, size: int, access: Access, offset: int = 0) -> int:
        """Map *size* bytes from *offset*, both multiples of the page size; return the address."""

    @abc.abstractmethod
    def map_at(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        """Map at *address*, or raise ``EEXIST`` if any byte of it is taken."""

    @abc.abstractmethod
    def replace(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        """Map at *address*, in place of what is there."""

    @abc.abstractmethod
    def flush(self, address: int, size: int, *, asynchronous: bool) -> None:
        """Write changed pages of a file mapping back; *address* is that of a page."""

    @abc.abstractmethod
    def advise(self, address: int, size: int, advice: Advice, *, writable: bool = True) -> None:
        """Tell how the memory is going to be used; *address* is that of a page.

        What is not *writable* is populated by reading: the pages of its object are taken as well.
        """

    @abc.abstractmethod
    def own_pages(self, address: int, size: int) -> list[tuple[int, int]]:
        """Return which pages of a private mapping were written: runs, as address and size.

        Raises:
            OSError: The kernel does not tell.
        """

    @abc.abstractmethod
    def unmap(self, address: int, size: int) -> None:
        """Take a mapping away."""

    @abc.abstractmethod
    def discard(self, address: int, size: int) -> None:
        """Give the pages of a shared mapping back; they read as zero afterwards."""

    @abc.abstractmethod
    def window(self, address: int, size: int) -> Any:
        """Return a weakly referenceable object that exports *size* bytes at *address*.

        It owns nothing. Buffers taken from it keep it alive, so its death is the
        moment at which the last view is gone.
        """

    @abc.abstractmethod
    def address_of(self, buffer: Buffer) -> int:
        """Return the address of the first byte of a contiguous buffer."""

    @abc.abstractmethod
    def copy(self, address: int, source: Buffer, nbytes: int) -> None:
        """Copy *nbytes* of a contiguous buffer to *address*; lets other threads run."""

    @abc.abstractmethod
    def copy_memory(self, address: int, source: int, nbytes: int) -> None:
        """Copy *nbytes* from the address *source* to *address*; lets other threads run."""

    @abc.abstractmethod
    def clear_memory(self, address: int, nbytes: int) -> None:
        """Fill *nbytes* at *address* with zeros; lets other threads run."""

    @abc.abstractmethod
    def bytes_at(self, address: int, nbytes: int) -> bytes:
        """Return a copy of the bytes at *address*."""

    # -- leases ---------------------------------------------------------------------

    @abc.abstractmethod
    def lock_shared(self, fd: int, position: int) -> None:
        """Let the open file description of *fd* hold one byte, beside other holders."""

    @abc.abstractmethod
    def unlock(self, fd: int, position: int) -> None:
        """Let go of the byte."""

    @abc.abstractmethod
    def is_held(self, fd: int, position: int) -> bool:
        """Tell whether any *other* open file description holds the byte."""

    # -- counters -------------------------------------------------------------------

    @abc.abstractmethod
    def create_counter(self, memory: int) -> int:
        """Return an fd that counts from 0, for everyone who has it; *memory* is the fd of a memory object.

        The count is the kernel's: no lock guards it, so none can die with its holder.
        """

    @abc.abstractmethod
    def count(self, counter: int, change: int = 0) -> int:
        """Add *change* in one step and return the new count; ``EINVAL`` if it were negative."""

    @abc.abstractmethod
    def clear_counter(self, counter: int) -> None:
        """Let it count from 0 again."""

    # -- messages -------------------------------------------------------------------

    @abc.abstractmethod
    def message_sockets(self) -> tuple[socket.socket, socket.socket]:
        """Return two connected sockets that keep message boundaries and carry fds."""

    @abc.abstractmethod
    def unread_bytes(self, sender: socket.socket) -> int:
        """Return how much of what *sender* sent has not been received; 0 when all has."""

    def has_ended(self, receiver: socket.socket) -> bool:
        """Whether nothing came because nobody can send any more, and not because a message was empty."""
        return True

    @abc.abstractmethod
    def received_fds(self, ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
        """Return the fds that came beside a message."""

    # -- processes ------------------------------------------------------------------

    @abc.abstractmethod
    def open_process(self, pid: int) -> int:
        """Return an fd that becomes readable when the process ends."""

    @abc.abstractmethod
    def start_time(self, pid: int) -> int:
        """Return when *pid* was started, in a unit of the kernel: tells a reused pid."""

    @abc.abstractmethod
    def die_with(self, lifeline: int) -> int:
        """Have the kernel kill this process when the other end of *lifeline* is closed.

        Args:
            lifeline: The reading end of a pipe.

        Returns:
            An fd that must stay open for as long as the arrangement is wanted.
        """
