"""Locks in shared memory without robust mutexes, process-shared semaphores or futexes.

A lock is a number in the memory and the byte at that position in a file, which all processes of this user have open.
The process whose record lock (fcntl(2)) is on the byte has the lock. The kernel removes the record lock when that
process ends, in any way. The holder writes its thread beside the number. A process that gets the lock and finds a
thread there knows that the holder died.

Nothing wakes a waiter: it polls, with pauses from 20 us to 2 ms.

These locks work between processes of one user on one machine that share the directory /tmp.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import struct
import sys
import tempfile
import threading
import time
from threading import get_native_id
from typing import TYPE_CHECKING, Any

from forkshm import _system
from forkshm._interrupts import promptly
from forkshm.backend import _memory
from forkshm.backend.posix._whole import surely, whole
from forkshm.errors import SyncError

assert sys.platform != "win32"  # type checkers leave out the rest on Windows

if TYPE_CHECKING:
    from collections.abc import Iterator

MUTEX_SIZE = 64
SEMAPHORE_SIZE = 64
LOCK_LAYOUT = 4 << 8 | struct.calcsize("P")
"""Differs from that of every C library, so that other processes refuse these locks."""
locks_missing: str | None = None

# Words of eight bytes: the byte of the file; the owner, alive or dead; the state after its death; the file.
_NUMBER, _OWNER, _STATE, _FILE = 0, 1, 2, 3
# In a semaphore, this word has the permits.
_PERMITS = 1
_SOUND, _DIED, _GIVEN_UP = 0, 1, 2
_MOST_PERMITS = 2**31 - 1

_FIRST_PAUSE, _LAST_PAUSE = 20e-6, 2e-3


# Names to try for the file, in this order: other users may have taken some.
_NAMES = ["forkshm-{user}.locks", *(f"forkshm-{{user}}-{number}.locks" for number in range(1, 16))]
# How often the file is touched while in use, so that cleaners of old files leave it.
_TOUCH_SECONDS = 3600.0
# Number of attempts to release a lock before the refusal is an error, and the pause between them.
_RELEASES, _RELEASE_PAUSE = 200, 0.005


class _Files:
    """The files whose bytes are locked; each lock records which file it is in.

    One file is enough, unless it is removed while in use. Then its locks stay usable for the processes that have it
    open, and other processes are refused. New locks are made in a new file.
    """

    def __init__(self) -> None:
        # By identity. Never closed: closing one fd of a file would release all of this process's locks in it.
        self._fds: dict[int, int] = {}
        self._touched = time.monotonic()

    def current(self) -> int:
        """Return the identity of the file for new locks.

        Raises:
            SyncError: No file can be opened.
        """
        for identity in list(self._fds):
            status = self._status(identity)
            if status is not None and status.st_nlink:
                return identity
        refused: list[str] = []
        for path in _paths():
            try:
                identity = self._open(path, os.O_CREAT)
            except OSError as error:
                refused.append(f"{path}: {error.strerror}")
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    break
            else:
                return identity
        raise SyncError(
            f"cannot make a lock: no file can be opened for it ({refused[-1]}). Remove files of that name that belong "
            "to others, or set TMPDIR"
        )

    def fds(self) -> list[int]:
        """Return the fds of all files that this process has open."""
        return [self._fds[identity] for identity in list(self._fds) if self._status(identity) is not None]

    def _status(self, identity: int) -> os.stat_result | None:
        """Return what the kernel tells about a file; None, and forget the file, if other code has closed its fd."""
        fd = self._fds.get(identity, -1)
        if fd < 0:
            return None
        with contextlib.suppress(OSError):
            status = os.fstat(fd)
            if _identity(status) == identity:
                return status
        self._fds.pop(identity, None)
        return None

    def fd(self, identity: int) -> int:
        """Return the fd of the file that a lock is in.

        Raises:
            SyncError: The file was removed.
        """
        if self._status(identity) is None:
            for path in _paths():
                with contextlib.suppress(OSError):
                    if self._open(path, 0) == identity:
                        break
            else:
                raise SyncError(
                    f"cannot use a lock: the file in {_folder()} by which processes share it was removed while it was "
                    "used. Keep cleaners from removing forkshm-*.locks there, and start the program again"
                )
        fd = self._fds[identity]
        if time.monotonic() - self._touched > _TOUCH_SECONDS:
            self._touched = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(fd)
        return fd

    def _open(self, path: str, flags: int) -> int:
        flags |= os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        status = None
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
        if status is not None:
            if (known := _identity(status)) in self._fds:
                return known  # closing another fd of the file would release its locks
            _check(status)
        fd = os.open(path, flags, 0o600)
        try:
            status = os.fstat(fd)
            _check(status)
        except BaseException:
            os.close(fd)
            raise
        identity = _identity(status)
        if self._fds.setdefault(identity, fd) == fd:
            # If other code has closed an fd of this file, the kernel has released all locks of this process.
            for number in filter(None, (_held.token, *_held.by_number)):
                with contextlib.suppress(OSError):  # another process has taken it over
                    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            with contextlib.suppress(OSError):
                os.utime(fd)
        # Another thread opened the file first. This fd stays open, because closing it would release that thread's
        # locks.
        return identity


def _check(status: os.stat_result) -> None:
    if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
        raise PermissionError(errno.EPERM, "it belongs to another user, or is not a file")


def _identity(status: os.stat_result) -> int:
    # While the file is open, no other file has its number.
    return (status.st_dev << 40 ^ status.st_ino) % 2**64


def _folder() -> str:
    return "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()  # noqa: S108


def _paths() -> Iterator[str]:
    folder, user = _folder(), os.geteuid()
    return (os.path.join(folder, name.format(user=user)) for name in _NAMES)


class _Held:
    """The locks that threads of this process hold; a record lock does not tell threads apart."""

    def __init__(self) -> None:
        # The holding thread, by number. Changed in steps that no other thread can interleave with.
        self.by_number: dict[int, tuple[int, object]] = {}
        # See `process_token`; 0 until first used.
        self.token = 0

    def in_child(self) -> None:
        # Record locks belong to the process that took them, not to its children.
        self.by_number.clear()
        self.token = 0


_files = _Files()
_held = _Held()
_system.register_at_fork(after_in_child=_held.in_child)


@whole
def process_token() -> int:
    """Return a number that identifies this process: its pid and a random part.

    The process locks the byte at that position of the file.
    """
    token = secrets.randbits(30) << 32 | 1 << 62 | os.getpid() & 0x7FFFFFFF
    # The start time of the pid would also do, but not every system reports it, and none by a single call.
    fcntl.lockf(_files.fd(_files.current()), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, token)
    _held.token = token
    return token


@whole
def is_alive(token: int) -> bool:
    """Return whether the process with that token has not ended."""
    if token == _held.token:
        return True
    # F_GETLK needs C's struct flock, whose order of fields differs between systems. So the lock is tried instead, and
    # released at once.
    _files.current()
    for fd in _files.fds():
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, token)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return True
            raise
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, token)
    return False


def _words(address: int) -> memoryview:
    return memoryview(_memory.buffer_at(address, 32)).cast("B").cast("Q")


def _lock(words: memoryview, thread: int) -> int:
    """Lock the byte: 0, EBUSY, EDEADLK, or EOWNERDEAD if a thread of this process ended as the owner."""
    number, fd = words[_NUMBER], _files.fd(words[_FILE])
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
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError as error:
        del _held.by_number[number]
        return errno.EBUSY if error.errno in (errno.EACCES, errno.EAGAIN) else error.errno or errno.EIO
    return 0


def _unlock(words: memoryview) -> None:
    number = words[_NUMBER]
    for left in reversed(range(_RELEASES)):
        try:
            fcntl.lockf(_files.fd(words[_FILE]), fcntl.LOCK_UN, 1, number)
            break
        except OSError as error:
            # ENOLCK: splitting a record around the byte needs kernel memory that is not available. All others wait
            # until this lock is released.
            if error.errno not in (errno.ENOLCK, errno.ENOMEM) or not left:
                raise
            time.sleep(_RELEASE_PAUSE)
    _held.by_number.pop(number, None)


def _new_number() -> int:
    return secrets.randbits(62) | 1


@whole
def mutex_init(address: int) -> int:
    """Initialize a mutex."""
    words = _words(address)
    words[_OWNER] = words[_STATE] = 0
    words[_FILE] = _files.current()
    words[_NUMBER] = _new_number()
    return 0


@whole
def mutex_trylock(address: int) -> int:
    """See `Locks`."""
    words = _words(address)
    number = words[_NUMBER]
    if not number:
        return errno.EINVAL
    me = get_native_id()
    code = _lock(words, me)
    if code not in (0, errno.EOWNERDEAD):
        return code
    if words[_STATE] == _GIVEN_UP:
        _unlock(words)
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


@promptly
def mutex_unlock(address: int) -> int:
    """See `Locks`."""
    # When the program ends, the names of this module are gone before the last lock is. The kernel unlocks it then.
    unlock: Any = _mutex_unlock
    return 0 if unlock is None else unlock(address)


@surely
def _mutex_unlock(address: int) -> int:
    words = _words(address)
    number, me = words[_NUMBER], get_native_id()
    there = _held.by_number.get(number)
    if there is None or there[0] != me:
        return errno.EPERM
    if words[_OWNER] == me:
        if words[_STATE] == _DIED:
            words[_STATE] = _GIVEN_UP
        words[_OWNER] = 0
    _unlock(words)
    return 0


@whole
def mutex_consistent(address: int) -> int:
    """See `Locks`."""
    words = _words(address)
    there = _held.by_number.get(words[_NUMBER])
    if words[_STATE] != _DIED or there is None or there[0] != get_native_id():
        return errno.EINVAL
    words[_STATE] = _SOUND
    return 0


@whole
def sem_init(address: int, value: int) -> int:
    """See `Locks`."""
    code = mutex_init(address)
    if code == 0:
        _words(address)[_PERMITS] = value
    return code


def _change_permits(address: int, change: int) -> int:
    """Add to the permits: 0, or -1 if there would be too few or too many."""
    pause = _FIRST_PAUSE
    while (code := _change_now(address, change)) == errno.EBUSY:
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)
    return code


@whole
def _change_now(address: int, change: int) -> int:
    """Change the permits, unless another thread does at the moment: EBUSY."""
    words = _words(address)
    code = _lock(words, get_native_id())
    if code == errno.EBUSY:
        return code
    try:
        value = words[_PERMITS] + change
        if not 0 <= value <= _MOST_PERMITS:
            return -1
        words[_PERMITS] = value  # one store: a process killed here has either changed it or not
        return 0
    finally:
        if code != errno.EDEADLK:  # with EDEADLK, a signal handler interrupted this very call
            _unlock(words)


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
    return memoryview(_memory.buffer_at(address, 4)).cast("B").cast("I")


def futex_wait(address: int, expected: int, seconds: float) -> int:
    """See `Locks`. The waking thread has changed the word before it wakes."""
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
    """Provide only the memory barrier, see `Locks`: waiters poll the word."""
    if _barrier.acquire(blocking=False):  # a locked instruction makes earlier writes visible to all
        _barrier.release()
    return 0
