"""The status region: one slot for each worker, in which the worker records its current task.

The slot is written *before* the fact: "claiming" before a worker checks the queue, and the task's number before it
touches the task. So when a worker has died, its slot shows:

* A task's number: the worker had that task, and no other worker has it.
* Claiming or last look: the worker may have taken a message without naming it.
* Idle: the worker had no task.

The slot also shows the parent whether workers must be woken. A worker that is claiming will check the queue again. A
worker that is past its last look sleeps until it gets a byte from the wakeup pipe. The parent sends before it reads the
slot, and the worker writes the slot before its last look. Both use the socket's own lock, so at least one of them sees
the other, and no message is left to sleeping workers.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import struct
import sys
from typing import TYPE_CHECKING, Any

from forkshm.backend import kernel
from forkshm.errors import RegionBusyError, RegionCreateError
from forkshm.pickler import register
from forkshm.region import Mode, map_refused, sparse_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from forkshm.region import MappedRegion

__all__ = (
    "CLAIMING",
    "FIRST_TASK",
    "IDLE",
    "LAST_LOOK",
    "MARKS",
    "SLOT_WORDS",
    "STARTING",
    "ResultBatch",
    "Status",
    "TraceRing",
    "answers_in",
)

STARTING = 0
"""The initializer has not finished yet."""
IDLE = 1
"""Asleep, with no task."""
CLAIMING = 2
"""Checking the queue, and going to check again."""
LAST_LOOK = 3
"""Checking the queue once more before it sleeps."""
FIRST_TASK = 16
"""The smallest task number."""

MARKS = 4096
"""Number of places for marks of cancelled tasks: task n has its mark in place n modulo this."""

# A slot has the state, the number of the item in its chunk, counted from 1, and padding. A worker writes it for each
# item, so each slot has a cache line of its own: writing takes three times as long if two workers share a line.
SLOT_WORDS = 8

# Bytes of a worker's clock: a cache line, so that workers do not share one.
_CLOCK = 64

# Bytes of answers that a worker may collect before it sends them.
_RESULT_BATCH = 16 * 1024

# Bytes of the records of a trace, for each worker: 16,384 tasks.
_TRACE_RING = 2 * 2**20
_TRACE_RING_HEAD = 16
# If the file size is limited: the shortest trace ring, and the least that a worker has for answers and trace.
_SHORTEST_TRACE_RING = 1024
_LEAST_OF_WORKER = 2048

# One answer: number of the task, nanoseconds it took, bytes of the pickle that follows.
_ANSWER = struct.Struct("<QQI")


class ResultBatch:
    """Collects the answers of a batch in a worker, to send them in one message.

    It lies in the status region, so that the parent finds answers that a dead worker had not sent. An answer counts
    once `used` includes it, which is written last. If an answer was sent and is still here, the parent finds it
    twice and ignores the second one.
    """

    def __init__(self, memory: memoryview) -> None:
        self._used = memory[:8].cast("Q")
        self._memory = memory[8:]

    def add(self, number: int, nanoseconds: int, stream: bytes) -> bool:
        """Add an answer, which is only a pickle; False if it does not fit."""
        used = self._used[0]
        start = used + _ANSWER.size
        end = start + len(stream)
        if end > len(self._memory):
            return False
        _ANSWER.pack_into(self._memory, used, number, nanoseconds, len(stream))
        self._memory[start:end] = stream
        self._used[0] = end
        return True

    def content(self) -> bytes:
        """Return the bytes that were added since `clear`."""
        return bytes(self._memory[: self._used[0]])

    def clear(self) -> None:
        """Empty it."""
        self._used[0] = 0

    def close(self) -> None:
        """Release the memory."""
        self._used.release()
        self._memory.release()


def answers_in(content: bytes, position: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """Yield the number and nanoseconds of each answer of a result batch, and the start and end of its pickle.

    Raises:
        struct.error: The content ends within an answer.
    """
    size, unpack, length = _ANSWER.size, _ANSWER.unpack_from, len(content)
    while position < length:
        number, nanoseconds, nbytes = unpack(content, position)
        start = position + size
        position = start + nbytes
        yield number, nanoseconds, start, position


class TraceRing:
    """The memory in which a worker records its work; see `_trace`."""

    def __init__(self, memory: memoryview) -> None:
        # Whether to record, and the number of records that were begun.
        self.head = memory[:_TRACE_RING_HEAD].cast("Q")
        self.records = memory[_TRACE_RING_HEAD:]

    def close(self) -> None:
        """Release the memory."""
        self.head.release()
        self.records.release()


def _file_limit() -> int:
    """Return the maximum size of a file, in bytes."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrlimit(resource.RLIMIT_FSIZE)[0]


def _of_worker(size: int) -> tuple[int, int]:
    """Return the bytes of the result batch and of the trace ring of a worker that has *size* bytes for both."""
    result_batch = min(_RESULT_BATCH, (size - _SHORTEST_TRACE_RING) // _CLOCK * _CLOCK)
    return result_batch, size - result_batch


def _reserved(fixed: int, workers: int) -> MappedRegion:
    """Return the memory of a pool: *fixed* bytes, and those of `_of_worker` for each worker.

    Memory of trace rings is allocated on demand, except for their heads.
    """
    each = _RESULT_BATCH + _TRACE_RING_HEAD + _TRACE_RING
    try:
        region = sparse_memory(fixed + workers * each)
    except RegionCreateError as error:
        if error.errno != errno.EFBIG:
            raise
        # The file size is limited (ulimit -f). The POSIX backend needs a page for itself.
        left = (_file_limit() - mmap.PAGESIZE - fixed) // workers // _CLOCK * _CLOCK
        each = min(each, max(left, _LEAST_OF_WORKER))
        region = sparse_memory(fixed + workers * each)
    result_batch, trace_ring = _of_worker(each)
    rings = fixed + workers * result_batch
    try:
        kernel.reserve(region.fileno(), 0, rings)
        for worker in range(workers):
            kernel.reserve(region.fileno(), rings + worker * trace_ring, _TRACE_RING_HEAD)
    except OSError as error:
        region.close()
        raise map_refused(error, rings, Mode.read_write) from error
    return region


class Status:
    """The slots of one pool. Each word has one writer, and is written in one store."""

    def __init__(self, workers: int, region: MappedRegion | None = None) -> None:
        words = workers * SLOT_WORDS * 8
        # Aligned to a cache line.
        clocks = -(-words // _CLOCK) * _CLOCK
        marks = clocks + workers * _CLOCK
        boxes = marks + MARKS * 8
        self._region = _reserved(boxes, workers) if region is None else region
        result_batch, trace_ring = _of_worker((self._region.size - boxes) // workers)
        result_batches = boxes + workers * result_batch
        self.words = self._region.buf[:words].cast("Q")
        # See `_report`.
        self.clocks = [self._region.buf[start : start + _CLOCK] for start in range(clocks, marks, _CLOCK)]
        # The number of a cancelled task in its place, so that no worker begins it. Written by the parent.
        self.marks = self._region.buf[marks:boxes].cast("Q")
        self._result_batches = [
            ResultBatch(self._region.buf[start : start + result_batch])
            for start in range(boxes, result_batches, result_batch)
        ]
        self.trace_rings = [
            TraceRing(self._region.buf[start : start + trace_ring])
            for start in range(result_batches, result_batches + workers * trace_ring, trace_ring)
        ]

    def reset(self, worker: int) -> None:
        """Make a slot ready for a new worker."""
        self.words[worker * SLOT_WORDS] = STARTING
        self.words[worker * SLOT_WORDS + 1] = 0
        self._result_batches[worker].clear()

    def result_batch(self, worker: int) -> ResultBatch:
        """Return the memory in which the worker collects answers."""
        return self._result_batches[worker]

    def state(self, worker: int) -> int:
        """Return the state that the worker has written."""
        return self.words[worker * SLOT_WORDS]

    def states(self) -> list[int]:
        """Return the contents of all slots."""
        return self.words[::SLOT_WORDS].tolist()

    def item(self, worker: int) -> int | None:
        """Return the index in its chunk of the item that the worker runs, counted from 0, or None without a chunk."""
        return self.words[worker * SLOT_WORDS + 1] - 1 if self.words[worker * SLOT_WORDS + 1] else None

    def close(self) -> None:
        """Close the region. Slots and marks can still be read and written; no worker sees it."""
        # A call that was interrupted, or another thread, may still cancel tasks.
        self.words = memoryview(bytearray(self.words)).cast("Q")
        self.marks = memoryview(bytearray(self.marks)).cast("Q")
        for result_batch in self._result_batches:
            result_batch.close()
        for trace_ring in self.trace_rings:
            trace_ring.close()
        for clock in self.clocks:
            clock.release()
        # Another thread may be reading. The memory is unmapped with the last view. A free-threaded build may free that
        # view a little later than its last reference is gone.
        with contextlib.suppress(RegionBusyError):
            self._region.close()


def reduce_status(status: Status) -> Any:
    """Send the slots: the receiver gets the same memory."""
    return Status, (len(status._result_batches), status._region)


register(Status, reduce_status)
