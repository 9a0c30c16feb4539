"""The team state: the memory through which the members of a team synchronize.

Each word has a single writer, or is written with `guard` held, and always in one store. So a member that is killed at
any point leaves nothing half changed. `guard` is a robust mutex.

    head        futex words: the wakeup word, on which waiters sleep, and the start barrier
    guard       mutex for loops and singles
    lock        the mutex for the members' own code
    states      for each member: starting, running, left, failed, died
    pids        for each member
    arrivals    for each member: number of barriers it has reached
    loops_begun for each member: number of loops it has reached
    singles     number of singles taken; then the size of the directory in bytes
    loops       slots of three words: number of the loop, its length, the next index
    slots       two values for each member: it writes one while others may still read the other

A value that does not fit a slot is in the overflow memory, another memory object. It is not mapped, but written and
read at an offset of the member's own. Behind these offsets are a directory of named memory, and that memory itself,
which is mapped as regions.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
from typing import TYPE_CHECKING, Any

from forkshm.backend import kernel
from forkshm.errors import ForkshmError, RegionBusyError, TeamBrokenError
from forkshm.region import MappedRegion, Mode, Mutex, OwnedFd, RecursiveMutex, anonymous_shared_memory, map_refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.pickler import ReceivedFd

__all__ = ("DIED", "FAILED", "LEFT", "LOOPS", "RUNNING", "STARTING", "TeamState")

# States of a member.
STARTING, RUNNING, LEFT, FAILED, DIED = range(5)

_WAKEUP, _GATE = 0, 1
# Indices of 8-byte words behind the futex words: singles taken, size of the directory in bytes.
_SINGLES, _DIRECTORY = 1, 2

LOOPS = 32
"""Number of loops that may be in progress: the fastest member is at most this far ahead of the slowest."""
_LOOP_WORDS = 3

_LINE = 64
_SLOT = 1024
# A value: its size, if its bytes follow; otherwise 0, and the size of the list of parts in the overflow memory.
_VALUE = struct.Struct("<QQ")

# log2 of the overflow memory for one value, which is more than any machine has.
_OVERFLOW_SHIFT = 42

_ALL = 0x7FFFFFFF


class Fd:
    """An fd as an object with ``fileno()``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd


class TeamState:
    """The shared state of one team.

    Args:
        size: Number of members.
        fds: The received fds of a team state that another process made; None creates a new one.

    Raises:
        RegionCreateError: The kernel refused the memory.
        OSError: The kernel refused the overflow memory.
    """

    def __init__(self, size: int, fds: tuple[ReceivedFd, ReceivedFd] | None = None) -> None:
        self.size = size
        self._overflow = OwnedFd()
        locks = _LINE
        states = locks + Mutex.SIZE + RecursiveMutex.SIZE
        loops = states + 4 * size * 8
        slots = loops + LOOPS * _LOOP_WORDS * 8
        nbytes = slots + 2 * size * _SLOT
        if fds is None:
            self.region = anonymous_shared_memory(nbytes)
            # No call between its creation and this store.
            self._overflow.fd = kernel.create_growing("overflow")
            self.guard = Mutex(self.region, locks, repair=_nothing)
            self.lock = RecursiveMutex(self.region, locks + Mutex.SIZE, repair=_died_with_lock)
        else:
            self.region = MappedRegion(Fd(fds[0].fd), size=nbytes)
            self._overflow.fd = fds[1].take()
            self.guard = Mutex.attach(self.region, locks, repair=_nothing)
            self.lock = RecursiveMutex.attach(self.region, locks + Mutex.SIZE, repair=_died_with_lock)
        self._overflow.own()
        whole = self.region.buf
        self._head = whole[:_LINE].cast("I")
        self._singles = whole[:_LINE].cast("Q")
        self._wakeup = self.region.address + 4 * _WAKEUP
        self._gate = self.region.address + 4 * _GATE
        words = whole[states:slots].cast("Q")
        self.states, self.pids, self.arrivals, self.loops_begun = (
            words[size * index : size * (index + 1)] for index in range(4)
        )
        self._loops = words[4 * size :]
        self._slots = whole[slots:]

    def fds(self) -> tuple[int, int]:
        """Return the fds of the team state, for a process that is not forked from this one. They stay open here."""
        return self.region.fileno(), self.overflow

    # -- states -------------------------------------------------------------------------

    def enter(self, rank: int) -> None:
        """Record this process as the member *rank*."""
        self.pids[rank] = os.getpid()
        self.states[rank] = RUNNING

    def end(self, rank: int, state: int) -> None:
        """Record how a member has ended, and wake the members that may wait for it."""
        self.states[rank] = state
        self.wake()

    def open_gate(self) -> None:
        """Open the start barrier."""
        self._head[_GATE] = 1
        kernel.locks.futex_wake(self._gate, _ALL)

    def wait_for_gate(self) -> None:
        """Wait until all members have started."""
        while not self._head[_GATE]:
            kernel.locks.futex_wait(self._gate, 0, 1.0)

    # -- waiting ------------------------------------------------------------------------

    def wake(self) -> None:
        """Wake all waiters. A full memory barrier."""
        # Two simultaneous calls may count as one, so a waiter may go back to sleep. It wakes up again after one slice.
        self._head[_WAKEUP] = (self._head[_WAKEUP] + 1) & 0xFFFFFFFF
        kernel.locks.futex_wake(self._wakeup, _ALL)

    def wakeup(self) -> int:
        """Return the number of wakeups so far, to pass to `sleep`."""
        return self._head[_WAKEUP]

    def sleep(self, woken: int, seconds: float) -> None:
        """Sleep until the next wakeup, or for *seconds*."""
        kernel.locks.futex_wait(self._wakeup, woken, seconds)

    def arrive(self, rank: int, number: int) -> bool:
        """Record the arrival at a barrier; return whether all other members have arrived."""
        self.arrivals[rank] = number
        kernel.locks.futex_wake(self._wakeup, 0)  # a full barrier: of the last two members, one sees the other
        return self.have_arrived(number)

    def have_arrived(self, number: int) -> bool:
        """Return whether all members have reached a barrier."""
        return min(self.arrivals.tolist()) >= number

    # -- loops and singles --------------------------------------------------------------

    def take_single(self, number: int) -> bool:
        """Return whether the caller is the first to reach this `single`."""
        if self._singles[_SINGLES] >= number:
            return False
        with self.guard:
            if self._singles[_SINGLES] >= number:
                return False
            self._singles[_SINGLES] = number
            return True

    def begin_loop(self, rank: int, number: int, length: int) -> int | None:
        """Enter a loop, and return its length; None if the slowest member is too far behind.

        Raises:
            LookupError: Other members are far beyond this loop.
        """
        self.loops_begun[rank] = number
        slot = number % LOOPS * _LOOP_WORDS
        loops = self._loops
        with self.guard:
            there = loops[slot]
            if there < number:
                if there and min(self.loops_begun.tolist()) <= there:
                    return None
                loops[slot + 1] = length
                loops[slot + 2] = 0
                loops[slot] = number  # stored last: a member that is killed before it has begun nothing
            elif there > number:
                raise LookupError
            return loops[slot + 1]

    def claim(self, number: int, chunksize: int, share: int) -> tuple[int, int]:
        """Claim the next indices of a loop: *chunksize*, or the *share*-th part of the rest if that is more.

        Raises:
            LookupError: The loop ended long ago.
        """
        slot = number % LOOPS * _LOOP_WORDS
        loops = self._loops
        with self.guard:
            if loops[slot] != number:
                raise LookupError
            length, start = loops[slot + 1], loops[slot + 2]
            if share:
                chunksize = max(chunksize, (length - start) // share)
            stop = loops[slot + 2] = min(start + chunksize, length)
            return start, stop

    # -- values -------------------------------------------------------------------------

    def write_value(self, rank: int, number: int, value: Any) -> None:
        """Store the value of a member for a meeting."""
        place = 2 * rank + number % 2
        start = place * _SLOT
        buffers: list[pickle.PickleBuffer] = []
        stream = pickle.dumps(value, 5, buffer_callback=buffers.append)
        if not buffers and len(stream) <= _SLOT - _VALUE.size:
            self._slots[start + _VALUE.size : start + _VALUE.size + len(stream)] = stream
            _VALUE.pack_into(self._slots, start, len(stream), 0)
            return
        parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
        head = pickle.dumps([part.nbytes for part in parts])
        position = place << _OVERFLOW_SHIFT
        for part in (memoryview(head), *parts):
            position = _write(self.overflow, part, position)
        _VALUE.pack_into(self._slots, start, 0, len(head))

    def read_value(self, rank: int, number: int) -> Any:
        """Return the value of a member for a meeting."""
        place = 2 * rank + number % 2
        start = place * _SLOT
        here, head = _VALUE.unpack_from(self._slots, start)
        if here:
            return pickle.loads(self._slots[start + _VALUE.size : start + _VALUE.size + here])
        position = place << _OVERFLOW_SHIFT
        sizes = pickle.loads(_read(self.overflow, head, position))
        position += head
        parts = []
        for nbytes in sizes:
            parts.append(_read(self.overflow, nbytes, position))
            position += nbytes
        return pickle.loads(parts[0], buffers=parts[1:])

    def memory(self, key: str, nbytes: int, what: str) -> MappedRegion:
        """Return the memory with that name, which the first request creates.

        Raises:
            ValueError: It exists, and was created for something else.
            RegionCreateError: The kernel refused the memory.
        """
        directory = 2 * self.size << _OVERFLOW_SHIFT
        position = directory + (1 << _OVERFLOW_SHIFT)
        with self.guard:
            used = self._singles[_DIRECTORY]
            entries = io.BytesIO(_read(self.overflow, used, directory))
            while True:
                if entries.tell() >= used:
                    break
                name, start, size, made_for = pickle.load(entries)
                if name == key:
                    if made_for != what:
                        raise ValueError(f"cannot use {key!r} for {what}: it already exists as {made_for}")
                    return MappedRegion(Fd(self.overflow), offset=start, size=size)
                position = start + -(-size // kernel.page_size) * kernel.page_size
            try:
                os.ftruncate(self.overflow, position + nbytes)
            except OSError as error:
                raise map_refused(error, nbytes, Mode.read_write) from error
            region = MappedRegion(Fd(self.overflow), offset=position, size=nbytes)
            entry = pickle.dumps((key, position, nbytes, what))
            _write(self.overflow, memoryview(entry), directory + used)
            self._singles[_DIRECTORY] = used + len(entry)  # stored last: makes the entry visible
            return region

    @property
    def overflow(self) -> int:
        """The fd of the overflow memory."""
        if not self._overflow.is_intact():
            raise ForkshmError(
                f"cannot use the team: it used fd {self._overflow.fd}, which other code in this process has closed. "
                "Close only fds that your code has opened."
            )
        return self._overflow.fd

    def close(self) -> None:
        """Release the memory in this process. Can be repeated."""
        self.guard.detach()
        self.lock.detach()
        for words in (self.states, self.pids, self.arrivals, self.loops_begun, self._loops, self._slots):
            words.release()
        self._head.release()
        self._singles.release()
        # The traceback of a failed call may hold views; then the garbage collector closes the region.
        with contextlib.suppress(RegionBusyError):
            self.region.close()
        self._overflow.close()


def _nothing() -> None:
    """Repair nothing: each word is written in one store."""


def _died_with_lock() -> None:
    raise TeamBrokenError("a member ended while it held the lock: the data it guards may be half changed")


def _write(fd: int, part: memoryview, position: int) -> int:
    assert sys.platform != "win32"  # memory cannot grow there
    view = part.cast("B") if part.nbytes else part
    return _move(lambda at, where: os.pwrite(fd, view[at:], where), part.nbytes, position)


def _read(fd: int, nbytes: int, position: int) -> bytearray:
    assert sys.platform != "win32"  # memory cannot grow there
    into = bytearray(nbytes)
    view = memoryview(into)
    _move(lambda at, where: os.preadv(fd, [view[at:]], where), nbytes, position)
    return into


def _move(move: Callable[[int, int], int], nbytes: int, position: int) -> int:
    # One system call moves at most 2 GiB.
    done = 0
    while done < nbytes:
        moved = move(done, position + done)
        if not moved:
            raise EOFError(f"a value of {nbytes:,} bytes ends after {done:,}: please report this")
        done += moved
    return position + nbytes
