"""Turns the messages of workers into the answers of tasks."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

from forkshm import _interrupts
from forkshm._ledger import ledger
from forkshm.channel import HEADER_SIZE, Kind, read_header, read_message
from forkshm.errors import ChannelBrokenError, ForkshmError
from forkshm.pool._results import Outcome, PlainOutcome
from forkshm.pool._status import answers_in
from forkshm.pool._tasks import CANCELLED
from forkshm.pool.observe import Traced, brief

if TYPE_CHECKING:
    from collections.abc import Callable

    from forkshm.channel import Header, Received
    from forkshm.pool._deaths import Deaths
    from forkshm.pool._marks import Marks
    from forkshm.pool._tasks import Answer, Outstanding, Pace
    from forkshm.pool._worker_group import WorkerGroup
    from forkshm.pool.observe import PoolRecord

__all__ = ("Receiver",)


class Receiver:
    """Handles what workers have sent. Every call can be repeated.

    Args:
        worker_group: The workers.
        tasks: The tasks of the pool. Their answers are recorded here, and delivered by the caller.
        deaths: Is told of answers, and of messages that are not forkshm's.
        marks: The marks on cancelled tasks.
        record: Counts what arrives.
        fail: Called with the exception if the pool cannot go on.
    """

    def __init__(
        self,
        worker_group: WorkerGroup,
        tasks: Outstanding,
        deaths: Deaths,
        marks: Marks,
        record: PoolRecord,
        fail: Callable[[BaseException], None],
    ) -> None:
        self._worker_group = worker_group
        self._tasks = tasks
        self._deaths = deaths
        self._marks = marks
        self._record = record
        self._fail = fail

    def take_in(self, received: Received) -> None:
        """Handle one message."""
        try:
            header = read_header(received.data)
        except ChannelBrokenError:
            self._deaths.note_garbage()
            return
        kind, number, nanoseconds = header.kind, header.number, header.group
        record = self._record
        began = time.perf_counter_ns() if record.trace is not None else 0
        record.messages += 1
        if kind is Kind.WAKE and not received.fds:
            return
        if kind is Kind.ANSWERS and not received.fds:
            self.take_result_batch(received.data, HEADER_SIZE)
            if (trace := record.trace) is not None:
                trace.note("receiving", began, {"bytes": len(received.data)})
        elif kind is Kind.CANCELLED and not received.fds:
            self._take_cancelled(number)
        elif kind in (Kind.RESULT, Kind.ERROR):
            if number in self._tasks.sent:
                outcome = self._outcome_of(received, header, number)
                self._take_answer(number, nanoseconds, len(received.data), outcome)
                if (trace := record.trace) is not None:
                    trace.note("receiving", began, {"task": number, "bytes": len(received.data)})
            elif number not in self._marks:
                # No task waits for this answer, but a task may wait for the message that it replaced.
                self._deaths.note_garbage()
        elif kind is Kind.INITIALIZER_FAILED and self._worker_group.has_initializer:
            self._fail(self._outcome_of(received, header, number).open()[1])
        else:
            self._deaths.note_garbage()

    def take_result_batch(self, content: bytes, position: int = 0) -> None:
        """Handle the answers that a worker had collected."""
        tasks, sent, slow = self._tasks, self._tasks.sent, self._record.slow
        # Slower tasks are reported; all of them are if there is a trace.
        floor = slow.floor if self._record.trace is None else -1
        answered = False
        # Totals of the tasks of one call, which usually are all tasks.
        pace: Pace | None = None
        count = total = nbytes = 0
        try:
            for number, nanoseconds, start, end in answers_in(content, position):
                # A missing task was already found in the result batch of a dead worker.
                task = sent.get(number)
                if task is None:
                    continue
                answered = True
                if nanoseconds > floor:
                    self._take_answer(number, nanoseconds, end - start, Outcome(stream=content[start:end]))
                    continue
                tasks.answer(number, PlainOutcome(content[start:end]))
                if pace is not task.sink.pace:
                    if pace is not None:
                        pace.note(total // count, nbytes // count, count)
                    pace = task.sink.pace
                    count = total = nbytes = 0
                count += 1
                total += nanoseconds
                nbytes += end - start + task.copied
        except struct.error:
            self._deaths.note_garbage()
        if pace is not None:
            pace.note(total // count, nbytes // count, count)
        if answered:  # not for the empty batch of a worker that died without an answer: consecutive deaths are counted
            self._deaths.note_answer()

    def _take_answer(self, number: int, nanoseconds: int, nbytes: int, outcome: Outcome) -> None:
        answer: Answer = outcome
        task = self._tasks.sent.get(number)
        if task is not None and (trace := self._record.trace) is not None:
            answer = Traced(outcome, trace, task)
        if task is None or self._tasks.answer(number, answer) is None:
            return
        self._deaths.note_answer()
        task.sink.pace.note(nanoseconds, nbytes + task.copied)
        slow = self._record.slow
        if nanoseconds > slow.floor:
            slow.note(nanoseconds, brief(task))

    def _take_cancelled(self, number: int) -> None:
        """Handle the message that a worker skipped a task because of its mark."""
        self._marks.remove(number)
        task = self._tasks.sent.get(number)
        if task is None:
            return
        if task.is_cancelled:  # a chunk that was begun
            self._tasks.answer(number, CANCELLED)
        else:  # the mark came too late for `Dispatcher.cancel`, so the task must run
            self._tasks.send_again([number])

    def _outcome_of(self, received: Received, header: Header, number: int) -> Outcome:
        if received.message is not None:  # a signal handler runs while the read message is being handled
            return Outcome(message=received.message)
        if not received.fds:
            return Outcome(received=received)
        # Fds are scarce, so the memory is taken over now; unpickling can wait.
        task = self._tasks.sent.get(number)
        try:
            if task is not None and ledger.watches:
                with task.function.acting("result of"):
                    message = read_message(received, header, keep=True)
            else:
                message = read_message(received, header, keep=True)
        except Exception as error:
            if not isinstance(error, ForkshmError) and not _interrupts.is_of_kernel(error):
                raise  # raised by a signal handler: the message is read again
            return Outcome(error=error)
        outcome = Outcome(message=message)
        self._record.moved(*outcome.traffic())
        return outcome
