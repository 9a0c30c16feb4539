"""Submits, batches, sends and cancels tasks.

`_leader` decides which thread does this, `_tasks` knows where each task is, `_packing` pickles arguments, `_receiving`
handles what workers send, and `_deaths` handles dead workers.
"""

from __future__ import annotations

import contextlib
import operator
import os
import time
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.backend import IS_FREE_THREADED
from forkshm.channel import Kind, Spin, write_message
from forkshm.errors import ChannelBrokenError, ChannelClosedError, PoolClosedError, as_text
from forkshm.pickler import name_of
from forkshm.pool._deaths import Deaths
from forkshm.pool._leader import Leader
from forkshm.pool._marks import Marks
from forkshm.pool._packing import Packing
from forkshm.pool._receiving import Receiver
from forkshm.pool._results import Outcome
from forkshm.pool._status import IDLE, LAST_LOOK, MARKS, STARTING
from forkshm.pool._tasks import CANCELLED, Batch, Outstanding, Packer, PickledCallable, Task, ThreadedOutstanding
from forkshm.pool.observe import PoolRecord, PoolReport, PoolStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forkshm.pool._tasks import Answer
    from forkshm.pool._worker_group import WorkerGroup

__all__ = ("Dispatcher",)

# Messages in flight, beyond two for each worker. Enough to keep tiny tasks flowing, and few enough to stay below the
# kernel's queue of about 270 messages.
_WINDOW = 96
# If more tasks than this wait, the time of the first ones decides how many to send in one message.
_MANY = 64
# Tasks in flight: few enough that each has a place of its own for its mark.
_WINDOW_TASKS = MARKS // 4
# Bytes of copies in flight, beyond two tasks for each worker.
_WINDOW_BYTES = 64 * 2**20
# More messages than the queue holds. After so many the leader does other work, even if workers keep sending.
_MOST_AT_ONCE = 4096
# The leader wakes up this often in any case.
_LONGEST_SLEEP_SECONDS = 1.0
# The leader wakes up this often while a worker sleeps although there is a task, and wakes the workers again. This
# happens if a worker was stopped (SIGSTOP) right after it had been woken.
_LOOK_AGAIN_SECONDS = 0.1
_AUDIT_SECONDS = 0.001
_IS_CANCELLED = operator.attrgetter("is_cancelled")


class Dispatcher(Leader):
    """The parent's half of a pool.

    Fork and threads:
        Any thread may submit and drive, and so may signal handlers and finalizers. It cannot be used in a forked child.
    """

    def __init__(self, worker_group: WorkerGroup, *, task_timeout: float | None = None, retries: int = 0) -> None:
        super().__init__(self)
        self._worker_group = worker_group
        # Pickles the functions of tasks.
        self.packer = Packer(worker_group.importable)
        # The names of ``__main__`` that the workers have, which are therefore sent by name.
        self.importable = worker_group.importable
        self.retries = retries
        self.record = PoolRecord()
        self.packing = Packing(worker_group.importable, self.record, may_repeat=retries > 0)
        self._tasks = (ThreadedOutstanding if IS_FREE_THREADED else Outstanding)(worker_group.sent)
        self._marks = Marks(worker_group.status)
        self._deaths = Deaths(worker_group, self._tasks, task_timeout, self._break)
        self._receiver = Receiver(worker_group, self._tasks, self._deaths, self._marks, self.record, self._break)
        # Keeps other threads out while a message is numbered and sent, or a task cancelled. It does not make several
        # changes atomic.
        self._lock = _interrupts.RLock()
        self._spin = Spin()
        # The reason why the pool takes no more tasks: a failure, or that it was terminated.
        self._failure: BaseException | None = None
        self._accepting = True
        # Threads that still read the input of an `imap` that was called before the pool was closed.
        self._readers: dict[int, bool] = {}

    # -- submitting -------------------------------------------------------------------

    def submit(self, tasks: Sequence[Task], *, waited_for: bool, reader: int = 0) -> None:
        """Send tasks now or as soon as there is room.

        Args:
            tasks: The tasks, which are begun in this order.
            waited_for: Whether the caller will drive until they are answered.
            reader: The key passed to `begin_reading`, for input of a call made before the pool was closed.

        Raises:
            PoolClosedError: The pool takes no more tasks.
            Exception: Whatever pickling the arguments of the first task raised.
        """
        self.check_accepting(reader)
        first = tasks[0]
        if not self._tasks.has_unsent() and self._has_room() and not (first.batched and first.sink.pace.batch > 1):
            # Done before any change, so that a pickling error is raised by the call.
            self.packing.pack(first)
            if len(tasks) == 1 and not self._tasks.has_unsent() and not self._deaths.audit:
                # A fast path of the code below, for most calls.
                self.check_accepting(reader)
                batch = Batch(0)
                batch.append(first)
                if self._send_off(batch):
                    if not waited_for and self._deaths.deadlines is not None:
                        self.start_helper()
                    return
                tasks = ()
        self.check_accepting(reader)
        self._tasks.waiting.extend(tasks)
        if self._failure is not None:  # set by another thread in between
            self._fail_waiting()
        if reader and len(self._tasks.waiting) < first.sink.pace.batch and self._is_busy():
            # Input that may block comes one by one. The tasks are sent together once an answer arrives or there are
            # enough.
            with contextlib.suppress(RuntimeError):  # no thread can be started: they are sent when a thread waits
                self.start_helper(now=False)
            return
        self.feed()
        if not waited_for and (self.has_unsent() or self._deaths.deadlines is not None):
            self.start_helper()

    def is_named(self, function: Callable[..., Any]) -> bool:
        """Return whether a function is sent by name. If it is, a name of ``__main__`` may still be rebound later."""
        return self.packer.by_name(function) is not None

    def named_function(self, function: Callable[..., Any]) -> PickledCallable | None:
        """Return the function that tasks can share while `is_named` is true, or None if it is sent by value."""
        return PickledCallable(self.packer, function, for_many=False) if self.is_named(function) else None

    def check_accepting(self, reader: int = 0) -> None:
        """Raise an error unless tasks can be submitted."""
        if self._worker_group.owner != os.getpid():
            raise PoolClosedError(
                f"cannot use this pool in process {os.getpid()}: it belongs to the parent process "
                f"{self._worker_group.owner}. Create a pool in this process."
            )
        if not self._accepting and (reader not in self._readers or self._failure is not None):
            self.wait_out_program()
            raise PoolClosedError("cannot submit a task: the pool was closed or terminated. Create a new pool.")
        if self._failure is not None:
            # The same exception is raised each time, without the frames of earlier callers.
            raise self._failure.with_traceback(None)

    def begin_reading(self, key: int) -> None:
        """Allow a thread to submit the input it reads under *key* until `end_reading`, also to a closed pool."""
        self._readers[key] = True

    def end_reading(self, key: int) -> None:
        """End the reading that was allowed under a key."""
        self._readers.pop(key, None)
        if not self._accepting:
            self._close_queue_if_idle()
        self.nudge()

    def is_idle(self) -> bool:
        """Return whether all submitted tasks are answered."""
        return self._tasks.is_empty() and not self._readers

    def has_kept_tasks(self) -> bool:
        """Return whether an unanswered result keeps the pool alive: an asynchronous call, or an iterator."""
        tasks = self._tasks
        open_tasks = [*list(tasks.sent.values()), *list(tasks.again.values()), *tasks.waiting.copy()]
        # Tasks whose delivery was interrupted.
        open_tasks += [task for task, _ in list(tasks.answered.values())]
        return bool(self._readers) or any(task.sink.keeps is not None for task in open_tasks)

    def knows(self, task: Task) -> bool:
        """Return whether a task was submitted but not delivered to its sink yet."""
        return self._tasks.knows(task)

    def has_unsent(self) -> bool:
        """Return whether submitted tasks wait because there was no room yet."""
        return self._tasks.has_unsent()

    def stop_accepting(self) -> None:
        """Take no more tasks; let the workers end when all tasks are answered."""
        self._accepting = False
        self._close_queue_if_idle()

    def _close_queue_if_idle(self) -> None:
        if self.is_idle():
            self._worker_group.close_queue()

    def _sent_off(self, batch: Batch) -> None:
        """Forget a batch that was sent. All of it may have been answered by now, and the pool closed."""
        self._tasks.sent_off(batch)
        if not self._accepting:
            self._close_queue_if_idle()

    def _is_busy(self) -> bool:
        """Return whether each worker has a task, and another one is in flight for it."""
        return len(self._tasks.messages) >= 2 * self._worker_group.size

    def _has_room(self) -> bool:
        on_their_way = len(self._tasks.messages)
        if not self._is_busy():
            return True
        if len(self._tasks.waiting) > _MANY:
            with contextlib.suppress(IndexError):  # another thread took the tasks
                first = self._tasks.waiting[0]
                if first.batched and first.sink.pace.is_growing:
                    # Wait: each answer lets more of the tasks share a message.
                    return False
        if on_their_way >= _WINDOW or len(self._tasks.sent) >= _WINDOW_TASKS:
            return False
        return self._tasks.sent_bytes < _WINDOW_BYTES

    # -- sending ----------------------------------------------------------------------

    def feed(self) -> None:
        """Send waiting tasks while there is room. Arguments are pickled here, with no lock held."""
        tasks = self._tasks
        if not tasks.has_unsent() and not tasks.batches:
            return
        if tasks.batches:
            self._recover()
        if tasks.waiting and tasks.is_first_cancelled():
            tasks.drop_cancelled()
            if not self._accepting:
                self._close_queue_if_idle()
        # Send nothing during an audit, because the queue must become empty.
        while not self._deaths.audit and tasks.has_unsent() and self._has_room():
            if not self._send_off(Batch(0)):
                break
        if tasks.answered:
            self._deliver()

    def _send_off(self, batch: Batch) -> bool:
        """Send a batch, or the next waiting tasks if it is empty; return whether there may be room for another."""
        try:
            self._tasks.register(batch)
            if not batch:
                if not self._tasks.take(batch):
                    self._sent_off(batch)
                    return False
                self._extend(batch)
            return self._send(batch)
        except BaseException as error:
            # Handled by `_recover`. Set before any call, because a signal handler may raise once more.
            batch.is_abandoned = True
            if not isinstance(error, Exception) or not batch or batch.sent or self.packing.is_interrupt(batch, error):
                raise
            with self._lock:
                if batch:  # otherwise another thread has recovered it
                    self._fail_batch(batch, error)
            self._deliver()
            self.nudge()
            return True

    def _extend(self, batch: Batch) -> None:
        """Move tasks like the first of a batch into the same message."""
        first = batch[0]
        if first.payload is None and first.batched:
            limit = first.sink.pace.batch
            if not first.sink.comes_in_batches:
                # Divide the last tasks among the workers, but do not send tiny tasks one by one.
                share = len(self._tasks.waiting) // (4 * self._worker_group.size)
                limit = min(limit, max(share, limit // 16))
            self._tasks.take_more(batch, limit)

    def _send(self, batch: Batch) -> bool:
        """Send tasks in one message, or put them back and return False."""
        tasks, first = self._tasks, batch[0]
        function = first.function
        if len(batch) == 1:
            self.packing.pack(first)
            kind = first.kind
        else:
            kind = Kind.BATCH
            self.packing.pack_batch(batch)
        payload, code = first.payload, function.payload()
        if payload is None:
            raise RuntimeError("a task without its payload: please report this")
        is_kept = first.retries > 0  # read before sending: after it, the worker may die of the task
        record = self.record
        began = time.perf_counter_ns() if record.trace is not None else 0
        is_unwanted = False
        with self._lock:
            is_unwanted = first.is_cancelled if len(batch) == 1 else True in map(_IS_CANCELLED, batch)
            if self._failure is None and not self._deaths.audit and not is_unwanted:
                number = tasks.enter(batch)  # before an answer can arrive
                data, fds = write_message(kind, number, code, payload, group=function.group)
                if self._worker_group.tasks.send(data, fds, wait=False, sent=batch.sent):
                    record.messages += 1
                    if kind is Kind.BATCH:
                        record.moved(payload.copied, payload.shared)
        if not batch.sent:
            if kind is Kind.BATCH:
                first.close()
            failure = self._failure
            tasks.give_back(batch)
            if failure is not None:
                self._fail_waiting()
            return is_unwanted
        self._wake_workers()  # first, so that a sleeping worker begins meanwhile
        count = len(batch)
        self._sent_off(batch)
        if not is_kept:
            first.close()
        if (trace := record.trace) is not None:
            trace.note("sending", began, {"function": name_of(function.function), "task": number, "tasks": count})
        self.notify()  # an answer can arrive now, so a follower may lead
        return True

    def _fail_batch(self, batch: Batch, error: Exception) -> None:
        """Answer a batch that cannot be sent with the error. A batch of several tasks is sent one by one instead."""
        tasks = self._tasks
        tasks.leave(batch)
        if len(batch) > 1:  # only one of them may be at fault
            for task in batch:
                task.batched = False
            batch[0].close()
            tasks.give_back(batch)
            return
        tasks.answer_unsent(batch, Outcome(error=as_text(error)))
        self._sent_off(batch)

    def _recover(self) -> None:
        """Recover the batches of interrupted threads."""
        tasks = self._tasks
        for batch in list(tasks.batches.values()):
            if batch.is_abandoned:
                if batch.sent:
                    self._sent_off(batch)
                    self._wake_workers()
                else:
                    with self._lock:
                        if len(batch) > 1:
                            batch[0].close()
                        tasks.give_back(batch)

    def _wake_workers(self) -> bool:
        """Wake sleeping workers for messages that no other worker will take; return whether there were any."""
        states = self._worker_group.status.states()
        asleep = states.count(IDLE) + states.count(LAST_LOOK)
        if not asleep:
            return False
        # Unanswered messages, without those that a worker runs or a spinning worker is about to take. The number may be
        # too large, because an answer may have arrived without being received.
        left = len(self._tasks.messages) - (len(states) - asleep - states.count(STARTING))
        if left > 0:
            self._worker_group.wake_workers(min(left, asleep))
        return left > 0

    # -- what the leader does ---------------------------------------------------------

    def may_come(self) -> bool:
        """Return whether anything can arrive through the channel.

        If not, waiting there is useless: another thread pickles tasks that it will send and wait for itself, or runs a
        callback.
        """
        return bool(self._tasks.sent or self._tasks.waiting or self._tasks.again or self._tasks.answered)

    def wake(self) -> None:
        """Make `step` return, in the thread that waits in it."""
        self._worker_group.wake()

    def step(self, deadline: float | None) -> bool:
        """Handle what arrives, and wait for it; return False at the deadline. Needs the lead."""
        try:
            deaths = self._deaths
            results = self._worker_group.results
            looks = results.looker()
            got = (looks(0) or results.inbox or self._tasks.answered) and self.take_answers()
            deaths.look()
            if got:
                return True
            began = now = time.perf_counter()
            # Before the first answer workers are starting, and need the cores more.
            spin_until = now + self._spin.begin(may_look=self.record.tasks > 0)
            if deadline is not None:
                spin_until = min(spin_until, deadline)
            while True:
                if now >= spin_until:
                    break
                if (looks(0) or results.inbox or self._tasks.answered) and self.take_answers():
                    self._spin.end(now - began)
                    return True
                now = time.perf_counter()
            pause = (
                _LONGEST_SLEEP_SECONDS if deadline is None else min(_LONGEST_SLEEP_SECONDS, max(0.0, deadline - now))
            )
            if self._wake_workers():
                pause = min(pause, _LOOK_AGAIN_SECONDS)
            if deaths.deadlines is not None:
                pause = min(pause, deaths.deadlines.pause)
            if deaths.audit:
                pause = min(pause, _AUDIT_SECONDS)
            ended = self._worker_group.wait(pause)
            if self.take_answers():
                self._spin.end(time.perf_counter() - began)
            for worker in ended:
                deaths.reap(worker, self.take_answers, self._receiver.take_result_batch, self.record.trace)
            if deaths.has_vacancies():
                self._replace()
            if deaths.audit:
                deaths.resolve_audit(self.take_answers)
            self._deliver()
            return deadline is None or time.perf_counter() < deadline or self.take_answers()
        except ChannelClosedError as error:
            self._break_if_lost(error)
            return True

    def _break_if_lost(self, error: ChannelClosedError) -> None:
        """Fail all tasks if other code in this process has closed the channels; otherwise raise *error*."""
        if not self._worker_group.is_lost():
            raise error
        self._break(error)

    def take_answers(self) -> bool:
        """Take all answers that have arrived; return whether there were any. Needs the lead."""
        results = self._worker_group.results
        got = False
        if self._tasks.answered:
            self._deliver()
            got = True
        for _ in range(_MOST_AT_ONCE):
            try:
                received = results.first()
            except BlockingIOError as error:
                if not _interrupts.is_of_kernel(error):  # raised by a signal handler
                    raise
                break
            except ChannelBrokenError:
                self._deaths.note_garbage()
                got = True
                continue
            except ChannelClosedError as error:
                self._break_if_lost(error)
                return True
            if received is None:
                break
            # All of this can be repeated: a message is dropped only after it was handled.
            self._receiver.take_in(received)
            results.drop(received)
            self._deliver()
            got = True
            if not self._tasks.sent:
                break  # no more answers can have arrived
        return got

    def _deliver(self) -> None:
        """Deliver the answers to their sinks."""
        count = len(self._tasks.answered)
        if self._tasks.deliver():
            self.record.answered(count)
            if not self._accepting:
                self._close_queue_if_idle()
            self.notify()

    # -- deaths -----------------------------------------------------------------------

    def replace_ended(self) -> None:
        """Reap and replace the workers that have ended by now. Needs the lead."""
        for worker in self._worker_group.wait(0):
            self._deaths.reap(worker, self.take_answers, self._receiver.take_result_batch, self.record.trace)
        self._replace()
        self._deliver()

    def _replace(self) -> None:
        if self._failure is None and (self._accepting or not self.is_idle()):
            self._deaths.replace(self.record.trace)

    def _break(self, error: BaseException) -> None:
        """Fail all tasks with *error*, now and later."""
        if self._failure is not None or (not self._accepting and self.is_idle()):
            return
        self._failure = error
        self._fail_rest()

    def end_with_program(self) -> None:
        """Take no more tasks, and let daemon threads that wait for results wait until the program has ended."""
        self._program_ends = True
        self._accepting = False

    def fail_all(self, error: BaseException) -> None:
        """Answer all open tasks with *error*, and take no more. Can be repeated."""
        self._accepting = False
        self._failure = error
        self._fail_rest()

    def _fail_rest(self) -> None:
        tasks, error = self._tasks, self._failure
        self._worker_group.given_up.update(tasks.sent)
        with self._lock:
            for number in list(tasks.sent):
                tasks.answer(number, Outcome(error=error))
        self._fail_waiting()

    def _fail_waiting(self) -> None:
        tasks, error = self._tasks, self._failure
        while tasks.has_unsent():
            batch = tasks.new_batch()
            try:
                if tasks.take(batch):
                    tasks.answer_unsent(batch, Outcome(error=error))
                self._sent_off(batch)
            except BaseException:
                batch.is_abandoned = True
                raise
        self._deliver()
        self.nudge()

    # -- cancelling -------------------------------------------------------------------

    def cancel(self, tasks: Sequence[Task], *, running: bool = False) -> list[Task]:
        """Cancel the tasks that no worker has begun, including those in the kernel's queue.

        A chunk that a worker runs ends after the current item.

        Args:
            tasks: Tasks of this pool. Answered tasks are skipped.
            running: Also end the workers that run one of the tasks.

        Returns:
            The cancelled tasks. Their sinks get a `concurrent.futures.CancelledError`. With *running*, the running
            tasks are included.
        """
        cancelled = []
        for task in tasks:
            with self._lock:
                is_sent = self._tasks.sent.get(task.number) is task
                if not is_sent:
                    task.is_cancelled = True
                    cancelled.append(task)
                elif self._marks.skip(task):
                    task.is_cancelled = True
                    self._tasks.answer(task.number, CANCELLED)
                    cancelled.append(task)
                elif running:
                    task.is_cancelled = True
                    cancelled.append(task)
                else:
                    self._marks.end_after_item(task)
        if running:
            self.end_cancelled()
        if cancelled:
            self.feed()  # answers the waiting ones
            self._deliver()
            self.nudge()
        return cancelled

    def cancel_all(self) -> None:
        """Cancel every task that no worker has begun."""
        tasks = self._tasks
        self.cancel([*list(tasks.sent.values()), *list(tasks.again.values()), *tasks.waiting.copy()])

    def is_timed(self) -> bool:
        """Return whether tasks have a time limit, so that a thread has to check them."""
        return self._deaths.deadlines is not None

    def end_cancelled(self) -> None:
        """End the workers that run a cancelled task. Repeat the call until there is none."""
        sent = self._tasks.sent
        self._deaths.end_running(lambda number: (task := sent.get(number)) is not None and task.is_cancelled)

    def is_running(self, task: Task) -> bool:
        """Return whether a worker runs a task."""
        number = task.number
        return self._tasks.sent.get(number) is task and number in self._worker_group.status.states()

    def needs_a_look(self) -> bool:
        """Return whether an audit is pending, so that `step` has to be called again soon."""
        return self._deaths.audit

    # -- statistics -------------------------------------------------------------------

    def statistics(self) -> PoolStatistics:
        """Return the counters."""
        return self.record.statistics(self._worker_group.started - self._worker_group.size)

    def open(self, answer: Answer) -> tuple[bool, Any]:
        """Unpickle an answer."""
        began = time.perf_counter_ns()
        try:
            return answer.open()
        finally:
            self.record.unpacked(time.perf_counter_ns() - began)

    def note_unpacking(self, nanoseconds: int) -> None:
        """Count the time that unpickling answers took, for `report`."""
        self.record.unpacked(nanoseconds)

    def failure(self) -> BaseException | None:
        """Return the exception because of which the pool cannot go on, or None."""
        return self._failure

    def report(self) -> PoolReport:
        """Return how the pool and its workers spent their time."""
        worker_group = self._worker_group
        seconds = time.perf_counter() - worker_group.made_at
        replaced = worker_group.started - worker_group.size
        return self.record.report(seconds, worker_group.reports(), replaced)
