"""Windows: sections backed by the paging file, named pipes. An fd here is a HANDLE.

A section reports neither its exact size nor its identity. So sections made here have a *trailer*, a page behind the
usable bytes. It records both, and the process that made the section.

A lease is a handle of a block's section, which contains nothing else. The kernel counts the handles of a section in all
processes, and reports their number.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import struct
import sys
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _system
from forkshm.backend import _memory
from forkshm.backend._addresses import Addresses
from forkshm.backend._interface import Access, Advice, HasFileno, Identity, MessageSocket
from forkshm.backend.windows import _in_flight, _locks, _pipes, _waiting, _winapi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from forkshm.backend._interface import Callee, Poller

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

__all__ = ("WindowsBackend",)

_VIEW = {
    Access.READ: _winapi.FILE_MAP_READ,
    Access.SHARED: _winapi.FILE_MAP_WRITE,
    Access.PRIVATE: _winapi.FILE_MAP_COPY,
    Access.SNAPSHOT: _winapi.FILE_MAP_READ,
}
_PROTECTION = {
    Access.READ: _winapi.PAGE_READONLY,
    Access.SHARED: _winapi.PAGE_READWRITE,
    Access.PRIVATE: _winapi.PAGE_WRITECOPY,
    Access.SNAPSHOT: _winapi.PAGE_READONLY,
}

# The trailer: magic, identity, size, pid and start time of the creator, and whether the creator has given the section
# up.
_TRAILER = struct.Struct("<16sqqQQQQ")
_MAGIC = b"forkshm section\1"
_MAKER, _GIVEN_UP = 40, 56

# Exit code of a process ended by signal 0; the signal's number is added. multiprocess uses 0x10000 for terminate().
_ENDED = 0x10000
_SIGTERM = 15

# Address spaces of 64-bit processes end here.
_HIGHEST = 2**47

# Prefix of files of named objects that were removed while still mapped.
_REMOVED = "removed-"
# The clock and the ticks since the start differ by some seconds.
_BOOT_MARGIN_SECONDS = 60.0

# Kinds of handles to look for. Others are transient: waits use events, and each lock of Python is a semaphore.
_FILES = 64
_COUNTED = frozenset({"Section", "File", "Process"})


class WindowsBackend(Addresses):
    """Windows 10 and newer."""

    name = "windows"
    locks = _locks
    leases_are_handles = True
    loops_watch_fds = False

    DONTWAIT = _pipes.DONTWAIT
    TAKE = 0
    TRUNCATED = _pipes.TRUNCATED
    FDS_LOST = _pipes.FDS_LOST
    RIGHTS = 1, 1
    DIRECT_FDS = 8192
    MOST_MESSAGES = _pipes.MOST_MESSAGES
    fds_lost_because = "the process that sent it has ended, or been killed, before it was received"

    def __init__(self) -> None:
        self._page, self.page_size = _winapi.page_sizes()
        # Bytes in use of each view, by base address.
        self._views: dict[int, int] = {}
        # Views that are whole sections with their trailer.
        self._with_trailer: set[int] = set()
        # The end of each view, by base address.
        self._ends: dict[int, int] = {}
        self._folder: str | None = None
        self._lock = _interrupts.Lock()
        # Handles of processes that made segments mapped here.
        self._makers: dict[tuple[int, int], int] = {}
        # Processes that were suspended by this one.
        self._stopped: set[int] = set()

    @_interrupts.promptly
    def close(self, fd: int) -> None:
        _winapi.close(fd)

    def raise_fd_limit(self) -> bool:
        return False

    def fd_limit(self) -> int:
        return sys.maxsize

    def is_scarce(self, fd: int) -> bool:
        return False

    def duplicate(self, fd: int) -> int:
        return _winapi.duplicate(fd)

    def of_file(self, fileno: int) -> int:
        import msvcrt

        return msvcrt.get_osfhandle(fileno)

    # -- memory objects -------------------------------------------------------------

    def _whole_pages(self, size: int) -> int:
        return -(-size // self._page) * self._page

    def create_memory(self, size: int, label: str, *, sealable: bool = True, sparse: bool = False) -> int:
        return self.create_section(size, None, 0o600)[0]

    def create_section(self, size: int, name: str | None, permissions: int) -> tuple[int, bool]:
        start = self._whole_pages(size)
        if start + self._page > sys.maxsize:
            raise OSError(errno.ENOMEM, f"a section cannot have {size:,} bytes")
        fd, is_there = _winapi.create_section(start + self._page, name, permissions=permissions)
        if not is_there:
            try:
                trailer = (_MAGIC, secrets.randbits(63), secrets.randbits(63), size, os.getpid(), self._own_start(), 0)
                self._write_trailer(fd, start, _TRAILER.pack(*trailer))
            except BaseException:
                _winapi.close(fd)
                raise
        return fd, is_there

    def open_section(self, name: str, *, writable: bool) -> int:
        access = _winapi.SECTION_QUERY | _winapi.SECTION_MAP_READ | (_winapi.SECTION_MAP_WRITE if writable else 0)
        return _winapi.open_section(name, access)

    def read_only(self, fd: int) -> int:
        return _winapi.duplicate(fd, _winapi.SECTION_QUERY | _winapi.SECTION_MAP_READ)

    @contextlib.contextmanager
    def _last_page(self, fd: int, start: int, access: int) -> Any:
        low = start - start % self.page_size
        base = _winapi.map_view(fd, access, low, 0)
        try:
            yield base + start - low
        finally:
            _winapi.unmap_view(base)

    def _write_trailer(self, fd: int, start: int, trailer: bytes) -> None:
        with self._last_page(fd, start, _winapi.FILE_MAP_WRITE) as where:
            _memory.copy(where, trailer, len(trailer))

    def _trailer(self, fd: int, whole: int) -> tuple[Any, ...] | None:
        if whole < 2 * self._page:
            return None
        try:
            with self._last_page(fd, whole - self._page, _winapi.FILE_MAP_READ) as where:
                trailer = _TRAILER.unpack(_memory.bytes_at(where, _TRAILER.size))
        except OSError as error:
            if error.errno == errno.EACCES:
                return None
            raise
        size = trailer[3]
        fits = trailer[0] == _MAGIC and size > 0 and self._whole_pages(size) == whole - self._page
        return trailer if fits else None

    def identify(self, fd: int) -> tuple[Identity, int]:
        whole = _winapi.section_size(fd)
        if whole is None:
            if not _winapi.is_on_disk(fd):
                raise OSError(errno.ENODEV, f"handle {fd} is neither that of a section nor that of a file")
            info = _winapi.file_info(fd)
            return (info.volume, info.number), info.size
        trailer = self._trailer(fd, whole)
        if trailer is not None:
            return (trailer[1], trailer[2]), trailer[3]
        # A section of another program is identified by its name while it is open. Without a name it has no identity.
        name = _winapi.object_name(fd)
        digest = hashlib.sha256(name.encode()).digest() if name else secrets.token_bytes(16)
        return (int.from_bytes(digest[:7], "little"), int.from_bytes(digest[7:14], "little")), whole

    def reopen(self, fd: int) -> int:
        return _winapi.duplicate(fd)

    def open_remote(self, pid: int, fd: int, identity: Identity) -> int:
        process = _winapi.open_process(pid, _winapi.PROCESS_DUP_HANDLE)
        try:
            opened = _winapi.duplicate(fd, source=process)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise FileNotFoundError(errno.ENOENT, f"process {pid} has no handle {fd}") from error
            raise
        finally:
            _winapi.close(process)
        try:
            if self.identify(opened)[0] == identity:
                return opened
        except OSError:
            pass  # the handle is not of a memory object
        _winapi.close(opened)
        raise OSError(errno.ESTALE, f"handle {fd} of process {pid} is a different object")

    def may_write(self, fd: int) -> bool:
        # SECTION_MAP_WRITE, and FILE_WRITE_DATA of files, are the same bit.
        return bool(_winapi.query_object(fd).access & _winapi.SECTION_MAP_WRITE)

    def seal_writes(self, fd: int) -> None:
        raise OSError(errno.ENOTSUP, "a section cannot be sealed")

    def create_growing(self, label: str) -> int:
        raise OSError(errno.ENOTSUP, "a section cannot grow")

    def open_own_memory(self) -> int:
        raise OSError(errno.ENOTSUP, "this system has no file of a process' memory")

    # -- named objects and files ------------------------------------------------------

    def _path_of(self, name: str) -> str:
        # Windows file systems forbid some characters and ignore case. So the file name is the readable part of the
        # name, followed by the name's digest.
        readable = re.sub(r"[^a-z0-9_.-]", "_", name.lower())[:40]
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
        return os.path.join(self.folder_of_named(), f"{readable}-{digest}")

    def folder_of_named(self) -> str:
        with self._lock:
            if self._folder is None:
                configured = os.environ.get("FORKSHM_FOLDER")
                base = configured or os.path.join(os.environ.get("ProgramData", r"C:\ProgramData"), "forkshm")  # noqa: SIM112
                with contextlib.suppress(FileExistsError):
                    os.makedirs(base)
                folder = os.path.join(base, _winapi.own_sid())
                _winapi.create_directory(folder)
                self._folder = folder
                self._sweep(folder)
            return self._folder

    def _sweep(self, folder: str) -> None:
        """Delete files older than this run of the system, and removed files that are no longer mapped."""
        booted = time.time() - _winapi.milliseconds_since_boot() / 1000 - _BOOT_MARGIN_SECONDS
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                # Files that a process has open or mapped cannot be deleted, and stay.
                with contextlib.suppress(OSError):
                    if entry.name.startswith(_REMOVED) or entry.stat(follow_symlinks=False).st_mtime < booted:
                        os.remove(entry.path)

    def open_named(self, name: str, *, create: bool, writable: bool, permissions: int = 0) -> int:
        access = _winapi.GENERIC_READ | (_winapi.GENERIC_WRITE if writable or create else 0)
        flags = _winapi.FILE_FLAG_OPEN_REPARSE_POINT | _winapi.FILE_ATTRIBUTE_TEMPORARY
        disposition = _winapi.CREATE_NEW if create else _winapi.OPEN_EXISTING
        fd = _winapi.create_file(self._path_of(name), access, disposition, flags)
        try:
            if _winapi.file_info(fd).attributes & _winapi.FILE_ATTRIBUTE_REPARSE_POINT:
                raise OSError(errno.ELOOP, "the name is a symbolic link")
        except BaseException:
            _winapi.close(fd)
            raise
        return fd

    def unlink_named(self, name: str) -> None:
        path = self._path_of(name)
        folder = self.folder_of_named()
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        # A mapped file cannot be deleted, but it can be renamed, so that the name is free at once.
        gone = os.path.join(folder, f"{_REMOVED}{os.getpid()}-{secrets.token_hex(8)}")
        os.rename(path, gone)
        self._sweep(folder)

    def open_file(self, path: str, *, writable: bool) -> int:
        access = _winapi.GENERIC_READ | (_winapi.GENERIC_WRITE if writable else 0)
        return _winapi.create_file(path, access, _winapi.OPEN_EXISTING, _winapi.FILE_FLAG_BACKUP_SEMANTICS)

    def is_regular(self, fd: int) -> bool:
        return not _winapi.file_info(fd).attributes & _winapi.FILE_ATTRIBUTE_DIRECTORY

    def owner(self, fd: int) -> str | None:
        return None  # no other user can write to the folder

    def resize(self, fd: int, size: int) -> None:
        try:
            _winapi.set_file_size(fd, size)
        except OSError as error:
            if error.errno == errno.EINVAL:  # no file can have that size
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG)) from error
            raise

    # -- mappings -------------------------------------------------------------------

    def map(self, fd: int, size: int, access: Access, offset: int = 0) -> int:
        return self._map(fd, size, access, offset, None)

    def map_at(self, mapped: list[int], address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        mapped.append(self._map(fd, size, access, offset, address))

    def _map(self, fd: int, size: int, access: Access, offset: int, address: int | None) -> int:
        if address is not None and not 0 < address < _HIGHEST:  # 0 lets the system choose
            raise OSError(errno.EINVAL, f"{address:#x} is not a valid address of a process")
        whole = _winapi.section_size(fd)
        section = fd
        if whole is None:
            whole = _winapi.file_info(fd).size
            section = _winapi.create_section(0, file=fd, protection=_PROTECTION[access])[0]
        try:
            # Whole pages are requested; the mapping ends where the object ends. A trailer is mapped with its section.
            end = self._whole_pages(size)
            fits = offset + end + self._page < whole
            base = _winapi.map_view(section, _VIEW[access], offset, size if fits else 0, address)
            is_whole = section == fd and not offset and whole == end + self._page
            if is_whole and _memory.bytes_at(base + end, len(_MAGIC)) == _MAGIC:
                self._with_trailer.add(base)
        finally:
            if section != fd:
                _winapi.close(section)
        self._views[base] = size
        # The size is in whole pages of 64 KiB, the memory in pages of 4 KiB.
        self._ends[base] = base + (size if fits else self._whole_pages(whole - offset))
        return base

    def replace(self, address: int, fd: int, size: int, access: Access, offset: int = 0) -> None:
        raise OSError(errno.ENOTSUP, "a mapping cannot be replaced in one step")

    def unmap(self, address: int, size: int) -> None:
        base = address if address in self._views else max(base for base in self._views if base < address)
        left = self._views[base] - size
        if left > 0:  # part of a view cannot be unmapped, so it goes with the rest
            self._views[base] = left
            return
        del self._views[base], self._ends[base]
        self._with_trailer.discard(base)
        _winapi.unmap_view(base)

    def flush(self, address: int, size: int, *, asynchronous: bool) -> None:
        _winapi.flush_view(address, size)

    def flush_to_disk(self, fd: int) -> None:
        if _winapi.section_size(fd) is None:
            _winapi.flush_file(fd)

    def advise(self, address: int, size: int, advice: Advice, *, writable: bool = True) -> None:
        if advice is Advice.normal:
            return
        if advice is Advice.populate:
            base = max(base for base in self._views if base <= address)
            for page in range(address, min(address + size, self._ends[base]), self._page):
                _winapi.load(page)
            return
        if advice is Advice.willneed:
            _winapi.prefetch(address, size)
            return
        raise OSError(errno.ENOTSUP, f"Windows does not support the advice {advice}")

    def own_pages(self, address: int, size: int) -> list[tuple[int, int]]:
        raise OSError(errno.ENOTSUP, "Windows does not report which pages are private")

    def discard(self, address: int, size: int) -> None:
        raise OSError(errno.ENOTSUP, "single pages of a section cannot be released")

    # -- leases ---------------------------------------------------------------------

    def lock_shared(self, fd: int, position: int) -> None:
        """Do nothing: a process that has the handle holds the block."""

    def unlock(self, fd: int, position: int) -> None:
        """Do nothing: closing the handle releases the block."""

    def is_held(self, fd: int, position: int) -> bool:
        if _winapi.query_object(fd).handles == 1:
            return False
        _in_flight.outgoing.sweep()
        return _winapi.query_object(fd).handles > 1

    def is_abandoned(self, address: int, size: int) -> bool:
        """Return whether the creator of the section, which is mapped whole there, has ended or no longer uses it."""
        if address not in self._with_trailer:
            return True  # not a section of forkshm
        trailer = address + self._whole_pages(size)
        if _winapi.load_long(trailer + _GIVEN_UP):
            return True
        maker = _winapi.load_long(trailer + _MAKER), _winapi.load_long(trailer + _MAKER + 8)
        process = self._makers.get(maker)
        if process is None:
            for key, old in list(self._makers.items()):
                if _winapi.wait(old, 0) == _winapi.WAIT_OBJECT_0:
                    del self._makers[key]
                    _winapi.close(old)
            try:
                process = _winapi.open_process(maker[0], _winapi.PROCESS_QUERY | _winapi.SYNCHRONIZE)
            except OSError:
                return True
            if _winapi.process_start(process) != maker[1]:
                _winapi.close(process)
                return True
            self._makers[maker] = process
        return _winapi.wait(process, 0) == _winapi.WAIT_OBJECT_0

    def give_up(self, address: int, size: int) -> None:
        """Mark the section as unused, for all processes that have it mapped."""
        _winapi.store_long(address + self._whole_pages(size) + _GIVEN_UP, 1)

    # -- counters -------------------------------------------------------------------

    def create_counter(self, memory: int) -> int:
        return _winapi.create_semaphore()

    def count(self, counter: int, change: int = 0, noted: list[int] | None = None) -> int:
        if change > 0:
            now = _winapi.release_semaphore(counter, change) + change
            if noted is not None:
                noted.append(now)
            return now
        for _ in range(-change):
            if _winapi.wait(counter, 0) != _winapi.WAIT_OBJECT_0:
                raise OSError(errno.EINVAL, "a count cannot be less than 0")
            if noted:
                noted.pop()
        return _winapi.semaphore_value(counter)

    def clear_counter(self, counter: int) -> None:
        while _winapi.wait(counter, 0) == _winapi.WAIT_OBJECT_0:
            pass

    # -- messages -------------------------------------------------------------------

    def message_sockets(self) -> tuple[MessageSocket, MessageSocket]:
        return _pipes.message_pipe()

    def message_socket(self, fd: int) -> MessageSocket:
        if not _winapi.is_pipe(fd):
            raise OSError(errno.EPROTOTYPE, "no pipe")
        return _pipes.MessageEnd(fd)

    def fds_space(self, count: int) -> int:
        return 8 * count

    def wait_readable(self, end: HasFileno, seconds: float | None) -> bool:
        return _waiting.wait_readable(end.fileno(), seconds)

    def wait_writable(self, end: HasFileno, seconds: float) -> bool:
        time.sleep(min(seconds, 0.005))  # a pipe does not report room: the waiter tries again
        return True

    def poller(self) -> Poller:
        return _waiting.Poll()

    def has_message(self, end: MessageSocket) -> bool:
        return isinstance(end, _pipes.MessageEnd) and end.has_message()

    def has_ended(self, receiver: MessageSocket) -> bool:
        return not isinstance(receiver, _pipes.MessageEnd) or receiver.said_end

    def received_fds(self, ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
        return [handle for _, _, data in ancillary for (handle,) in struct.iter_unpack("<q", data)]

    def forget_sent(self, sender: MessageSocket) -> None:
        if isinstance(sender, _pipes.MessageEnd):
            _in_flight.outgoing.sweep()
            _in_flight.outgoing.forget(sender.other)

    def listen(self, address: str | None, backlog: int) -> Callee:
        return _pipes.Callee(address, backlog)

    def call(self, address: str) -> MessageSocket:
        return _pipes.call(address)

    # -- wakeup pipes ------------------------------------------------------------------------

    def create_wakeup(self) -> tuple[int, int]:
        wakeup = _winapi.create_semaphore()
        try:
            return wakeup, _winapi.duplicate(wakeup)
        except BaseException:
            _winapi.close(wakeup)
            raise

    def wake(self, wakeup: int, how_many: int) -> None:
        with contextlib.suppress(OSError):  # the semaphore already holds two thousand million wakeups
            _winapi.release_semaphore(wakeup, how_many)

    def wait_for_wakeup(self, wakeup: int, seconds: float | None = None) -> bool | None:
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = 0.25 if deadline is None else min(0.25, deadline - time.monotonic())
            if _winapi.wait(wakeup, max(int(left * 1000), 0)) == _winapi.WAIT_OBJECT_0:
                return True
            if left <= 0:
                return None
            if _winapi.query_object(wakeup).handles == 1:
                return False

    # -- processes ------------------------------------------------------------------

    def _own_start(self) -> int:
        return _in_flight.own_start()

    def forking(self) -> AbstractContextManager[int]:
        return contextlib.nullcontext(-1)

    def open_process(self, pid: int, sentinel: int = -1) -> int:
        if sentinel >= 0:
            return _winapi.duplicate(sentinel)
        signalling = _winapi.PROCESS_TERMINATE | _winapi.PROCESS_SUSPEND
        return _winapi.open_process(pid, _winapi.PROCESS_QUERY | signalling | _winapi.SYNCHRONIZE)

    def signal_process(self, process: int, pid: int, number: int) -> None:
        if _winapi.wait(process, 0) == _winapi.WAIT_OBJECT_0:
            raise ProcessLookupError(errno.ESRCH, f"process {pid} has ended")
        if number == _system.SIGSTOP:
            _winapi.suspend(process)
            self._stopped.add(pid)
            return
        self._stopped.discard(pid)
        if number == _system.SIGCONT:
            _winapi.resume(process)
            return
        if number not in (_SIGTERM, _system.SIGKILL):
            raise OSError(errno.ENOTSUP, f"Windows has no signal {number} for other processes")
        # multiprocess exits with this code for SIGTERM; other signals follow the same pattern.
        _winapi.terminate(process, _ENDED if number == _SIGTERM else _ENDED + number)

    def is_stopped(self, pid: int) -> bool | None:
        if self.is_running(pid):
            return pid in self._stopped
        self._stopped.discard(pid)
        return None

    def is_running(self, pid: int) -> bool:
        try:
            process = _winapi.open_process(pid, _winapi.SYNCHRONIZE)
        except PermissionError:
            return True
        except OSError:
            return False
        try:
            return _winapi.wait(process, 0) == _winapi.WAIT_TIMEOUT
        finally:
            _winapi.close(process)

    def usable_cores(self) -> int:
        return os.cpu_count() or 1

    def start_time(self, pid: int) -> int:
        if pid == os.getpid():
            return self._own_start()
        process = _winapi.open_process(pid, _winapi.PROCESS_QUERY)
        try:
            return _winapi.process_start(process)
        finally:
            _winapi.close(process)

    def create_lifeline(self) -> tuple[int, int]:
        # Other processes wait for a handle of this process; the second handle only has to be closed.
        mine = _winapi.duplicate(_winapi.SELF)
        try:
            return mine, _winapi.duplicate(_winapi.SELF)
        except BaseException:
            _winapi.close(mine)
            raise

    def die_with(self, lifeline: int) -> int:
        # The kernel's own mechanism, a job that kills on close, crashes Wine 8.
        kept = _winapi.duplicate(lifeline)
        try:
            _winapi.end_with(kept)
        except BaseException:
            _winapi.close(kept)
            raise
        return _winapi.duplicate(_winapi.SELF)  # the waiting handle must stay; this one may be closed

    # -- for tests ----------------------------------------------------------------------

    def handles(self) -> frozenset[tuple[int, str]]:
        """Return the handles of kernel objects of this process, except those that are kept on purpose."""
        _in_flight.outgoing.sweep()
        kept = set(self._makers.values()) | _in_flight.kept() | _locks.kept()
        for fileno in range(_FILES):  # files of Python and of the test runner
            with contextlib.suppress(OSError):
                kept.add(self.of_file(fileno))
        found = set()
        for handle in _winapi.open_handles(os.getpid()):
            kind = _winapi.object_type(handle)
            if kind in _COUNTED and handle not in kept:
                found.add((handle, kind))
        return frozenset(found)
