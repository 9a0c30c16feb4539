"""The contract of a backend."""

from __future__ import annotations

import abc
import contextlib
import enum
import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from forkshm.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer


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


class HasFileno(Protocol):
    """Anything with an fd."""

    def fileno(self) -> int:
        """Return the fd."""
        ...


class MessageSocket(Protocol):
    """An end of a channel: what of ``socket.socket`` is used of one, with the meaning that it has for SOCK_SEQPACKET.

    So messages are whole, go to one of those who receive, and have fds beside them; `recvmsg` returns no bytes once
    every process that could send is gone, or has shut the socket down, and all was received.
    """

    def fileno(self) -> int:
        """Return the fd, which is readable when a message is there; -1 when closed."""
        ...

    def send(self, data: bytes, flags: int = 0, /) -> int:
        """Send a message without fds."""
        ...

    def sendmsg(self, buffers: Any, ancdata: Any = ..., flags: int = ..., /) -> int:
        """Send a message with fds; see `Backend.RIGHTS`."""
        ...

    def recvmsg(self, bufsize: int, ancbufsize: int = ..., flags: int = ..., /) -> tuple[bytes, list[Any], int, Any]:
        """Receive a message: its bytes, what `Backend.received_fds` takes, flags, and nothing of use."""
        ...

    def recv(self, bufsize: int, flags: int = ..., /) -> bytes:
        """Look at a message."""
        ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set how much the kernel is asked to hold."""
        ...

    def shutdown(self, how: int, /) -> None:
        """Send no more, from any process."""
        ...

    def dup(self) -> Any:
        """Return the same end under another fd."""
        ...

    def close(self) -> None:
        """Close it in this process."""
        ...


class Poller(Protocol):
    """What of ``select.poll`` is used."""

    def register(self, fd: int, eventmask: int = ..., /) -> object:
        """Watch an fd: for `Backend.READABLE`, or `Backend.WRITABLE`."""
        ...

    def unregister(self, fd: int, /) -> object:
        """Watch it no more."""
        ...

    def poll(self, timeout: float | None = ..., /) -> list[tuple[int, int]]:
        """Wait so many milliseconds, or for ever; return the fds that are ready, each with what is."""
        ...


class Callee(Protocol):
    """Where a process is called by others of the same user."""

    address: str

    def accept(self) -> MessageSocket:
        """Wait for a caller; return this end of a new channel to it. Callers of other users are turned away."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        ...

    def close(self) -> None:
        """Take no more calls. Twice is allowed."""
        ...


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


class Backend(abc.ABC):
    """The operations of one operating system.

    An fd is a number by which this process knows something of the kernel's. Nobody above does with it what is not
    written here: on some systems it is no file descriptor, or more than one.

    Every method raises ``OSError`` with the kernel's errno when it is refused, and
    leaves nothing behind when it raises.
    """

    #: "linux", "posix" or "windows".
    name: str
    #: Mappings start and end on multiples of this many bytes.
    page_size: int
    #: Locks in shared memory.
    locks: Locks

    # Of messages: flags of `MessageSocket.sendmsg` and `MessageSocket.recvmsg`.
    #: Do not wait.
    DONTWAIT: int
    #: How to take a message: fds that arrive are close-on-exec.
    TAKE: int
    #: The message was longer than the room for it.
    TRUNCATED: int
    #: There was no room for all fds.
    FDS_LOST: int
    #: Level and kind of what is sent beside a message: fds, as ``array("i")``.
    RIGHTS: tuple[int, int]
    #: For a `Poller`.
    READABLE: int = 1
    WRITABLE: int = 4
    #: How long a process that has ended may take until it can be collected, in seconds.
    COLLECT_SECONDS: float = 0.0
    #: How many fds may go beside one message; more go in a carrier.
    DIRECT_FDS: int = 16
    #: More messages than a queue has at a time.
    MOST_MESSAGES: int = 10_000
    #: What it means when fds of a message did not arrive.
    fds_lost_because: str = (
        "this process has as many files open as it may (EMFILE); let arrays share a region, "
        "pass fewer at once, or raise the limit (ulimit -n)"
    )
    #: To have an fd of a memory object is to hold all of it: there is one lease for each object, its fds are counted,
    #: and `replace`, `own_pages` and `discard` do not exist. Else leases are on bytes; see `lock_shared`.
    leases_are_handles: bool = False
    #: Whether `exit_of` can tell an exit code before it is reaped.
    can_look_at_exits: bool = False
    #: Whether event loops can watch fds: else a thread has to.
    loops_watch_fds: bool = True

    @abc.abstractmethod
    def close(self, fd: int) -> None:
        """Close an fd of any kind."""

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

    def more_fds(self) -> int:
        """How many files are open for fds that take more than one."""
        return 0

    @abc.abstractmethod
    def duplicate(self, fd: int) -> int:
        """Return another fd of the same open file description."""

    # -- memory objects -------------------------------------------------------------

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

    def handles(self) -> frozenset[tuple[int, str]]:
        """Return the fds of this process and what they are, but those that are kept on purpose; not on all systems."""
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

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

    def memory_left(self) -> int | None:
        """Return how many bytes this process can be given before the kernel kills for want of them, at most.

        None where no limit is known. It counts limits on groups of processes, not what the machine has.
        """
        return None

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

    # -- mappings -------------------------------------------------------------------

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

    def unlocking(self, fd: int, position: int) -> Iterator[object]:
        """Return an iterator that unlocks, as `unlock`, when it is asked for its one item.

        So a caller can check a condition and unlock with no signal handler in between.
        """
        return map(self.unlock, (fd,), (position,))

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

    def is_abandoned(self, address: int, size: int) -> bool:
        """Whether who made an object, which is mapped there, has done with it; where `leases_are_handles`."""
        raise NotImplementedError

    def give_up(self, address: int, size: int) -> None:
        """Have done with an object made here; where `leases_are_handles`."""
        raise NotImplementedError

    # -- counters -------------------------------------------------------------------

    @abc.abstractmethod
    def create_counter(self, memory: int) -> int:
        """Return an fd that counts from 0, for everyone who has it; *memory* is the fd of a memory object.

        The count is the kernel's: no lock guards it, so none can die with its holder.
        """

    @abc.abstractmethod
    def count(self, counter: int, change: int = 0, noted: list[int] | None = None) -> int:
        """Add *change* in one step and return the new count; ``EINVAL`` if the count would be negative.

        *noted* gets an item in the C call that adds, and loses one in the C call that subtracts. An interrupted
        caller knows from it whether it has counted.
        """

    @abc.abstractmethod
    def clear_counter(self, counter: int) -> None:
        """Let it count from 0 again."""

    # -- messages -------------------------------------------------------------------

    @abc.abstractmethod
    def message_sockets(self) -> tuple[MessageSocket, MessageSocket]:
        """Return two connected sockets that keep message boundaries and carry fds."""

    @abc.abstractmethod
    def message_socket(self, fd: int) -> MessageSocket:
        """Return the end that has arrived as *fd*, which is its own from here on.

        When it is something else, the errno is ``EPROTOTYPE``, and *fd* stays the caller's.
        """

    @abc.abstractmethod
    def fds_space(self, count: int) -> int:
        """Return the bytes that so many fds take beside a message: the second argument of ``recvmsg``."""

    @abc.abstractmethod
    def wait_readable(self, end: HasFileno, seconds: float | None) -> bool:
        """Wait until a message is there, or nobody can send one any more; tell whether it is so."""

    @abc.abstractmethod
    def wait_writable(self, end: HasFileno, seconds: float) -> bool:
        """Wait until there is room for a message; tell whether there may be."""

    @abc.abstractmethod
    def poller(self) -> Poller:
        """Return what waits for several fds."""

    @abc.abstractmethod
    def has_message(self, end: MessageSocket) -> bool:
        """Whether a message waits at this end; it stays there."""

    def has_ended(self, receiver: MessageSocket) -> bool:
        """Whether nothing came because nobody can send any more, and not because a message was empty."""
        return True

    @abc.abstractmethod
    def received_fds(self, ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
        """Return the fds that came beside a message."""

    def forget_sent(self, sender: MessageSocket) -> None:  # noqa: B027
        """Let go of the fds that were sent through an end and not received: nobody is going to."""

    @abc.abstractmethod
    def listen(self, address: str | None, backlog: int) -> Callee:
        """Be called at *address*, or one that is made up and that nobody can guess."""

    @abc.abstractmethod
    def call(self, address: str) -> MessageSocket:
        """Call who listens there; ``PermissionError`` if it is a process of another user."""

    def forget_address(self, address: str) -> None:  # noqa: B027
        """Take away what a process that was called at *address* may have left there."""

    # -- wakeup pipes: processes that sleep until they are rung for --------------------------

    @abc.abstractmethod
    def create_wakeup(self) -> tuple[int, int]:
        """Return two fds: one to wait at, for any number of processes, and one to `ring`."""

    @abc.abstractmethod
    def wake(self, wakeup: int, how_many: int) -> None:
        """Wake so many of those who wait, or let as many waits return at once."""

    @abc.abstractmethod
    def wait_for_wakeup(self, wakeup: int, seconds: float | None = None) -> bool | None:
        """Wait; True when it was rung for this one, False when nobody can ring any more, None after *seconds*."""

    # -- processes ------------------------------------------------------------------

    @abc.abstractmethod
    def forking(self) -> AbstractContextManager[int]:
        """Fork one child inside: gives what `open_process` may need in order to watch it, or -1."""

    def spawning(self) -> AbstractContextManager[tuple[int, int]]:
        """Start one child anew inside: gives the same, and an fd for the child's `hold_birth`; or -1 twice."""
        return contextlib.nullcontext((-1, -1))

    def hold_birth(self, fd: int) -> None:  # noqa: B027
        """In a process that was started anew: hold that fd to the end, and close it in processes forked from here."""

    @abc.abstractmethod
    def open_process(self, pid: int, sentinel: int = -1) -> int:
        """Return an fd that becomes readable when the process ends; at once when it was reaped already.

        Args:
            pid: The process.
            sentinel: What ``multiprocess`` watches it by, or what `forking` or `spawning` gave; it stays the caller's.
        """

    def exit_of(self, pid: int, *, reap: bool) -> int | None:
        """Return the exit code of a child that has ended, with the signal's number negated; None while it runs.

        Without *reap* it can be asked again. Where `can_look_at_exits`.

        Args:
            pid: The child.
            reap: Let the kernel forget it.

        Raises:
            ChildProcessError: It was reaped before, or SIGCHLD is ignored and it has ended.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def signal_process(self, process: int, pid: int, number: int) -> None:
        """Send a signal to a process that `open_process` has opened; ``ProcessLookupError`` when it has ended."""

    @abc.abstractmethod
    def is_stopped(self, pid: int) -> bool | None:
        """Whether a child was stopped by a signal; None when it has ended, or it cannot be told."""

    @abc.abstractmethod
    def is_running(self, pid: int) -> bool:
        """Whether there is such a process, and it has not ended."""

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

    def step_back(self) -> None:  # noqa: B027 - nothing, where there is nothing for it
        """Let others that wait for this core go first, where the system has that."""

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

    @abc.abstractmethod
    def start_time(self, pid: int) -> int:
        """Return when *pid* was started, in a unit of the kernel: tells a reused pid."""

    def process_token(self) -> int:
        """Return a number of 64 bits by which other processes know this one; bit 31 is not set, and it is not 0.

        It is that of no other process, also when the pid is used again, and not that of the process that forked this.
        """
        pid = os.getpid()
        return (self.start_time(pid) & 0xFFFFFFFF) << 32 | pid

    def is_alive(self, token: int) -> bool:
        """Whether the process with that `process_token` has not ended; it need not have been collected."""
        pid = token & 0x7FFFFFFF
        try:
            return self.is_running(pid) and self.start_time(pid) & 0xFFFFFFFF == token >> 32
        except OSError:
            return False

    @abc.abstractmethod
    def create_lifeline(self) -> tuple[int, int]:
        """Return two fds: for `die_with`, and one that must stay open for as long as they are to live."""

    @abc.abstractmethod
    def die_with(self, lifeline: int) -> int:
        """Have the kernel kill this process when the other end of *lifeline* is closed.

        Args:
            lifeline: The first of `create_lifeline`.

        Returns:
            An fd that must stay open for as long as the arrangement is wanted.
        """
