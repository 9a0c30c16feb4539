"""Sends tasks, takes results, notices deaths: by whichever thread is waiting.

There is no thread of the pool's own. A thread that waits for a result *leads*: it sends
what is queued, receives what has come, for everybody, and buries the dead. Others that
wait follow: they sleep until their result is there or the lead is free. Only what nobody
waits for needs a helper thread, which lives while there is such work: callbacks, and
asynchronous calls that do not fit the kernel's queue at once.

Which task did a dead worker hold? Its slot says (see `_status`), but for one gap: a
worker that died while claiming may have taken a message and not named it. Then, once the
queue is empty and no worker is claiming, a task that was sent, and is in no slot, and not
answered, was that one. It was never begun, so it is sent again.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import os
import struct
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from forkshm import _system
from forkshm._ledger import Sending, call_site, ledger, on_behalf_of
from forkshm.backend import kernel
from forkshm.channel import HEADER_SIZE, Kind, read_header, read_message, write_message
from forkshm.channel._spin import Spin
from forkshm.errors import ChannelBrokenError, PoolClosedError, TaskTimeoutError, WorkerDiedError, WorkerStartError
from forkshm.pickler import Parcel, Repeats, explain, mark, pack, pack_by_name
from forkshm.pool._describe import brief, describe_task, index_of, name_of, names_of_arguments
from forkshm.pool._oom import OomKills
from forkshm.pool._report import PoolReport, SlowTasks, hints_of
from forkshm.pool._results import Outcome
from forkshm.pool._statistics import PoolStatistics
from forkshm.pool._status import CLAIMING, FIRST_TASK, IDLE, LAST_LOOK, STARTING, answers_in
from forkshm.pool._trace import Traced
from forkshm.pool._watch import Watch
from forkshm.region._segment import forget_abandoned

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forkshm.channel import Received
    from forkshm.pool._crew import Crew, Worker
    from forkshm.pool._results import Job
    from forkshm.pool._trace import Trace

__all__ = ("Dispatcher", "Function", "Task")

#: Tasks on their way at a time, beyond two for each worker: enough to keep tiny tasks
#: flowing, few enough to stay below the kernel's queue of about 270 messages.
_WINDOW = 96
#: Copies on their way at a time, in bytes, beyond two tasks for each worker.
_WINDOW_BYTES = 64 * 2**20
#: More messages than the queue has at a time: whoever leads looks up then, if a worker never stops sending.
_MOST_AT_ONCE = kernel.MOST_MESSAGES
#: Whoever leads looks up this often whatever happens.
_LONGEST_SLEEP_SECONDS = 1.0
#: And this often while somebody sleeps although a task lies there, as with a worker that
#: was stopped (SIGSTOP) right after it had been woken for it: then it rings again.
_LOOK_AGAIN_SECONDS = 0.1
_AUDIT_SECONDS = 0.001
#: After so long the helper looks whether those who drove in its place still do, and then less and less often.
_STAND_BY_SECONDS = 0.001
_LONGEST_STAND_BY_SECONDS = 0.016
#: Workers that may die in a row before they are through their initializer.
_FAILED_STARTS = 3
#: And that may die in a row, at most so many seconds apart, with no task done or failed.
_DEATHS_FOR_NOTHING = 10
_APART_SECONDS = 10.0


_NOBODY: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


class Function:
    """What the tasks of one call run: pickled once, sent with each."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        function: Callable[..., Any],
        *,
        for_many: bool,
        repeated: frozenset[int] = frozenset(),
    ) -> None:
        self._dispatcher = dispatcher
        self.function = function
        #: Not 0 when several tasks share the parcel.
        self.group = dispatcher.new_group() if for_many else 0
        #: Tasks that are not answered yet.
        self.users = 0
        self._parcel: Parcel | None = None
        self._cached = False
        # The ids of arguments that several tasks have in common, and the copies of those.
        self._repeated = repeated
        self.repeats = Repeats() if repeated else None
        self._called_at = call_site() if ledger.watches else "a call made before the block"

    def arguments_of(self, task: Task) -> Any:
        """Return the arguments to be pickled for a task."""
        if not self._repeated:
            return task.arguments
        return mark(task.arguments, self._repeated, starred=task.kind is Kind.STARMAP)

    def acting(self, what: str) -> contextlib.AbstractContextManager[object]:
        """What is packed and received in this context was *what* the function, if somebody watches."""
        if not ledger.watches:
            return _NOBODY
        return on_behalf_of(Sending(f"{what} {name_of(self.function)}()", self._called_at))

    def parcel(self) -> Parcel:
        """Return the parcel; made on first use."""
        if self._parcel is None:
            try:
                self._parcel, self._cached = self._dispatcher.pack_function(self.function, for_many=self.group != 0)
            except Exception as error:
                explain(error, {"func": self.function}, self._dispatcher.known)
                raise
        return self._parcel

    def done(self) -> None:
        """One task less; with the last, let go of the memory held for sending."""
        self.users -= 1
        if self.users:
            return
        if self.repeats is not None:
            self.repeats.close()
        # One that is kept by the dispatcher stays: other threads may be about to send it.
        if self._parcel is not None and not self._cached:
            self._parcel.close()
            self._parcel = None


@dataclasses.dataclass(eq=False)
class Task:
    """One message to be answered by one message."""

    kind: Kind
    function: Function
    #: (args, kwargs) of a call, or the items of a chunk.
    arguments: Any
    job: Job
    #: Which part of the job it answers.
    position: int
    #: Whether it may go in one message with others.
    batched: bool = False
    parcel: Parcel | None = None
    #: How often it is done again when its worker dies. Its parcel is kept for that.
    retries: int = 0
    #: Workers that have died of it.
    deaths: int = 0
    #: Bytes copied for its message.
    copied: int = 0
    #: Once sent: the numbers of the first and the last task of its message.
    message: int = 0
    last: int = 0

    def close(self) -> None:
        """Let go of what is held for sending it."""
        if self.parcel is not None:
            self.parcel.close()
            self.parcel = None
        self.function.done()


class _Death(NamedTuple):
    worker: Worker
    exitcode: int | None
    #: It was ended because its task took too long.
    was_overdue: bool


class Dispatcher:
    """The parent's half of a pool.

    Fork and threads:
        Any thread may submit and drive. Of no use in a forked child.
    """

    def __init__(self, crew: Crew, *, task_timeout: float | None = None, retries: int = 0) -> None:
        self._crew = crew
        #: Gives what keeps the workers from being ended; held while something here runs.
        self.keeper: Callable[[], object] = bool
        #: What of ``__main__`` the workers have, and so crosses by name.
        self.known = crew.known
        self._watch = Watch(task_timeout) if task_timeout is not None else None
        self.retries = retries
        self._oom_kills = OomKills()
        self._next_number = FIRST_TASK
        self._groups = itertools.count(1)
        # Parcels of functions that cross by name never change, so they are made once.
        # None stands for one that crosses by value.
        self._by_name: weakref.WeakKeyDictionary[Any, Parcel | None] = weakref.WeakKeyDictionary()
        # The state. Reentrant because failing a task may start the helper; none of the
        # user's code ever runs under it.
        self._lock = threading.RLock()
        # Who receives. Reentrant: arguments are pickled under it, and an object's
        # __reduce__ may use the pool.
        self._lead = threading.RLock()
        self._changed = threading.Condition(threading.Lock())
        self._followers = 0
        self._backlog: collections.deque[Task] = collections.deque()
        # Tasks taken from the backlog that are being pickled.
        self._in_hand = 0
        self._sent: dict[int, Task] = crew.sent
        self._sent_bytes = 0
        # Messages by the number of their first task, and how many of theirs are unanswered.
        self._open: dict[int, int] = {}
        self._spin = Spin()
        self._audit = False
        # Whether what came through the results channel was no message of ours.
        self._is_garbled = False
        # Deaths since the last answer: before and after the initializer, and when.
        self._failed_starts = 0
        self._deaths_for_nothing = 0
        self._died_at = 0.0
        self._callbacks: collections.deque[Callable[[], None]] = collections.deque()
        self._helper: threading.Thread | None = None
        # There is something to be done for it.
        self._called = threading.Event()
        self._is_called_now = False
        # How often somebody has moved things on.
        self._steps = 0
        # Why the pool takes no more tasks: it broke, or was terminated.
        self._failure: BaseException | None = None
        self._accepting = True
        #: Set while somebody traces.
        self.trace: Trace | None = None
        self._tasks_answered = 0
        self._messages = 0
        self._bytes_copied = 0
        self._bytes_shared = 0
        # See `report`.
        self._packing_ns = 0
        self._unpacking_ns = 0
        self._slow = SlowTasks()

    # -- submitting -------------------------------------------------------------------

    def new_group(self) -> int:
        """Return a number for tasks that share a function parcel."""
        return next(self._groups)

    def submit(self, tasks: Sequence[Task], *, waited_for: bool) -> None:
        """Send tasks now or as soon as there is room.

        Args:
            tasks: What to do, in this order as far as it is begun.
            waited_for: The caller is going to drive until they are answered.

        Raises:
            PoolClosedError: The pool takes no more tasks.
            Exception: What pickling the arguments of the first raised.
        """
        self.check_accepting()
        for task in tasks:
            task.function.users += 1
        try:
            if not self._backlog and self._has_room() and not (tasks[0].batched and tasks[0].job.pace.batch > 1):
                # Before anything is changed, so that what cannot be pickled is told at once.
                self._pack(tasks[0])
            with self._lock:
                self.check_accepting()
                self._backlog.extend(tasks)
        except BaseException:
            for task in tasks:
                task.close()
            raise
        self._feed()
        if not waited_for and (self._backlog or self._watch is not None):
            self.start_helper()

    def named_function(self, function: Callable[..., Any]) -> Function | None:
        """Return what tasks of a function can have in common now and later; None for one that crosses by value."""
        return None if self._parcel_by_name(function) is None else Function(self, function, for_many=False)

    def pack_function(self, function: Callable[..., Any], *, for_many: bool) -> tuple[Parcel, bool]:
        """Return the parcel of a function, and whether it is kept here for the next time."""
        parcel = self._parcel_by_name(function)
        if parcel is not None:
            return parcel, True
        return pack(function, for_many=for_many, known=self.known), False

    def _parcel_by_name(self, function: Callable[..., Any]) -> Parcel | None:
        try:
            if function not in self._by_name:
                self._by_name[function] = pack_by_name(function, self.known)
            return self._by_name[function]
        except TypeError:  # not hashable, or without weak references
            return None

    def check_accepting(self) -> None:
        """Raise unless tasks can be submitted."""
        if self._crew.owner != os.getpid():
            raise PoolClosedError(
                f"this pool belongs to process {self._crew.owner}, and this is its child {os.getpid()}: "
                "make a pool in this process"
            )
        if not self._accepting:
            raise PoolClosedError("cannot submit a task: the pool was closed or terminated")
        if self._failure is not None:
            # The same one each time: without the frames of those who got it before.
            raise self._failure.with_traceback(None)

    def is_idle(self) -> bool:
        """Whether everything that was submitted has been answered."""
        return not self._sent and not self._backlog and not self._in_hand

    def has_kept_tasks(self) -> bool:
        """Whether a result keeps the pool that was not answered yet: that of an asynchronous call, or an iterator."""
        return any(task.job.keeps is not None for task in [*self._sent.values(), *self._backlog])

    def has_unsent(self) -> bool:
        """Whether something was submitted for which there was no room yet."""
        return bool(self._backlog)

    def stop_accepting(self) -> None:
        """Take no more tasks; let the workers go once all is answered."""
        with self._lock:
            self._accepting = False
            if self.is_idle():
                self._crew.dismiss()

    def _has_room(self) -> bool:
        on_their_way = len(self._sent)
        if on_their_way < 2 * self._crew.size:
            return True
        return on_their_way < _WINDOW and self._sent_bytes < _WINDOW_BYTES

    def _pack(self, task: Task) -> None:
        if task.parcel is None:
            began = time.perf_counter_ns()
            if ledger.watches:
                with task.function.acting("sent to"):
                    parcel, function = self._parcels(task)
            else:
                parcel, function = self._parcels(task)
            task.copied = parcel.copied
            took = time.perf_counter_ns() - began
            if (trace := self.trace) is not None:
                trace.note("pickling", began, {"function": name_of(task.function.function)})
            with self._lock:
                self._packing_ns += took
                first = task.position == 0
                self._bytes_copied += parcel.copied + (function.copied if first else 0)
                self._bytes_shared += parcel.shared + (function.shared if first else 0)

    def _parcels(self, task: Task) -> tuple[Parcel, Parcel]:
        function = task.function
        # What may be sent again is mapped copy-on-write: nobody sees what a worker wrote before it died.
        again = self.retries > 0
        try:
            task.parcel = pack(function.arguments_of(task), for_many=again, known=self.known, repeats=function.repeats)
        except Exception as error:
            explain(error, names_of_arguments(task), self.known)
            raise
        return task.parcel, function.parcel()

    def _feed(self) -> None:
        """Send from the backlog while there is room."""
        while True:
            with self._lock:
                # During an audit the queue has to run empty.
                if self._audit or not self._backlog or not self._has_room():
                    return
                tasks = self._take_batch()
                self._in_hand += len(tasks)
            try:
                sent = self._send(tasks)
            except Exception as error:
                if len(tasks) == 1:
                    self._fail_in_hand(tasks, error)
                else:  # one of them is to blame: they go one by one
                    for task in tasks:
                        task.batched = False
                    self._put_back(tasks)
                sent = True
            except BaseException:  # Ctrl-C: it is the caller's, the tasks may be others'
                self._put_back(tasks)
                raise
            if not sent:
                return

    def _put_back(self, tasks: Sequence[Task]) -> None:
        with self._lock:
            failure = self._failure
            if failure is None:
                self._in_hand -= len(tasks)
                self._backlog.extendleft(reversed(tasks))
                return
        self._fail_in_hand(tasks, failure)

    def _fail_in_hand(self, tasks: Sequence[Task], error: BaseException) -> None:
        with self._lock:
            self._in_hand -= len(tasks)
        for task in tasks:
            self._finish(task, Outcome(error=error))
        self._crew.wake()  # who leads may be waiting for these

    def _take_batch(self) -> list[Task]:
        """Take a task off the backlog, with those like it that may go in one message."""
        backlog = self._backlog
        first = backlog.popleft()
        tasks = [first]
        if first.parcel is None and first.batched:
            limit = min(first.job.pace.batch, len(backlog) // (4 * self._crew.size))
            while len(tasks) < limit and backlog[0].function is first.function and backlog[0].batched:
                tasks.append(backlog.popleft())
        return tasks

    def _send(self, tasks: list[Task]) -> bool:
        """Send tasks in one message, or put them back and return False."""
        first = tasks[0]
        if len(tasks) == 1:
            self._pack(first)
            kind = first.kind
        else:
            kind = Kind.BATCH
            began = time.perf_counter_ns()
            with first.function.acting("sent to"):
                first.parcel = pack(
                    (int(first.kind), [task.function.arguments_of(task) for task in tasks]),
                    known=self.known,
                    repeats=first.function.repeats,
                )
            first.copied = first.parcel.copied
            took = time.perf_counter_ns() - began
            self._packing_ns += took
        parcel, function = first.parcel, first.function
        if parcel is None:
            raise RuntimeError("a task without its parcel: please report this")
        is_kept = first.retries > 0  # asked now: once it is sent, its worker may die of it
        began = time.perf_counter_ns() if self.trace is not None else 0
        with self._lock:
            sent = False
            # During an audit nothing may be sent: the queue has to run empty.
            if self._failure is None and not self._audit:
                number = self._next_number
                data, fds = write_message(kind, number, function.parcel(), parcel, group=function.group)
                self._enter(number, tasks)  # before an answer can come
                try:
                    sent = self._crew.tasks.send(data, fds, wait=False)
                finally:
                    if not sent:
                        for taken in range(number, self._next_number):
                            self._take_sent(taken)
            if sent:
                # In the same breath as they were entered: there is no moment at which
                # they were answered and still seem to be in hand.
                self._in_hand -= len(tasks)
                self._messages += 1
                if kind is Kind.BATCH:
                    self._bytes_copied += parcel.copied
                    self._bytes_shared += parcel.shared
        if (sent and not is_kept) or kind is Kind.BATCH:
            first.parcel = None
            parcel.close()
        if sent:
            if (trace := self.trace) is not None:
                what = {"function": name_of(function.function), "task": number, "tasks": len(tasks)}
                trace.note("sending", began, what)
            self._ring()
            self._notify()  # there is something to lead for
        else:
            self._put_back(tasks)
        return sent

    def _enter(self, number: int, tasks: Sequence[Task]) -> None:
        last = number + len(tasks) - 1
        for task in tasks:
            task.message, task.last = number, last
            self._sent[self._next_number] = task
            self._next_number += 1
        self._sent_bytes += tasks[0].copied
        self._open[number] = len(tasks)

    def _take_sent(self, number: int) -> Task | None:
        with self._lock:
            task = self._sent.pop(number, None)
            if task is not None:
                self._sent_bytes -= task.copied
                task.copied = 0
                self._open[task.message] -= 1
                if not self._open[task.message]:
                    del self._open[task.message]
            return task

    def _ring(self) -> bool:
        """Wake sleepers for messages that nobody else will get to; tell whether there were any."""
        states = self._crew.status.states()
        asleep = states.count(IDLE) + states.count(LAST_LOOK)
        if not asleep:
            return False
        # Unanswered, but for those that are being worked on, or will be taken by somebody
        # who is looking. Too many at worst: an answer may be there and not received.
        left = len(self._open) - (len(states) - asleep - states.count(STARTING))
        if left > 0:
            self._crew.ring(min(left, asleep))
        return left > 0

    # -- waiting ----------------------------------------------------------------------

    def drive(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Keep the pool going until *done* returns True, or *timeout* seconds.

        Returns:
            Whether *done* is True.
        """
        deadline = None if timeout is None else time.perf_counter() + timeout
        # The last answer may take away what keeps the workers, while this still receives from them.
        keeper = self.keeper()  # noqa: F841
        while not done():
            if self._may_lead() and self._lead.acquire(blocking=False):
                try:
                    while not done() and self._may_lead():
                        if not self._step(deadline):
                            return done()
                finally:
                    self._lead.release()
                    self._notify()
            else:
                with self._changed:
                    self._followers += 1
                    try:
                        # Looked at again under the condition, so that neither the result
                        # nor the lead can become free unnoticed.
                        if done() or (self._may_lead() and self._is_lead_free()):
                            continue
                        left = None if deadline is None else deadline - time.perf_counter()
                        if left is not None and left <= 0:
                            return False
                        self._changed.wait(left)
                    finally:
                        self._followers -= 1
        return True

    def _may_lead(self) -> bool:
        """Whether something is going to come through the channel, or can be sent.

        Else there is nothing to wait for there: another thread pickles what it will then
        send and wait for itself, or runs a callback.
        """
        return bool(self._sent or self._backlog)

    def _is_lead_free(self) -> bool:
        free = self._lead.acquire(blocking=False)
        if free:
            self._lead.release()
        return free

    def _notify(self) -> None:
        if self._followers:
            with self._changed:
                self._changed.notify_all()

    def look(self) -> bool:
        """Take the answers that are there, unless somebody else does; return whether there were any."""
        if not self._lead.acquire(blocking=False):
            return False
        keeper = self.keeper()  # noqa: F841 - see `drive`
        try:
            self._steps += 1
            return self._receive()
        finally:
            self._lead.release()
            self._notify()

    def _step(self, deadline: float | None) -> bool:
        """Move things on, waiting for them to move; False when the time is over. Needs the lead."""
        self._steps += 1
        if self._backlog:
            self._feed()
            if self._failure is not None:
                return True  # pickling an argument ended the pool: all is answered, and closed
        got = self._receive()
        if self._watch is not None:
            self._watch.look(self._crew)
        if got:
            return True
        began = now = time.perf_counter()
        # Before the first answer workers are coming up, and need the cores more.
        spin_until = now + self._spin.begin(may_look=self._tasks_answered > 0)
        if deadline is not None:
            spin_until = min(spin_until, deadline)
        while now < spin_until:
            if self._receive():
                self._spin.end(now - began)
                return True
            now = time.perf_counter()
        pause = _LONGEST_SLEEP_SECONDS if deadline is None else min(_LONGEST_SLEEP_SECONDS, max(0.0, deadline - now))
        if self._ring():
            pause = min(pause, _LOOK_AGAIN_SECONDS)
        if self._watch is not None:
            pause = min(pause, self._watch.pause)
        if self._audit:
            pause = min(pause, _AUDIT_SECONDS)
        ended = self._crew.wait(pause)
        if self._receive():
            self._spin.end(time.perf_counter() - began)
        for worker in ended:
            self._bury(worker)
        if self._audit:
            self._resolve_audit()
        return deadline is None or time.perf_counter() < deadline or self._receive()

    def _receive(self) -> bool:
        """Take every answer that was there; tell whether there may be more. Needs the lead."""
        got = False
        results = self._crew.results
        for _ in range(_MOST_AT_ONCE):
            received = None
            try:
                received = results.receive_nowait()
                if received is None:
                    return got
                kind, number, nanoseconds = read_header(received.data)
            except BlockingIOError:
                return got
            except ChannelBrokenError:
                self._pass_over_garbage(received)
                continue
            got = True
            began = time.perf_counter_ns() if self.trace is not None else 0
            self._messages += 1
            if kind is Kind.WAKE and not received.fds:
                continue
            if kind is Kind.ANSWERS and not received.fds:
                self._take_answers(received.data, HEADER_SIZE)
                if (trace := self.trace) is not None:
                    trace.note("receiving", began, {"bytes": len(received.data)})
                continue
            outcome = self._take_over(received, number)
            if kind is Kind.INITIALIZER_FAILED and self._crew.has_initializer:
                self._break(outcome.open()[1])
            elif kind in (Kind.RESULT, Kind.ERROR):
                self._failed_starts = self._deaths_for_nothing = 0
                task = self._take_sent(number)
                if task is None:  # nobody waits for it; but somebody may wait for what it came in place of
                    self._pass_over_garbage(None)
                else:
                    task.job.pace.note(nanoseconds, len(received.data))
                    if nanoseconds > self._slow.floor:
                        self._slow.note(nanoseconds, brief(task))
                    if (trace := self.trace) is not None:
                        trace.note("receiving", began, {"task": number, "bytes": len(received.data)})
                    self._finish(task, outcome)
            else:
                self._pass_over_garbage(None)
        return True

    def _take_answers(self, content: bytes, position: int) -> None:
        try:
            with self._lock:
                for number, nanoseconds, parcel in answers_in(content, position):
                    self._failed_starts = self._deaths_for_nothing = 0
                    task = self._take_sent(number)
                    if task is not None:  # or it was found in the outbox of a dead worker already
                        task.job.pace.note(nanoseconds, len(parcel))
                        if nanoseconds > self._slow.floor:
                            self._slow.note(nanoseconds, brief(task))
                        self._finish(task, Outcome(parcel=parcel), notify=False)
        except struct.error:
            self._pass_over_garbage(None)
        self._notify()

    def _pass_over_garbage(self, received: Received | None) -> None:
        """Go on without a message that is none of ours.

        The kernel does not say who wrote it. If it came in place of an answer, the audit
        finds the task that is neither waiting nor being worked on.
        """
        for fd in received.fds if received is not None else ():
            kernel.close(fd)
        self._is_garbled = self._audit = bool(self._sent)

    def _take_over(self, received: Received, number: int) -> Outcome:
        if not received.fds:
            return Outcome(received=received)
        # Fds are dear, so its memory is taken over now; unpickling can wait.
        task = self._sent.get(number)
        try:
            with task.function.acting("result of") if task is not None else _NOBODY:
                outcome = Outcome(message=read_message(received))
        except Exception as error:
            return Outcome(error=error)
        copied, shared = outcome.traffic()
        with self._lock:
            self._bytes_copied += copied
            self._bytes_shared += shared
        return outcome

    def _finish(self, task: Task, outcome: Outcome, *, notify: bool = True) -> None:
        self._tasks_answered += 1
        ledger.tasks += 1
        if (trace := self.trace) is not None:
            outcome = Traced(outcome, trace, task)
        task.close()
        task.job.deliver(task.position, outcome)
        if not self._accepting and self.is_idle():
            self._crew.dismiss()
        if notify:
            self._notify()

    # -- deaths -----------------------------------------------------------------------

    def _bury(self, worker: Worker) -> None:
        # All it sent before it died is in the queue by now, and counts.
        self._receive()
        state = self._crew.status.state(worker.slot)
        item = self._crew.status.item(worker.slot)
        # What it had answered and not sent.
        self._take_answers(self._crew.status.outbox(worker.slot).content(), 0)
        if (trace := self.trace) is not None:
            trace.buried(worker)
        exitcode = self._crew.bury(worker)
        forget_abandoned()
        died = _Death(worker, exitcode, was_overdue=self._watch is not None and worker in self._watch.ended)
        if died.was_overdue and self._watch is not None:
            self._watch.ended.discard(worker)
        if state >= FIRST_TASK:
            self._end_task(state, item, died)
        elif state in (CLAIMING, LAST_LOOK):
            self._audit = bool(self._sent)
        if state < FIRST_TASK:
            self._count_for_nothing(died, started=state != STARTING)
        if self._failure is None and (self._accepting or not self.is_idle()):
            try:
                self._crew.start(worker.slot)
                if trace is not None:
                    trace.born(self._crew.workers[-1])
            except (WorkerStartError, OSError) as error:
                # The others go on; with none left, nobody would ever answer.
                if not self._crew.workers:
                    self._break(error)

    def replace_ended(self) -> None:
        """Bury and replace the workers that have ended by now. Needs the lead."""
        for worker in self._crew.wait(0):
            self._bury(worker)

    def _end_task(self, number: int, item: int | None, died: _Death) -> None:
        """Fail the task that a dead worker was at, or do it again."""
        with self._lock:
            # Of a batch, those after it were not begun.
            again = [n for n, other in self._sent.items() if other.message <= number < n]
            task = self._sent.get(number)
            if task is not None:
                task.deaths += 1
                if task.retries and not died.was_overdue and self._failure is None:
                    task.retries -= 1
                    again.append(number)
                    task = None
                else:
                    self._take_sent(number)
            self._send_again(again)
        if task is not None:
            self._finish(task, Outcome(error=self._why_failed(task, item, died)))

    def _why_failed(self, task: Task, item: int | None, died: _Death) -> Exception:
        what, index, pid = describe_task(task, item), index_of(task, item), died.worker.pid
        name = died.worker.name
        if died.was_overdue and self._watch is not None:
            seconds = self._watch.seconds
            return TaskTimeoutError(
                f"{what} took longer than task_timeout={seconds:g} seconds, so its worker {name} (pid {pid}) was ended",
                task=what,
                index=index,
                seconds=seconds,
                pid=pid,
            )
        return WorkerDiedError(
            pid, died.exitcode, name=name, task=what, index=index, attempts=task.deaths, hint=self._hint(died)
        )

    def _hint(self, died: _Death) -> str | None:
        return self._oom_kills.hint() if died.exitcode == -_system.SIGKILL else None

    def _count_for_nothing(self, died: _Death, *, started: bool) -> None:
        """Break the pool when its workers die one after the other and nothing gets done."""
        if self._failure is not None:
            return
        now = time.perf_counter()
        if not started:
            self._failed_starts += 1
            if self._failed_starts < max(_FAILED_STARTS, 2 * self._crew.size):
                return
            doing = "its initializer" if self._crew.has_initializer else None
            deaths = self._failed_starts
        else:
            self._deaths_for_nothing = self._deaths_for_nothing + 1 if now - self._died_at < _APART_SECONDS else 1
            self._died_at = now
            deaths = self._deaths_for_nothing
            if deaths < max(_DEATHS_FOR_NOTHING, 4 * self._crew.size) or (not self._accepting and self.is_idle()):
                return
            doing = None
        hint = f"{deaths} workers in a row ended so, and no more are started"
        if (more := self._hint(died)) is not None:
            hint += f"; {more}"
        name = died.worker.name
        self._break(WorkerDiedError(died.worker.pid, died.exitcode, name=name, task=doing, hint=hint))

    def _send_again(self, numbers: list[int]) -> None:
        with self._lock:
            for number in sorted(numbers, reverse=True):
                task = self._take_sent(number)
                if task is not None:
                    self._backlog.appendleft(task)

    def _resolve_audit(self) -> None:
        with self._lock:
            if self._crew.has_unread_tasks():
                return
            states = [self._crew.status.state(worker.slot) for worker in self._crew.workers]
            if CLAIMING in states or LAST_LOOK in states:
                return
            self._crew.tasks.forget_sent()  # what was taken and is not there was taken by the dead
            # A worker that was seen between tasks has sent its answer before that.
            self._receive()
            missing = [
                number
                for number, task in self._sent.items()
                if not any(task.message <= state <= task.last for state in states)
            ]
            lost: list[Task] = []
            if self._is_garbled:  # whether they were begun is not known
                lost = [task for number in missing if (task := self._take_sent(number)) is not None]
            else:
                self._send_again(missing)
            self._audit = self._is_garbled = False
        for task in lost:
            what = describe_task(task, None)
            error = ChannelBrokenError(f"the answer to {what} is lost: a worker wrote nonsense into the pool's channel")
            self._finish(task, Outcome(error=error))
        self._feed()

    def _break(self, error: BaseException) -> None:
        """Fail everything with *error*, now and later."""
        with self._lock:
            if self._failure is None:
                self._failure = error
            self._fail_all(error)

    def fail_all(self, error: BaseException) -> None:
        """Answer all open tasks with *error*, and take no more."""
        with self._lock:
            self._accepting = False
            self._failure = error
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        tasks = [*self._sent.values(), *self._backlog]
        self._crew.given_up.update(self._sent)
        self._sent.clear()
        self._open.clear()
        self._sent_bytes = 0
        self._backlog.clear()
        for task in tasks:
            self._finish(task, Outcome(error=error))

    def under_lead(self, action: Callable[[], None], *, patience: float | None = None) -> None:
        """Run *action* while no thread drives; after *patience* seconds all the same."""
        self._crew.wake()
        has_lead = self._lead.acquire(timeout=-1 if patience is None else patience)
        try:
            action()
        finally:
            if has_lead:
                self._lead.release()
        self._notify()

    def statistics(self) -> PoolStatistics:
        """Return the counters."""
        return PoolStatistics(
            tasks=self._tasks_answered,
            messages=self._messages,
            bytes_copied=self._bytes_copied,
            bytes_shared=self._bytes_shared,
            workers_replaced=self._crew.started - self._crew.size,
        )

    def open(self, outcome: Outcome) -> tuple[bool, Any]:
        """Unpickle an answer."""
        began = time.perf_counter_ns()
        try:
            return outcome.open()
        finally:
            self.note_unpacking(time.perf_counter_ns() - began)

    def note_unpacking(self, nanoseconds: int) -> None:
        """Count time that unpickling answers took, for `report`."""
        self._unpacking_ns += nanoseconds

    def report(self) -> PoolReport:
        """Return where the time went."""
        report = PoolReport(
            seconds=time.perf_counter() - self._crew.made_at,
            workers=self._crew.reports(),
            slowest=self._slow.slowest(),
            packing=self._packing_ns / 1e9,
            unpacking=self._unpacking_ns / 1e9,
            statistics=self.statistics(),
            hints=(),
        )
        return dataclasses.replace(report, hints=hints_of(report))

    # -- the helper -------------------------------------------------------------------

    def call_later(self, callback: Callable[[], None]) -> None:
        """Let the helper thread call *callback*."""
        with self._lock:
            self._callbacks.append(callback)
        self.start_helper()

    def start_helper(self, *, now: bool = True) -> None:
        """See to it that things move although nobody waits; if need not be *now*, once nobody does for a while."""
        with self._lock:
            self._is_called_now |= now
            self._called.set()
            if self._helper is None:
                self._helper = threading.Thread(target=self._help, name="forkshm-pool-helper", daemon=True)
                try:
                    self._helper.start()
                except BaseException:
                    self._helper = None
                    raise
        self._notify()

    def has_helper(self) -> bool:
        """Whether the thread is there; it stays while anything is on its way."""
        return self._helper is not None

    def nudge(self) -> None:
        """Let those who wait look again: what they wait for has come, and not through the channel."""
        self._crew.wake()
        self._notify()

    def finish_here(self) -> None:
        """Do in this thread what the helper would: the interpreter ends, and starts no more threads."""
        with self._lock:
            if self._helper is not None:
                return
            self._helper = threading.current_thread()
        self._help()

    def _help(self) -> None:
        keeper = self.keeper()  # noqa: F841 - see `drive`
        pause = _STAND_BY_SECONDS
        seen = -1
        while True:
            self._called.clear()
            if self._is_called_now:
                self._is_called_now = False
                seen = self._steps
            is_needed = self._may_lead() and not self._followers and self._steps == seen
            if is_needed and self._lead.acquire(blocking=False):
                pause = _STAND_BY_SECONDS
                try:
                    while self._may_lead() and not self._callbacks and not self._followers:
                        self._step(None)
                finally:
                    self._lead.release()
                    self._notify()
            with self._lock:
                callback = self._callbacks.popleft() if self._callbacks else None
                if callback is None and self.is_idle():
                    # Decided under the lock: work that comes from now on starts a new one.
                    self._helper = None
                    return
            if callback is None:
                # Who waits drives better: there is nobody it has to wake. This one is there for when nobody does.
                seen = self._steps
                self._called.wait(pause)
                pause = min(2 * pause, _LONGEST_STAND_BY_SECONDS)
                continue
            try:
                callback()
            except Exception as error:
                sys.excepthook(type(error), error, error.__traceback__)
            if not self._is_lead_free():
                self._crew.wake()  # that thread may wait for what was just called
            self._notify()
            seen = self._steps
            del callback
