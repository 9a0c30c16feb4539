"""Ends workers that take too long: ``task_timeout``.

The parent measures by looking regularly: a call has lasted for as long as successive looks have seen a worker at it. So
if the program was stopped, or did not wait for its tasks, not all of them seem overdue at once. Workers do nothing for
it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from forkshm.backend import kernel
from forkshm.pool._status import FIRST_TASK

if TYPE_CHECKING:
    from forkshm.pool._worker_group import WorkerGroup, WorkerHandle

__all__ = ("TaskDeadlines",)

# Number of looks while a call may last, and the longest pause between two looks.
_LOOKS, _LONGEST_PAUSE_SECONDS = 10, 0.25
_SHORTEST_PAUSE_SECONDS = 0.002


class TaskDeadlines:
    """Tracks how long each worker has been at its current task."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        # Seconds between two looks.
        self.pause = max(_SHORTEST_PAUSE_SECONDS, min(seconds / _LOOKS, _LONGEST_PAUSE_SECONDS))
        # Workers that were killed but not reaped yet.
        self.ended: set[WorkerHandle] = set()
        # For each slot: the state that was seen there, and for how long.
        self._seen: dict[int, tuple[tuple[int, int, int | None], float]] = {}
        self._looked = time.monotonic()

    def look(self, worker_group: WorkerGroup) -> None:
        """End the workers whose time is over. Cheap if it is too early to look."""
        now = time.monotonic()
        passed = now - self._looked
        if passed < self.pause:
            return
        self._looked = now
        # If no thread looked for a while, do not count that time against the workers.
        passed = min(passed, 2 * self.pause)
        for worker in worker_group.workers:
            slot = worker.slot
            state = worker_group.status.state(slot)
            what = worker.pid, state, worker_group.status.item(slot)
            before, seconds = self._seen.get(slot, (None, 0.0))
            seconds = seconds + passed if what == before else 0.0
            self._seen[slot] = what, seconds
            # A worker without a task may sleep or initialize itself for any time. But it may not be stopped, because it
            # could hold a message that its slot does not name yet.
            if seconds >= self.seconds and (state >= FIRST_TASK or kernel.is_stopped(worker.pid)):
                self.ended.add(worker)
                worker_group.end(worker)
