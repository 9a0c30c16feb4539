"""A timeline of the workers, for chrome://tracing and ui.perfetto.dev.

Each worker has a *trace ring* in the status region: a ring of records of one size, one for each task. A record is begun
when the task is taken, and completed step by step, each time by one store. So the records of a killed worker are
available, and the incomplete record shows how far the worker had come. Trace rings take no pages while there is no
trace. Then a worker reads only one word for each message.

All processes use the same clock: CLOCK_MONOTONIC, or the performance counter of Windows, whose other clock ticks in
hundredths of seconds.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.pickler import name_of
from forkshm.pool._results import Outcome
from forkshm.pool._status import CLAIMING, FIRST_TASK, IDLE, LAST_LOOK
from forkshm.pool.observe._html import timeline_page
from forkshm.pool.observe._report import report_body

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

    from forkshm.pool._interfaces import TracedPool, Worker, Workers
    from forkshm.pool._status import TraceRing
    from forkshm.pool._tasks import Answer, Task

__all__ = ("Recorder", "Trace", "Traced")

# The words of a record. The first five are times: when the worker began to wait, had the message, had unpickled it, had
# computed, and had sent; 0 for not yet. They are followed by the task, the bytes of arguments and result, and the
# worker. The rest is the end of the function's name.
_ASKED, _TAKEN, _OPENED, _COMPUTED, _SENT, _NUMBER, _ARGUMENTS, _RESULT, _WHO, _NAME = range(10)
_WORDS = 16
_RECORD_BYTES = _WORDS * 8
_NAME_BYTES = _RECORD_BYTES - _NAME * 8
_RECORD = struct.Struct(f"<{_NAME}Q{_NAME_BYTES}s")
# A bit in the worker's word: the task raised.
_FAILED = 1 << 32

# Maximum number of events of the parent.
_PARENT_EVENTS = 100_000


class Recorder:
    """The worker's side of its trace ring."""

    def __init__(self, trace_ring: TraceRing) -> None:
        self._trace_ring = trace_ring
        self._words = trace_ring.records.cast("Q")
        self._capacity = len(self._words) // _WORDS
        self._at = 0
        self._pid = os.getpid()

    def begin(self, number: int, asked: int = 0) -> None:
        """Begin the record of a task that was just taken.

        Args:
            number: The number of the task.
            asked: When the worker began to wait for it; 0 for a later task of a message.
        """
        words, head = self._words, self._trace_ring.head
        at = self._at = head[1] % self._capacity * _WORDS
        now = time.perf_counter_ns()
        words[at + _ASKED] = asked or now
        words[at + _TAKEN] = now
        words[at + _OPENED] = 0 if asked else now
        for later in (_COMPUTED, _SENT, _ARGUMENTS, _RESULT, *range(_NAME, _WORDS)):
            words[at + later] = 0
        words[at + _NUMBER] = number
        words[at + _WHO] = self._pid
        head[1] += 1  # from now on it is read

    def opened(self, function: Callable[..., Any]) -> None:
        """Record that the arguments are unpickled, and which function is called."""
        start = self._at * 8 + _NAME * 8
        name = name_of(function).encode(errors="replace")
        if len(name) > _NAME_BYTES:
            name = b"..." + name[3 - _NAME_BYTES :]
        self._trace_ring.records[start : start + len(name)] = name
        opened = self._at + _OPENED
        self._words[opened] = self._words[opened] or time.perf_counter_ns()

    def received(self, nbytes: int) -> None:
        """Record the size of the arguments."""
        self._words[self._at + _ARGUMENTS] = nbytes

    def computed(self) -> None:
        """Record that the function has returned."""
        self._words[self._at + _COMPUTED] = time.perf_counter_ns()

    def packed(self, nbytes: int) -> None:
        """Record the size of the result."""
        self._words[self._at + _RESULT] = nbytes

    def failed(self) -> None:
        """Record that the answer is an exception."""
        words, at = self._words, self._at
        now = time.perf_counter_ns()
        for stage in (_OPENED, _COMPUTED):
            words[at + stage] = words[at + stage] or now
        words[at + _WHO] |= _FAILED

    def sent(self) -> None:
        """Record that the task is answered."""
        self._words[self._at + _SENT] = time.perf_counter_ns()


@dataclasses.dataclass
class _Life:
    """One worker, as recorded by the trace."""

    slot: int
    name: str
    began: int
    # When it was reaped; None while it lives.
    ended: int | None = None


class Trace:
    """A context manager that records a trace, and writes a file at its end; returned by `Pool.trace`.

    Attributes:
        path: The file.
        dropped: After the file was written: the number of recorded tasks that were overwritten by later ones, and of
            dropped events of this process.
    """

    def __init__(
        self, path: str | os.PathLike[str], worker_group: Workers, dispatcher: TracedPool, pool: object
    ) -> None:
        self.path = os.path.abspath(path)
        self.dropped = 0
        self._worker_group = worker_group
        self._record = dispatcher.record
        self._check_accepting = dispatcher.check_accepting
        self._pool = pool  # so that it is not collected before the trace has ended
        self._owner = os.getpid()
        self._is_on = False
        self._started = 0
        # One thread may end the pool while another leaves the block.
        self._stopping = _interrupts.Lock()
        self._lives: dict[int, _Life] = {}
        self._threads: dict[int, str] = {}
        self._noted = 0
        self._events: collections.deque[tuple[str, int, int, int, dict[str, Any]]] = collections.deque(
            maxlen=_PARENT_EVENTS
        )
        self._workers_events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        if self._record.trace is not None:
            raise RuntimeError(f"cannot trace to {self.path}: the pool is traced to {self._record.trace.path} now")
        if self._started:
            raise RuntimeError(f"cannot trace to {self.path}: this trace was used before. Call Pool.trace again.")
        self._check_accepting()
        # Fail now, instead of after the work, if the file cannot be written.
        with open(self.path, "w"):
            pass
        self._started = time.perf_counter_ns()
        self._first = [trace_ring.head[1] for trace_ring in self._worker_group.status.trace_rings]
        self._record.trace = self
        self._is_on = True
        for worker in list(self._worker_group.workers):
            self.born(worker)
        for trace_ring in self._worker_group.status.trace_rings:
            trace_ring.head[0] = 1
        return self

    def __exit__(self, *_: object) -> None:
        if os.getpid() != self._owner:
            return  # in a forked child: the trace belongs to its parent
        self.collect()
        self._write()

    # -- called by the dispatcher -----------------------------------------------------

    def born(self, worker: Worker) -> None:
        """Record that a worker was started."""
        self._lives[worker.pid] = _Life(worker.slot, worker.process.name, time.perf_counter_ns())

    def reaped(self, worker: Worker) -> None:
        """Record that a worker has ended, and its current activity with it."""
        life = self._lives.get(worker.pid)
        if life is not None:
            life.ended = time.perf_counter_ns()

    def note(self, name: str, began: int, what: dict[str, Any]) -> None:
        """Record an activity of this thread that began at *began*."""
        if self._is_on and began >= self._started:
            thread = threading.get_native_id()
            if thread not in self._threads:
                self._threads[thread] = threading.current_thread().name
            self._noted += 1
            self._events.append((name, began, time.perf_counter_ns(), thread, what))

    # -- the end ----------------------------------------------------------------------

    def collect(self) -> None:
        """Stop recording, and read the trace rings. Called when the trace ends, or when the pool ends before."""
        with self._stopping:
            if self._is_on:
                self._is_on = False
                self._record.trace = None
                self._collect()

    def _collect(self) -> None:
        status = self._worker_group.status
        for trace_ring in status.trace_rings:
            trace_ring.head[0] = 0
        self._stopped = time.perf_counter_ns()
        # Where each worker's row ends so far.
        ends: dict[int, int] = {}
        for slot, trace_ring in enumerate(status.trace_rings):
            for record in self._records(trace_ring, self._first[slot]):
                self._workers_events += self._of_task(slot, record, ends)
        for pid, life in list(self._lives.items()):
            if life.ended is None and status.state(life.slot) in (IDLE, CLAIMING, LAST_LOOK):
                began = min(ends.get(pid, life.began), self._stopped)
                self._workers_events.append(_event("waiting", pid, pid, began, self._stopped))
        self.dropped += self._noted - len(self._events)

    def _records(self, trace_ring: TraceRing, first: int) -> Iterator[tuple[Any, ...]]:
        count, capacity = trace_ring.head[1], len(trace_ring.records) // _RECORD_BYTES
        content = bytes(trace_ring.records[: count * _RECORD_BYTES])
        # A worker may write during the read: its current record takes the place of the oldest one.
        oldest = max(first, trace_ring.head[1] - capacity + 1)
        self.dropped += oldest - first
        for number in range(oldest, count):
            yield _RECORD.unpack_from(content, number % capacity * _RECORD_BYTES)

    def _of_task(self, slot: int, record: Sequence[Any], ends: dict[int, int]) -> Iterator[dict[str, Any]]:
        pid = record[_WHO] % _FAILED
        if record[_NUMBER] < FIRST_TASK:
            return
        life = self._lives.setdefault(pid, _Life(slot, f"worker {pid}", self._started))
        over = self._stopped if life.ended is None else life.ended
        name = record[_NAME].rstrip(b"\0").decode(errors="replace")
        task: dict[str, Any] = {"task": record[_NUMBER]}
        if name:
            task["function"] = name
        received = {**task, "argument_bytes": record[_ARGUMENTS]}
        # A worker may continue while its trace ring is read. Later events are not shown.
        end = min(max(record[_ASKED], ends.get(pid, self._started)), over)
        stages: list[tuple[int, str, dict[str, Any]]] = [
            (_TAKEN, "waiting", {}),
            (_OPENED, "receiving", received),
            (_COMPUTED, "computing", {**received, "failed": bool(record[_WHO] & _FAILED)}),
            (_SENT, "sending", {**task, "result_bytes": record[_RESULT]}),
        ]
        for stage, category, args in stages:
            began, reached = end, bool(record[stage])
            end = min(max(began, record[stage]), over) if reached else over
            if not reached:
                args["unfinished"] = True
            # The later tasks of a message have no waiting and receiving times.
            if end > began or stage in (_COMPUTED, _SENT):
                what = name if name and category == "computing" else category
                yield _event(what, pid, pid, began, end, args, category)
            if not reached:
                break
        ends[pid] = end

    def _write(self) -> None:
        parent = self._owner
        events: list[dict[str, Any]] = [_label("process_name", parent, parent, name=f"parent {parent}")]
        events += [_label("thread_name", parent, thread, name=name) for thread, name in list(self._threads.items())]
        for pid, life in list(self._lives.items()):
            events.append(_label("process_name", pid, pid, name=life.name))
            events.append(_label("process_sort_index", pid, pid, sort_index=life.slot + 1))
            events.append(_label("thread_name", pid, pid, name=life.name))
        events += [
            _event(name, parent, thread, began, end, args) for name, began, end, thread, args in list(self._events)
        ]
        events += self._workers_events
        for event in events:
            if event["ph"] == "X":
                event["ts"] -= self._started // 1000
        if self.path.lower().endswith((".html", ".htm")):
            report = getattr(self._pool, "report", None)
            page = timeline_page(events, "" if report is None else report_body(report()), self.dropped)
            with open(self.path, "w", encoding="utf-8") as file:
                file.write(page)
            return
        whole = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"dropped": self.dropped}}
        with open(self.path, "w") as file:
            json.dump(whole, file)


def _event(
    name: str,
    pid: int,
    tid: int,
    began: int,
    end: int,
    args: dict[str, Any] | None = None,
    category: str | None = None,
) -> dict[str, Any]:
    # Whole microseconds, so that adjacent events meet exactly, which sums of fractions would not.
    start = began // 1000
    return {
        "name": name,
        "cat": category or name,
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": end // 1000 - start,
        "args": args or {},
    }


def _label(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": args}


class Traced(Outcome):
    """An outcome whose unpickling is recorded, in any thread."""

    __slots__ = ("_outcome", "_task", "_trace")

    def __init__(self, outcome: Answer, trace: Trace, task: Task) -> None:
        super().__init__()
        self._outcome = outcome
        self._trace = trace
        self._task = {"function": name_of(task.function.function)}

    def open(self) -> tuple[bool, Any]:
        """Unpickle the outcome."""
        began = time.perf_counter_ns()
        try:
            return self._outcome.open()
        finally:
            self._trace.note("unpickling", began, self._task)
