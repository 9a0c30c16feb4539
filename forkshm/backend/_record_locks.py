"""Locks in shared memory without robust mutexes, process-shared semaphores or futexes.

A lock is a number in the memory, and a byte of that number in a file that all processes of this user have open: whose
record lock (fcntl(2)) is on the byte, has the lock. The kernel takes it away from who ends, in whichever way. Beside
the number the holder writes its thread: who finds one there when it gets the lock, knows that the holder died.

Nobody is woken up by this: who waits, looks again and again, with pauses from 20 us to 2 ms.

It works between the processes of one user on one machine, which see the same directory /tmp.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import struct
import sys
import tempfile
import threading
import time
from threading import get_native_id
from typing import TYPE_CHECKING

from forkshm import _system
from forkshm.backend import _memory

assert sys.platform != "win32"  # elsewhere type checkers leave out what follows

if TYPE_CHECKING:
    from collections.abc import Iterator

MUTEX_SIZE = 64
SEMAPHORE_SIZE = 64
#: Unlike that of any C library: others do not take these for theirs.
LOCK_LAYOUT = 3 << 8 | struct.calcsize("P")
locks_missing: str | None = None

#: Words of eight bytes: the byte of the file; who has it, or had it and died; what became of it.
_NUMBER, _OWNER, _STATE = 0, 1, 2
#: Of a semaphore.
_PERMITS = 1
_SOUND, _DIED, _GIVEN_UP = 0, 1, 2
_MOST_PERMITS = 2**31 - 1

_FIRST_PAUSE, _LAST_PAUSE = 20e-6, 2e-3


class _Held:
    """What this process has locked; a record lock does not tell its threads apart."""

    def __init__(self) -> None:
        self.fd = -1
        # By number: the thread that has it. Changed in steps that no other thread can come between.
        self.by_number: dict[int, tuple[int, object]] = {}
        #: See `process_token`; 0 until somebody asks.
        self.token = 0

    def file(self) -> int:
        """Return the fd of the file, which is opened once and never closed: with it the locks would go."""
        if self.fd < 0:
            folder = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()  # noqa: S108
            path = os.path.join(folder, f"forkshm-{os.geteuid()}.locks")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if os.fstat(fd).st_uid != os.geteuid():
                os.close(fd)
                raise PermissionError(errno.EPERM, f"{path} belongs to another user", path)
            os.utime(fd)  # what looks old may be cleaned away
            if self.fd >= 0:  # another thread was faster
                os.close(fd)
            else:
                self.fd = fd
        return self.fd

    def in_child(self) -> None:
        # Record locks are those of the process that took them.
        self.by_number.clear()
        self.token = 0


_held = _Held()
_system.register_at_fork(after_in_child=_held.in_child)


def process_token() -> int:
    """Return a number that says which process this is: its pid, and a random one; it has that byte of the file."""
    token = secrets.randbits(30) << 32 | 1 << 62 | os.getpid() & 0x7FFFFFFF
    # Also the pid's start would do; but not all systems tell it, and none of them by one call.
    fcntl.lockf(_held.file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, token)
    _held.token = token
    return token


def is_alive(token: int) -> bool:
    """Whether the process with that token has not ended."""
    if token == _held.token:
        return True
    # Like struct flock of C: its fields are in another order on each system, so it is tried, and given back at once.
    try:
        fcntl.lockf(_held.file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, token)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return True
        raise
    fcntl.lockf(_held.file(), fcntl.LOCK_UN, 1, token)
    return False


def _words(address: int) -> memoryview:
    return memoryview(_memory.window(address, 24)).cast("B").cast("Q")


def _lock(number: int, thread: int) -> int:
    """Take a byte: 0, EBUSY, EDEADLK, or EOWNERDEAD: of a thread of this process that has ended."""
    mine = (thread, object())
    there = _held.by_number.setdefault(number, mine)
    if there is not mine:
        if there[0] == thread:
            return errno.EDEADLK
        if any(one.native_id == there[0] for one in threading.enumerate()):
            return errno.EBUSY
        _held.by_number[number] = mine
        return errno.EOWNERDEAD
    try:
        fcntl.lockf(_held.file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError as error:
        del _held.by_number[number]
        return errno.EBUSY if error.errno in (errno.EACCES, errno.EAGAIN) else error.errno or errno.EIO
    return 0


def _unlock(number: int) -> None:
    fcntl.lockf(_held.file(), fcntl.LOCK_UN, 1, number)
    _held.by_number.pop(number, None)


def _new_number() -> int:
    return secrets.randbits(62) | 1


def mutex_init(address: int) -> int:
    """Make a mutex."""
    try:
        _held.file()
    except OSError as error:
        return error.errno or errno.EIO
    words = _words(address)
    words[_OWNER] = words[_STATE] = 0
    words[_NUMBER] = _new_number()
    return 0


def mutex_trylock(address: int) -> int:
    """See `Locks`."""
    words = _words(address)
    number = words[_NUMBER]
    if not number:
        return errno.EINVAL
    me = get_native_id()
    code = _lock(number, me)
    if code not in (0, errno.EOWNERDEAD):
        return code
    if words[_STATE] == _GIVEN_UP:
        _unlock(number)
        return errno.ENOTRECOVERABLE
    died = words[_OWNER] != 0 or words[_STATE] == _DIED
    if died:
        words[_STATE] = _DIED
    words[_OWNER] = me
    return errno.EOWNERDEAD if died else 0


def mutex_lock(address: int, seconds: float) -> int:
    """See `Locks`."""
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while (code := mutex_trylock(address)) == errno.EBUSY:
        left = deadline - time.monotonic()
        if left <= 0:
            return errno.ETIMEDOUT
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LAST_PAUSE)
    return code


def mutex_unlock(address: int) -> int:
    """See `Locks`."""
    words = _words(address)
    number, me = words[_NUMBER], get_native_id()
    there = _held.by_number.get(number)
    if there is None or there[0] != me:
        return errno.EPERM
    if words[_OWNER] == me:
        if words[_STATE] == _DIED:
            words[_STATE] = _GIVEN_UP
        words[_OWNER] = 0
    _unlock(number)
    return 0


def mutex_consistent(address: int) -> int:
    """See `Locks`."""
    words = _words(address)
    there = _held.by_number.get(words[_NUMBER])
    if words[_STATE] != _DIED or there is None or there[0] != get_native_id():
        return errno.EINVAL
    words[_STATE] = _SOUND
    return 0


def sem_init(address: int, value: int) -> int:
    """See `Locks`."""
    code = mutex_init(address)
    if code == 0:
        _words(address)[_PERMITS] = value
    return code


def _change_permits(address: int, change: int) -> int:
    """Add to the permits: 0, or -1 when there would be too few, or too many."""
    words = _words(address)
    number, me = words[_NUMBER], get_native_id()
    pause = _FIRST_PAUSE
    while (code := _lock(number, me)) == errno.EBUSY:
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)
    try:
        value = words[_PERMITS] + change
        if not 0 <= value <= _MOST_PERMITS:
            return -1
        words[_PERMITS] = value  # one store: who is killed here has done it or not
        return 0
    finally:
        if code != errno.EDEADLK:  # else a signal handler came into the middle of this very call
            _unlock(number)


def sem_post(address: int) -> int:
    """See `Locks`."""
    return _change_permits(address, 1)


def _take_permit(address: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while True:
        if _words(address)[_PERMITS] and _change_permits(address, -1) == 0:
            return 0
        left = deadline - time.monotonic()
        if left <= 0:
            return -1
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LAST_PAUSE)


def sem_try(address: int) -> Iterator[int]:
    """See `Locks`."""
    return map(_take_permit, (address,), (0.0,))


def sem_wait(address: int, seconds: float) -> Iterator[int]:
    """See `Locks`."""
    return map(_take_permit, (address,), (seconds,))


def sem_value(address: int) -> int:
    """See `Locks`."""
    return _words(address)[_PERMITS]


def _word(address: int) -> memoryview:
    return memoryview(_memory.window(address, 4)).cast("B").cast("I")


def futex_wait(address: int, expected: int, seconds: float) -> int:
    """See `Locks`: whoever wakes others has changed the word before."""
    word = _word(address)
    if word[0] != expected:
        return errno.EAGAIN
    deadline = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LAST_PAUSE)
        if word[0] != expected:
            return 0
    return errno.ETIMEDOUT


_barrier = threading.Lock()


def futex_wake(address: int, count: int) -> int:
    """Nobody sleeps for longer than a moment; see `Locks` for the barrier."""
    if _barrier.acquire(blocking=False):  # a locked instruction: what was written before is seen by all
        _barrier.release()
    return 0
