"""Marks on tasks that are in the kernel's queue or in a running chunk, so that workers skip them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forkshm.channel import Kind
from forkshm.pool._status import MARKS

if TYPE_CHECKING:
    from forkshm.pool._status import Status
    from forkshm.pool._tasks import Task

__all__ = ("Marks",)


class Marks:
    """The marks of one pool.

    A worker names a task in its slot before it checks the mark. The parent sets the mark before it checks the slots. So
    at least one of the two sees the other.

    Args:
        status: The memory that the workers see.
    """

    def __init__(self, status: Status) -> None:
        self._status = status
        # Cancelled tasks that may lie in the kernel's queue, by the place of their marks.
        self._marked: dict[int, int] = {}

    def __contains__(self, number: int) -> bool:
        return number in list(self._marked.values())

    def skip(self, task: Task) -> bool:
        """Keep workers from beginning a task in the kernel's queue. Return False if a worker has begun it."""
        number = task.number
        place = number % MARKS
        if self._marked.get(place, number) != number:
            return False  # the place is taken by the mark of another task, which may still be in the queue
        marks = self._status.marks
        # No call may come between these. A worker that runs a chunk ends it when it sees the mark, and what it has done
        # must not be done again.
        self._marked[place] = number
        if task.kind is not Kind.CALL:
            task.is_cancelled = True
        marks[place] = number
        if number not in self._status.states():
            return True
        marks[place] = 0
        # A worker that has seen the mark reports it, and the task is sent again.
        self._marked.pop(place, None)
        return False

    def end_after_item(self, task: Task) -> None:
        """Mark a chunk, so that the worker that runs it ends it after the current item."""
        place = task.number % MARKS
        if task.kind is not Kind.CALL and place not in self._marked:
            task.is_cancelled = True
            self._status.marks[place] = task.number

    def remove(self, number: int) -> None:
        """Forget the mark of a task that a worker has skipped."""
        self._marked.pop(number % MARKS, None)
