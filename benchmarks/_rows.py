"""Rows of a table: the work, its limit, and its bounds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from _peers import Peer

KB, MB, GB = 10**3, 10**6, 10**9

OURS, REFERENCE, LIMIT = "forkshm", "multiprocessing", "limit"


@dataclasses.dataclass(frozen=True)
class Scale:
    """The amount of work."""

    quick: bool = False

    def size(self, full: int) -> int:
        """Return a scaled number of bytes or items."""
        return max(1, full // 100) if self.quick else full


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of work to be timed repeatedly."""

    call: Callable[[], Any]
    # Checks each answer. Checking and freeing the answer are not timed.
    is_right: Callable[[Any], bool] = lambda answer: answer is None
    # Number of tasks in a call, by which its time is divided.
    per: int = 1
    # Called before each call; not timed.
    prepare: Callable[[], None] = lambda: None
    # Extracts the measured value from the answer, if it is not a time.
    value: Callable[[Any], float] | None = None


# Sets up a side, yields the work to time, and cleans up.
Measurement: TypeAlias = Callable[..., Iterator[Work]]


class Median(Protocol):
    """The part of `Timings` that bounds use."""

    @property
    def median(self) -> float: ...


Sides: TypeAlias = Mapping[str, Median]


class Bound(Protocol):
    """A requirement on a row."""

    def is_kept(self, sides: Sides) -> bool:
        """Return whether the medians meet the bound; KeyError if a side that it needs was not measured."""


@dataclasses.dataclass(frozen=True)
class TimesLimit:
    """At most a multiple of the limit."""

    factor: float

    def __str__(self) -> str:
        return f"<= {self.factor:g}x limit"

    def is_kept(self, sides: Sides) -> bool:
        return sides[OURS].median <= self.factor * sides[LIMIT].median


@dataclasses.dataclass(frozen=True)
class LimitPlus:
    """At most a number of seconds more than the limit."""

    seconds: float

    def __str__(self) -> str:
        return f"<= limit + {self.seconds * 1e6:g} us"

    def is_kept(self, sides: Sides) -> bool:
        return sides[OURS].median <= sides[LIMIT].median + self.seconds


@dataclasses.dataclass(frozen=True)
class TimesFaster:
    """At least a number of times faster than multiprocessing."""

    factor: float

    def __str__(self) -> str:
        return f">= {self.factor:g}x faster than mp" if self.factor != 1 else "<= mp"

    def is_kept(self, sides: Sides) -> bool:
        return self.factor * sides[OURS].median <= sides[REFERENCE].median


@dataclasses.dataclass(frozen=True)
class AtMost:
    """At most an absolute value."""

    value: float
    unit: str = "s"

    def __str__(self) -> str:
        return f"<= {self.value * 1e6:g} us" if self.unit == "s" else f"<= {self.value:g} {self.unit}"

    def is_kept(self, sides: Sides) -> bool:
        return sides[OURS].median <= self.value


@dataclasses.dataclass(frozen=True)
class Row:
    """A kind of work, and how it is measured."""

    name: str
    # May contain {parameters}.
    title: str
    # Measures the workers of a library.
    measure: Callable[..., contextlib.AbstractContextManager[Work]]
    bounds: tuple[Bound, ...] = ()
    # Measures the machine's limit; None if there is none.
    limit: Callable[..., contextlib.AbstractContextManager[Work]] | None = None
    # Number of turns, and of calls in a turn.
    turns: int = 15
    burst: int = 4
    # Whether sides take turns. Otherwise they run one after the other, because each needs all the memory.
    together: bool = True
    unit: str = "s"

    def set_up(self, peer: Peer | None, scale: Scale, **parameters: Any) -> contextlib.AbstractContextManager[Work]:
        """Prepare the work of a peer, or of the machine for None."""
        if peer is not None:
            return self.measure(peer, scale, **parameters)
        if self.limit is None:
            raise ValueError(f"{self.name} has no limit")
        return self.limit(scale, **parameters)


class Rows(dict[str, Row]):
    """The rows of a program, by name."""

    def row(
        self, title: str, *bounds: Bound, limit: Measurement | None = None, **options: Any
    ) -> Callable[[Measurement], Measurement]:
        """Register a measurement under the name of its function; *options* are fields of `Row`."""

        def register(measure: Measurement) -> Measurement:
            self[measure.__name__] = Row(
                measure.__name__,
                title,
                contextlib.contextmanager(measure),
                bounds,
                contextlib.contextmanager(limit) if limit else None,
                **options,
            )
            return measure

        return register
