"""Locks in shared memory on Windows: words in the region, and a named kernel mutex whose name is one of the words.

A kernel mutex is owned by a thread and released when the thread ends, so no process waits for a dead one. But when no
process has the mutex open, it is destroyed, and the information that its owner died is lost. So the owner is also
written into the region. A thread that gets the kernel mutex and finds an owner there knows that this owner died.

Windows has no futex between processes. A thread waits for a word by polling it: often at first, then each millisecond.
"""

from __future__ import annotations

import collections
import errno
import itertools
import os
import secrets
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING

from forkshm import _interrupts
from forkshm.backend import _memory
from forkshm.backend.windows import _winapi

if TYPE_CHECKING:
    from collections.abc import Iterator

assert sys.platform == "win32"  # type checkers leave out the rest on other systems

MUTEX_SIZE = 64
"""Bytes of a mutex: name, owner, start time of the owner's process, state."""
_OWNER, _STARTED, _STATE = 16, 24, 32
SEMAPHORE_SIZE = 64
"""Bytes of a semaphore: a mutex that guards the count, and the count."""
_COUNT = 48
_MOST = 2**31 - 1
LOCK_LAYOUT = 3 << 8 | struct.calcsize("P")
"""Differs from that of every C library, so that other processes refuse these locks."""
locks_missing: str | None = None

_SOUND, _INHERITED, _LOST = 0, 1, 2

# Kernel mutexes that stay open here, beyond those that a thread of this process holds.
_KEPT = 1024
_LOOKS = 50
_PAUSE = 0.001

_handles: collections.OrderedDict[bytes, int] = collections.OrderedDict()
_held: set[bytes] = set()
# Mutexes and threads for which the kernel may count an ownership, perhaps twice, that the words do not show, because a
# signal handler raised during a call. Only the main thread runs handlers.
_unsure: set[tuple[bytes, int]] = set()
_lock = _interrupts.Lock()
_started = 0


def _me() -> tuple[int, int]:
    global _started
    if not _started:
        _started = _winapi.process_start(_winapi.SELF)
    return os.getpid() << 32 | threading.get_native_id(), _started


def _handle_of(address: int) -> tuple[bytes, int]:
    name = _memory.bytes_at(address, 16)
    with _lock:
        handle = _handles.get(name)
        if handle is not None:
            _handles.move_to_end(name)
            return name, handle
        handle = _handles[name] = _winapi.create_mutex(f"Local\\forkshm-{name.hex()}")
        for old in list(itertools.islice(_handles, max(len(_handles) - _KEPT, 0))):
            if old in _held:
                continue
            _winapi.close(_handles.pop(old))
        return name, handle


def mutex_init(address: int) -> int:
    """Initialize a mutex."""
    _memory.clear_memory(address, MUTEX_SIZE)
    _memory.copy(address, secrets.token_bytes(16), 16)
    return 0


def mutex_trylock(address: int) -> int:
    """Try to lock: 0, EBUSY, EOWNERDEAD (locked), ENOTRECOVERABLE or EDEADLK."""
    return mutex_lock(address, 0.0)


def mutex_lock(address: int, seconds: float) -> int:
    """Lock: the codes of `mutex_trylock`, or ETIMEDOUT after *seconds*."""
    me, started = _me()
    if _winapi.load_long(address + _OWNER) == me and _winapi.load_long(address + _STARTED) == started:
        return errno.EDEADLK
    try:
        name, handle = _handle_of(address)
        key = name, me
        was_unsure = key in _unsure
        _unsure.add(key)
        if _winapi.wait(handle, int(seconds * 1000)) == _winapi.WAIT_TIMEOUT:
            _unsure.discard(key)
            return errno.ETIMEDOUT if seconds else errno.EBUSY
    except OSError as error:
        return error.errno or errno.EINVAL
    if _winapi.load_long(address + _STATE) == _LOST:
        _release(key, handle)
        return errno.ENOTRECOVERABLE
    # An owner that died before this store had not begun; one that died after it was cleared had finished.
    died = _winapi.load_long(address + _OWNER) != 0
    if died:
        _winapi.store_long(address + _STATE, _INHERITED)
    _held.add(name)
    _winapi.store_long(address + _STARTED, started)
    _winapi.store_long(address + _OWNER, me)
    if not was_unsure:
        _unsure.discard(key)
    return errno.EOWNERDEAD if died else 0


def mutex_unlock(address: int) -> int:
    """Unlock: 0, or EPERM."""
    me, started = _me()
    if _winapi.load_long(address + _OWNER) != me or _winapi.load_long(address + _STARTED) != started:
        return errno.EPERM
    name, handle = _handle_of(address)
    if _winapi.load_long(address + _STATE) == _INHERITED:
        _winapi.store_long(address + _STATE, _LOST)
    key = name, me
    was_unsure = key in _unsure
    _unsure.add(key)
    _held.discard(name)
    try:
        _winapi.store_long(address + _OWNER, 0)
    finally:
        released = _winapi.release_mutex(handle)
    if was_unsure:
        _release(key, handle)
    _unsure.discard(key)
    return 0 if released else errno.EPERM


def _release(key: tuple[bytes, int], handle: int) -> None:
    # The kernel counts how often this thread has acquired the mutex.
    while _winapi.release_mutex(handle):
        pass
    _unsure.discard(key)


def mutex_consistent(address: int) -> int:
    """Mark as repaired: 0, or EINVAL."""
    if _winapi.load_long(address + _STATE) != _INHERITED:
        return errno.EINVAL
    _winapi.store_long(address + _STATE, _SOUND)
    return 0


def sem_init(address: int, value: int) -> int:
    """Initialize a semaphore."""
    if value > _MOST:
        return errno.EINVAL
    mutex_init(address)
    _winapi.store(address + _COUNT, value)
    return 0


def _change(address: int, by: int) -> int:
    before = None
    try:
        code = mutex_lock(address, 5.0)
        if code == errno.EOWNERDEAD:
            mutex_consistent(address)  # safe, because the count changes in one store
        elif code != 0:
            return -1
        value = _winapi.load(address + _COUNT)
        if not 0 <= value + by <= _MOST:
            mutex_unlock(address)
            return -1
        before = value
        _winapi.store(address + _COUNT, value + by)
        mutex_unlock(address)
        return 0
    except BaseException:
        # A signal handler raised somewhere in this call. The caller gets no answer, so the change is undone.
        _change_back(address, by, before)
        raise


def _change_back(address: int, by: int, before: int | None) -> None:
    code = mutex_lock(address, 5.0)
    if code == errno.EDEADLK:  # this thread still holds the mutex
        if before is not None:
            _winapi.store(address + _COUNT, before)
    elif code in (0, errno.EOWNERDEAD):
        mutex_consistent(address)
        if before is not None:  # released after the store
            _winapi.store(address + _COUNT, _winapi.load(address + _COUNT) - by)
    else:
        return
    mutex_unlock(address)


def sem_post(address: int) -> int:
    """Release a permit: 0, or -1."""
    return _change(address, 1)


def sem_try(address: int) -> Iterator[int]:
    """Return an iterator that tries to take a permit when it is advanced: 0 if one was taken, else -1."""
    return map(_change, (address,), (-1,))


def sem_wait(address: int, seconds: float) -> Iterator[int]:
    """Return an iterator like that of `sem_try` that waits for *seconds*."""
    return map(_wait, (address,), (seconds,))


def _wait(address: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while _change(address, -1) != 0:
        left = deadline - time.monotonic()
        if left <= 0:
            return -1
        futex_wait(address + _COUNT, 0, left)
    return 0


def sem_value(address: int) -> int:
    """Return the number of free permits."""
    return _winapi.load(address + _COUNT)


def futex_wait(address: int, expected: int, seconds: float) -> int:
    """Poll a word while it is *expected*: 0, EAGAIN (it differs), or ETIMEDOUT."""
    if _winapi.load(address) != expected:
        return errno.EAGAIN
    deadline = time.monotonic() + seconds
    for count in itertools.count():
        time.sleep(0 if count < _LOOKS else _PAUSE)
        if _winapi.load(address) != expected:
            return 0
        if time.monotonic() >= deadline:
            return errno.ETIMEDOUT
    raise AssertionError("counting ends never")


def futex_wake(address: int, count: int) -> int:
    """Provide only a full memory barrier: waiters poll the word."""
    _winapi.full_barrier()
    return 0


def kept() -> set[int]:
    """Return the handles of mutexes that stay open for later use."""
    with _lock:
        return set(_handles.values())
