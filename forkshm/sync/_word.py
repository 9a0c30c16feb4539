"""One word of shared memory that names the process which has the lock.

The word is 0, or the token of a process: its pid and start time (`Backend.process_token`). It is changed by compare and
exchange only, so taking a lock and noting its owner is one step. Whoever is killed at any instruction has the lock, and
the word says so, or does not have it.

* **Acquire**: exchange 0 for this process's token.
* **Release**: exchange the token for 0; wake a waiter if the word says that there may be one. Any process may release
  what another one has acquired, as with the locks of ``multiprocessing``: the word is then 0 like after any release.
* **Wait**: set bit 31, which says that somebody may be asleep, and sleep on the word. After 10 ms, and then each 0.1 s,
  look whether the owner is alive. If it is not, exchange its token for this process's: that succeeds in one process
  only, and only if nobody has released the lock meanwhile.

A forked child has another token than its parent, so it never has what its parent holds.

Where compare and exchange is not at hand (`NativeLocks` says where), it is done under a robust mutex behind the word.
"""

from __future__ import annotations

import errno
import math
import time
import warnings
from threading import get_ident
from typing import TYPE_CHECKING, Any

from forkshm import _system
from forkshm.backend import kernel, native_locks
from forkshm.backend import locks as _locks
from forkshm.errors import ForkshmWarning, NotConstructedError, SyncError
from forkshm.region.locks import LINE, SLICE, give_back, mutex_made
from forkshm.region.locks import take as take_mutex

if TYPE_CHECKING:
    from forkshm.region import MappedRegion

__all__ = ("SIZE", "Word", "deadline_of", "has_died", "pid_of", "token", "warn_of")

#: Bytes of a word with what belongs to it.
SIZE = 2 * LINE

#: Somebody may be asleep.
_ASLEEP = 1 << 31
_LOW = 0xFFFFFFFF
_OWNER, _SIGNATURE_AT = 0, 1
# "FW", a version, and which of the two ways: processes that differ in it must not share a lock.
_SIGNATURE = 0x46570100 | (native_locks is not None)

#: The first look whether the owner is alive; later ones are `SLICE` apart.
_FIRST_LOOK = 0.01
#: How often one tries before one sleeps, where the owner may go on meanwhile.
_LOOKS = range(12 if kernel.usable_cores() > 1 and native_locks is not None else 0)

# Of this process; 0 until somebody asks.
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
    """Return the pid in a token."""
    return owner & (_ASLEEP - 1)


def has_died(owner: int) -> bool:
    """Whether the process with that token has ended."""
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
    """Return until when to wait, by ``time.perf_counter()``: 0 to only try."""
    if not block:
        return 0.0
    if timeout is None:
        return math.inf
    return time.perf_counter() + timeout if timeout > 0 else 0.0


class Word:
    """A lock word, and what this process knows of the lock.

    Attributes:
        state: How often this process holds it, the thread that acquired it, and the token that this process had then.
            Of use only together with the word: another process may have released the lock.
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
                "words in another way (FORKSHM_NATIVE_LOCKS, another architecture), or is no lock; start both "
                "processes in the same way"
            )
        self._space = bytearray(24)
        self.state = memoryview(self._space).cast("Q")
        self.state_address = kernel.address_of(self._space)

    @property
    def keep(self) -> Any:
        """What keeps the memory of both words and state."""
        return self._memory, self.state

    @property
    def owner(self) -> int:
        """The token of the process that has the lock, or 0."""
        return self._memory[_OWNER] & ~_ASLEEP

    def is_mine(self) -> bool:
        """Whether this thread has it."""
        state, me = self.state, token()
        return self.owner == me == state[2] and state[0] > 0 and state[1] == get_ident()

    def count(self) -> int:
        """How often this process has it."""
        me = token()
        return self.state[0] if self.owner == me == self.state[2] else 0

    def take(self, deadline: float, kind: str) -> bool:
        """Acquire the lock; whether that was done before *deadline*."""
        trial: list[int] = []
        try:
            return self._take(deadline, kind, trial)
        except BaseException:
            # A signal handler has raised. What was expected was there, if the exchange was made.
            if len(trial) == 2 and trial[0] == trial[1]:
                self.state[0] = 0
                self.give()
            else:
                _locks.futex_wake(self.address, 1)  # if this thread was woken, it passes that on
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
        # Others may be asleep since before this thread came.
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
                    warn_of(there, f"a {kind}", "this process has it now; what it guards may be half changed")
                    return True

    def give(self) -> bool:
        """Release the lock, whoever has it; whether anybody had."""
        trial: list[int] = []
        try:
            while True:
                there = self._memory[_OWNER]
                if there == 0:
                    return False
                self._exchange(there, 0, trial)
                if trial[1] == there:
                    break
        except BaseException:
            # Once more, unless it was done: whoever releases a lock has released it, whatever was raised.
            if not (len(trial) == 2 and trial[0] == trial[1]):
                self._exchange(self._memory[_OWNER], 0, trial)
            _locks.futex_wake(self.address, 1)
            raise
        if there & _ASLEEP:
            _locks.futex_wake(self.address, 1)
        return True

    def _exchange(self, expected: int, new: int, trial: list[int]) -> None:
        """Put *new* in place of *expected*; *trial* is what was expected, and what was there: the same on success."""
        trial[:] = (expected,)
        if native_locks is not None:
            # The call is made by the assignment: no signal handler runs between it and the note of what came of it.
            trial[1:] = map(native_locks.compare_exchange, (self.address,), (expected,), (new,))
            return
        mutex = self.address + LINE
        try:
            code = take_mutex(mutex, math.inf)
            if code == errno.EOWNERDEAD:  # whoever died has changed the word, or not
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
