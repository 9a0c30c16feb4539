"""How a pool spent its time: the object that `Pool.report` returns."""

from __future__ import annotations

import dataclasses
import heapq
import html
import itertools
import struct
import time
from typing import TYPE_CHECKING

from forkshm.pool._status import FIRST_TASK, STARTING
from forkshm.pool.observe._html import legend, page, table

if TYPE_CHECKING:
    import os

    from forkshm.pool._interfaces import Workers
    from forkshm.pool._statistics import PoolStatistics

__all__ = (
    "PoolReport",
    "SlowTask",
    "SlowTasks",
    "WorkerClock",
    "WorkerReport",
    "hints_of",
    "report_body",
    "worker_reports",
)

# With less work than this there are no hints.
_LEAST_SECONDS = 0.02
# If tasks copy more bytes than this on average, copying dominates.
_COPIES_MATTER = 64 * 1024
# The busiest worker must have worked so many times as long as the average for a hint.
_UNEVEN = 1.5
# Share of the busiest worker's time that one task must have taken for a hint to name it.
_ONE_TASK = 0.5

_SLOWEST = 10
# Faster tasks are not listed as slow.
_SLOW_NS = 1_000_000

# The words of a worker: tasks done; nanoseconds busy, in transfer and waiting; and the time of the last update.
_CLOCK = struct.Struct("<5Q")


class WorkerClock:
    """A worker's own account of its time, kept in memory that the parent sees.

    Nearly all times are taken by the worker for other reasons, too.
    """

    __slots__ = ("_memory", "busy", "mark", "tasks", "transfer", "waiting")

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        # A worker continues the account of the one that it replaces.
        self.tasks, self.busy, self.transfer, self.waiting, _ = _CLOCK.unpack_from(memory)
        self.mark = time.perf_counter_ns()
        self.write()

    def write(self) -> None:
        """Show it."""
        _CLOCK.pack_into(self._memory, 0, self.tasks, self.busy, self.transfer, self.waiting, self.mark)


@dataclasses.dataclass(frozen=True)
class WorkerReport:
    """Seconds that one worker, including the workers it replaced, spent on each activity."""

    name: str
    pid: int
    tasks: int
    """Tasks answered; a chunk of a map is one task."""
    busy: float
    """Time in the functions."""
    waiting: float
    """Time without a task."""
    transfer: float
    """Time for receiving, unpickling, pickling, copying and sending."""


@dataclasses.dataclass(frozen=True)
class SlowTask:
    """One of the slowest tasks."""

    seconds: float
    task: str
    """The function, and its arguments or the part of the input in a few words."""


@dataclasses.dataclass(frozen=True)
class PoolReport:
    """How a pool spent its time since it was made; ``print`` shows it as a table."""

    seconds: float
    """Seconds since the pool was made."""
    workers: tuple[WorkerReport, ...]
    slowest: tuple[SlowTask, ...]
    """At most ten tasks that took a millisecond or more, the slowest first. Tasks that raised are not included."""
    packing: float
    """Seconds that this process spent pickling and copying arguments."""
    unpacking: float
    """Seconds that this process spent unpickling results."""
    statistics: PoolStatistics
    hints: tuple[str, ...]
    """Advice for making the work faster, if there is any."""

    def __str__(self) -> str:
        moved = self.statistics
        lines = [f"{'':24} {'tasks':>9} {'busy':>10} {'transfer':>10} {'waiting':>10}"]
        lines += [
            f"{worker.name:24} {worker.tasks:9,} {worker.busy:8.3f} s {worker.transfer:8.3f} s {worker.waiting:8.3f} s"
            for worker in self.workers
        ]
        copied, shared = moved.bytes_copied / 1e6, moved.bytes_shared / 1e6
        lines.append(
            f"in {self.seconds:.3f} s this process packed for {self.packing:.3f} s and unpacked for "
            f"{self.unpacking:.3f} s; {copied:,.1f} MB were copied, {shared:,.1f} MB shared"
        )
        lines += [f"{task.seconds:9.3f} s: {task.task}" for task in self.slowest]
        lines += [f"hint: {hint}" for hint in self.hints]
        return "\n".join(lines)

    def to_html(self) -> str:
        """Return the report as an HTML page that opens without a network, in light and dark."""
        title = f"Report of a pool, {self.seconds:.3f} s, {len(self.workers)} workers"
        return page(title, f"<h1>{html.escape(title)}</h1>{report_body(self)}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_html` to a file.

        Args:
            path: The file; it is overwritten.

        Raises:
            OSError: The file cannot be written.

        Example:
            >>> import forkshm, pathlib, tempfile
            >>> path = pathlib.Path(tempfile.mkdtemp(), "report.html")
            >>> with forkshm.Pool(1) as pool:
            ...     pool.report().save(path)
            >>> path.read_text()[:15]
            '<!DOCTYPE html>'
        """
        text = self.to_html()
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def _repr_html_(self) -> str:
        parts = [_workers(self), f"<p>{html.escape(_moved(self))}</p>"]
        if self.slowest:
            parts.append(table(("seconds", "slowest tasks"), ((f"{t.seconds:.3f}", t.task) for t in self.slowest), [0]))
        parts += [f"<p><b>Hint:</b> {html.escape(hint)}</p>" for hint in self.hints]
        # The page around it does not have the styles of `page`.
        return '<div style="overflow-x: auto">' + "".join(parts) + "</div>"


class SlowTasks:
    """The slowest tasks so far."""

    def __init__(self) -> None:
        # Slower tasks are recorded.
        self.floor = _SLOW_NS
        self._heap: list[tuple[int, int, str]] = []
        self._counter = itertools.count()

    def note(self, nanoseconds: int, task: str) -> None:
        """Record a task that took longer than `floor`."""
        heapq.heappush(self._heap, (nanoseconds, next(self._counter), task))
        if len(self._heap) > _SLOWEST:
            heapq.heappop(self._heap)
            self.floor = self._heap[0][0]

    def slowest(self) -> tuple[SlowTask, ...]:
        """Return the recorded tasks, the slowest first."""
        return tuple(SlowTask(taken / 1e9, task) for taken, _, task in sorted(self._heap, reverse=True))


def worker_reports(worker_group: Workers) -> tuple[WorkerReport, ...]:
    """Return the workers' accounts, including the time of their current activity."""
    reports = []
    for _, worker in sorted(worker_group.by_slot.items()):
        state = worker_group.status.state(worker.slot)
        tasks, busy, transfer, waiting, mark = _CLOCK.unpack_from(worker_group.status.clocks[worker.slot])
        going_on = max(0, time.perf_counter_ns() - mark)
        if worker not in worker_group.workers:
            pass  # the worker has ended
        elif state in worker_group.sent:
            busy += going_on
        elif state != STARTING and state < FIRST_TASK:
            waiting += going_on
        reports.append(WorkerReport(worker.name, worker.pid, tasks, busy / 1e9, waiting / 1e9, transfer / 1e9))
    return tuple(reports)


def hints_of(report: PoolReport) -> tuple[str, ...]:
    """Return hints for making the work faster, where there are any."""
    busy = [worker.busy for worker in report.workers]
    computing, most = sum(busy), max(busy, default=0.0)
    moving = sum(worker.transfer for worker in report.workers) + report.packing + report.unpacking
    tasks, copied = max(1, report.statistics.tasks), report.statistics.bytes_copied
    hints = []
    if moving > computing and moving > _LEAST_SECONDS:
        if copied / tasks > _COPIES_MATTER:
            hints.append(
                f"moving data took {moving:.3g} s, computing {computing:.3g} s, and {copied / 1e6:,.0f} MB were "
                "copied. Create large arrays in shared memory (forkshm.empty, forkshm.shared_allocations, "
                "Pool(born_shared=True))."
            )
        else:
            hints.append(
                f"moving data took {moving:.3g} s, computing {computing:.3g} s: each task computes for only "
                f"{computing / tasks * 1e6:,.0f} us. Give each task more work (chunksize=...)."
            )
    if len(busy) > 1 and most > _LEAST_SECONDS and most > _UNEVEN * computing / len(busy):
        uneven = f"one worker computed for {most:.3g} s, and the average is {computing / len(busy):.3g} s"
        first = next(iter(report.slowest), None)
        if first is not None and first.seconds > _ONE_TASK * most:
            hints.append(f"{uneven}. One task took {first.seconds:.3g} s: {first.task}. Split that task.")
        else:
            hints.append(f"{uneven}. Divide the work into more and smaller tasks (chunksize=1).")
    return tuple(hints)


# -- as HTML -----------------------------------------------------------------------------


def _moved(report: PoolReport) -> str:
    moved = report.statistics
    return (
        f"In {report.seconds:.3f} s this process packed for {report.packing:.3f} s and unpacked for "
        f"{report.unpacking:.3f} s. {moved.bytes_copied / 1e6:,.1f} MB were copied, "
        f"{moved.bytes_shared / 1e6:,.1f} MB shared."
    )


def _workers(report: PoolReport) -> str:
    return table(
        ("worker", "tasks", "busy", "transfer", "waiting"),
        (
            (each.name, f"{each.tasks:,}", *(f"{value:.3f} s" for value in (each.busy, each.transfer, each.waiting)))
            for each in report.workers
        ),
        range(1, 5),
    )


def _bars(report: PoolReport) -> str:
    """Return a table of the workers' times with a bar for each."""
    rows = []
    for each in report.workers:
        whole = (each.busy + each.transfer + each.waiting) or 1.0
        bar = "".join(
            f'<span class="{kind}" style="width:{100 * value / whole:.2f}%"></span>'
            for kind, value in (("computing", each.busy), ("receiving", each.transfer), ("waiting", each.waiting))
        )
        # On a phone, where there is no room for a heading, each number has its word beside it.
        numbers = {
            "tasks": f"{each.tasks:,}",
            "busy": f"{each.busy:.3f} s",
            "transfer": f"{each.transfer:.3f} s",
            "waiting": f"{each.waiting:.3f} s",
        }
        cells = "".join(f'<td class="n" data-of="{word}">{text}</td>' for word, text in numbers.items())
        rows.append(
            f'<tr><td class="name">{html.escape(each.name)}</td>{cells}'
            f'<td class="shares"><div class="bar">{bar}</div></td></tr>'
        )
    return (
        '<div class="wide"><table class="workers"><thead><tr><th>worker</th><th class="n">tasks</th>'
        '<th class="n">busy</th><th class="n">transfer</th><th class="n">waiting</th><th>shares</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        + legend((("computing", "busy"), ("receiving", "transfer"), ("waiting", "waiting")))
    )


def report_body(report: PoolReport) -> str:
    """Return the sections of a report as HTML."""
    moved = report.statistics
    parts = [
        "<h2>Workers</h2>",
        _bars(report),
        "<h2>Data</h2>",
        table(
            (),
            (
                ("copied", f"{moved.bytes_copied / 1e6:,.1f} MB"),
                ("shared", f"{moved.bytes_shared / 1e6:,.1f} MB"),
                ("tasks", f"{moved.tasks:,}"),
                ("messages", f"{moved.messages:,}"),
                ("workers replaced", f"{moved.workers_replaced:,}"),
                ("packing in this process", f"{report.packing:.3f} s"),
                ("unpacking in this process", f"{report.unpacking:.3f} s"),
            ),
            [1],
        ),
    ]
    if report.slowest:
        parts.append("<h2>Slowest tasks</h2>")
        parts.append(table(("seconds", "task"), ((f"{t.seconds:.3f}", t.task) for t in report.slowest), [0]))
    if report.hints:
        parts.append("<h2>Hints</h2>")
        parts += [f'<p class="hint">{html.escape(hint)}</p>' for hint in report.hints]
    return "".join(parts)
