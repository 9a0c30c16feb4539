"""Memory objects, and their mappings in this process."""

from __future__ import annotations

import abc
import enum
import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

__all__ = (
    "Access",
    "Advice",
    "Identity",
    "MappedFile",
    "Memory",
)


class Access(enum.StrEnum):
    """What a mapping may do with the memory behind it."""

    #: Reads; sees what others write.
    READ = "read"
    #: Reads and writes; everybody sees it.
    SHARED = "shared"
    #: Reads and writes; nobody else sees the writes.
    PRIVATE = "private"
    #: Reads; may or may not see what others write later.
    SNAPSHOT = "snapshot"


class Advice(enum.StrEnum):
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


class MappedFile(NamedTuple):
    """A range of addresses at which a file is mapped."""

    start: int
    end: int
    #: Where in the file the range starts.
    offset: int
    #: What the kernel calls the file here: on some file systems not what ``fstat`` says.
    identity: tuple[int, int, int]
    writable: bool
    #: Whether others who map the file see what is written; else it stays in this process.
    shared: bool
    path: str


class Memory(abc.ABC):
    """Memory objects, and their mappings in this process."""

    #: Mappings start and end on multiples of this many bytes.
    page_size: int

    @abc.abstractmethod
    def close(self, fd: int) -> None:
        """Close an fd of any kind."""

    @abc.abstractmethod
    def duplicate(self, fd: int) -> int:
        """Return another fd of the same open file description."""

    @abc.abstractmethod
    def create_memory(self, size: int, label: str, *, sealable: bool = True, sparse: bool = False) -> int:
        """Create a zero-filled memory object without a name; return its fd.

        It can never shrink, so no process can turn another's reads into SIGBUS. One that is not *sealable*
        refuses `seal_writes`, for ever and to all. Where memory of this kind has a bound of its own, it is reserved;
        of one that is *sparse*, only what is asked for by `reserve`.
        *label* and the pid of the creator are shown in ``/proc/<pid>/maps``.
        """

    @abc.abstractmethod
    def open_named(self, name: str, *, create: bool, writable: bool, permissions: int = 0) -> int:
        """Open the object *name* of the system, or create it with size 0; return its fd.

        What is there is not opened by *create*, but ``EEXIST``. Symbolic links are not followed.
        """

    def folder_of_named(self) -> str:
        """Return where files stand for named objects, for those who look what is there."""
        return "/dev/shm"  # noqa: S108

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

    def is_object(self, fd: int, identity: Identity) -> bool:
        """Return whether *fd* is open and still names that object: a program may close what it did not open."""
        try:
            return self.identify(fd)[0] == identity
        except OSError:
            return False

    def may_shrink(self, fd: int, identity: Identity) -> bool:
        """Whether an anonymous object that arrived can be made smaller, so that to read it could end this process.

        False as well where the kernel cannot tell, and for objects that have names and files: those can always be.
        """
        return False

    def reserve(self, fd: int, start: int, size: int) -> None:  # noqa: B027 - nothing, where memory is never short
        """Have memory for a part of a sparse object, before anybody touches it.

        Raises:
            OSError: There is none; to write there would end the process.
        """

    def write_memory(self, fd: int, identity: Identity, position: int, address: int, nbytes: int) -> bool:
        """Write memory of this process into the object behind *fd*, without a mapping of it.

        The kernel clears no page that it is going to fill, and this process takes no page faults. So for pages that
        have no memory yet this takes half the time of copying through a mapping; for others it takes longer.

        Returns:
            False when it is to be copied through a mapping instead: *fd* names another object by now, the limit on the
            size of files is lower than that of the object, or this system cannot. Part of it may have been written.

        Raises:
            OSError: There is no memory for it (``ENOSPC``, ``ENOMEM``), which a copy through a mapping would be ended
                for; or the source cannot be read (``EFAULT``).
        """
        return False

    def fills_huge_pages(self) -> bool:
        """Return whether shared memory that asks for huge pages gets them, when it is filled through a mapping."""
        return False

    @abc.abstractmethod
    def create_growing(self, label: str) -> int:
        """Create an object without a name that can be read, written, mapped in part, and made larger at any time."""

    @abc.abstractmethod
    def open_own_memory(self) -> int:
        """Return an fd from which all memory of this process can be read at its address; what is none, is an error."""

    def of_file(self, fileno: int) -> int:
        """Return the fd behind one of the C library, as files of Python have them; it stays the file's."""
        return fileno

    @abc.abstractmethod
    def open_file(self, path: str, *, writable: bool) -> int:
        """Open a file to be mapped."""

    @abc.abstractmethod
    def is_regular(self, fd: int) -> bool:
        """Whether *fd* is one of a regular file."""

    @abc.abstractmethod
    def owner(self, fd: int) -> str | None:
        """Return whose the file is; None when it is this user's."""

    def create_section(self, size: int, name: str | None, permissions: int) -> tuple[int, bool]:
        """Create memory that is gone with its last fd, or open that of the name; tell whether it was there already."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def open_section(self, name: str, *, writable: bool) -> int:
        """Open such memory."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def read_only(self, fd: int) -> int:
        """Return another fd of such memory, with which nobody can write to it."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    @abc.abstractmethod
    def map(self, fd: int, size: int, access: Access, offset: int = 0) -> int:
        """Map *size* bytes from *offset*, both multiples of the page size; return the address."""

    def map_into(self, mapped: list[int], fd: int, size: int, access: Access, offset: int = 0) -> None:
        """Map as `map` does, and append the address to *mapped*.

        Where the system allows it both are one C call, so that no signal handler runs between the two.
        """
        mapped.append(self.map(fd, size, access, offset))

    def unmap_from(self, mapped: list[int], size: int) -> None:
        """Take the last address of *mapped* out of the list and its mapping away; in one C call, as `map_into`.

        When the kernel refuses, the address is in the list again.
        """
        address = mapped.pop()
        try:
            self.unmap(address, size)
        except BaseException:
            mapped.append(address)
            raise

    def reopen_into(self, fds: list[int], fd: int) -> None:
        """Open as `reopen` does, and append the new fd to *fds*; in one C call, as `map_into`."""
        fds.append(self.reopen(fd))

    def close_all(self, fds: list[int]) -> None:
        """Take fds out of the list and close them, each in one C call, until the list is empty."""
        while fds:
            self.close(fds.pop())

    def discarding(self, address: int, size: int) -> Iterator[object]:
        """Return an iterator that discards, as `discard`, when it is asked for its one item; see `unlocking`."""
        return map(self.discard, (address,), (size,))

    @abc.abstractmethod
    def map_at(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        """Map at *address*, or raise ``EEXIST`` if any byte of it is taken."""

    @abc.abstractmethod
    def replace(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        """Map at *address*, in place of what is there."""

    @abc.abstractmethod
    def flush(self, address: int, size: int, *, asynchronous: bool) -> None:
        """Write changed pages of a file mapping back; *address* is that of a page."""

    def flush_to_disk(self, fd: int) -> None:  # noqa: B027
        """Wait until the disk has what `flush` has written; nothing where that waits itself."""

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

    def mapped_file(self, address: int) -> MappedFile | None:
        """Return which file lies at an address; None if none does, or the kernel does not tell."""
        return None

    def open_mapped(self, file: MappedFile) -> int | None:
        """Return a new fd of the file that lies at an address, whatever became of its name; None if there is no way.

        It may be written to if the mapping writes to the file.
        """
        return None

    @abc.abstractmethod
    def unmap(self, address: int, size: int) -> None:
        """Take a mapping away."""

    @abc.abstractmethod
    def discard(self, address: int, size: int) -> None:
        """Give the pages of a shared mapping back; they read as zero afterwards."""

    @staticmethod
    @abc.abstractmethod
    def buffer_at(address: int, size: int) -> Any:
        """Return a weakly referenceable object that exports *size* bytes at *address*.

        It owns nothing. Buffers taken from it keep it alive, so its death is the
        moment at which the last view is gone.
        """

    @staticmethod
    @abc.abstractmethod
    def address_of(buffer: Buffer) -> int:
        """Return the address of the first byte of a contiguous buffer."""

    @staticmethod
    @abc.abstractmethod
    def copy(address: int, source: Buffer, nbytes: int) -> None:
        """Copy *nbytes* of a contiguous buffer to *address*; lets other threads run."""

    @abc.abstractmethod
    def copy_memory(self, address: int, source: int, nbytes: int) -> None:
        """Copy *nbytes* from the address *source* to *address*; lets other threads run."""

    @abc.abstractmethod
    def is_same_memory(self, address: int, other: int, nbytes: int) -> bool:
        """Return whether *nbytes* at two addresses are equal; lets other threads run."""

    @abc.abstractmethod
    def clear_memory(self, address: int, nbytes: int) -> None:
        """Fill *nbytes* at *address* with zeros; lets other threads run."""

    @abc.abstractmethod
    def bytes_at(self, address: int, nbytes: int) -> bytes:
        """Return a copy of the bytes at *address*."""

    @staticmethod
    @abc.abstractmethod
    def text_address(text: str) -> int:
        """Return the address of the characters of an ASCII ``str``, a byte each."""

    @staticmethod
    @abc.abstractmethod
    def new_text(length: int) -> str:
        """Return a new ASCII ``str``, whose characters the caller writes to its `text_address` at once."""

    def global_int(self, path: str, name: str) -> Any:
        """Return a C ``int`` of a library that is loaded, whose ``value`` can be read and set; None if it has none."""
        return None
