"""What one of several processes that run the same code can do together with the others."""

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

#: How long one sleep takes at most: then a waiter looks whether the others are alive.
_SLICE = 0.1

#: Of an iterable that does not say how long it is.
_ENDLESS = 2**62

_WHAT_HAPPENED = {LEFT: "has left", FAILED: "raised an exception", DIED: "died"}

_numbers = range  # `Member` has a method of that name


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
    """One of `size` processes that run the same code, and meet over shared memory.

    You get one from `forkshm.team` and from `forkshm.worker`. What all members do together they must all come to,
    in the same order: barriers, reductions, loops, singles.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.

    Fork and threads:
        To be used by one thread of each member, and by no process that is forked from a member.
    """

    rank: int
    size: int
    _team_state: TeamState | None
    _pid: int

    def _join(self, team_state: TeamState | None, rank: int, size: int) -> None:
        """Be the member *rank*."""
        self.rank, self.size = rank, size
        self._team_state = team_state
        self._pid = os.getpid()
        self._meetings = self._loops = self._singles = self._reductions = 0
        self._spin = Spin()

    def _joined_state(self) -> TeamState:
        """The team state of this process' team.

        Raises:
            ForkshmError: There is none, or this process is no member of it.
        """
        if self._pid != os.getpid():
            raise ForkshmError(
                f"this process (pid {os.getpid()}) is no member of that team: it was forked from member {self.rank} "
                f"(pid {self._pid}), and only members meet"
            )
        if self._team_state is None:
            raise ForkshmError("there is no team: its block has not begun, or is over")
        return self._team_state

    # -- waiting for the others -----------------------------------------------------------

    def _look_for_dead(self) -> None:
        """Write on the team state who has died; for whoever started the members."""

    def _check(self, where: str) -> None:
        team_state = self._joined_state()
        self._look_for_dead()
        for rank, state in enumerate(team_state.states.tolist()):
            if state >= LEFT and rank != self.rank:
                raise TeamBrokenError(
                    f"member {self.rank} of {self.size} cannot wait at {where}: "
                    f"member {rank} (pid {team_state.pids[rank]}) "
                    f"{_WHAT_HAPPENED[state]}" + (" and does not come" if state == LEFT else ""),
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
                    break  # all came meanwhile, and somebody has left since
                raise
            team_state.sleep(woken, _SLICE)
        self._spin.end(time.perf_counter() - began)

    def barrier(self) -> None:
        """Wait until all members are here.

        Raises:
            TeamBrokenError: A member failed, died or left, so that not all can come.

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
        """A lock that one member has at a time, ``with t.lock:``; that one may take it again.

        A member that dies with it, or leaves, does not block the others: who takes it next gets `TeamBrokenError`.
        """
        team_state = self._team_state
        return team_state.lock if team_state is not None and self._pid == os.getpid() else self._joined_state().lock

    def single(self) -> bool:
        """Tell one member that it is the one: whoever comes here first.

        The others go on. If they need what it does, let all call `barrier` afterwards.

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
        """Combine the values of all members; all get the result.

        Args:
            value: A number, an array, or anything else that can be pickled; each member brings its own.
            op: A function of two values, or one of the four names. Values are combined in the order of ranks, in
                each member: all get the same, and every time, to the last bit.

        Raises:
            TeamBrokenError: A member failed, died or left.
            ValueError: *op* is a name that there is not.
            Exception: What pickling or *op* raised.

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
        # Two slots for each member are enough: who writes the third value knows, because
        # all came to the second meeting, that all have read the first.
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
        chunk: int | None = None,
    ) -> Iterable[int]:
        """Share out the numbers of a range: each is somebody's, and nobody else's.

        Nobody waits for anybody at the end of the loop; call `barrier` where that is needed.

        Args:
            start: As for `range`, as are *stop* and *step*.
            stop: See *start*.
            step: See *start*.
            schedule: ``"static"`` gives each member its part at once, which costs nothing. With ``"dynamic"`` each
                takes the next *chunk* numbers when it is done with the last: for steps that take differently long.
                ``"guided"`` does so with large parts first, and ever smaller ones, at least *chunk*.
            chunk: How many numbers at a time; 1 by default. Static parts are one for each member by default, and
                with *chunk* they go around.

        Raises:
            ValueError: *schedule* is none of the three, or *chunk* is less than 1; or the members have come to
                loops of different lengths.
            TeamBrokenError: A member failed, died or left, and this one is too far ahead of it.

        Example:
            >>> import forkshm
            >>> squares = forkshm.zeros(10)
            >>> with forkshm.team(2) as t:
            ...     for i in t.range(10, schedule="dynamic", chunk=2):
            ...         squares[i] = i * i
            >>> int(squares.sum())
            285
        """
        numbers = _numbers(start) if stop is None else _numbers(start, stop, step)
        if chunk is not None and operator.index(chunk) < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if schedule == "static":
            if chunk is None:
                each, more = divmod(len(numbers), self.size)
                begin = self.rank * each + min(self.rank, more)
                return numbers[begin : begin + each + (self.rank < more)]
            starts = _numbers(self.rank * chunk, len(numbers), self.size * chunk)
            return itertools.chain.from_iterable(numbers[begin : begin + chunk] for begin in starts)
        if schedule not in ("dynamic", "guided"):
            raise ValueError(f"schedule must be 'static', 'dynamic' or 'guided', got {schedule!r}")
        if self.size == 1:
            return numbers
        parts = self._parts(len(numbers), chunk or 1, guided=schedule == "guided")
        return itertools.chain.from_iterable(numbers[begin:end] for begin, end in parts)

    def iterate(self, iterable: Iterable[T], *, chunk: int = 1) -> Iterator[T]:
        """Share out the elements of an iterable, the next *chunk* to whoever is done with its last.

        Nothing is sent: each member takes the elements from its own copy of the iterable. An iterator is stepped
        through by all of them, and must give the same to each: a generator does that; a file that was opened before
        the team began does not, because its position is shared.

        Args:
            iterable: A sequence, of which elements are taken by index, or anything else that can be iterated over.
            chunk: How many elements at a time.

        Raises:
            ValueError: *chunk* is less than 1; or the members have come to loops of different lengths.
            TeamBrokenError: A member failed, died or left, and this one is too far ahead of it.

        Example:
            >>> import forkshm
            >>> with forkshm.team(2) as t:
            ...     length = t.reduce(sum(len(word) for word in t.iterate(["shared", "memory"])))
            >>> length
            12
        """
        if operator.index(chunk) < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        if self.size == 1:
            return iter(iterable)
        if hasattr(iterable, "__len__") and hasattr(iterable, "__getitem__") and not hasattr(iterable, "keys"):
            elements: Any = iterable
            parts = self._parts(len(elements), chunk)
            return (elements[index] for begin, end in parts for index in _numbers(begin, end))
        return self._step_through(iter(iterable), self._parts(_ENDLESS, chunk))

    def _step_through(self, iterator: Iterator[T], parts: Iterator[tuple[int, int]]) -> Iterator[T]:
        position = 0
        for begin, end in parts:
            next(itertools.islice(iterator, begin - position, begin - position), None)
            taken = list(itertools.islice(iterator, end - begin))
            if not taken:
                return
            yield from taken
            position = end

    def _parts(self, length: int, chunk: int, *, guided: bool = False) -> Iterator[tuple[int, int]]:
        """Come to a loop now; return what yields this member's parts of it."""
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
                f"members disagree: loop {number} of the team has {there:,} steps for others and {length:,} for member "
                f"{self.rank}; all of them must come to the same loops, in the same order"
            )
        return self._claims(team_state, number, chunk, 2 * self.size if guided else 0)

    def _claims(self, team_state: TeamState, number: int, chunk: int, share: int) -> Iterator[tuple[int, int]]:
        while True:
            try:
                begin, end = team_state.claim(number, chunk, share)
            except LookupError:
                raise self._too_late(number) from None
            if begin == end:
                return
            yield begin, end

    def _too_late(self, number: int) -> ValueError:
        return ValueError(
            f"members disagree: others are many loops beyond loop {number}, at which member {self.rank} is; all of "
            "them must come to the same loops, in the same order, and a dynamic loop cannot be inside another"
        )


_CORES = kernel.usable_cores()
