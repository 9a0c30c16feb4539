"""Memory objects, and their mappings in this process."""

from __future__ import annotations

import abc
import enum
import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from forkshm._interrupts import is_of_kernel, promptly

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

__all__ = (
    "UNKNOWN",
    "Access",
    "Advice",
    "Identity",
    "MappedFile",
    "Memory",
)


class Access(enum.StrEnum):
    """The access of a mapping to the memory behind it."""

    READ = "read"
    """Reads, and sees other processes' writes."""
    SHARED = "shared"
    """Reads and writes; all processes see the writes."""
    PRIVATE = "private"
    """Reads and writes; no other process sees the writes."""
    SNAPSHOT = "snapshot"
    """Reads, and may or may not see later writes of other processes."""


class Advice(enum.StrEnum):
    """Future use of memory: Boost.Interprocess' ``advice_types``, and three of Linux.

    A member equals its name.
    """

    normal = "normal"
    """No special use."""
    sequential = "sequential"
    """From front to back: read ahead, and drop pages that were read."""
    random = "random"
    """Random access: do not read ahead."""
    willneed = "willneed"
    """Soon: read now."""
    dontneed = "dontneed"
    """Not soon: may be dropped from memory. No byte is lost."""
    huge_pages = "huge_pages"
    """Use huge pages where the kernel has them."""
    populate = "populate"
    """Take memory for all pages now, instead of when each is first touched."""

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"advice must be one of {', '.join(map(repr, map(str, cls)))}, got {value!r}")


Identity: TypeAlias = tuple[int, int]
"""The kernel's own name for a memory object, device and inode: unique while the object lives."""

UNKNOWN: Identity = (-1, -1)
"""Stands for what an fd refers to until that is known."""


class MappedFile(NamedTuple):
    """A range of addresses at which a file is mapped."""

    start: int
    end: int
    offset: int
    """Position in the file at which the range starts."""
    identity: tuple[int, int, int]
    """The kernel's identity of the file here; on some file systems it differs from that of ``fstat``."""
    writable: bool
    shared: bool
    """Whether other processes that map the file see writes made here."""
    path: str


class Memory(abc.ABC):
    """Memory objects, and their mappings in this process."""

    page_size: int
    """Mappings start and end on multiples of this many bytes."""

    @abc.abstractmethod
    def close(self, fd: int) -> None:
        """Close an fd of any kind."""

    def file_of(self, fd: int) -> Identity:
        """Return what identifies the file, socket or pipe that *fd* refers to; it may differ from `identify`."""
        return 0, fd

    def refers_to(self, fd: int, file: Identity) -> bool:
        """Return whether *fd* still refers to that file, or `UNKNOWN`. A program may close fds that it did not open."""
        return True

    def closing(self, fd: int, file: Identity) -> Iterator[object]:
        """Return an iterator that closes *fd* when it is first advanced, if the fd refers to that file, or `UNKNOWN`.

        It raises OSError if the fd is closed, or if the kernel cannot tell what it refers to; then the fd stays open,
        because it may belong to another file. If a signal handler raises in it, it can be advanced again. Advance it by
        `close_own`.
        """
        return map(self.close, (fd,))

    @staticmethod
    @promptly
    def close_own(closing: Iterator[object]) -> None:
        """Advance the iterator of `closing`. Once called, it takes effect; a second call does nothing."""
        try:
            next(closing, None)
        except BaseException as error:
            Memory.close_own(closing)  # does nothing if the kernel refused the call
            if not is_of_kernel(error):
                raise

    @abc.abstractmethod
    def duplicate(self, fd: int) -> int:
        """Return another fd of the same open file description."""

    @abc.abstractmethod
    def create_memory(self, size: int, label: str, *, sealable: bool = True, sparse: bool = False) -> int:
        """Create a zero-filled memory object without a name; return its fd.

        The object can never shrink, so no process can turn another's reads into SIGBUS. If it is not *sealable*,
        `seal_writes` fails for every process. Where memory of this kind has a separate limit, the memory is reserved.
        For a *sparse* object, only the parts passed to `reserve` are reserved.
        *label* and the pid of the creator are shown in ``/proc/<pid>/maps``.
        """

    @abc.abstractmethod
    def open_named(self, name: str, *, create: bool, writable: bool, permissions: int = 0) -> int:
        """Open the object *name* of the system, or create it with size 0; return its fd.

        With *create*, an existing object is not opened: the error is ``EEXIST``. Symbolic links are not followed.
        """

    def folder_of_named(self) -> str:
        """Return the folder of the files that stand for named objects, for listing them."""
        return "/dev/shm"  # noqa: S108

    @abc.abstractmethod
    def unlink_named(self, name: str) -> None:
        """Remove the name; the object lives until its last user is gone."""

    @abc.abstractmethod
    def resize(self, fd: int, size: int) -> None:
        """Set the size of an object, and reserve its memory; new bytes are zero.

        When there is no room (``ENOSPC``), the size stays unchanged.
        """

    @abc.abstractmethod
    def seal_writes(self, fd: int) -> None:
        """Permanently forbid new writable mappings, writes and changes of size. Existing mappings stay."""

    @abc.abstractmethod
    def reopen(self, fd: int) -> int:
        """Open the same object again: a new open file description, with its own locks."""

    @abc.abstractmethod
    def open_remote(self, pid: int, fd: int, identity: Identity) -> int:
        """Open the object that process *pid* knows as *fd*, provided that *fd* still refers to it.

        The object is checked before it is opened, because opening an unknown file can have
        side effects. If it is another object, the errno is ``ESTALE``.
        """

    @abc.abstractmethod
    def may_write(self, fd: int) -> bool:
        """Return whether *fd* was also opened for writing."""

    @abc.abstractmethod
    def identify(self, fd: int) -> tuple[Identity, int]:
        """Return the identity and the size in bytes of the object behind *fd*."""

    def is_object(self, fd: int, identity: Identity) -> bool:
        """Return whether *fd* is open and still refers to that object: a program may close fds it did not open."""
        try:
            return self.identify(fd)[0] == identity
        except OSError as error:
            if not is_of_kernel(error):  # raised by a signal handler
                raise
            return False

    def may_shrink(self, fd: int, identity: Identity) -> bool:
        """Return whether a received anonymous object can shrink, so that reading it could kill this process.

        Also False where the kernel cannot tell, and for named objects and files, which can always shrink.
        """
        return False

    def reserve(self, fd: int, start: int, size: int) -> None:  # noqa: B027 - does nothing where memory is never short
        """Allocate the memory of a part of a sparse object before it is first touched.

        Raises:
            OSError: There is no memory; writing there would kill the process.
        """

    def write_memory(self, fd: int, identity: Identity, position: int, address: int, nbytes: int) -> bool:
        """Write memory of this process into the object behind *fd*, without mapping the object.

        The kernel does not clear a page before it fills it, and this process takes no page faults. For pages without
        memory this takes half the time of copying through a mapping; for other pages it takes longer.

        Returns:
            False if the caller has to copy through a mapping instead: *fd* names another object now, the limit on file
            sizes is lower than the size of the object, or this system cannot. Part may have been written.

        Raises:
            OSError: There is no memory (``ENOSPC``, ``ENOMEM``), so a copy through a mapping would kill the process; or
                the source cannot be read (``EFAULT``).
        """
        return False

    def fills_huge_pages(self) -> bool:
        """Return whether shared memory with huge pages requested gets them when filled through a mapping."""
        return False

    @abc.abstractmethod
    def create_growing(self, label: str) -> int:
        """Create an object without a name that can be read, written, mapped in part, and made larger at any time."""

    @abc.abstractmethod
    def open_own_memory(self) -> int:
        """Return an fd from which the memory of this process can be read by address; bad addresses are errors."""

    def of_file(self, fileno: int) -> int:
        """Return the fd behind a C library fd of a Python file, which keeps owning it."""
        return fileno

    @abc.abstractmethod
    def open_file(self, path: str, *, writable: bool) -> int:
        """Open a file to be mapped."""

    @abc.abstractmethod
    def is_regular(self, fd: int) -> bool:
        """Return whether *fd* is that of a regular file."""

    @abc.abstractmethod
    def owner(self, fd: int) -> str | None:
        """Return the owner of the file, or None if it is this user."""

    def create_section(self, size: int, name: str | None, permissions: int) -> tuple[int, bool]:
        """Create memory that vanishes with its last fd, or open *name*; return the fd and whether it existed."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def open_section(self, name: str, *, writable: bool) -> int:
        """Open existing memory of `create_section`."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def read_only(self, fd: int) -> int:
        """Return another fd of such memory that does not allow writing."""
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
        """Remove the last address from *mapped* and unmap it, in one C call like `map_into`.

        If the kernel refuses, the address is in the list again.
        """
        address = mapped.pop()
        try:
            self.unmap(address, size)
        except BaseException:
            mapped.append(address)
            raise

    def reopen_into(self, fds: list[int], fd: int) -> None:
        """Open as `reopen` does, and append the new fd to *fds*, in one C call like `map_into`."""
        fds.append(self.reopen(fd))

    def close_all(self, fds: list[int]) -> None:
        """Remove and close each fd in the list, in one C call per fd, until the list is empty."""
        while fds:
            self.close(fds.pop())

    def discarding(self, address: int, size: int) -> Iterator[object]:
        """Return an iterator that discards, like `discard`, when it is advanced to its item; see `unlocking`."""
        return map(self.discard, (address,), (size,))

    @abc.abstractmethod
    def map_at(self, mapped: list[int], address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        """Map at *address*, or raise ``EEXIST`` if any byte of it is taken; append the address like `map_into`."""

    @abc.abstractmethod
    def replace(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        """Map at *address*, replacing the existing mapping."""

    def replacing(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> Iterator[object]:
        """Return an iterator that replaces, like `replace`, when it is advanced to its item; see `unlocking`."""
        return map(self.replace, (address,), (fd,), (size,), (access,), (offset,))

    def replace_by_copy(self, address: int, size: int) -> None:
        """Put a private copy of whole pages in their place. No other thread may use them meanwhile.

        Raises:
            OSError: The kernel refused.
        """
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    @abc.abstractmethod
    def flush(self, address: int, size: int, *, asynchronous: bool) -> None:
        """Write changed pages of a file mapping back; *address* is page-aligned."""

    def flush_to_disk(self, fd: int) -> None:  # noqa: B027
        """Wait until the disk has the data that `flush` wrote; do nothing where `flush` itself waits."""

    @abc.abstractmethod
    def advise(self, address: int, size: int, advice: Advice, *, writable: bool = True) -> None:
        """Advise the kernel on the future use of the memory; *address* is page-aligned.

        Memory that is not *writable* is populated by reading, which also allocates the pages of its object.
        """

    @abc.abstractmethod
    def own_pages(self, address: int, size: int) -> list[tuple[int, int]]:
        """Return the written pages of a private mapping, as runs of address and size.

        Raises:
            OSError: The kernel does not tell.
        """

    def mapped_file(self, address: int, without: list[tuple[int, int]] | None = None) -> MappedFile | None:
        """Return the file mapped at an address, or None if there is none or the kernel does not tell.

        Args:
            address: The address.
            without: Gets the start and end of the range around the address if no file is mapped there.
        """
        return None

    def open_mapped(self, file: MappedFile) -> int | None:
        """Return a new fd of a mapped file, even if its name is gone; None if that is impossible.

        The fd is writable if the mapping writes to the file.
        """
        return None

    @abc.abstractmethod
    def unmap(self, address: int, size: int) -> None:
        """Remove a mapping."""

    @abc.abstractmethod
    def discard(self, address: int, size: int) -> None:
        """Return the pages of a shared mapping to the system; they read as zero afterwards."""

    @staticmethod
    @abc.abstractmethod
    def buffer_at(address: int, size: int) -> Any:
        """Return a weakly referenceable object that exports *size* bytes at *address*.

        It owns no memory. Buffers taken from it keep it alive, so it is collected when
        the last view is gone.
        """

    @staticmethod
    @abc.abstractmethod
    def hide_from_gc(thing: Any) -> None:
        """Make the garbage collector ignore an object. It is collected when nothing refers to it."""

    @staticmethod
    @abc.abstractmethod
    def address_of(buffer: Buffer) -> int:
        """Return the address of the first byte of a contiguous buffer."""

    @staticmethod
    @abc.abstractmethod
    def copy(address: int, source: Buffer, nbytes: int) -> None:
        """Copy *nbytes* of a contiguous buffer to *address*; lets other threads run."""

    @staticmethod
    @abc.abstractmethod
    def copy_memory(address: int, source: int, nbytes: int) -> None:
        """Copy *nbytes* from the address *source* to *address*; lets other threads run."""

    @staticmethod
    @abc.abstractmethod
    def is_same_memory(address: int, other: int, nbytes: int) -> bool:
        """Return whether *nbytes* at two addresses are equal; lets other threads run."""

    @staticmethod
    @abc.abstractmethod
    def clear_memory(address: int, nbytes: int) -> None:
        """Fill *nbytes* at *address* with zeros; lets other threads run."""

    @staticmethod
    @abc.abstractmethod
    def bytes_at(address: int, nbytes: int) -> bytes:
        """Return a copy of the bytes at *address*."""

    @staticmethod
    @abc.abstractmethod
    def text_address(text: str) -> int:
        """Return the address of the characters of an ASCII ``str``, one byte each."""

    @staticmethod
    @abc.abstractmethod
    def new_text(length: int) -> str:
        """Return a new ASCII ``str``, whose characters the caller writes to its `text_address` at once."""

    def trim_heap(self) -> None:  # noqa: B027 - does nothing where the C library has no such call
        """Return the free memory of malloc(3) to the kernel. Takes microseconds for each free piece."""

    def global_int(self, path: str, name: str) -> Any:
        """Return a C ``int`` of a loaded library, whose ``value`` can be read and set, or None if it lacks it."""
        return None
