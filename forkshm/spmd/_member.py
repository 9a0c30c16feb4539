"""Member: barriers, reductions and shared loops among processes that run the same code."""

from __future__ import annotations

import itertools
import operator
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from forkshm.backend import kernel
from forkshm.channel import Spin
from forkshm.errors import ForkshmError, TeamBrokenError
from forkshm.spmd._team_state import DIED, FAILED, LEFT, TeamState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeAlias

    from forkshm.region import RecursiveMutex

    Schedule: TypeAlias = Literal["static", "dynamic", "guided"]

__all__ = ("Member",)

T = TypeVar("T")

# Longest sleep in seconds; after each, a waiter checks whether the other members are alive.
_SLICE = 0.1

# Stands for the length of an iterable without `len`.
_ENDLESS = 2**62

_WHAT_HAPPENED = {LEFT: "has left", FAILED: "raised an exception", DIED: "died"}

_numbers = range  # `Member.range` hides the builtin


def _smaller(first: Any, second: Any) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(first, numpy.ndarray):
        return numpy.minimum(first, second)
    return min(first, second)


def _larger(first: Any, second: Any) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(first, numpy.ndarray):
        return numpy.maximum(first, second)
    return max(first, second)


_OPERATIONS = {"sum": operator.add, "product": operator.mul, "min": _smaller, "max": _larger}


class Member:
    """One of `size` processes that run the same code and synchronize through shared memory.

    `forkshm.team` and `forkshm.worker` return members. All members must reach the same barriers, reductions, loops and
    singles in the same order.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.

    Fork and threads:
        Only one thread of each member may use it, and no process forked from a member.
    """

    rank: int
    size: int
    _team_state: TeamState | None
    _pid: int

    def _join(self, team_state: TeamState | None, rank: int, size: int) -> None:
        """Make this process the member *rank*."""
        self.rank, self.size = rank, size
        self._team_state = team_state
        self._pid = os.getpid()
        self._meetings = self._loops = self._singles = self._reductions = 0
        self._spin = Spin()

    def _joined_state(self) -> TeamState:
        """Return the state of this process's team.

        Raises:
            ForkshmError: There is no team, or this process is not a member of it.
        """
        if self._pid != os.getpid():
            raise ForkshmError(
                f"cannot use the team in process {os.getpid()}: it is not a member, but was forked from member "
                f"{self.rank} (pid {self._pid}). Use the team only in its members."
            )
        if self._team_state is None:
            raise ForkshmError("cannot use the team: its block has not begun or has ended. Use it inside the block.")
        return self._team_state

    # -- waiting for the others -----------------------------------------------------------

    def _look_for_dead(self) -> None:
        """Record dead members in the team state; implemented by the process that started them."""

    def _check(self, where: str) -> None:
        team_state = self._joined_state()
        self._look_for_dead()
        for rank, state in enumerate(team_state.states.tolist()):
            if state >= LEFT and rank != self.rank:
                raise TeamBrokenError(
                    f"member {self.rank} of {self.size} cannot wait at {where}: "
                    f"member {rank} (pid {team_state.pids[rank]}) "
                    f"{_WHAT_HAPPENED[state]}" + (" and will not arrive" if state == LEFT else ""),
                    rank=rank,
                )

    def _wait_until(self, condition: Callable[[], bool], where: str, *, may_look: bool) -> None:
        team_state = self._joined_state()
        began = time.perf_counter()
        look_until = began + self._spin.begin(may_look=may_look)
        while time.perf_counter() < look_until:
            if condition():
                self._spin.end(time.perf_counter() - began)
                return
        while True:
            woken = team_state.wakeup()
            if condition():
                break
            try:
                self._check(where)
            except TeamBrokenError:
                if condition():
                    break  # all members arrived in the meantime, and one has left since
                raise
            team_state.sleep(woken, _SLICE)
        self._spin.end(time.perf_counter() - began)

    def barrier(self) -> None:
        """Wait until all members have reached the barrier.

        Raises:
            TeamBrokenError: A member failed, died or left, so it cannot reach the barrier.

        Example:
            >>> import forkshm
            >>> parts = forkshm.zeros(2)
            >>> with forkshm.team(2) as t:
            ...     parts[t.rank] = t.rank + 1
            ...     t.barrier()
            ...     assert parts.sum() == 3
        """
        self._meet("a barrier")

    def _meet(self, where: str) -> None:
        team_state = self._joined_state()
        self._meetings += 1
        number = self._meetings
        if team_state.arrive(self.rank, number):
            team_state.wake()
            return
        self._wait_until(lambda: team_state.have_arrived(number), where, may_look=self.size <= _CORES)

    @property
    def lock(self) -> RecursiveMutex:
        """A recursive lock shared by the members, for ``with t.lock:``.

        If a member dies or leaves while it holds the lock, the next member that acquires it gets `TeamBrokenError`.
        """
        team_state = self._team_state
        return team_state.lock if team_state is not None and self._pid == os.getpid() else self._joined_state().lock

    def single(self) -> bool:
        """Return True in the first member that calls this, and False in the others.

        The other members continue without waiting. If they need the result, call `barrier` in all members afterwards.

        Example:
            >>> import forkshm
            >>> done = forkshm.zeros(1)
            >>> with forkshm.team(3) as t:
            ...     if t.single():
            ...         done += 1
            >>> float(done[0])
            1.0
        """
        self._singles += 1
        return self._joined_state().take_single(self._singles)

    def reduce(self, value: T, op: Literal["sum", "product", "min", "max"] | Callable[[T, T], T] = "sum") -> T:
        """Return the combined values of all members, in every member.

        Args:
            value: This member's value: a number, an array, or any other picklable object.
            op: A function of two values, or one of the four names. Each member combines the values in the order of
                ranks, so the result is the same in all members and in every run, to the last bit.

        Raises:
            TeamBrokenError: A member failed, died or left.
            ValueError: *op* is an unknown name.
            Exception: Pickling a value or calling *op* raised it.

        Example:
            >>> import forkshm
            >>> with forkshm.team(4) as t:
            ...     total = t.reduce(t.rank)
            >>> total
            6
        """
        if isinstance(op, str):
            try:
                combine: Callable[[Any, Any], Any] = _OPERATIONS[op]
            except KeyError:
                raise ValueError(
                    f"op must be a function of two values or one of {sorted(_OPERATIONS)}, got {op!r}"
                ) from None
        else:
            combine = op
        team_state = self._joined_state()
        if self.size == 1:
            return value
        # Two slots for each member suffice. A member that writes its third value has passed the second meeting, and
        # no member reaches that meeting before it has read all values of the first.
        self._reductions += 1
        team_state.write_value(self.rank, self._reductions, value)
        self._meet("a reduction")
        result: Any = None
        for rank in _numbers(self.size):
            theirs = value if rank == self.rank else team_state.read_value(rank, self._reductions)
            result = theirs if rank == 0 else combine(result, theirs)
        return result  # type: ignore[no-any-return]

    # -- sharing out work -----------------------------------------------------------------

    def range(
        self,
        start: int,
        stop: int | None = None,
        step: int = 1,
        *,
        schedule: Schedule = "static",
        chunksize: int | None = None,
    ) -> Iterable[int]:
        """Return this member's share of a range; each number goes to exactly one member.

        Members do not wait for each other at the end of the loop; call `barrier` if they must.

        Args:
            start: As for the builtin `range`.
            stop: As for the builtin `range`.
            step: As for the builtin `range`.
            schedule: ``"static"`` assigns each member its share at once, without communication. ``"dynamic"`` assigns
                the next *chunksize* numbers to each member that has finished its last, for steps of unequal duration.
                ``"guided"`` does the same with parts that begin large and shrink to *chunksize*.
            chunksize: Numbers in one part; 1 by default. The static schedule has one part for each member by default;
                with *chunksize*, it assigns parts in turn.

        Raises:
            ValueError: *schedule* is unknown, *chunksize* is less than 1, or the members' loops differ in length.
            TeamBrokenError: A member failed, died or left, and this member is too far ahead of it.

        Example:
            >>> import forkshm
            >>> squares = forkshm.zeros(10)
            >>> with forkshm.team(2) as t:
            ...     for i in t.range(10, schedule="dynamic", chunksize=2):
            ...         squares[i] = i * i
            >>> int(squares.sum())
            285
        """
        numbers = _numbers(start) if stop is None else _numbers(start, stop, step)
        if chunksize is not None and operator.index(chunksize) < 1:
            raise ValueError(f"chunksize must be at least 1, got {chunksize}")
        if schedule == "static":
            if chunksize is None:
                each, more = divmod(len(numbers), self.size)
                begin = self.rank * each + min(self.rank, more)
                return numbers[begin : begin + each + (self.rank < more)]
            starts = _numbers(self.rank * chunksize, len(numbers), self.size * chunksize)
            return itertools.chain.from_iterable(numbers[begin : begin + chunksize] for begin in starts)
        if schedule not in ("dynamic", "guided"):
            raise ValueError(f"schedule must be 'static', 'dynamic' or 'guided', got {schedule!r}")
        if self.size == 1:
            return numbers
        parts = self._parts(len(numbers), chunksize or 1, guided=schedule == "guided")
        return itertools.chain.from_iterable(numbers[begin:end] for begin, end in parts)

    def iterate(self, iterable: Iterable[T], *, chunksize: int = 1) -> Iterator[T]:
        """Return an iterator over this member's share of an iterable, assigned dynamically in parts of *chunksize*.

        Nothing is sent: each member takes elements from its own copy of the iterable. Every member steps through an
        iterator, which must yield the same elements in each. A generator does; a file opened before the team began
        does not, because the members share its position.

        Args:
            iterable: A sequence, which is indexed, or any other iterable.
            chunksize: Number of elements in one part.

        Raises:
            ValueError: *chunksize* is less than 1, or the members' loops differ in length.
            TeamBrokenError: A member failed, died or left, and this member is too far ahead of it.

        Example:
            >>> import forkshm
            >>> with forkshm.team(2) as t:
            ...     length = t.reduce(sum(len(word) for word in t.iterate(["shared", "memory"])))
            >>> length
            12
        """
        if operator.index(chunksize) < 1:
            raise ValueError(f"chunksize must be at least 1, got {chunksize}")
        if self.size == 1:
            return iter(iterable)
        if hasattr(iterable, "__len__") and hasattr(iterable, "__getitem__") and not hasattr(iterable, "keys"):
            elements: Any = iterable
            parts = self._parts(len(elements), chunksize)
            return (elements[index] for begin, end in parts for index in _numbers(begin, end))
        return self._step_through(iter(iterable), self._parts(_ENDLESS, chunksize))

    def _step_through(self, iterator: Iterator[T], parts: Iterator[tuple[int, int]]) -> Iterator[T]:
        position = 0
        for begin, end in parts:
            next(itertools.islice(iterator, begin - position, begin - position), None)
            taken = list(itertools.islice(iterator, end - begin))
            if not taken:
                return
            yield from taken
            position = end

    def _parts(self, length: int, chunksize: int, *, guided: bool = False) -> Iterator[tuple[int, int]]:
        """Enter the next loop, and return an iterator over this member's parts of it."""
        team_state = self._joined_state()
        self._loops += 1
        number = self._loops
        try:
            while True:
                woken = team_state.wakeup()
                there = team_state.begin_loop(self.rank, number, length)
                if there is not None:
                    break
                self._check("a loop, far behind")
                team_state.sleep(woken, _SLICE / 10)
        except LookupError:
            raise self._too_late(number) from None
        if there != length:
            raise ValueError(
                f"members disagree about loop {number}: it has {there:,} steps in other members and {length:,} in "
                f"member {self.rank}. All members must run the same loops, in the same order."
            )
        return self._claims(team_state, number, chunksize, 2 * self.size if guided else 0)

    def _claims(self, team_state: TeamState, number: int, chunksize: int, share: int) -> Iterator[tuple[int, int]]:
        while True:
            try:
                begin, end = team_state.claim(number, chunksize, share)
            except LookupError:
                raise self._too_late(number) from None
            if begin == end:
                return
            yield begin, end

    def _too_late(self, number: int) -> ValueError:
        return ValueError(
            f"members disagree: member {self.rank} is at loop {number}, and others are many loops ahead. All members "
            "must run the same loops, in the same order, and a dynamic loop cannot be nested in another."
        )


_CORES = kernel.usable_cores()
