"""The backend for macOS, the BSDs, and Linux on request: it uses only what all POSIX systems have.

An fd may have *companions* here: fds that travel in the same messages, are duplicated and inherited with it, and are
closed with it. They make up for missing features:

* An end of a channel is a SOCK_DGRAM socket, which keeps messages whole and delivers each to one receiver. Such a
socket
  does not report that its peers are gone. Its companion does: an end of a stream on which nothing is ever sent.
* A lease on a byte is the writing end of a pipe, a companion of the fd that holds the lease. The process that carves up
  the memory keeps the reading end. It hangs up once no process and no message holds the byte.

A memory object has one extra page, its label. It holds the creator, the size, and an identity, which fstat(2) of macOS
does not report.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import errno
import fcntl
import mmap as _mmap
import os
import resource
import secrets
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any, cast

from forkshm import _interrupts, _system
from forkshm.backend import _groups, _syscalls
from forkshm.backend._interface import Access, Advice, HasFileno, Identity
from forkshm.backend.posix import _record_locks
from forkshm.backend.posix._whole import surely, whole
from forkshm.errors import UnsupportedError

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

from forkshm.backend._unix import FLAGS, Unix, fallocate, seek_noted  # noqa: E402 - after the platform check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from forkshm.backend._interface import Callee, MessageSocket

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

# Requested buffer size: BSD kernels give a message socket only 2 to 16 KiB by default.
_BUFFER = 256 * 1024
# The bytes of a message are followed by an entry for each companion (the position of its fd, and its purpose), the
# number of fds, and the number of companions.
_COMPANION = struct.Struct("<Bq")
_MOST_COMPANIONS = 127
_TRAILER = _COMPANION.size * _MOST_COMPANIONS + 2
_MOST_FDS = 253
# Purposes of companions: one that reports the end of the peers, or the position of the byte that is held.
_LIFE = -1
# Stands for the creator of a segment, which the label names: it holds this position while it lives.
_CREATOR = 2**62

# As plain ints: combining the enum's members takes longer than the system call.
_DONTWAIT, _TRUNCATED = int(socket.MSG_DONTWAIT), int(socket.MSG_TRUNC)
# Whether poll(2) reports that the other end of a SOCK_DGRAM socket has room.
_TELLS_OF_ROOM = sys.platform == "linux"
# Whether received fds are close-on-exec from the start. Elsewhere, a program started at that moment may inherit them.
_BORN_CLOSED = hasattr(socket, "MSG_CMSG_CLOEXEC")
_FULL_PAUSE = 0.001
# Seconds to wait for a busy counter, which is free again after some microseconds.
_COUNT_PAUSE = 0.00005
_PEER_GONE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EDESTADDRREQ})

_ON_ALL_TRIES = 20


@dataclasses.dataclass
class _Object:
    """A memory object that was created in this process."""

    # The fd with which the object was created.
    fd: int
    # Positions that this fd holds. They need no pipe, because no other process has this fd.
    held: set[int] = dataclasses.field(default_factory=set)
    # For each position that others hold, the reading ends of the pipes that report it.
    lent: dict[int, list[int]] = dataclasses.field(default_factory=dict)


class PosixBackend(Unix):
    """A POSIX system with shm_open(3), record locks, and fds in messages."""

    name = "posix"
    locks = _record_locks
    # A pipe reports the end of a process before the kernel has its exit code.
    COLLECT_SECONDS = 5.0

    def __init__(self) -> None:
        super().__init__()
        # For each fd with companions: the purpose and the number of each companion.
        self._companions: dict[int, list[tuple[int, int]]] = {}
        # For each position held by fds of this process: those fds, for all objects.
        self._holders: dict[int, set[int]] = {}
        # The objects that this process has created, by fd and by identity.
        self._made: dict[int, Identity] = {}
        self._objects: dict[Identity, _Object] = {}
        self._counting = _interrupts.RLock()
        self._births = _Births()
        _system.register_at_fork(after_in_child=self._in_child)

    def _in_child(self) -> None:
        # Leases that the parent has lent are the parent's to wait for.
        for identity in self._made.values():
            self._forget(identity)
        self._made.clear()
        self._counting = _interrupts.RLock()
        self._births.in_child()

    # -- fds and their companions ----------------------------------------------------------

    @surely
    def close(self, fd: int, close: Callable[[int], None] = os.close) -> None:  # at exit the name may be gone
        companions = self.detach_companions(fd)
        if fd in self._made:
            self._forget(self._made.pop(fd))
        close(fd)
        for companion in companions:
            close(companion)

    def _forget(self, identity: Identity) -> None:
        for readers in self._objects.pop(identity).lent.values():
            for reader in readers:
                os.close(reader)

    @surely
    def detach_companions(self, fd: int) -> list[int]:
        """Forget the companions of an fd that is being closed, and return them."""
        companions = self._companions.pop(fd, None)
        if companions is None:
            return []
        for what, _ in companions:
            if what >= 0:
                self._no_holder(fd, what)
        return [companion for _, companion in companions]

    @whole
    def duplicate(self, fd: int) -> int:
        copy = super().duplicate(fd)
        try:
            for what, companion in self._companions.get(fd, ()):
                self.attach(copy, what, super().duplicate(companion))
        except BaseException:
            self.close(copy)
            raise
        return copy

    @whole
    def reopen_into(self, fds: list[int], fd: int) -> None:
        fds.append(self.reopen(fd))

    @surely
    def close_all(self, fds: list[int]) -> None:
        while fds:
            with contextlib.suppress(OSError):  # it was closed elsewhere
                self.close(fds.pop())

    @whole
    def attach(self, fd: int, what: int, companion: int) -> None:
        """Make *companion* travel with *fd*."""
        self._companions.setdefault(fd, []).append((what, companion))
        if what >= 0:
            self._holders.setdefault(what, set()).add(fd)

    def _no_holder(self, fd: int, position: int) -> None:
        holders = self._holders.get(position)
        if holders is not None:
            holders.discard(fd)
            if not holders:
                self._holders.pop(position, None)

    def companions(self, fd: int) -> Sequence[tuple[int, int]]:
        """Return the companions of *fd*: for each its purpose and its number."""
        return self._companions.get(fd, ())

    def raise_fd_limit(self) -> bool:
        if super().raise_fd_limit():
            return True
        # macOS reports no hard limit, but accepts at most this value.
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = os.sysconf("SC_OPEN_MAX") if soft < 0 else max(soft, _OPEN_MAX)
        if soft < most and resource.getrlimit(resource.RLIMIT_NOFILE)[1] == resource.RLIM_INFINITY:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.RLIM_INFINITY))
                return True
        return False

    def more_fds(self) -> int:
        companions = sum(len(companions) for companions in list(self._companions.values()))
        return companions + sum(len(readers) for made in list(self._objects.values()) for readers in made.lent.values())

    # -- memory objects ---------------------------------------------------------------

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
            self._objects[number], self._made[fd] = _Object(fd), number
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
            raise
        return fd

    def open_own_memory(self) -> int:
        raise OSError(errno.ENOTSUP, "this system has no /proc/self/mem")

    def seal_writes(self, fd: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    @whole
    def reopen(self, fd: int) -> int:
        # Without companions: a new description holds no bytes.
        return super().duplicate(fd)

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
        if status.st_nlink or status.st_size < 2 * page or status.st_size % page or not _is_file(status):
            return None
        try:
            address = _syscalls.mmap(fd, page, *FLAGS[Access.READ], status.st_size - page)
        except OSError:
            return None
        label = _LABEL.unpack(self.bytes_at(address, _LABEL.size))
        self.unmap(address, page)
        return label if label[0] == _MAGIC and label[3] <= status.st_size - page else None

    # -- mappings ---------------------------------------------------------------------

    def map_at(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        # Without MAP_FIXED the address is a hint, which the kernel follows if the range is free.
        got = _syscalls.mmap(fd, size, *FLAGS[access], offset, address)
        if got != address:
            self.unmap(got, size)
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

    # -- leases -----------------------------------------------------------------------

    @whole
    def lock_shared(self, fd: int, position: int) -> None:
        if position == _CREATOR:
            self._sign(fd)
            return
        if self.companion(fd, position) is not None:
            return
        if (own := self._made.get(fd)) is not None:
            self._objects[own].held.add(position)
            return
        identity, _ = self.identify(fd)
        made = self._objects.get(identity)
        for other in self._others(fd, position, identity):
            self.attach(fd, position, Unix.duplicate(self, other))
            return
        if made is None:  # a process that did not create the object holds only bytes lent to it
            raise OSError(errno.EACCES, f"no description in this process holds byte {position} of fd {fd}")
        read_end, write_end = self._pipe()
        made.lent.setdefault(position, []).append(read_end)
        self.attach(fd, position, write_end)

    @surely
    def unlock(self, fd: int, position: int) -> None:
        if (own := self._made.get(fd)) is not None:
            self._objects[own].held.discard(position)
        companions = self._companions.get(fd, [])
        for found in [found for found in companions if found[0] == position]:
            companions.remove(found)
            os.close(found[1])
            self._no_holder(fd, position)
        if not companions:
            self._companions.pop(fd, None)

    @whole
    def is_held(self, fd: int, position: int) -> bool:
        if position == _CREATOR:
            label = self._label(fd, os.fstat(fd))
            return label is not None and label[4] != 0 and self.is_running(label[4])
        identity = self._made.get(fd) or self.identify(fd)[0]
        made = self._objects.get(identity)
        if made is not None and position in made.lent:
            readers = made.lent[position]
            for reader in list(readers):
                if not _has_hung_up(reader):
                    return True
                readers.remove(reader)
                os.close(reader)
            del made.lent[position]
            return made.fd != fd and position in made.held
        if made is not None and made.fd != fd and position in made.held:
            return True
        return any(True for _ in self._others(fd, position, identity))

    def companion(self, fd: int, what: int) -> int | None:
        """Return the companion of an fd that has that purpose."""
        for found, companion in self._companions.get(fd, ()):
            if found == what:
                return companion
        return None

    def _others(self, fd: int, position: int, identity: Identity) -> Iterator[int]:
        """Return the companions by which other fds of that object hold the byte."""
        for other in list(self._holders.get(position, ())):
            if other != fd and self.identify(other)[0] == identity:
                companion = self.companion(other, position)
                if companion is not None:
                    yield companion

    # -- counters ---------------------------------------------------------------------

    @whole
    def create_counter(self, memory: int) -> int:
        # The position of an open file description, as on Linux; the file has no name.
        return self._new_file("counter")

    def count(self, counter: int, change: int = 0, noted: list[int] | None = None) -> int:
        if not change:
            return os.lseek(counter, 0, os.SEEK_CUR)
        while (moved := self._count_now(counter, change, noted)) is None:
            time.sleep(_COUNT_PAUSE)
        return moved

    @whole
    def _count_now(self, counter: int, change: int, noted: list[int] | None) -> int | None:
        """Add to the counter; return None if another process is doing so."""
        # POSIX does not promise that lseek(2) adds atomically. A record lock vanishes with its process.
        with self._counting:
            try:
                fcntl.lockf(counter, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return None
                raise
            try:
                if noted is None:
                    return os.lseek(counter, change, os.SEEK_CUR)
                return seek_noted(noted, counter, change)
            finally:
                fcntl.lockf(counter, fcntl.LOCK_UN)

    def clear_counter(self, counter: int) -> None:
        os.lseek(counter, 0, os.SEEK_SET)

    # -- messages ---------------------------------------------------------------------

    @whole
    def message_sockets(self) -> tuple[End, End]:
        data = self._socketpair(socket.SOCK_DGRAM)
        try:
            lives = self._socketpair(socket.SOCK_STREAM)
        except BaseException:
            for end in data:
                end.close()
            raise
        first, second = (self._joined(end, life) for end, life in zip(data, lives, strict=True))
        return first, second

    def _socketpair(self, kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
        try:
            ends = socket.socketpair(socket.AF_UNIX, kind)
        except OSError as error:
            self._once_more(error)
            ends = socket.socketpair(socket.AF_UNIX, kind)
        self._noted(ends[1].fileno())
        return ends

    def _joined(self, data: socket.socket, life: socket.socket) -> End:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            if data.getsockopt(socket.SOL_SOCKET, option) < _SMALLEST_BUFFER:
                data.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        fd = data.detach()
        self.attach(fd, _LIFE, life.detach())
        return End(self, fd)

    @whole
    def message_socket(self, fd: int) -> End:
        end = End(self, fd)
        if end.family != socket.AF_UNIX or end.type != socket.SOCK_DGRAM:
            found = f"{end.family.name}, {end.type.name}"
            end.detach()
            raise OSError(errno.EPROTOTYPE, f"a socket of {found} instead of AF_UNIX, SOCK_DGRAM")
        return end

    def wait_readable(self, end: HasFileno, seconds: float | None) -> bool:
        fd = end.fileno()
        return _wait(None if seconds is None else max(seconds, 0.0), fd, self.companion(fd, _LIFE))

    def has_ended(self, receiver: MessageSocket) -> bool:
        return not isinstance(receiver, End) or receiver.said_end

    def listen(self, address: str | None, backlog: int) -> Callee:
        return _Callee(self, address, backlog)

    def call(self, address: str) -> End:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            caller.settimeout(None)
            if (uid := _owner(address)) != os.geteuid():
                raise PermissionError(
                    errno.EACCES, f"the peer belongs to user {uid}, and this process to user {os.geteuid()}"
                )
            caller.connect(address)
            _, ancillary, _, _ = caller.recvmsg(1, self.fds_space(2), self.TAKE)
        fds = self.received_fds(ancillary)
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the listener closed the connection")
        for fd in fds:
            os.set_inheritable(fd, False)
        self.attach(fds[0], _LIFE, fds[1])
        return self.message_socket(fds[0])

    def forget_address(self, address: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(address)
        folder = os.path.dirname(address)
        if os.path.basename(folder).startswith(_FOLDER):
            with contextlib.suppress(OSError):
                os.rmdir(folder)

    # -- processes --------------------------------------------------------------------

    @contextlib.contextmanager
    def forking(self) -> Iterator[int]:
        ends: list[int] = []
        try:
            self._begin_birth(ends, forked=True)
            yield ends[0]
        finally:
            if ends:
                self._births.end(ends[1])

    @contextlib.contextmanager
    def spawning(self) -> Iterator[tuple[int, int]]:
        ends: list[int] = []
        try:
            self._begin_birth(ends, forked=False)
            yield ends[0], ends[1]
        finally:
            if ends:
                self._births.end(ends[1])

    @whole
    def _begin_birth(self, ends: list[int], *, forked: bool) -> None:
        ends += self._pipe()
        self._births.begin(*ends, forked=forked)

    @surely
    def hold_birth(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._births.hold(fd)

    @whole
    def open_process(self, pid: int, sentinel: int = -1) -> int:
        return super().duplicate(sentinel)

    def signal_process(self, process: int, pid: int, number: int) -> None:
        # A child's pid is not reused until the child is collected.
        if _wait(0.0, process, None):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        os.kill(pid, number)

    def is_stopped(self, pid: int) -> bool | None:
        if sys.platform != "darwin" and hasattr(os, "waitid"):
            try:
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return None
                return os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:
                pass  # a child of the fork server
            except OSError:
                return None
        try:
            listed = subprocess.run(  # noqa: S603
                ["ps", "-o", "state=", "-p", str(pid)],  # noqa: S607 - found on the PATH
                capture_output=True,
                check=False,
                text=True,
            )
        except OSError:
            return None
        state = listed.stdout.strip()[:1]
        return None if state in ("", "Z", "X") else state in ("T", "t")

    def is_running(self, pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # the pid belongs to a process of another user
        return True

    def process_token(self) -> int:
        return _record_locks.process_token()

    def is_alive(self, token: int) -> bool:
        return _record_locks.is_alive(token)

    def usable_cores(self) -> int:
        if sys.platform != "darwin" and hasattr(os, "sched_getaffinity"):
            return _groups.within_quota(len(os.sched_getaffinity(0)))
        return os.cpu_count() or 1

    def die_with(self, lifeline: int) -> int:
        # POSIX has no signal for the closing of a pipe, so a thread waits for it.
        own = super().duplicate(lifeline)
        pid = os.getpid()

        def wait() -> None:
            while os.getpid() == pid:
                try:
                    if os.read(own, 1) == b"":
                        os.kill(pid, signal.SIGKILL)
                except InterruptedError:
                    continue
                except OSError:
                    return  # closed

        threading.Thread(target=wait, name="forkshm-lifeline", daemon=True).start()
        return own


class End(socket.socket):
    """An end of a channel: a socket that keeps messages whole, and a companion that reports the end of the peers."""

    def __init__(self, backend: PosixBackend, fd: int) -> None:
        super().__init__(fileno=fd)
        self.settimeout(None)  # overrides socket.setdefaulttimeout()
        self._backend = backend
        # Whether the last receive reported that the other end is gone.
        self.said_end = False

    def _life(self) -> int | None:
        return self._backend.companion(self.fileno(), _LIFE)

    def send(self, data: Any, flags: int = 0, /) -> int:
        return self.sendmsg([data], (), flags)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /) -> int:
        while (sent := self._send_now(buffers, ancdata, flags | _DONTWAIT)) < 0:
            if flags & _DONTWAIT or not os.get_blocking(self.fileno()):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            # BSD does not report when there is room again.
            self._backend.wait_writable(self, _FULL_PAUSE)
            if not _TELLS_OF_ROOM:
                time.sleep(_FULL_PAUSE)
        return sent

    @whole
    def _send_now(self, buffers: Any, ancdata: Any, flags: int) -> int:
        """Send a message; return its number of bytes, or -1 if there is no room."""
        fds = [fd for _, _, part in ancdata for fd in part]
        companions = [
            (place, what, companion) for place, fd in enumerate(fds) for what, companion in self._backend.companions(fd)
        ]
        counts = bytes((len(fds), len(companions)))
        message = b"".join([*buffers, *(_COMPANION.pack(place, what) for place, what, _ in companions), counts])
        fds += [companion for _, _, companion in companions]
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            super().sendmsg([message], beside, flags)
        except BlockingIOError:
            return -1
        except OSError as error:
            if error.errno in _PEER_GONE:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
            if error.errno == errno.ENOBUFS:
                return -1
            raise
        return len(message) - len(counts) - _COMPANION.size * len(companions)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> tuple[bytes, list[Any], int, Any]:
        space = socket.CMSG_SPACE(_MOST_FDS * 4) if ancbufsize else 0
        self.said_end = over = False
        while True:
            try:
                return self._receive_now(bufsize, space, flags | _DONTWAIT)
            except BlockingIOError:
                if over:
                    self.said_end = True
                    return b"", [], 0, None
                life = self._life()
                # Messages sent before the other end closed are found by one more look.
                over = life is not None and _has_hung_up(life)
                if not over:
                    if flags & _DONTWAIT:
                        raise
                    _wait(None, self.fileno(), life)
            except ConnectionResetError:
                pass  # BSD reports once that the other end is gone

    @whole
    def _receive_now(self, bufsize: int, space: int, flags: int) -> tuple[bytes, list[Any], int, Any]:
        data, ancillary, found, _ = super().recvmsg(bufsize + _TRAILER, space, flags)
        return self._taken(data, ancillary, found, bufsize)

    def _taken(self, data: bytes, ancillary: Any, found: int, bufsize: int) -> tuple[bytes, list[Any], int, Any]:
        fds = self._backend.received_fds(ancillary)
        if not _BORN_CLOSED:
            for fd in fds:
                os.set_inheritable(fd, False)
        if len(data) >= 2 and not found & _TRUNCATED:
            end = len(data) - 2
            start = end - _COMPANION.size * data[end + 1]
            if start >= 0:
                # If there was no room for all fds, the companions were lost first, because they come last.
                count = min(data[end], len(fds))
                for (place, what), companion in zip(_COMPANION.iter_unpack(data[start:end]), fds[count:], strict=False):
                    if place < count:
                        self._backend.attach(fds[place], what, companion)
                    else:
                        os.close(companion)
                data, fds = data[:start], fds[:count]
        if len(data) > bufsize:
            found |= _TRUNCATED
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        return data, beside, found, None

    def shutdown(self, how: int, /) -> None:
        life = self._life()
        if life is not None:
            with contextlib.suppress(OSError):
                other = socket.socket(fileno=os.dup(life))
                with other:
                    other.shutdown(how)
        super().shutdown(how)

    @whole
    def dup(self) -> End:
        return End(self._backend, self._backend.duplicate(self.fileno()))

    @surely
    def close(self) -> None:
        fd = self.detach()
        if fd >= 0:
            self._backend.close(fd)

    # With defaults, because the names of this module may be gone when the program ends.
    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing, warn: Any = warnings.warn) -> None:
        if self.fileno() >= 0:
            if not ends():
                warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self.close()


class _Callee:
    """A listener at an address in a directory of its own, which only this user can enter."""

    def __init__(self, backend: PosixBackend, address: str | None, backlog: int) -> None:
        self._backend = backend
        self._owner = os.getpid()
        self.address = address or os.path.join(tempfile.mkdtemp(prefix=_FOLDER), "manager")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(None)
            self._socket.bind(self.address)
            os.chmod(self.address, 0o600)
            self._socket.listen(backlog)
        except BaseException:
            self.close()
            raise

    def accept(self) -> End:
        while True:
            caller, _ = self._socket.accept()
            with caller:
                ours, theirs = self._backend.message_sockets()
                with contextlib.closing(theirs):
                    fds = [theirs.fileno(), cast("int", theirs._life())]
                    try:
                        caller.settimeout(None)
                        caller.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
                    except OSError:
                        ours.close()
                        continue  # it is gone already
                    return ours

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        if os.getpid() == self._owner:
            self._backend.forget_address(self.address)


class _Births:
    """The pipes by which parents see that their children have ended."""

    def __init__(self) -> None:
        # Writing ends of the pipes of children that are being forked, by thread.
        self._begun: dict[int, int] = {}
        self._here = threading.local()
        # In a child, the writing end that it holds for its parent.
        self._own = -1

    def begin(self, read_end: int, write_end: int, *, forked: bool = True) -> None:
        self._begun[write_end] = read_end
        if forked:
            self._here.write_end = write_end

    @surely
    def end(self, write_end: int) -> None:
        read_end = self._begun.pop(write_end, None)
        self._here.write_end = -1
        if read_end is not None:  # otherwise this is the child, which holds it
            os.close(read_end)
            os.close(write_end)

    def hold(self, write_end: int) -> None:
        self._own = write_end

    def in_child(self) -> None:
        # A child must not hold the writing ends of its siblings or of its parent.
        mine = getattr(self._here, "write_end", -1)
        for fd in (*self._begun, *self._begun.values(), self._own):
            if fd >= 0 and fd != mine:
                os.close(fd)
        self._begun.clear()
        self._own, self._here.write_end = mine, -1


_SMALLEST_BUFFER = 128 * 1024
_OPEN_MAX = 10_240
_FOLDER = "forkshm-manager-"


def _is_boundless(fd: int) -> bool:
    try:
        os.ftruncate(fd, 2**60)
    except OSError:
        return False
    return True


def _owner(address: str) -> int:
    try:
        return os.stat(address).st_uid
    except PermissionError:  # the address is in a directory of another user
        return os.stat(os.path.dirname(address)).st_uid


def _no_proc() -> UnsupportedError:
    return UnsupportedError(
        "cannot send memory through a channel of another library: this backend lacks /proc. Use forkshm's own Queue, "
        "Pipe, Pool or Executor, or send bytes(region.buf).",
        capability="proc",
    )


def _is_file(status: os.stat_result) -> bool:
    # Objects of shm_open(3) are regular files on Linux and FreeBSD, and of no type on macOS.
    return stat.S_IFMT(status.st_mode) in (0, stat.S_IFREG)


def _wait(seconds: float | None, fd: int, life: int | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if life is not None:
        poll.register(life, select.POLLIN)
    return bool(poll.poll(None if seconds is None else -int(-seconds * 1000 // 1)))


def _has_hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
