"""Barrier: wait until all parties have arrived.

The header holds words that are written only under the bare robust mutex that follows it:

    parties     number of parties
    generation  how often the barrier has opened or broken; waiters sleep on this word
    arrived     number of parties that have arrived in this generation
    broken      whether the barrier is broken
    history     how the last 32 generations ended, one bit each, set if broken
"""

from __future__ import annotations

import errno
import math
import operator
import threading
import time
from typing import TYPE_CHECKING, ClassVar, TypeVar

from forkshm._interrupts import promptly, repeat
from forkshm.backend import locks as _locks
from forkshm.errors import SyncError
from forkshm.region.locks._placed import HEADER, LINE, SLICE, Placed, checked_timeout, give_back, mutex_made, take

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from forkshm.region._mapped import MappedRegion

__all__ = ("Barrier",)

_T = TypeVar("_T")

_PARTIES, _GENERATION, _ARRIVED, _BROKEN, _HISTORY = 2, 3, 4, 5, 6

_WORD = 4
_MASK = 0xFFFFFFFF


class Barrier(Placed):
    """A barrier in a region, at which *parties* threads wait until all have arrived.

    A party that is killed after it arrived still counts. A party that is killed earlier looks like one that is late;
    pass `wait` a timeout, which breaks the barrier for all. A party that is killed while it changes the barrier breaks
    it.

    Args:
        region: A region mapped ``read_write``.
        offset: Offset in the region; see `Mutex`.
        parties: Number of parties, at least 1.

    Raises:
        ValueError: *parties* is less than 1, or as for `Mutex`. Other errors are as for `Mutex`.

    Fork and threads:
        As for `Mutex`. The parties are threads of one or several processes.

    Example:
        >>> from forkshm.region import Barrier, anonymous_shared_memory
        >>> barrier = Barrier(anonymous_shared_memory(Barrier.SIZE), parties=1)
        >>> barrier.wait(), barrier.wait()
        (0, 0)

    See Also:
        `threading.Barrier`; pthread_barrier_wait(3), which has no timeout.
    """

    SIZE: ClassVar[int] = HEADER + LINE
    _KIND: ClassVar[int] = 6

    def __init__(self, region: MappedRegion, offset: int = 0, parties: int = 2) -> None:
        parties = operator.index(parties)
        if not 1 <= parties < 1 << 31:
            raise ValueError(f"parties must be between 1 and 2**31 - 1, got {parties}")
        words = self._construct(region, offset, self.SIZE)
        words[_PARTIES] = parties
        mutex_made(self._address + HEADER, "Barrier")
        self._complete(words)

    @classmethod
    def attach(cls, region: MappedRegion, offset: int = 0) -> Self:
        """Return the barrier that this or another process constructed at *offset*.

        Raises:
            NotConstructedError: There is no complete barrier at *offset*.
        """
        return cls._find(region, offset, cls.SIZE)[0]

    @property
    def parties(self) -> int:
        """Number of parties."""
        return int(self._live()[_PARTIES])

    @property
    def n_waiting(self) -> int:
        """Number of parties that have arrived and wait."""
        return int(self._live()[_ARRIVED])

    @property
    def broken(self) -> bool:
        """Whether the barrier is broken, until `reset`."""
        return bool(self._live()[_BROKEN])

    def wait(self, timeout: float | None = None) -> int:
        """Wait until all parties have arrived.

        Args:
            timeout: Seconds; None waits forever. After *timeout*, the barrier is broken.

        Returns:
            The position in which this party arrived, from 0 to ``parties - 1``.

        Raises:
            threading.BrokenBarrierError: The barrier is broken, was broken or reset during the wait, or *timeout* has
                passed.
            ValueError: *timeout* is negative.
        """
        return self.wait_and_act(checked_timeout(timeout), None)

    def wait_and_act(self, timeout: float, action: Callable[[], object] | None) -> int:
        """Wait as `wait` does; the last one to arrive calls *action* before it lets the others go.

        If *action* raises, the barrier is broken.
        """
        words = self._live()
        deadline = time.perf_counter() + timeout
        # The generation, and this party's position in it; -1 if it was the last to arrive, and acts.
        ticket: list[int] = []

        def arrive() -> int:
            if words[_BROKEN]:
                raise threading.BrokenBarrierError(f"cannot wait at {self!r}: it is broken. Call reset() first.")
            place, generation = int(words[_ARRIVED]), words[_GENERATION]
            if place >= words[_PARTIES]:
                return ~int(generation)
            if place + 1 == words[_PARTIES] and action is None:
                self._end(words, broken=False)
            else:
                self._sign(place)
                # No call in between: an interrupted wait withdraws exactly when it was counted.
                words[_ARRIVED] = place + 1
                ticket[:] = (generation, place)
            return place

        try:
            while True:
                if (place := self._guarded(words, arrive)) >= 0:
                    break
                self._sleep(words, ~place, deadline)
            if ticket and place + 1 == words[_PARTIES]:
                self._act(words, ticket[0], action)
            elif ticket:
                self._sleep(words, ticket[0], deadline)
        except BaseException:
            repeat(lambda: self._leave(words, ticket))
            raise
        return place

    @promptly
    def _leave(self, words: memoryview, ticket: list[int]) -> None:
        if ticket:
            self._guarded(words, lambda: self._withdraw(words, ticket))

    def _act(self, words: memoryview, generation: int, action: Callable[[], object] | None) -> None:
        """Run the action as the last party to arrive, and release the others."""
        try:
            if action is not None:
                action()
        except BaseException:
            self._guarded(words, lambda: self._break(words, generation))
            raise

        def end() -> None:
            if words[_GENERATION] == generation:
                self._end(words, broken=False)

        self._guarded(words, end)
        self._check(words, generation)

    def _sign(self, place: int) -> None:
        """Record this thread as the party at that position."""

    def _move(self, place: int, to: int) -> None:
        """Record that the party at one position has another position."""

    def _has_dead_party(self, arrived: int) -> bool:
        """Return whether a party that arrived has died."""
        return False

    def _sleep(self, words: memoryview, generation: int, deadline: float) -> None:
        where = self._address + _GENERATION * _WORD
        while words[_GENERATION] == generation:
            left = deadline - time.perf_counter()
            if left <= 0:
                self._guarded(words, lambda: self._break(words, generation))
            elif _locks.futex_wait(where, generation, min(left, SLICE)) == errno.ETIMEDOUT:
                # If a party died while changing the barrier, entering breaks it.
                self._guarded(words, lambda: self._break_after_death(words, generation))
        self._check(words, generation)

    def _check(self, words: memoryview, generation: int) -> None:
        if words[_HISTORY] >> generation % 32 & 1:
            raise threading.BrokenBarrierError(
                f"cannot wait any longer at {self!r}: it was broken or reset, or the timeout has passed"
            )

    def _break_after_death(self, words: memoryview, generation: int) -> None:
        if words[_GENERATION] == generation and self._has_dead_party(words[_ARRIVED]):
            self._break(words, generation)

    def abort(self) -> None:
        """Break the barrier; current and later waiters get `threading.BrokenBarrierError`."""
        words = self._live()
        self._guarded(words, lambda: self._break(words, words[_GENERATION]))

    def reset(self) -> None:
        """Restore the barrier to its empty state; current waiters get `threading.BrokenBarrierError`."""
        words = self._live()

        def mend() -> None:
            if words[_ARRIVED]:
                self._end(words, broken=True)
            words[_BROKEN] = 0

        self._guarded(words, mend)

    def _break(self, words: memoryview, generation: int) -> None:
        if words[_GENERATION] == generation:
            words[_BROKEN] = 1
            self._end(words, broken=True)

    def _withdraw(self, words: memoryview, ticket: list[int]) -> None:
        if ticket and words[_GENERATION] == ticket[0] and words[_ARRIVED]:
            last = words[_ARRIVED] - 1
            if last > ticket[1]:
                self._move(last, ticket[1])
            # No call between these stores.
            words[_ARRIVED] = last
        ticket[:] = ()

    def _end(self, words: memoryview, *, broken: bool) -> None:
        """End a generation, and keep its outcome for 32 more, for waiters that wake up late."""
        generation = words[_GENERATION]
        bit = 1 << generation % 32
        words[_HISTORY] = words[_HISTORY] | bit if broken else words[_HISTORY] & ~bit
        words[_ARRIVED] = 0
        words[_GENERATION] = (generation + 1) & _MASK
        _locks.futex_wake(self._address + _GENERATION * _WORD, _MASK)

    def _guarded(self, words: memoryview, action: Callable[[], _T]) -> _T:
        """Run *action* under the mutex; break the barrier if a process died inside an earlier one."""
        guard = self._address + HEADER
        try:
            code = take(guard, math.inf)
            if code == errno.EOWNERDEAD:
                self._break(words, words[_GENERATION])
                code = _locks.mutex_consistent(guard)
            if code != 0:
                raise SyncError(f"cannot use {self!r}: the C library refused (errno {code})")
            return action()
        except BaseException:
            if give_back(guard):
                words[_BROKEN] = 1
            raise
        finally:
            _locks.mutex_unlock(guard)
