"""The C library of a POSIX system: prototypes, and errno to ``OSError``."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_libc = ctypes.CDLL(None, use_errno=True)

# Calls that take microseconds keep the GIL: that is faster, and no other thread runs in between.
_quick = ctypes.PyDLL(None, use_errno=True)
# Without argtypes, because checking six arguments takes longer than the call. The callers convert arguments that are
# not a C int.
_mmap = _quick.mmap
_mmap.restype = ctypes.c_void_p
_size_t = ctypes.c_size_t
_off_t = ctypes.c_int64
_START = _off_t(0)
_libc.munmap.argtypes = _quick.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_munmap, _munmap_quick = _libc.munmap, _quick.munmap
# Unmapping more bytes than this may take long, so it releases the GIL.
_LARGE = 2**22
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
# shm_open is part of libc in musl and in glibc since 2.34, and of librt before.
_librt = _libc if hasattr(_libc, "shm_open") else ctypes.CDLL("librt.so.1", use_errno=True)
# The third argument is variadic: macOS on ARM passes such arguments differently.
_librt.shm_open.argtypes = (ctypes.c_char_p, ctypes.c_int)
_librt.shm_unlink.argtypes = (ctypes.c_char_p,)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

sigaction: Callable[..., int] = _quick.sigaction
"""sigaction(2), with room for the new action and for the current one; either may be None."""


def action_room() -> Any:
    """Return room for a ``struct sigaction``: 152 bytes in glibc and musl, less elsewhere."""
    return ctypes.create_string_buffer(256)


_interrupts.sigaction, _interrupts.action_room = sigaction, action_room

_MAP_FAILED = ctypes.c_void_p(-1).value


@_interrupts.promptly
def _refused(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def mmap(fd: int, size: int, prot: int, flags: int, offset: int, where: int | None = None) -> int:
    """Map as mmap(2) says; return the address."""
    mapped: list[int] = []
    mmap_into(mapped, fd, size, prot, flags, offset, where)
    return mapped[0]


@_interrupts.promptly
def _mapped(address: int) -> int:
    if address == _MAP_FAILED:
        raise _refused("mmap")
    return address


def mmapping(fd: int, size: int, prot: int, flags: int, offset: int, where: int) -> Iterator[int]:
    """Return an iterator that maps, like `mmap`, when it is advanced to its single item."""
    position = _off_t(offset) if offset else _START
    arguments = (ctypes.c_void_p(where),), (_size_t(size),), (prot,), (flags,), (fd,), (position,)
    return map(_mapped, map(_mmap, *arguments))


def munmap(address: int, size: int) -> None:
    """Unmap as munmap(2) says."""
    if (_munmap if size > _LARGE else _munmap_quick)(address, size):
        raise _refused("munmap")


def mmap_into(
    mapped: list[int], fd: int, size: int, prot: int, flags: int, offset: int, where: int | None = None
) -> None:
    """Map as mmap(2) does, and append the address; no signal handler runs in between."""
    address = where if where is None else ctypes.c_void_p(where)
    position = _off_t(offset) if offset else _START
    mapped.extend(map(_mapped, map(_mmap, (address,), (_size_t(size),), (prot,), (flags,), (fd,), (position,))))


_LAST = (-1,)


def munmap_from(mapped: list[int], size: int) -> None:
    """Remove the last address from a list and unmap it; no signal handler runs in between."""
    address = mapped[-1]
    if next(map(_munmap if size > _LARGE else _munmap_quick, map(mapped.pop, _LAST), (size,)), 0):
        mapped.append(address)
        raise _refused("munmap")


def madvising(address: int, size: int, advice: int) -> Iterator[object]:
    """Return an iterator that calls `madvise` when it is advanced; its one item is the result."""
    return map(_libc.madvise, (address,), (size,), (advice,))


def msync(address: int, size: int, flags: int) -> None:
    """Write back as msync(2) does."""
    if _libc.msync(address, size, flags) != 0:
        raise _refused("msync")


def shm_open_into(fds: list[int], name: bytes, flags: int, permissions: int) -> None:
    """Open as shm_open(3) does, and append the fd; no signal handler runs in between."""
    while True:
        fds.extend(map(_librt.shm_open, (name,), (flags,), (ctypes.c_uint(permissions),)))
        if fds[-1] >= 0:
            return
        del fds[-1]
        refused = _refused("shm_open")
        if refused.errno != errno.EINTR:
            raise refused


def shm_open(name: bytes, flags: int, permissions: int) -> int:
    """Open as shm_open(3) does; return the fd."""
    fds: list[int] = []
    shm_open_into(fds, name, flags, permissions)
    return fds[0]


def shm_unlink(name: bytes) -> None:
    """Unlink as shm_unlink(3) does."""
    if _librt.shm_unlink(name) != 0:
        raise _refused("shm_unlink")


def madvise(address: int, size: int, advice: int) -> None:
    """Advise as madvise(2) does."""
    if _libc.madvise(address, size, advice) != 0:
        raise _refused("madvise")


# -- locks in shared memory: pthread_mutexattr_setrobust(3), sem_overview(7), futex(2) ------

MUTEX_SIZE = 64
"""Room for a ``pthread_mutex_t``: 24 to 48 bytes in glibc and musl, 64 in the largest libc known.

A test compares it with the C compiler's sizeof."""
SEMAPHORE_SIZE = 64
"""Room for a ``sem_t``: 16 or 32 bytes in glibc and musl."""
LOCK_LAYOUT = (1 if hasattr(_libc, "gnu_get_libc_version") else 2) << 8 | ctypes.sizeof(ctypes.c_void_p)
"""How this process lays out locks: glibc or another libc, and the size of a pointer."""

# These values are the same in glibc and musl.
_SHARED = 1
_ROBUST = 1
_ERROR_CHECKING = 2

_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
# These numbers are in no header that Python exposes. 64-bit architectures of the common table use 98.
_FUTEX_NUMBERS = {"x86_64": 202, "i686": 240, "armv7l": 240, "ppc64le": 221, "s390x": 238}
_FUTEX_NUMBERS |= dict.fromkeys(("aarch64", "riscv64", "loongarch64"), 98)
_futex_number = _FUTEX_NUMBERS.get(os.uname().machine) if ctypes.sizeof(ctypes.c_void_p) == 8 else 240

locks_missing = (
    "robust mutexes"
    if not hasattr(_libc, "pthread_mutexattr_setrobust")
    else "futex"
    if _futex_number is None or sys.platform != "linux"
    else None
)
"""The capability for locks in shared memory that this system lacks, or None."""


class _Timespec(ctypes.Structure):
    """``struct timespec`` of the calls without a suffix: two C longs."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _timespec(seconds: float) -> _Timespec:
    whole = int(seconds)
    return _Timespec(whole, int((seconds - whole) * 1e9))


def _prototype(library: Any, name: str, *arguments: Any) -> Any:
    function = getattr(library, name, None)
    if function is not None:
        function.restype = ctypes.c_int
        function.argtypes = arguments
    return function


_where, _moment = ctypes.c_void_p, ctypes.POINTER(_Timespec)

mutex_trylock: Callable[[int], int] = _prototype(_quick, "pthread_mutex_trylock", _where)
"""0, EBUSY, EOWNERDEAD (taken), ENOTRECOVERABLE, or EDEADLK (this thread has it; musl says EBUSY)."""
mutex_unlock: Callable[[int], int] = _prototype(_quick, "pthread_mutex_unlock", _where)
"""0, or EPERM: this thread does not hold it."""
mutex_consistent: Callable[[int], int] = _prototype(_quick, "pthread_mutex_consistent", _where)
"""0, or EINVAL: the last owner did not die."""
sem_post: Callable[[int], int] = _prototype(_quick, "sem_post", _where)
"""0, or -1: SEM_VALUE_MAX is reached."""

_mutex_init = _prototype(_libc, "pthread_mutex_init", _where, _where)
_mutex_timedlock = _prototype(_libc, "pthread_mutex_timedlock", _where, _moment)
# In glibc since 2.30. With other C libraries the wait uses the wall clock, and is longer if the clock is set back.
_mutex_clocklock = _prototype(_libc, "pthread_mutex_clocklock", _where, ctypes.c_int, _moment)
_mutexattr = {
    name: _prototype(_libc, f"pthread_mutexattr_{name}", _where, ctypes.c_int)
    for name in ("setpshared", "setrobust", "settype")
}
_mutexattr_init = _prototype(_libc, "pthread_mutexattr_init", _where)
_mutexattr_destroy = _prototype(_libc, "pthread_mutexattr_destroy", _where)
_sem_init = _prototype(_libc, "sem_init", _where, ctypes.c_int, ctypes.c_uint)
_sem_trywait = _prototype(_quick, "sem_trywait", _where)
_sem_timedwait = _prototype(_libc, "sem_timedwait", _where, _moment)
_sem_clockwait = _prototype(_libc, "sem_clockwait", _where, ctypes.c_int, _moment)
_sem_getvalue = _prototype(_quick, "sem_getvalue", _where, ctypes.POINTER(ctypes.c_int))

_syscall = ctypes.CDLL(None, use_errno=True)["syscall"]  # an object of its own, because it gets other argtypes
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, _where, ctypes.c_int, ctypes.c_uint32, _moment)


# Missing in other C libraries than glibc.
_malloc_trim = _prototype(_libc, "malloc_trim", ctypes.c_size_t)


def trim_heap() -> None:
    """Return the free memory of the heap to the kernel, where the C library has malloc_trim(3)."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def mutex_init(address: int) -> int:
    """Initialize a mutex that is shared between processes, robust, and reports errors where others would deadlock."""
    attributes = ctypes.create_string_buffer(64)
    where = ctypes.addressof(attributes)
    code = int(_mutexattr_init(where))
    if code != 0:
        return code
    try:
        for name, value in (("setpshared", _SHARED), ("setrobust", _ROBUST), ("settype", _ERROR_CHECKING)):
            code = int(_mutexattr[name](where, value))
            if code == 0:
                continue
            return code
        return int(_mutex_init(address, where))
    finally:
        _mutexattr_destroy(where)


def mutex_lock(address: int, seconds: float) -> int:
    """Lock: the codes of `mutex_trylock`, or ETIMEDOUT after *seconds*; here musl also returns EDEADLK."""
    if _mutex_clocklock is None:
        return int(_mutex_timedlock(address, _timespec(time.time() + seconds)))
    return int(_mutex_clocklock(address, time.CLOCK_MONOTONIC, _timespec(time.monotonic() + seconds)))


def sem_init(address: int, value: int) -> int:
    """Initialize a semaphore that is shared between processes."""
    return 0 if _sem_init(address, 1, value) == 0 else ctypes.get_errno()


def sem_try(address: int) -> Iterator[int]:
    """Return an iterator that tries to take a permit when it is advanced.

    Its one item is 0 if a permit was taken, else -1. ``answer[:] = sem_try(...)`` stores the item before any signal
    handler can run, so no permit is lost to a KeyboardInterrupt.
    """
    return map(_sem_trywait, (address,))


def sem_wait(address: int, seconds: float) -> Iterator[int]:
    """Return an iterator like that of `sem_try` that waits for *seconds*; -1 also after a signal."""
    if _sem_clockwait is None:
        return map(_sem_timedwait, (address,), (_timespec(time.time() + seconds),))
    until = _timespec(time.monotonic() + seconds)
    return map(_sem_clockwait, (address,), (time.CLOCK_MONOTONIC,), (until,))


def sem_value(address: int) -> int:
    """Return the number of free permits."""
    value = ctypes.c_int()
    _sem_getvalue(address, value)
    return value.value


def futex_wait(address: int, expected: int, seconds: float) -> int:
    """Wait for a wakeup while the word is *expected*: 0, EAGAIN (it differs), ETIMEDOUT, or EINTR."""
    if _syscall(_futex_number, address, _FUTEX_WAIT, expected, _timespec(seconds)) == 0:
        return 0
    return ctypes.get_errno()


def futex_wake(address: int, count: int) -> int:
    """Wake up to *count* waiters; return how many there were. A full memory barrier."""
    return int(_syscall(_futex_number, address, _FUTEX_WAKE, min(count, 0x7FFFFFFF), None))
