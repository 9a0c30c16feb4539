"""What a pool records about itself: counters, its slowest tasks, and the trace."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from forkshm import _interrupts
from forkshm._ledger import ledger
from forkshm.pool._statistics import PoolStatistics
from forkshm.pool.observe._report import PoolReport, SlowTasks, hints_of

if TYPE_CHECKING:
    from forkshm.pool.observe._report import WorkerReport
    from forkshm.pool.observe._trace import Trace

__all__ = ("PoolRecord",)


class PoolRecord:
    """The parent's account of its pool. Any thread may write to it."""

    def __init__(self) -> None:
        self.trace: Trace | None = None
        """Set while a trace is recorded."""
        self.slow = SlowTasks()
        self.tasks = 0
        """Answered tasks."""
        self.messages = 0
        """Messages sent and received."""
        self._bytes_copied = 0
        self._bytes_shared = 0
        self._packing_ns = 0
        self._unpacking_ns = 0
        self._lock = _interrupts.RLock()

    def packed(self, nanoseconds: int, copied: int = 0, shared: int = 0) -> None:
        """Count the time that pickling arguments took, and their bytes."""
        with self._lock:
            self._packing_ns += nanoseconds
            self._bytes_copied += copied
            self._bytes_shared += shared

    def moved(self, copied: int, shared: int) -> None:
        """Count bytes."""
        with self._lock:
            self._bytes_copied += copied
            self._bytes_shared += shared

    def unpacked(self, nanoseconds: int) -> None:
        """Count the time that unpickling answers took."""
        self._unpacking_ns += nanoseconds

    def answered(self, count: int) -> None:
        """Count answered tasks."""
        self.tasks += count
        ledger.tasks += count

    def statistics(self, workers_replaced: int) -> PoolStatistics:
        """Return the counters."""
        return PoolStatistics(
            tasks=self.tasks,
            messages=self.messages,
            bytes_copied=self._bytes_copied,
            bytes_shared=self._bytes_shared,
            workers_replaced=workers_replaced,
        )

    def report(self, seconds: float, workers: tuple[WorkerReport, ...], workers_replaced: int) -> PoolReport:
        """Return how the pool and its workers spent their time."""
        report = PoolReport(
            seconds=seconds,
            workers=workers,
            slowest=self.slow.slowest(),
            packing=self._packing_ns / 1e9,
            unpacking=self._unpacking_ns / 1e9,
            statistics=self.statistics(workers_replaced),
            hints=(),
        )
        return dataclasses.replace(report, hints=hints_of(report))
