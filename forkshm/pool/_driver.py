"""Interfaces of a pool that results, progress bars and traces depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forkshm.pool._tasks import Task
    from forkshm.pool.observe import PoolStatistics

__all__ = ("Answer", "Driver", "TracedPool")


class Answer(Protocol):
    """The answer to one task: its result or exception, not unpickled yet."""

    def open(self) -> tuple[bool, Any]:
        """Return (True, value) or (False, exception)."""
        ...


class Driver(Protocol):
    """The parent's half of a pool."""

    def drive(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Drive the pool until *done* returns True or for *timeout* seconds; return whether it is true."""
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

    trace: Any
    """The trace that is being written, if any."""

    def check_accepting(self) -> None:
        """Raise unless tasks can be submitted."""
        ...
