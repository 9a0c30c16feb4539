"""The operations that Linux and other POSIX systems share."""

from __future__ import annotations

import _socket
import array
import contextlib
import errno
import fcntl
import itertools
import mmap as _mmap
import operator
import os
import resource
import select
import socket
import stat
import sys
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.backend import _memory, _syscalls
from forkshm.backend._addresses import Addresses
from forkshm.backend._interface import UNKNOWN, Access

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._green import Socket, new_poll  # noqa: E402 - after the platform check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from forkshm.backend._interface import HasFileno, Identity, MessageSocket, Poller

MAP_SHARED = _mmap.MAP_SHARED
MAP_PRIVATE = _mmap.MAP_PRIVATE
MAP_FIXED = 0x10
"""<sys/mman.h>; the same on Linux, macOS and the BSDs."""
_MS_ASYNC = 1
_MS_SYNC = {"darwin": 0x10, "freebsd": 0, "openbsd": 2}.get(sys.platform.rstrip("0123456789"), 4)


def seek_noted(noted: list[int], counter: int, change: int) -> int:
    """Add *change* to the position of *counter*, record it in *noted* in the same C call; return the new position."""
    moved = map(os.lseek, (counter,), (change,), (os.SEEK_CUR,))
    if change > 0:
        noted.extend(moved)
        return noted[-1]
    return next(zip(moved, map(noted.pop, (-1,)), strict=False))[0]


class MessageEnd(Socket):
    """An end of a channel, which closes its fd only while the fd refers to it.

    A program may close fds that it did not open, and the numbers then belong to its own files.
    """

    # What the fd refers to. Until this is set, the end does not own the fd.
    _file: Identity = UNKNOWN
    _closing: Iterator[Any] = iter(())

    def own(self, file: Identity, closing: Iterator[Any]) -> None:
        """Take over the fd; see `Unix.closing`."""
        self._file, self._closing = file, closing

    def is_intact(self) -> bool:
        try:
            return bool(_FILE(os.fstat(self.fileno())) == self._file)
        except OSError as error:
            if not _interrupts.is_of_kernel(error):  # raised by a signal handler
                raise
            return False

    @_interrupts.promptly
    def close(self) -> None:
        # One C call detaches and closes the fd.
        both = zip(map(_socket.socket.detach, (self,)), self._closing, strict=False)
        try:
            next(both, None)
        except OSError as error:  # the fd is closed already
            if not _interrupts.is_of_kernel(error):  # raised by a signal handler
                raise

    @_interrupts.promptly
    def __del__(self) -> None:
        try:  # noqa: SIM105 - a context manager is a call at which a signal handler runs
            next(self._closing, None)
        except OSError:
            pass


def adopted(fd: int) -> socket.socket:
    """Return the socket of an fd, which waits without a time limit; take over the fd unless this raises."""
    # Made in two steps, so that the caller keeps the fd if a signal handler raises in between.
    end = Socket.__new__(Socket)
    try:
        end.__init__(fileno=fd)  # type: ignore[misc]
        end.settimeout(None)  # overrides socket.setdefaulttimeout()
    except BaseException:
        end.detach()
        raise
    return end


def accepted(listener: socket.socket, adopt: Callable[[int], Any] = adopted) -> Any:
    """Wait for a caller, and return the socket for it, which *adopt* makes."""
    # `socket.accept` receives an fd and makes its owner one after the other, and is interrupted in between.
    made: list[tuple[int, Any]] = []
    try:
        made.extend(itertools.starmap(listener._accept, _ONCE))  # type: ignore[attr-defined]
        return adopt(made[0][0])
    except BaseException:
        if made:
            os.close(made[0][0])
        raise


FLAGS = {
    Access.READ: (_mmap.PROT_READ, MAP_SHARED),
    Access.SHARED: (_mmap.PROT_READ | _mmap.PROT_WRITE, MAP_SHARED),
    Access.PRIVATE: (_mmap.PROT_READ | _mmap.PROT_WRITE, MAP_PRIVATE),
    Access.SNAPSHOT: (_mmap.PROT_READ, MAP_PRIVATE),
}

_LAST = (-1,)
# The device and the inode in a result of fstat(2).
_FILE: Any = operator.itemgetter(2, 1)
# Number of steps in which the iterator of `closing` tries to close an fd.
_TRIES = 8
# For `itertools.starmap`: makes one call without arguments.
_ONCE: tuple[tuple[()], ...] = ((),)

# The hard limit counts as near when this many fds are left, or half of all fds if that is less.
_FEW_FDS = 256
FREE_FDS = 128
"""Fds that are kept free where the limits allow it: a message whose fds do not all fit loses the rest."""


def _no_fallocate(fd: int, offset: int, size: int, /) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


fallocate: Any = getattr(os, "posix_fallocate", _no_fallocate)
"""posix_fallocate(3), or nothing on macOS, which lacks it."""


# waitid(2). macOS has it, but Python does not expose it there.
_waitid: Any = getattr(os, "waitid", None)
_P_PID: int = getattr(os, "P_PID", 0)
_ENDED: int = getattr(os, "WEXITED", 0) | os.WNOHANG
_KEEP: int = getattr(os, "WNOWAIT", 0)
_EXITED: int = getattr(os, "CLD_EXITED", 0)

# As plain ints; see `Unix.DONTWAIT`.
_SOCKET, _RIGHTS = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS)
_INT_SIZE = array.array("i").itemsize

_LOOK = int(socket.MSG_PEEK) | int(socket.MSG_DONTWAIT)


class Unix(Addresses):
    """A POSIX system."""

    # As plain ints: combining the enum's members takes longer than the system call.
    DONTWAIT = int(socket.MSG_DONTWAIT)
    TAKE = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    TRUNCATED = int(socket.MSG_TRUNC)
    FDS_LOST = int(socket.MSG_CTRUNC)
    RIGHTS = _SOCKET, _RIGHTS
    READABLE = select.POLLIN
    WRITABLE = select.POLLOUT

    def __init__(self) -> None:
        self.page_size = os.sysconf("SC_PAGE_SIZE")
        # The kernel assigns the lowest free number, so a number below this shows that enough fds are left.
        self._roomy_below = _soft_limit() - FREE_FDS
        # Address and size of mappings that the kernel could not unmap yet.
        self._postponed: list[tuple[int, int]] = []

    # -- the limit on open files ------------------------------------------------------

    def raise_fd_limit(self) -> bool:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            except (ValueError, OSError):  # the hard limit is above the system's own
                hard = soft
        self._roomy_below = sys.maxsize  # the limit cannot be raised further
        return soft != hard

    def _noted(self, fd: int) -> int:
        if fd >= self._roomy_below:
            self.raise_fd_limit()
        return fd

    def _once_more(self, error: OSError) -> None:
        """Raise *error*, unless a second attempt may get an fd."""
        if error.errno != errno.EMFILE or not self.raise_fd_limit():
            raise error

    def _open_into(self, fds: list[int], call: Callable[..., int], *arguments: Any) -> None:
        """Call a C function that opens an fd, and append the fd; no signal handler runs in between."""
        try:
            fds.extend(itertools.starmap(call, (arguments,)))
        except OSError as error:
            self._once_more(error)
            fds.extend(itertools.starmap(call, (arguments,)))
        else:
            self._noted(fds[-1])

    def _opened(self, call: Callable[..., int], *arguments: Any) -> int:
        """Return the fd that a C function opens; it is closed if a signal handler raises before the return."""
        fds: list[int] = []
        try:
            self._open_into(fds, call, *arguments)
            return fds[0]
        except BaseException:
            while True:
                if not fds:
                    break
                next(map(os.close, map(fds.pop, _LAST)))
            raise

    def file_of(self, fd: int) -> Identity:
        file: Identity = _FILE(os.fstat(fd))
        return file

    def refers_to(self, fd: int, file: Identity) -> bool:
        if file == UNKNOWN:
            return True
        try:
            return bool(_FILE(os.fstat(fd)) == file)
        except OSError as error:
            if not _interrupts.is_of_kernel(error):  # raised by a signal handler, which os.fstat may run
                raise
            return False

    def closing(self, fd: int, file: Identity) -> Iterator[object]:
        if file == UNKNOWN:
            return map(self.close, (fd,))
        # The check and the close are one C call. But os.fstat multiplies times, which checks for signals. If a handler
        # raises there, the fd is still in the list, and the next step tries again.
        fds = [fd]
        looks = map(os.fstat, itertools.chain.from_iterable(itertools.repeat(fds, _TRIES)))
        is_same = map(file.__eq__, map(_FILE, looks))
        return map(self.close, map(fds.pop, itertools.compress(itertools.repeat(*_LAST), is_same)))

    def fd_limit(self) -> int:
        return _soft_limit()

    def is_scarce(self, fd: int) -> bool:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return hard != resource.RLIM_INFINITY and fd >= hard - min(hard // 2, _FEW_FDS)

    def duplicate(self, fd: int) -> int:
        return self._opened(os.dup, fd)

    def open_named(self, name: str, *, create: bool, writable: bool, permissions: int = 0) -> int:
        flags = (os.O_RDWR if writable else os.O_RDONLY) | (os.O_CREAT | os.O_EXCL if create else 0)
        # NONBLOCK, so that opening a FIFO does not block; its type is refused later. The C library adds the other
        # two flags; passing them costs nothing.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fds: list[int] = []
        try:
            _syscalls.shm_open_into(fds, os.fsencode("/" + name), flags, permissions)
            if create:
                os.fchmod(fds[0], permissions)  # regardless of the umask
            return fds[0]
        except BaseException:
            is_made = create and fds != [] and fds[0] >= 0

            def undo() -> None:
                if is_made:
                    with contextlib.suppress(FileNotFoundError):
                        self.unlink_named(name)
                self.close_all(fds)

            _interrupts.repeat(undo)
            raise

    def unlink_named(self, name: str) -> None:
        _syscalls.shm_unlink(os.fsencode("/" + name))

    def resize(self, fd: int, size: int) -> None:
        if size:
            # posix_fallocate(3) also sets a larger size, and undoes its work when there is no room. It starts at 0
            # because other processes may have left holes, and a size alone reserves nothing. Where the file system
            # cannot allocate, only the size is set.
            try:
                fallocate(fd, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(fd, size)

    def may_write(self, fd: int) -> bool:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    def map(self, fd: int, size: int, access: Access, offset: int = 0) -> int:
        prot, flags = FLAGS[access]
        return _syscalls.mmap(fd, size, prot, flags, offset)

    def replace(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        prot, flags = FLAGS[access]
        _syscalls.mmap(fd, size, prot, flags | MAP_FIXED, offset, address)

    def replacing(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> Iterator[object]:
        prot, flags = FLAGS[access]
        return _syscalls.mmapping(fd, size, prot, flags | MAP_FIXED, offset, address)

    def replace_by_copy(self, address: int, size: int) -> None:
        content = bytes(_memory.buffer_at(address, size))
        prot, flags = FLAGS[Access.PRIVATE]
        mapping = _syscalls.mmapping(-1, size, prot, flags | MAP_FIXED | _mmap.MAP_ANONYMOUS, 0, address)
        # One C call does both: a signal handler must not see the pages without their content.
        list(itertools.starmap(operator.call, ((next, mapping), (_memory.copy_memory, address, content, size))))

    def flush(self, address: int, size: int, *, asynchronous: bool) -> None:
        _syscalls.msync(address, size, _MS_ASYNC if asynchronous else _MS_SYNC)

    def unmap(self, address: int, size: int) -> None:
        try:
            _syscalls.munmap(address, size)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            # munmap(2): this process has reached its limit on mappings, and this call would split one. Until it can be
            # unmapped, the range stays taken, so nothing else is mapped there.
            self._postponed.append((address, size))
            return
        while self._postponed:
            address, size = self._postponed.pop()
            try:
                _syscalls.munmap(address, size)
            except OSError:
                self._postponed.append((address, size))
                return

    def map_into(self, mapped: list[int], fd: int, size: int, access: Access, offset: int = 0) -> None:
        prot, flags = FLAGS[access]
        _syscalls.mmap_into(mapped, fd, size, prot, flags, offset)

    def unmap_from(self, mapped: list[int], size: int) -> None:
        _syscalls.munmap_from(mapped, size)

    def global_int(self, path: str, name: str) -> Any:
        return _memory.global_int(path, name)

    def wait_writable(self, end: HasFileno, seconds: float) -> bool:
        poll = new_poll()
        poll.register(end.fileno(), select.POLLOUT)
        return bool(poll.poll(seconds * 1000))

    def received_fds(self, ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
        fds: list[int] = []
        for level, kind, data in ancillary:
            if level == _SOCKET and kind == _RIGHTS:
                fds += memoryview(data)[: len(data) & -_INT_SIZE].cast("i")
        if fds and max(fds) >= self._roomy_below:
            self.raise_fd_limit()
        return fds

    def fds_space(self, count: int) -> int:
        return socket.CMSG_SPACE(count * _INT_SIZE)

    def open_file(self, path: str, *, writable: bool) -> int:
        # NONBLOCK, so that opening a FIFO does not block; its type is refused later.
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        return self._opened(os.open, path, flags)

    def is_regular(self, fd: int) -> bool:
        return stat.S_ISREG(os.fstat(fd).st_mode)

    def owner(self, fd: int) -> str | None:
        uid = os.fstat(fd).st_uid
        return None if uid == os.geteuid() else f"user {uid}, and you are {os.geteuid()}"

    def has_message(self, end: MessageSocket) -> bool:
        try:
            return bool(end.recv(1, _LOOK))
        except BlockingIOError:
            return False

    def poller(self) -> Poller:
        return new_poll()

    def _pipe(self) -> tuple[int, int]:
        made: list[tuple[int, int]] = []
        try:
            try:
                made.extend(itertools.starmap(os.pipe, _ONCE))
            except OSError as error:
                self._once_more(error)
                made.extend(itertools.starmap(os.pipe, _ONCE))
            self._noted(made[0][1])
        except BaseException:
            if made:
                self.close_all([*made[0]])
            raise
        return made[0]

    def create_wakeup(self) -> tuple[int, int]:
        ends = self._pipe()
        try:
            os.set_blocking(ends[1], False)
        except BaseException:
            self.close_all([*ends])
            raise
        return ends

    def wake(self, wakeup: int, how_many: int) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe already holds 65,536 wakeups
            os.write(wakeup, b"." * how_many)

    def wait_for_wakeup(self, wakeup: int, seconds: float | None = None) -> bool | None:
        if seconds is not None:
            waiting = new_poll()
            waiting.register(wakeup, select.POLLIN)
            if not waiting.poll(seconds * 1000):
                return None
        return os.read(wakeup, 1) != b""

    def create_lifeline(self) -> tuple[int, int]:
        return self._pipe()

    can_look_at_exits = _waitid is not None

    def exit_of(self, pid: int, *, reap: bool) -> int | None:
        # By pid instead of pidfd: another thread may reap the child and close its fd meanwhile. Fd numbers are reused
        # at once, pids only after all others.
        ended = _waitid(_P_PID, pid, _ENDED if reap else _ENDED | _KEEP)
        if ended is None:
            return None
        status: int = ended.si_status
        return status if ended.si_code == _EXITED else -status


def _soft_limit() -> int:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft
