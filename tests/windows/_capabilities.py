"""Features that Windows lacks, and the tests that are skipped for them, each with a reason.

A test that uses one of these is skipped at that point, with the reason, and counted: see `stand_in`. Tests of an
intended difference have the mark ``needs``; the reasons are in ``tests/capability_skips.py``.
"""

from __future__ import annotations

import builtins
import errno
import functools
import multiprocessing
import os
import signal
import sys
import types

import _signals
import pytest

import forkshm
from forkshm.backend import Access, kernel

if sys.platform == "win32":
    import msvcrt

# POSIX-only names that tests use, with the reason to skip.
CAPABILITIES = {
    "fork": "needs fork(2): Windows spawns processes",
    "fork context": "needs the start method fork, which Windows lacks",
    "fcntl": "looks at fds with fcntl(2): a handle of Windows has no such flags",
    "resource": "needs limits on open files or memory of a process (setrlimit(2)): Windows has none of these",
    "proc": "looks into /proc: Windows has none",
    "signals": "needs signals between processes (SIGSTOP, SIGTERM handlers): Windows has none",
    "fds": "makes file descriptors of its own, or asks one for what only a file of POSIX tells: forkshm's are handles",
    "users": "needs another user, or files given to one",
    "unix sockets": "needs AF_UNIX sockets or socketpairs that carry fds",
    "select": "waits with poll(2): handles of Windows cannot be polled",
    "shm_open": "looks into /dev/shm: named objects are files of another folder there",
    "seals": "needs sealed memory (memfd_create(2)): sections of Windows cannot be sealed",
    "born shared": "needs NumPy's hook for its memory, whose machine code is for the calling convention of POSIX",
}


def skip(capability: str) -> None:
    """Skip the running test."""
    pytest.skip(f"needs {capability}: {CAPABILITIES[capability]}", allow_module_level=True)


def _function(capability):
    def missing(*args, **options):
        skip(capability)

    return missing


class _Module(types.ModuleType):
    """A module that can be imported, and skips tests that use its names."""

    def __init__(self, name: str, capability: str) -> None:
        super().__init__(name)
        self.__dict__["_capability"] = capability

    def __getattr__(self, name):
        # Libraries check whether this exists.
        if name.startswith("__") or f"{os.sep}tests{os.sep}" not in sys._getframe(1).f_code.co_filename:
            raise AttributeError(name)
        skip(self._capability)


def stand_in() -> None:
    """Replace missing names by objects that skip the test which uses them."""
    for name, capability in {"fcntl": "fcntl", "resource": "resource", "termios": "fcntl"}.items():
        sys.modules.setdefault(name, _Module(name, capability))
    # Names of os are replaced for tests only: forkshm looked its own up when it was imported.
    for name, capability in {
        "fork": "fork",
        "memfd_create": "fds",
        "pidfd_open": "fds",
        "register_at_fork": "fork",
        "set_blocking": "fds",
        "sched_getaffinity": "proc",
        "getpgid": "signals",
        "setsid": "signals",
        "setpgid": "signals",
        "statvfs": "shm_open",
        "chown": "users",
        "mkfifo": "fds",
        "posix_fallocate": "fds",
        "wait": "fork",
        "waitid": "fork",
        "fchmod": "fds",
    }.items():
        if not hasattr(os, name):
            setattr(os, name, _function(capability))
    for name in ("MFD_CLOEXEC", "MFD_ALLOW_SEALING", "O_DIRECT", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"):
        if not hasattr(os, name):
            setattr(os, name, 0)
    _signals.stand_in(skip)
    for name in ("pthread_kill", "setitimer", "alarm", "pause", "pidfd_send_signal"):
        if not hasattr(signal, name):
            setattr(signal, name, _function("signals"))
    # Under Wine the files of Linux exist, but describe other processes than the tests expect.
    builtins.open = _not_of_linux(open)
    for name in ("open", "listdir", "readlink", "scandir", "stat"):
        setattr(os, name, _not_of_linux(getattr(os, name)))
    for name in ("read", "write", "lseek"):
        setattr(os, name, _not_of_handles(getattr(os, name)))
    for name, of_handle in _OF_HANDLES.items():
        setattr(os, name, _also_of_handles(getattr(os, name, None), of_handle))
    for library in (multiprocessing, forkshm):
        library.get_context = _not_fork(library.get_context)


def _by_a_test() -> bool:
    return f"{os.sep}tests{os.sep}" in sys._getframe(2).f_code.co_filename


def _not_of_linux(function):
    @functools.wraps(function)
    def checked(path=".", *args, **options):
        if isinstance(path, (str, os.PathLike)) and _by_a_test():
            text = os.fspath(path)
            if text.startswith("/proc"):
                skip("proc")
            if text.startswith("/dev/shm"):
                skip("shm_open")
        return function(path, *args, **options)

    return checked


def _not_of_handles(function):
    @functools.wraps(function)
    def checked(fd, *args, **options):
        try:
            return function(fd, *args, **options)
        except OSError as error:
            if error.errno in (errno.EBADF, errno.EINVAL) and _by_a_test():
                skip("fds")
            raise

    return checked


def _also_of_handles(function, of_handle):
    @functools.wraps(of_handle)
    def checked(fd, *args, **options):
        if function is not None:
            try:
                return function(fd, *args, **options)
            except OSError as error:
                if error.errno not in (errno.EBADF, errno.EINVAL) or not _by_a_test():
                    raise
        try:
            handle = msvcrt.get_osfhandle(fd)
        except OSError:
            handle = fd
        try:
            return of_handle(handle, *args)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from error
            raise

    return checked


def _view(handle, nbytes, offset, access):
    """Yield the address of the bytes of an object while they are mapped."""
    low = offset - offset % kernel.page_size
    size = offset - low + nbytes
    address = kernel.map(handle, size, access, low)
    try:
        yield address + offset - low
    finally:
        kernel.unmap(address, size)


def _pread(handle, nbytes, offset):
    nbytes = min(nbytes, max(kernel.identify(handle)[1] - offset, 0))
    for where in _view(handle, nbytes, offset, Access.READ) if nbytes else ():
        return kernel.bytes_at(where, nbytes)
    return b""


def _pwrite(handle, data, offset):
    for where in _view(handle, len(data), offset, Access.SHARED) if data else ():
        kernel.copy(where, data, len(data))
    return len(data)


class _Status:
    """Return the fields of fstat(2) that a handle provides."""

    def __init__(self, handle):
        (self.st_dev, self.st_ino), self.st_size = kernel.identify(handle)

    def __getattr__(self, name):
        skip("fds")


_OF_HANDLES = {
    "fstat": _Status,
    "ftruncate": lambda handle, size: kernel.resize(handle, size),
    "pread": _pread,
    "pwrite": _pwrite,
    "dup": lambda handle: kernel.duplicate(handle),
    "close": lambda handle: kernel.close(handle),
    "get_inheritable": lambda handle: os.get_handle_inheritable(handle),
    "set_inheritable": lambda handle, on: os.set_handle_inheritable(handle, on),
}


def _not_fork(get_context):
    @functools.wraps(get_context)
    def checked(method=None):
        if method in ("fork", "forkserver") and _by_a_test():
            skip("fork context")
        return get_context(method)

    return checked
