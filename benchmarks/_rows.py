"""What a row of a table is: the work, its limit, and the bounds that it must keep."""

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
    """How much to do."""

    quick: bool = False

    def size(self, full: int) -> int:
        """Bytes, or items."""
        return max(1, full // 100) if self.quick else full


@dataclasses.dataclass(frozen=True)
class Work:
    """One thing to be timed again and again."""

    call: Callable[[], Any]
    # Looks at each answer. Not timed, and neither is freeing the answer.
    is_right: Callable[[Any], bool] = lambda answer: answer is None
    # Tasks in a call: what to divide its time by.
    per: int = 1
    # Called before each call; not timed.
    prepare: Callable[[], None] = lambda: None
    # What is measured, if not seconds: taken from the answer.
    value: Callable[[Any], float] | None = None


# Set up a side, yield what to time, and clean up.
Measurement: TypeAlias = Callable[..., Iterator[Work]]


class Median(Protocol):
    """What bounds look at."""

    @property
    def median(self) -> float: ...


Sides: TypeAlias = Mapping[str, Median]


class Bound(Protocol):
    """What a row must keep."""

    def is_kept(self, sides: Sides) -> bool:
        """Look at the medians; KeyError if a side that is needed was not measured."""


@dataclasses.dataclass(frozen=True)
class TimesLimit:
    """At most so many times the limit."""

    factor: float

    def __str__(self) -> str:
        return f"<= {self.factor:g}x limit"

    def is_kept(self, sides: Sides) -> bool:
        return sides[OURS].median <= self.factor * sides[LIMIT].median


@dataclasses.dataclass(frozen=True)
class LimitPlus:
    """At most so much longer than the limit."""

    seconds: float

    def __str__(self) -> str:
        return f"<= limit + {self.seconds * 1e6:g} us"

    def is_kept(self, sides: Sides) -> bool:
        return sides[OURS].median <= sides[LIMIT].median + self.seconds


@dataclasses.dataclass(frozen=True)
class TimesFaster:
    """At least so many times faster than multiprocessing."""

    factor: float

    def __str__(self) -> str:
        return f">= {self.factor:g}x faster than mp" if self.factor != 1 else "<= mp"

    def is_kept(self, sides: Sides) -> bool:
        return self.factor * sides[OURS].median <= sides[REFERENCE].median


@dataclasses.dataclass(frozen=True)
class AtMost:
    """At most so much."""

    value: float
    unit: str = "s"

    def __str__(self) -> str:
        return f"<= {self.value * 1e6:g} us" if self.unit == "s" else f"<= {self.value:g} {self.unit}"

    def is_kept(self, sides: Sides) -> bool:
        return sides[OURS].median <= self.value


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of work, and how it is measured."""

    name: str
    # May have {parameters}.
    title: str
    # For the workers of a library.
    measure: Callable[..., contextlib.AbstractContextManager[Work]]
    bounds: tuple[Bound, ...] = ()
    # For the machine; None if there is no such thing.
    limit: Callable[..., contextlib.AbstractContextManager[Work]] | None = None
    # How often the sides take turns, and the calls in a turn.
    turns: int = 15
    burst: int = 4
    # Whether sides take turns; else one after the other, because one needs the memory of all.
    together: bool = True
    unit: str = "s"

    def set_up(self, peer: Peer | None, scale: Scale, **parameters: Any) -> contextlib.AbstractContextManager[Work]:
        """Prepare the work of a peer; of the machine for None."""
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
