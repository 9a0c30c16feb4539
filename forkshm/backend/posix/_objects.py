"""Memory objects of shm_open(3), each with a label on an extra page, and their mappings."""

from __future__ import annotations

import dataclasses
import errno
import mmap as _mmap
import os
import secrets
import stat
import struct
import sys
import tempfile
from typing import TYPE_CHECKING

from forkshm.backend import _syscalls
from forkshm.backend._interface import Access, Advice, Identity
from forkshm.backend.posix._whole import surely, whole
from forkshm.errors import UnsupportedError

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._green import close  # noqa: E402 - after the platform check
from forkshm.backend._unix import FLAGS, Unix, fallocate  # noqa: E402
from forkshm.backend.posix._companions import Companions, Noted  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable


# <sys/mman.h> as Python exposes it; some systems lack some of the constants.
_ADVICE = {
    advice: getattr(_mmap, f"MADV_{name}", None)
    for advice, name in (
        (Advice.normal, "NORMAL"),
        (Advice.random, "RANDOM"),
        (Advice.sequential, "SEQUENTIAL"),
        (Advice.willneed, "WILLNEED"),
        (Advice.dontneed, "DONTNEED"),
        (Advice.huge_pages, "HUGEPAGE"),
    )
}
# The label on the last page of a memory object: magic, identity, size, and the process that carves up a segment.
_LABEL = struct.Struct("<8sQQQQ")
_MAGIC = b"forkshm\1"
_ON_ALL_TRIES = 20


@dataclasses.dataclass
class _Object:
    """A memory object that was created in this process."""

    # The fd with which the object was created.
    fd: int
    # Positions that this fd holds. They need no pipe, because no other process has this fd.
    held: set[int] = dataclasses.field(default_factory=set)
    # For each position that others hold, the reading ends of the pipes that report it.
    lent: dict[int, list[Noted]] = dataclasses.field(default_factory=dict)


class Objects(Companions):
    """The part of the backend that makes, opens and maps memory objects."""

    def __init__(self) -> None:
        super().__init__()
        # The objects that this process has created: by fd, with what the fd refers to, and by identity.
        self._made: dict[int, tuple[Identity, Identity]] = {}
        self._objects: dict[Identity, _Object] = {}

    @surely
    def close(self, fd: int, close: Callable[[int], None] = close) -> None:  # at exit the name may be gone
        companions = self.detach_companions(fd)
        if fd in self._made:
            self._forget(self._made.pop(fd)[0])
        close(fd)
        if companions:
            self.close_noted(*companions)

    def _forget(self, identity: Identity) -> None:
        for readers in self._objects.pop(identity).lent.values():
            self.close_noted(*readers)

    def made_by(self, fd: int) -> Identity | None:
        """Return the identity of an object that this process has created with *fd*, or None."""
        made = self._made.get(fd)
        if made is None:
            return None
        if self.refers_to(fd, made[1]):
            return made[0]
        self._forget(self._made.pop(fd)[0])  # other code has closed the fd, and the number is in use again
        return None

    @whole
    def create_memory(self, size: int, label: str, *, sealable: bool = True, sparse: bool = False) -> int:
        page = self.page_size
        start = -(-size // page) * page
        if start + page >= 2**63:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        fd = self._new_object(label)
        try:
            os.ftruncate(fd, start + page)
            reserved = start if sparse else 0
            self._reserve(fd, reserved, start + page - reserved)
            number = secrets.randbits(63), secrets.randbits(63)
            self._write_label(fd, start, _LABEL.pack(_MAGIC, *number, size, 0))
            self.made_by(fd)
            file = self.file_of(fd)
            self._objects[number], self._made[fd] = _Object(fd), (number, file)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _write_label(self, fd: int, where: int, label: bytes) -> None:
        address = _syscalls.mmap(fd, self.page_size, *FLAGS[Access.SHARED], where)
        try:
            self.copy(address, label, len(label))
        finally:
            self.unmap(address, self.page_size)

    def _sign(self, fd: int) -> None:
        """Write into the label of an object that this process carves it up."""
        status = os.fstat(fd)
        if (label := self._label(fd, status)) is not None:
            self._write_label(fd, status.st_size - self.page_size, _LABEL.pack(*label[:4], os.getpid()))

    def reserve(self, fd: int, start: int, size: int) -> None:
        self._reserve(fd, start, size)

    def _reserve(self, fd: int, start: int, size: int) -> None:
        """Allocate these bytes where memory objects have a separate limit, as in /dev/shm.

        Without this, a write there could end in SIGBUS.
        """
        try:
            fallocate(fd, start, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def _new_object(self, label: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        for attempt in range(_ON_ALL_TRIES):
            name = f"/forkshm-{label}-{secrets.token_hex(6)}".encode()  # macOS allows 31 characters
            try:
                fd = _syscalls.shm_open(name, flags, 0o600)
            except FileExistsError:
                if attempt == _ON_ALL_TRIES - 1:
                    raise
                continue
            except OSError as error:
                self._once_more(error)
                continue
            # A process that is killed here leaves an empty named object behind.
            try:
                _syscalls.shm_unlink(name)
                os.set_inheritable(fd, False)
            except BaseException:
                os.close(fd)
                raise
            return self._noted(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    @whole
    def create_growing(self, label: str) -> int:
        # On macOS, objects of shm_open(3) can be resized only once and cannot be written to, so a file is used. Not
        # every file system has files of any size, however.
        fd = self._new_file(label)
        try:
            if not _is_boundless(fd):
                os.close(fd)
                fd = -1
                fd = self._new_object(label)
            os.ftruncate(fd, 1)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        return fd

    def _new_file(self, label: str) -> int:
        fd, path = tempfile.mkstemp(prefix=f"forkshm-{label}-")
        try:
            os.unlink(path)
        except BaseException:
            os.close(fd)
            raise
        return self._noted(fd)

    @whole
    def open_named(self, name: str, *, create: bool, writable: bool, permissions: int = 0) -> int:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | (os.O_CREAT | os.O_EXCL if create else 0)
        path = os.fsencode("/" + name)
        try:
            # For objects that are files, see `Unix.open_named`; for others, the system refuses the flags.
            fd = _syscalls.shm_open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, permissions)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = _syscalls.shm_open(path, flags, permissions)
        try:
            os.set_inheritable(fd, False)
            if create:
                os.fchmod(fd, permissions)
        except BaseException:
            os.close(fd)
            if create:
                _syscalls.shm_unlink(path)
            raise
        return fd

    def open_own_memory(self) -> int:
        raise OSError(errno.ENOTSUP, "this system has no /proc/self/mem")

    def seal_writes(self, fd: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    @whole
    def reopen(self, fd: int) -> int:
        # Without companions: a new description holds no bytes.
        return Unix.duplicate(self, fd)

    def open_remote(self, pid: int, fd: int, identity: Identity) -> int:
        raise _no_proc()

    def start_time(self, pid: int) -> int:
        raise _no_proc()

    @whole
    def identify(self, fd: int) -> tuple[Identity, int]:
        status = os.fstat(fd)
        if (label := self._label(fd, status)) is not None:
            _, first, second, size, _ = label
            return (first, second), size
        return (status.st_dev, status.st_ino), status.st_size

    def _label(self, fd: int, status: os.stat_result) -> tuple[bytes, int, int, int, int] | None:
        page = self.page_size
        where = status.st_size - page
        if status.st_nlink or where < page or where % page or not _is_file(status):
            return None
        try:
            # Reading needs no mapping, so it works at the limit on mappings.
            label = _LABEL.unpack(os.pread(fd, _LABEL.size, where))
        except OSError:
            try:
                label = self._mapped_label(fd, where)
            except OSError:
                return None
        return label if label[0] == _MAGIC and label[3] <= where else None

    def _mapped_label(self, fd: int, where: int) -> tuple[bytes, int, int, int, int]:
        """Read the label where objects of shm_open(3) cannot be read, as on macOS."""
        mapped: list[int] = []
        try:
            _syscalls.mmap_into(mapped, fd, self.page_size, *FLAGS[Access.READ], where)
            return _LABEL.unpack(self.bytes_at(mapped[0], _LABEL.size))
        finally:
            if mapped:
                self.unmap_from(mapped, self.page_size)

    def map_at(self, mapped: list[int], address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        # Without MAP_FIXED the address is a hint, which the kernel follows if the range is free.
        _syscalls.mmap_into(mapped, fd, size, *FLAGS[access], offset, address)
        if mapped[-1] != address:
            self.unmap_from(mapped, size)
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))

    def advise(self, address: int, size: int, advice: Advice, *, writable: bool = True) -> None:
        number = _ADVICE.get(advice)
        if number is None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        _syscalls.madvise(address, size, number)

    def own_pages(self, address: int, size: int) -> list[tuple[int, int]]:
        raise OSError(errno.ENOTSUP, "this system has no /proc/self/pagemap")

    def discard(self, address: int, size: int) -> None:
        raise OSError(errno.ENOTSUP, "this system cannot release pages of shared memory")


def _is_boundless(fd: int) -> bool:
    try:
        os.ftruncate(fd, 2**60)
    except OSError:
        return False
    return True


def _no_proc() -> UnsupportedError:
    return UnsupportedError(
        "cannot send memory through a channel of another library: this backend lacks /proc. Use forkshm's own Queue, "
        "Pipe, Pool or Executor, or send bytes(region.buf).",
        capability="proc",
    )


def _is_file(status: os.stat_result) -> bool:
    # Objects of shm_open(3) are regular files on Linux and FreeBSD, and of no type on macOS.
    return stat.S_IFMT(status.st_mode) in (0, stat.S_IFREG)
