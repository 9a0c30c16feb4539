"""One word of shared memory that names the process that holds the lock.

The word is 0, or the token of a process: its pid and start time (`Backend.process_token`). It changes only by compare
and exchange, so taking a lock and recording its owner is one step. A process killed at any instruction either holds the
lock, and the word says so, or does not hold it.

* **Acquire**: exchange 0 for this process's token.
* **Release**: exchange the token for 0; wake a waiter if the word says that there may be one. Any process may release
  a lock that another process acquired, as with the locks of ``multiprocessing``: the word is then 0 as after any
  release.
* **Wait**: set bit 31, which says that a process may be asleep, and sleep on the word. After 10 ms, and then every
  0.1 s, check whether the owner is alive. If it is not, exchange its token for this process's. That succeeds in one
  process only, and only if no process has released the lock meanwhile.

A forked child has another token than its parent, so it never holds its parent's locks.

Where compare and exchange is unavailable (see `NativeLocks`), it is done under a robust mutex behind the word.
"""

from __future__ import annotations

import errno
import math
import time
import warnings
from threading import get_ident
from typing import TYPE_CHECKING, Any

from forkshm import _system
from forkshm._interrupts import promptly
from forkshm.backend import kernel, native_locks
from forkshm.backend import locks as _locks
from forkshm.errors import ForkshmWarning, NotConstructedError, SyncError
from forkshm.region.locks import LINE, SLICE, give_back, mutex_made
from forkshm.region.locks import take as take_mutex

if TYPE_CHECKING:
    from forkshm.region import MappedRegion

__all__ = ("SIZE", "Word", "deadline_of", "has_died", "pid_of", "token", "warn_of")

# Bytes of a word and its companions.
SIZE = 2 * LINE

# Flag: a process may be asleep.
_ASLEEP = 1 << 31
_LOW = 0xFFFFFFFF
_OWNER, _SIGNATURE_AT = 0, 1
# "FW", a version, and the kind of exchange: processes that differ in it must not share a lock.
_SIGNATURE = 0x46570100 | (native_locks is not None)

# Seconds before the first check whether the owner is alive; later checks are `SLICE` apart.
_FIRST_LOOK = 0.01
# Number of attempts before sleeping, if the owner can run meanwhile.
_LOOKS = range(12 if kernel.usable_cores() > 1 and native_locks is not None else 0)

# The token of this process; 0 until it is first needed.
_mine = [0]


def token() -> int:
    """Return the token of this process."""
    return _mine[0] or _learn()


def _learn() -> int:
    found = kernel.process_token()
    _mine[0] = found
    if native_locks is not None:
        native_locks.set_token(found)
    return found


def _in_child() -> None:
    _mine[0] = 0
    if native_locks is not None:
        native_locks.set_token(0)


_system.register_at_fork(after_in_child=_in_child)


def pid_of(owner: int) -> int:
    """Return the pid of a token."""
    return owner & (_ASLEEP - 1)


def has_died(owner: int) -> bool:
    """Return whether the process with that token has ended."""
    owner &= ~_ASLEEP
    return owner not in (0, token()) and not kernel.is_alive(owner)


def warn_of(owner: int, what: str, then: str) -> None:
    """Warn that the process with that token died."""
    warnings.warn(
        f"process {pid_of(owner)} died while it held {what}: {then}",
        ForkshmWarning,
        stacklevel=5,
    )


def deadline_of(block: bool, timeout: float | None) -> float:
    """Return the deadline by ``time.perf_counter()``; 0 for a single attempt."""
    if not block:
        return 0.0
    if timeout is None:
        return math.inf
    return time.perf_counter() + timeout if timeout > 0 else 0.0


class Word:
    """A lock word, and this process's knowledge of the lock.

    Attributes:
        state: The recursion count, the thread that acquired the lock, and the token that this process had then.
            Valid only together with the word: another process may have released the lock.
    """

    __slots__ = ("_memory", "_space", "address", "offset", "region", "state", "state_address")

    def __init__(self, region: MappedRegion, offset: int, *, new: bool) -> None:
        self.region = region
        self.offset = offset
        self.address = region.address + offset
        self._memory = memory = region.buf[offset : offset + SIZE].cast("Q")
        if new:
            if native_locks is None:
                mutex_made(self.address + LINE, "lock")
            _locks.futex_wake(self.address, 0)
            memory[_SIGNATURE_AT] = _SIGNATURE
        elif memory[_SIGNATURE_AT] != _SIGNATURE:
            raise NotConstructedError(
                f"cannot use a lock at offset {offset:,} of {region!r}: it was made by a process that changes lock "
                "words in another way (FORKSHM_NATIVE_LOCKS, another architecture), or is not a lock. Start both "
                "processes with the same settings."
            )
        self._space = bytearray(24)
        self.state = memoryview(self._space).cast("Q")
        self.state_address = kernel.address_of(self._space)

    @property
    def keep(self) -> Any:
        """The object that keeps the memory of word and state alive."""
        return self._memory, self.state

    @property
    def owner(self) -> int:
        """The token of the process that holds the lock, or 0."""
        return self._memory[_OWNER] & ~_ASLEEP

    def is_mine(self) -> bool:
        """Return whether this thread holds the lock."""
        state, me = self.state, token()
        return self.owner == me == state[2] and state[0] > 0 and state[1] == get_ident()

    def count(self) -> int:
        """Return how often this process holds the lock."""
        me = token()
        return self.state[0] if self.owner == me == self.state[2] else 0

    def take(self, deadline: float, kind: str) -> bool:
        """Acquire the lock; return whether that succeeded before *deadline*."""
        trial: list[int] = []
        try:
            return self._take(deadline, kind, trial)
        except BaseException:
            # A signal handler raised. If the exchange was made, *trial* has the expected value.
            if len(trial) == 2 and trial[0] == trial[1]:
                self.state[0] = 0
                self.give()
            else:
                _locks.futex_wake(self.address, 1)  # pass on a wakeup that this thread may have consumed
            raise

    def _take(self, deadline: float, kind: str, trial: list[int]) -> bool:
        state, me, ident, address = self.state, token(), get_ident(), self.address
        for _ in _LOOKS if deadline else ():
            self._exchange(0, me, trial)
            if trial[1] == 0:
                state[0] = 1
                state[1] = ident
                state[2] = me
                return True
        # Other processes may have gone to sleep before this thread came.
        sleeper = me | _ASLEEP if deadline else me
        pause = _FIRST_LOOK
        marked: list[int] = []
        while True:
            self._exchange(0, sleeper, trial)
            there = trial[1]
            if there == 0:
                state[0] = 1
                state[1] = ident
                state[2] = me
                return True
            left = deadline - time.perf_counter() if deadline else 0.0
            if left <= 0:
                if deadline or not has_died(there):
                    return False
            elif not there & _ASLEEP:
                self._exchange(there, there | _ASLEEP, marked)
                if marked[1] != there:
                    continue
                there |= _ASLEEP
            if left > 0 and _locks.futex_wait(address, there & _LOW, min(left, pause)) != errno.ETIMEDOUT:
                continue
            pause = SLICE
            if has_died(there):
                self._exchange(there, sleeper, trial)
                if trial[1] == there:
                    state[0] = 1
                    state[1] = ident
                    state[2] = me
                    warn_of(
                        there, f"a {kind}", "this process has it now; check what it guards, which may be half changed"
                    )
                    return True

    @promptly
    def give(self) -> bool:
        """Release the lock, whichever process holds it; return whether any did."""
        trial: list[int] = []
        try:
            while True:
                there = self._memory[_OWNER]
                if there == 0:
                    return False
                self._exchange(there, 0, trial)
                if trial[1] != there:
                    continue
                break
        except BaseException:
            # Repeat unless it was done: a release takes effect whatever is raised.
            if not (len(trial) == 2 and trial[0] == trial[1]):
                self._exchange(self._memory[_OWNER], 0, trial)
            _locks.futex_wake(self.address, 1)
            raise
        if there & _ASLEEP:
            _locks.futex_wake(self.address, 1)
        return True

    def _exchange(self, expected: int, new: int, trial: list[int]) -> None:
        """Exchange *expected* for *new*; *trial* gets the expected and the found value, which are equal on success."""
        trial[:] = (expected,)
        if native_locks is not None:
            # The assignment makes the call: no signal handler runs between the call and the record of its result.
            trial[1:] = map(native_locks.compare_exchange, (self.address,), (expected,), (new,))
            return
        mutex = self.address + LINE
        try:
            code = take_mutex(mutex, math.inf)
            if code == errno.EOWNERDEAD:  # the dead process has changed the word, or not
                code = _locks.mutex_consistent(mutex)
            if code != 0:
                raise SyncError(f"cannot use a lock at {self.address:#x}: the C library refused (errno {code})")
            words = self._memory
            there = words[_OWNER]
            if there == expected:
                words[_OWNER] = new
            trial[1:] = (there,)
        except BaseException:
            give_back(mutex)
            raise
        finally:
            _locks.mutex_unlock(mutex)
