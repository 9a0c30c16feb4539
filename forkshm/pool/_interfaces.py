"""Interfaces of a pool that results, progress bars and traces depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from forkshm.pool._statistics import PoolStatistics
    from forkshm.pool._status import Status
    from forkshm.pool._tasks import Answer, Task

__all__ = ("Bar", "Driver", "TracedPool", "Worker", "Workers")


class Bar(Protocol):
    """A bar that shows the progress of a call."""

    def update(self, count: int) -> None:
        """Count so many more items as done."""

    def close(self) -> None:
        """End the bar, and leave it as it is."""


class Driver(Protocol):
    """The parent's half of a pool."""

    def drive(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Drive the pool until *done* returns True or for *timeout* seconds; return whether it is true."""
        ...

    def wait_out_program(self) -> None:
        """Never return in a daemon thread of a program that ends."""
        ...

    def open(self, answer: Answer) -> tuple[bool, Any]:
        """Unpickle an answer, and count the time that this takes."""
        ...

    def note_unpacking(self, nanoseconds: int) -> None:
        """Count the time that unpickling answers took."""
        ...

    def call_later(self, callback: Callable[[], None]) -> None:
        """Schedule *callback* on the helper thread."""
        ...

    def cancel(self, tasks: Sequence[Task], *, running: bool = False) -> list[Task]:
        """Cancel the tasks that no worker has begun and, with *running*, running ones; return the cancelled tasks."""
        ...

    def statistics(self) -> PoolStatistics:
        """Return the counters."""
        ...


class TracedPool(Protocol):
    """The interface of a pool that a trace depends on."""

    record: Any
    """Its `trace` is the trace that is being written, if any."""

    def check_accepting(self) -> None:
        """Raise unless tasks can be submitted."""
        ...


class Worker(Protocol):
    """A worker process, as reports and traces see it."""

    slot: int
    process: Any
    """The process object, which has a name."""

    @property
    def name(self) -> str:
        """The name of the process."""
        ...

    @property
    def pid(self) -> int:
        """The process id."""
        ...


class Workers(Protocol):
    """The workers of a pool, as reports and traces see them."""

    status: Status
    sent: dict[int, Task]
    """Tasks that were sent, by their numbers."""

    @property
    def workers(self) -> Collection[Worker]:
        """The living workers."""
        ...

    @property
    def by_slot(self) -> Mapping[int, Worker]:
        """The last worker of each slot."""
        ...
