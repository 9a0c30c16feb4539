"""Linux: memfd, seals, OFD locks, SEQPACKET sockets, pidfd."""

from __future__ import annotations

import _socket
import array
import contextlib
import errno
import fcntl
import functools
import io
import math
import os
import resource
import secrets
import select
import signal
import socket
import stat
import struct
import sys
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.backend import _groups, _memory, _syscalls
from forkshm.backend._interface import Access, Advice, HasFileno, Identity, MappedFile

assert sys.platform == "linux"  # type checkers leave out the rest on other systems

from forkshm.backend._green import Socket, close, new_poll  # noqa: E402 - after the platform check
from forkshm.backend._unix import FLAGS, MessageEnd, Unix, accepted, seek_noted  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from contextlib import AbstractContextManager

    from forkshm.backend._interface import Callee, MessageSocket


# <linux/fcntl.h> and <asm-generic/fcntl.h>; Python's fcntl names them only since 3.9 to 3.13.
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
F_SEAL_FUTURE_WRITE = 0x0010
F_OFD_GETLK = 36
F_OFD_SETLK = 37
F_SETSIG = 10

# <asm-generic/mman.h>
_MAP_FIXED_NOREPLACE = 0x100000
_MADV_REMOVE = 9
_ADVICE = {
    Advice.normal: 0,
    Advice.random: 1,
    Advice.sequential: 2,
    Advice.willneed: 3,
    Advice.dontneed: 4,
    Advice.huge_pages: 14,
    Advice.populate: 23,  # MADV_POPULATE_WRITE, Linux 5.14
}
_MADV_POPULATE_READ = 22

# /proc/pid/pagemap of proc(5): the page is in memory or swapped out; it belongs to a file, or is shared.
_PAGE_THERE = 1 << 63 | 1 << 62
_PAGE_OF_FILE = 1 << 61
_PAGEMAP_CHUNK = 2**18
_LAST = (-1,)
# Whether the kernel gives huge pages to shared memory: the word in brackets is the setting.
_SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
# Errors of pwrite(2) where a copy through a mapping would end in SIGBUS or SIGSEGV.
_NO_MEMORY_TO_WRITE = frozenset({errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFAULT})
_lseek = os.lseek  # saves an attribute lookup in calls that take microseconds


# struct flock: l_type, l_whence, l_start, l_len, l_pid. For OFD locks, the pid must be 0.
_FLOCK = struct.Struct("hhqqi4x")


# Few positions are in use at a time, and each is locked and unlocked many times.
@functools.lru_cache(maxsize=4096)
def _one_byte(kind: int, position: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, position, 1, 0)


def _add_own(runs: list[tuple[int, int]], entries: bytes, start: int, page: int) -> None:
    """Add the runs of written pages that *entries* describe."""
    tops = entries[7::8] if sys.byteorder == "little" else entries[::8]
    if not any(top << 56 & _PAGE_THERE and not top << 56 & _PAGE_OF_FILE for top in set(tops)):
        return  # the common case; this comparison is a hundred times as fast as the loop
    for number, entry in enumerate(array.array("Q", entries)):
        if entry & _PAGE_THERE and not entry & _PAGE_OF_FILE:
            here = start + number * page
            if runs and sum(runs[-1]) == here:
                runs[-1] = runs[-1][0], runs[-1][1] + page
            else:
                runs.append((here, page))


class LinuxBackend(Unix):
    """Linux 5.3 and newer (pidfd_open(2) is the newest call needed)."""

    name = "linux"
    one_fd_leases_many = True
    locks = _syscalls
    _device_of_memfds = -1

    close = staticmethod(close)  # pyright: ignore[reportAssignmentType] - no frame in which a handler could run

    @_interrupts.promptly
    def close_all(self, fds: list[int]) -> None:
        try:
            self._close_all(fds)
        except BaseException:  # a signal handler has raised
            self._close_all(fds)
            raise

    def _close_all(self, fds: list[int]) -> None:
        while fds:
            try:
                next(map(os.close, map(fds.pop, _LAST)), None)
            except (OSError, IndexError) as error:  # it was closed elsewhere, or a signal handler was faster
                if isinstance(error, OSError) and not _interrupts.is_of_kernel(error):
                    raise  # of a signal handler
                continue

    def is_object(self, fd: int, identity: Identity) -> bool:
        try:
            status = os.fstat(fd)
        except OSError as error:
            if error.errno != errno.EBADF:  # raised by a signal handler, which os.fstat may run
                raise
            return False
        return status.st_ino == identity[1] and status.st_dev == identity[0]

    def create_memory(self, size: int, label: str, *, sealable: bool = True, sparse: bool = False) -> int:
        fd = self._opened(os.memfd_create, f"forkshm-{label}-{os.getpid()}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            # memfd_create(2), "File sealing": no process can shrink the object.
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK if sealable else F_SEAL_SHRINK | F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def create_growing(self, label: str) -> int:
        return self.create_memory(1, label)

    def write_memory(self, fd: int, identity: Identity, position: int, address: int, nbytes: int) -> bool:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]  # beyond it the kernel sends SIGXFSZ
        if (limit != resource.RLIM_INFINITY and position + nbytes > limit) or not self.is_object(fd, identity):
            return False
        source = memoryview(_memory.buffer_at(address, nbytes)).cast("B")
        done = 0
        while done < nbytes:
            try:
                count = os.pwrite(fd, source[done:], position + done)
            except OSError as error:
                if error.errno in _NO_MEMORY_TO_WRITE:
                    raise
                return False
            if not count:
                return False
            done += count
        return True

    def fills_huge_pages(self) -> bool:
        try:
            with open(_SHMEM_ENABLED) as file:
                return file.read().partition("[")[2].partition("]")[0] in ("always", "within_size", "advise", "force")
        except OSError:
            return False

    def open_own_memory(self) -> int:
        return self._opened(os.open, "/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)

    def memory_left(self) -> int | None:
        return _groups.memory_left()

    def may_shrink(self, fd: int, identity: Identity) -> bool:
        # Named objects are on another device than memfds, and cannot be sealed.
        if self._device_of_memfds < 0:
            probe = self._opened(os.memfd_create, "forkshm-probe", os.MFD_CLOEXEC)
            try:
                self._device_of_memfds = os.fstat(probe).st_dev
            finally:
                os.close(probe)
        return identity[0] == self._device_of_memfds and not fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK

    def seal_writes(self, fd: int) -> None:
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)

    def reopen(self, fd: int) -> int:
        # dup(2) would share the description, and with it the locks; proc(5) gives a new one.
        return self._opened(os.open, f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

    def reopen_into(self, fds: list[int], fd: int) -> None:
        self._open_into(fds, os.open, f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

    def open_remote(self, pid: int, fd: int, identity: Identity) -> int:
        path = f"/proc/{pid}/fd/{fd}"
        status = os.stat(path)
        if (status.st_dev, status.st_ino) == identity:
            try:
                opened = self._opened(os.open, path, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS, errno.ETXTBSY):
                    raise
                opened = self._opened(os.open, path, os.O_RDONLY | os.O_CLOEXEC)  # the file is read-only
            is_same = False
            try:
                # The fd may have been replaced between the check and the open.
                if is_same := self.identify(opened)[0] == identity:
                    return opened
            finally:
                if not is_same:
                    os.close(opened)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    def identify(self, fd: int) -> tuple[Identity, int]:
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino), status.st_size

    def map_at(self, mapped: list[int], address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        prot, flags = FLAGS[access]
        _syscalls.mmap_into(mapped, fd, size, prot, flags | _MAP_FIXED_NOREPLACE, offset, address)
        if mapped[-1] != address:  # kernels before 4.17 treat the address as a hint
            self.unmap_from(mapped, size)
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))

    def advise(self, address: int, size: int, advice: Advice, *, writable: bool = True) -> None:
        number = _ADVICE[advice]
        if advice is Advice.populate and not writable:
            number = _MADV_POPULATE_READ
        _syscalls.madvise(address, size, number)

    def own_pages(self, address: int, size: int) -> list[tuple[int, int]]:
        # pagemap of proc(5) has 8 bytes for each page; every process may read the upper bits of its own. A page that
        # was written is anonymous. A page that was only read, or is absent, still belongs to the object.
        page = self.page_size
        runs: list[tuple[int, int]] = []
        fd = self._opened(os.open, "/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start in range(address, address + size, _PAGEMAP_CHUNK // 8 * page):
                wanted = min(_PAGEMAP_CHUNK, (address + size - start) // page * 8)
                entries = os.pread(fd, wanted, start // page * 8)
                if len(entries) != wanted:
                    raise OSError(errno.EIO, f"/proc/self/pagemap: {len(entries)} bytes of {wanted}")
                _add_own(runs, entries, start, page)
        finally:
            os.close(fd)
        return runs

    def mapped_file(self, address: int, without: list[tuple[int, int]] | None = None) -> MappedFile | None:
        found = _query_map(address) if _can_query else None
        if found is None:
            found = _read_map(address)
        if found is None or not found.identity[2] or found.path.startswith(_ANONYMOUS):
            if found is not None and without is not None:
                without.append((found.start, found.end))
            return None
        return found

    def open_mapped(self, file: MappedFile) -> int | None:
        fds: list[int] = []
        try:
            self._open_mapped_into(fds, file)
            return fds[0] if fds else None
        except BaseException:
            self.close_all(fds)
            raise

    def _open_mapped_into(self, fds: list[int], file: MappedFile) -> None:
        flags = (os.O_RDWR if file.shared and file.writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        with contextlib.suppress(OSError):  # only root may open it
            self._open_into(fds, os.open, f"/proc/self/map_files/{file.start:x}-{file.end:x}", flags)
            return
        with contextlib.suppress(OSError):
            self._open_into(fds, os.open, file.path, flags)
            if self._is_mapped_file(fds[0], file):
                return
        self.close_all(fds)
        # The file was renamed or removed, or this process may no longer open it. The code that mapped it may still have
        # it open.
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                there = int(entry)
                status = os.fstat(there)
                if not stat.S_ISREG(status.st_mode) or not self._is_mapped_file(there, file):
                    continue
                with contextlib.suppress(PermissionError):
                    self._open_into(fds, os.open, f"/proc/self/fd/{there}", flags)
                    return
                if fcntl.fcntl(there, fcntl.F_GETFL) & os.O_ACCMODE in (os.O_RDWR, flags & os.O_ACCMODE):
                    self._open_into(fds, os.dup, there)
                    return

    def _is_mapped_file(self, fd: int, file: MappedFile) -> bool:
        """Return whether an fd refers to that file. Maps a page: the kernel names the files of all mappings alike."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return False
        mapped: list[int] = []
        try:
            self.map_into(mapped, fd, self.page_size, Access.READ)
            found = self.mapped_file(mapped[0])
        finally:
            if mapped:
                self.unmap_from(mapped, self.page_size)
        return found is not None and found.identity == file.identity

    def discard(self, address: int, size: int) -> None:
        # MADV_REMOVE punches a hole in the object itself: the pages are gone for every
        # process that maps it. MADV_DONTNEED would only drop our own page table.
        _syscalls.madvise(address, size, _MADV_REMOVE)

    def discarding(self, address: int, size: int) -> Iterator[object]:
        return _syscalls.madvising(address, size, _MADV_REMOVE)

    def lock_shared(self, fd: int, position: int) -> None:
        fcntl.fcntl(fd, F_OFD_SETLK, _one_byte(fcntl.F_RDLCK, position))

    def unlock(self, fd: int, position: int) -> None:
        fcntl.fcntl(fd, F_OFD_SETLK, _one_byte(fcntl.F_UNLCK, position))

    def unlocking(self, fd: int, position: int) -> Iterator[object]:
        return map(fcntl.fcntl, (fd,), (F_OFD_SETLK,), (_one_byte(fcntl.F_UNLCK, position),))

    def is_held(self, fd: int, position: int) -> bool:
        # F_OFD_GETLK asks whether a write lock *could* be placed, without placing it. That costs half as much as
        # trying to lock. Locks of the same description do not count.
        answer = fcntl.fcntl(fd, F_OFD_GETLK, _one_byte(fcntl.F_WRLCK, position))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def create_counter(self, memory: int) -> int:
        # The counter is the position of an open file description of its own. lseek(2) adds to the position under a
        # lock of the kernel, and refuses to go below 0.
        return self.reopen(memory)

    def count(self, counter: int, change: int = 0, noted: list[int] | None = None) -> int:
        if noted is None:
            return _lseek(counter, change, 1)  # SEEK_CUR
        return seek_noted(noted, counter, change)

    def counting(self, counter: int, change: int) -> tuple[Any, ...]:
        return _lseek, counter, change, 1

    def clear_counter(self, counter: int) -> None:
        os.lseek(counter, 0, os.SEEK_SET)

    def message_sockets(self) -> tuple[_End, _End]:
        # `socket.socketpair` makes the fds and the sockets one after the other, and is interrupted in between.
        try:
            ends = _socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._once_more(error)
            ends = _socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._noted(ends[1].fileno())
        first, second = map(self._message_socket_from, ends)
        return first, second

    def _message_socket_from(self, source: _socket.socket) -> _End:
        # With its family and type, Python does not ask the kernel for them.
        end = self._socket_of(source.fileno(), socket.AF_UNIX, socket.SOCK_SEQPACKET, 0)
        source.detach()
        return end

    def message_socket(self, fd: int) -> _End:
        return self._socket_of(fd, -1, -1, -1)

    def _socket_of(self, fd: int, family: int, kind: int, protocol: int) -> _End:
        # Made in two steps, so that the caller keeps the fd if a signal handler raises in between.
        end = _End.__new__(_End)
        try:
            end.__init__(family, kind, protocol, fd)  # type: ignore[misc]
            if family == -1 and (end.family != socket.AF_UNIX or end.type != socket.SOCK_SEQPACKET):
                found = f"{end.family.name}, {end.type.name}"
                raise OSError(errno.EPROTOTYPE, f"a socket of {found} instead of AF_UNIX, SOCK_SEQPACKET")
            end.settimeout(None)  # overrides socket.setdefaulttimeout()
            end.backend = self
            file = self.file_of(fd)
            closing = self.closing(fd, file)
        except BaseException:
            end.detach()
            raise
        # No call from here to the return.
        end.own(file, closing)
        return end

    def wait_readable(self, end: HasFileno, seconds: float | None) -> bool:
        poll = new_poll()
        poll.register(end.fileno(), select.POLLIN)
        return bool(poll.poll(None if seconds is None else math.ceil(max(seconds, 0.0) * 1000)))

    def has_ended(self, receiver: MessageSocket) -> bool:
        ends = new_poll()
        ends.register(receiver, select.POLLRDHUP)
        return bool(ends.poll(0))

    def listen(self, address: str | None, backlog: int) -> Callee:
        return _Callee(self, address, backlog)

    def call(self, address: str) -> _End:
        source = _socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end = self._message_socket_from(source)
        try:
            end.connect(address)
            if (uid := _uid_of_peer(end)) != os.geteuid():
                raise PermissionError(
                    errno.EACCES, f"the peer belongs to user {uid}, and this process to user {os.geteuid()}"
                )
        except BaseException:
            end.close()
            raise
        return end

    def forking(self) -> AbstractContextManager[int]:
        return contextlib.nullcontext(-1)

    def open_process(self, pid: int, sentinel: int = -1) -> int:
        if sentinel >= 0 and _is_pidfd(sentinel):
            return self.duplicate(sentinel)
        try:
            return self._opened(os.pidfd_open, pid)
        except ProcessLookupError:
            # The process has ended and was reaped, by other code of this program or because SIGCHLD is ignored.
            return self.duplicate(sentinel) if sentinel >= 0 else self._ended()

    def _ended(self) -> int:
        """Return an fd that is readable from the start."""
        ends = [*self._pipe()]
        try:
            next(map(os.close, map(ends.pop, _LAST)))
            return ends[0]
        except BaseException:
            self.close_all(ends)
            raise

    def exit_of_reaped(self, process: int) -> int | None:
        info = bytearray(_PIDFD_INFO.size)
        _PIDFD_INFO.pack_into(info, 0, _PIDFD_INFO_EXIT, 0)
        try:
            fcntl.ioctl(process, _PIDFD_GET_INFO, info)
        except OSError:  # Linux before 6.15, or the substitute for a pidfd that `open_process` returns
            return None
        known, status = _PIDFD_INFO.unpack(info)
        return os.waitstatus_to_exitcode(status) if known & _PIDFD_INFO_EXIT else None

    def signal_process(self, process: int, pid: int, number: int) -> None:
        # Signal through the pidfd: the pid may belong to another process by now.
        try:
            signal.pidfd_send_signal(process, number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.fstat(process)  # a closed fd is an error of the caller
            # The fd is the substitute that `open_process` returns for a process that has ended already.
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None

    def is_stopped(self, pid: int) -> bool | None:
        try:
            state = _status(pid)[0]
        except OSError:  # the process has ended, or /proc is not readable
            return None
        return None if state in (b"Z", b"X") else state in (b"T", b"t")

    def is_running(self, pid: int) -> bool:
        # An ended process that was not reaped is still in /proc, but without a program.
        return os.path.exists(f"/proc/{pid}/exe")

    def usable_cores(self) -> int:
        return _groups.within_quota(len(os.sched_getaffinity(0)))

    def step_back(self) -> None:
        os.sched_yield()

    def trim_heap(self) -> None:
        _syscalls.trim_heap()

    def use_cpus(self, cpus: Collection[int] | None) -> frozenset[int]:
        if cpus is not None:
            os.sched_setaffinity(0, cpus)
        return frozenset(os.sched_getaffinity(0))

    def start_time(self, pid: int) -> int:
        return int(_status(pid)[19])

    def is_alive(self, token: int) -> bool:
        try:
            status = _status(token & 0x7FFFFFFF)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ESRCH)
        # The first thread may have ended before the others.
        ended = status[0] in (b"Z", b"X") and int(status[17]) <= 1
        return not ended and int(status[19]) & 0xFFFFFFFF == token >> 32

    def die_with(self, lifeline: int) -> int:
        # PR_SET_PDEATHSIG fires when the *thread* that forked this process ends, and a pool forks from the thread that
        # notices a death. With a pipe, fcntl(2) F_SETSIG and O_ASYNC send the signal when the last writer is gone.
        # Both are attributes of the open file description, so this process needs its own.
        own = self._opened(os.open, f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(own, F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
            # Without a writer, the parent died before the signal was set up.
            with contextlib.suppress(BlockingIOError):
                if os.read(own, 1) == b"":
                    os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:
            os.close(own)
            raise
        return own


# struct procmap_query of <linux/fs.h>, and PROCMAP_QUERY, since Linux 6.11.
_MAP_QUERY = struct.Struct("QQQ QQQQQQ II II QQ")
_PROCMAP_QUERY = 0xC0686611
_VMA_WRITABLE, _VMA_SHARED = 0x02, 0x08
# The kernel's name for shared memory without a file; only root could open it.
_ANONYMOUS = "/dev/zero"
_can_query = [True]
_LONGEST_PATH = 4096


def _query_map(address: int) -> MappedFile | None:
    """Return the mapping at an address, in microseconds; None if the kernel has no such call."""
    name = bytearray(_LONGEST_PATH)
    query = bytearray(
        _MAP_QUERY.pack(_MAP_QUERY.size, 0, address, *[0] * 6, 0, 0, _LONGEST_PATH, 0, _memory.address_of(name), 0)
    )
    try:
        with io.FileIO("/proc/self/maps") as maps:
            fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    except OSError as error:
        if error.errno == errno.ENOTTY:
            _can_query.clear()
        return None
    fields = _MAP_QUERY.unpack(query)
    start, end, flags, _, offset, inode, major, minor, length = fields[3:12]
    identity = major, minor, inode
    path = os.fsdecode(bytes(name[: max(length - 1, 0)]))
    return MappedFile(start, end, offset, identity, bool(flags & _VMA_WRITABLE), bool(flags & _VMA_SHARED), path)


def _read_map(address: int) -> MappedFile | None:
    with contextlib.suppress(OSError), open("/proc/self/maps", "rb") as maps:
        for line in maps:
            reach, modes, offset, device, inode, *name = line.split(None, 5)
            start, end = (int(bound, 16) for bound in reach.split(b"-"))
            if start <= address < end:
                major, minor = (int(part, 16) for part in device.split(b":"))
                path = os.fsdecode(name[0].rstrip(b"\n")) if name else ""
                identity = major, minor, int(inode)
                return MappedFile(start, end, int(offset, 16), identity, modes[1:2] == b"w", modes[3:4] == b"s", path)
    return None


# struct pidfd_info of linux/pidfd.h: a mask of the known fields first, the status of wait(2) last.
_PIDFD_INFO = struct.Struct("=Q52xi")
_PIDFD_INFO_EXIT = 1 << 3
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11


def _is_pidfd(fd: int) -> bool:
    try:
        signal.pidfd_send_signal(fd, 0)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _status(pid: int) -> list[bytes]:
    """Return the fields of proc(5) from the third on. The name in parentheses, before them, may hold any character."""
    # Not by `open`, which is gone when a `__del__` that runs at the end of the program uses a lock.
    with io.FileIO(f"/proc/{pid}/stat") as status:
        return status.read().rpartition(b")")[2].split()


# struct ucred of unix(7)
_PEER = struct.Struct("iII")


def _uid_of_peer(end: socket.socket) -> int:
    uid: int = _PEER.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[1]
    return uid


_SO_COOKIE = 57


class _End(MessageEnd):
    """An end of a channel."""

    backend: LinuxBackend
    # The kernel's number of this socket, once it was asked for; see SO_COOKIE in socket(7).
    _cookie = b""

    def is_intact(self) -> bool:
        # Takes half the time of fstat(2).
        try:
            cookie = self.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
        except OSError as error:
            if not _interrupts.is_of_kernel(error):  # raised by a signal handler
                raise
            return False
        if self._cookie:
            return cookie == self._cookie
        is_intact = super().is_intact()
        if is_intact:
            self._cookie = cookie
        return is_intact

    def dup(self) -> _End:
        fds = [self.backend.duplicate(self.fileno())]
        try:
            end = self.backend.message_socket(fds[0])
            del fds[0]
            return end
        finally:
            self.backend.close_all(fds)


class _Callee:
    """A listener at an abstract address (unix(7)), which is not a file and leaves none behind."""

    def __init__(self, backend: LinuxBackend, address: str | None, backlog: int) -> None:
        self._backend = backend
        self._socket = Socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(None)
            self.address = address or f"\0forkshm-{secrets.token_hex(16)}"
            self._socket.bind(self.address)
            self._socket.listen(backlog)
        except BaseException:
            self._socket.close()
            raise

    def accept(self) -> _End:
        while True:
            end: _End = accepted(self._socket, self._backend.message_socket)
            if _uid_of_peer(end) == os.geteuid():
                return end
            end.close()

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def close(self) -> None:
        self._socket.close()
