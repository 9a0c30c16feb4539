"""Tasks, the data that several of them share, and the place of each unanswered task.

A task waits, is in a batch that is being pickled and sent, was sent, or was answered. Each move to the next place is
one C call, or stores with no call between them. So an interrupt finds each task in exactly one place. See
docs/internals/interruptions.md.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from forkshm import _interrupts
from forkshm._ledger import Sending, call_site, ledger, on_behalf_of
from forkshm.channel import Kind
from forkshm.pickler import Payload, Repeats, explain, mark, name_of, pack, pack_by_name, still_by_name
from forkshm.pool._status import FIRST_TASK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from forkshm.pickler import ImportableNames

__all__ = (
    "CANCELLED",
    "Answer",
    "Batch",
    "Outstanding",
    "Pace",
    "Packer",
    "PickledCallable",
    "ResultSink",
    "Task",
    "ThreadedOutstanding",
    "Wrapper",
)

_NOBODY: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
# Arguments for `itertools.starmap`: one call without arguments.
_ONCE: tuple[tuple[()], ...] = ((),)


# Stands for the payload of a function that was not pickled yet.
_UNKNOWN: Any = object()


class Answer(Protocol):
    """The answer to one task: its result or exception, not unpickled yet."""

    def open(self) -> tuple[bool, Any]:
        """Return (True, value) or (False, exception)."""
        ...


class _Cancelled:
    """The answer to a cancelled task, which will not run."""

    def open(self) -> tuple[bool, Any]:
        """Return False and the exception."""
        return False, concurrent.futures.CancelledError()


CANCELLED = _Cancelled()


class Packer:
    """Pickles the functions of a pool's tasks.

    Args:
        importable: The names of ``__main__`` that the workers have, which are therefore sent by name.
    """

    def __init__(self, importable: ImportableNames) -> None:
        self.importable = importable
        self._groups = itertools.count(1)
        # Payloads of functions that are sent by name never change, so they are made once. None stands for a function
        # that is sent by value.
        self._by_name: weakref.WeakKeyDictionary[Any, Payload | None] = weakref.WeakKeyDictionary()

    def new_group(self) -> int:
        """Return a number for tasks that share a function payload."""
        return next(self._groups)

    def by_name(self, function: Callable[..., Any]) -> Payload | None:
        """Return the payload of a function that is sent by name, which is cached here; None for any other function."""
        try:
            payload = self._by_name.get(function, _UNKNOWN)
            if payload is _UNKNOWN:
                payload = self._by_name[function] = pack_by_name(function, self.importable)
            return payload if payload is None or still_by_name(function, self.importable) else None
        except TypeError:  # it is not hashable, or cannot have weak references
            return None

    def pack(self, function: Callable[..., Any], *, for_many: bool) -> Payload:
        """Return the payload of a function."""
        payload = self.by_name(function)
        return pack(function, for_many=for_many, importable=self.importable) if payload is None else payload


class Wrapper:
    """Base class of a function that calls functions of the user, which messages describe instead."""

    def __call__(self, *args: Any) -> Any:
        """Call functions of the user."""
        raise NotImplementedError

    def describe(self, args: Sequence[Any], describe: Callable[[Any], str]) -> str:
        """Return a description of a call, given its arguments; *describe* describes a value."""
        raise NotImplementedError

    def names(self, args: Sequence[Any]) -> dict[str, Any]:
        """Return the objects that the user has passed, by the names that the user knows, given a call's arguments."""
        raise NotImplementedError


class PickledCallable:
    """The function of one call's tasks: pickled once, sent with each task.

    Its memory is released with the last task that uses it.
    """

    def __init__(
        self,
        packer: Packer,
        function: Callable[..., Any],
        *,
        for_many: bool,
        repeated: frozenset[int] = frozenset(),
        repeats: Repeats | None = None,
    ) -> None:
        self._packer = packer
        self.function = function
        # Not 0 if several tasks share the payload.
        self.group = packer.new_group() if for_many else 0
        self._payload: Payload | None = None
        # The ids of arguments that several tasks share, and the copies of these arguments.
        self._repeated = repeated
        self.repeats = Repeats() if repeated and repeats is None else repeats
        self._called_at = call_site() if ledger.watches else "a call made before the block"

    def arguments_of(self, task: Task) -> Any:
        """Return the arguments to be pickled for a task."""
        if not self._repeated:
            return task.arguments
        return mark(task.arguments, self._repeated, starred=task.kind is Kind.STARMAP)

    def acting(self, what: str) -> contextlib.AbstractContextManager[object]:
        """Return a context in which copies are reported as *what* the function, if the ledger is watched."""
        if not ledger.watches:
            return _NOBODY
        return on_behalf_of(Sending(f"{what} {name_of(self.function)}()", self._called_at))

    def payload(self) -> Payload:
        """Return the payload, which is made on first use."""
        payload = self._payload
        if payload is None:
            try:
                payload = self._payload = self._packer.pack(self.function, for_many=self.group != 0)
            except Exception as error:
                explain(error, {"func": self.function}, self._packer.importable)
                raise
        return payload


class Pace:
    """Measures how fast the tasks of a call are, and so how many may share one message."""

    __slots__ = ("_tasks", "batch", "is_growing")

    # Expected maximum duration of a batch, so that no task waits long behind another.
    _BATCH_NS = 500_000
    _BATCH_BYTES = 8 * 1024
    _MOST = 128

    def __init__(self) -> None:
        # Number of tasks in one message.
        self.batch = 1
        # Whether *batch* may still grow, because few tasks were answered yet.
        self.is_growing = True
        self._tasks = 0

    def note(self, nanoseconds: int, nbytes: int, count: int = 1) -> None:
        """Count tasks by their mean duration and the mean size of their answers."""
        if nanoseconds > self._BATCH_NS or nbytes > self._BATCH_BYTES:
            # A slow task: send one task a message until many have been fast again.
            self._tasks = 0
            self.batch = 1
            self.is_growing = False
            return
        self._tasks += count
        most = min(self._MOST, self._BATCH_NS // max(nanoseconds, 1))
        self.batch = max(1, min(most, self._tasks // 2))
        self.is_growing = self.batch < most


class ResultSink:
    """An object that receives the answers of one or more tasks."""

    # Number of input items in each task of a map, except the last.
    chunksize = 1
    # Its tasks are submitted in batches, so waiting tasks need not be divided among the workers.
    comes_in_batches = False

    def __init__(self) -> None:
        self.pace = Pace()
        # The pool, which must not be collected before the answer arrives.
        self.keeps: object = None

    def deliver(self, task: Task, answer: Answer) -> None:
        """Store the answer of a task and set ``task.is_delivered``, unless it is set. Called by the driving thread.

        An interrupted call is repeated. Therefore nothing is called between storing the answer and marking the task.
        """
        raise NotImplementedError

    def __reduce__(self) -> Any:
        raise NotImplementedError(
            f"cannot pickle {self!r}: it belongs to a pool of this process. Send its value instead."
        )


class Task:
    """One message to be answered by one message."""

    # The defaults are in the class, because there are many tiny tasks, and most never set most attributes.
    payload: Payload | None = None
    deaths: int = 0
    """Number of workers that died while running it."""
    copied: int = 0
    """Bytes copied for its message."""
    number: int = 0
    """Since it was sent: its own number, and the numbers of the first and the last task of its message."""
    message: int = 0
    last: int = 0
    is_cancelled: bool = False
    """Whether it is cancelled, so that no worker begins it any more."""
    is_delivered: bool = False
    """Whether its sink has the answer."""

    def __init__(
        self,
        kind: Kind,
        function: PickledCallable,
        arguments: Any,
        sink: ResultSink,
        position: int,
        *,
        batched: bool = False,
        retries: int = 0,
    ) -> None:
        self.kind = kind
        self.function = function
        # (args, kwargs) of a call, or the items of a chunk.
        self.arguments = arguments
        self.sink = sink
        # Which part of the sink's result it answers.
        self.position = position
        # Whether it may share a message with other tasks.
        self.batched = batched
        # How often it may be sent again when its worker dies. Its payload is kept for that.
        self.retries = retries

    def close(self) -> None:
        """Release the memory that is held for sending the task."""
        payload, self.payload = self.payload, None
        if payload is not None:
            payload.close()


_NO_ARGUMENTS: Any = ((), {})


class Batch(list[Task]):
    """Tasks that are being pickled and sent in one message."""

    def __init__(self, key: int) -> None:
        super().__init__()
        self.key = key
        # The numbers that the tasks were entered under before the message was sent.
        self.numbers = range(0)
        # Has an item once the message is in the kernel's queue.
        self.sent: list[int] = []
        # Whether the thread that pickles and sends it was interrupted, and will not continue.
        self.is_abandoned = False


class Outstanding:
    """The unanswered tasks of a pool, each in one place.

    Args:
        sent: The place of tasks that were sent, by their numbers.
    """

    def __init__(self, sent: dict[int, Task]) -> None:
        # Tasks that were not sent yet, in order.
        self.waiting: collections.deque[Task] = collections.deque()
        # Tasks to be sent again before all others, by their previous numbers.
        self.again: dict[int, Task] = {}
        # Batches that are being sent.
        self.batches: dict[int, Batch] = {}
        self.sent = sent
        # Bytes that were copied for the sent tasks.
        self.sent_bytes = 0
        # For each message, by the number of its first task, the number of its unanswered tasks.
        self.messages: dict[int, int] = {}
        # Answered tasks that were not delivered to their sinks yet.
        self.answered: dict[int, tuple[Task, Answer]] = {}
        self._next = FIRST_TASK
        self._keys = itertools.count(1)

    def is_empty(self) -> bool:
        """Return whether every task was answered, and every answer delivered."""
        return not (self.sent or self.waiting or self.again or self.batches or self.answered)

    def knows(self, task: Task) -> bool:
        """Return whether a task is in one of the places."""
        if self.sent.get(task.number) is task or task in self.waiting or task in list(self.again.values()):
            return True
        answered = any(task is other for other, _ in list(self.answered.values()))
        return answered or any(task in batch for batch in list(self.batches.values()))

    def has_unsent(self) -> bool:
        """Return whether there are tasks that were not sent."""
        return bool(self.waiting or self.again)

    def new_batch(self) -> Batch:
        """Return an empty batch, which is registered."""
        batch = Batch(0)
        self.register(batch)
        return batch

    def register(self, batch: Batch) -> None:
        """Give the batch a key, and add it to `batches`."""
        key = batch.key = next(self._keys)
        self.batches[key] = batch

    def take(self, batch: Batch) -> bool:
        """Move the next task to be sent into a batch; return False if there is none."""
        while True:
            for number in tuple(self.again):
                with contextlib.suppress(KeyError):
                    batch.extend(map(self.again.pop, (number,)))
                break  # one task at a time
            else:
                with contextlib.suppress(IndexError):
                    batch.extend(itertools.starmap(self.waiting.popleft, _ONCE))
            if not batch or not batch[0].is_cancelled:
                return bool(batch)
            self.answered[-next(self._keys)] = batch[0], CANCELLED
            batch.clear()

    def is_first_cancelled(self) -> bool:
        """Return whether the first of the waiting tasks was cancelled."""
        with contextlib.suppress(IndexError):  # another thread took the tasks
            return self.waiting[0].is_cancelled
        return False

    def drop_cancelled(self) -> None:
        """Answer the cancelled tasks at the front of the waiting ones."""
        while self.is_first_cancelled():
            batch = self.new_batch()
            try:
                self.take(batch)
            finally:
                batch.is_abandoned = True  # so that it is recovered if the next line is interrupted
                self.give_back(batch)

    def take_more(self, batch: Batch, limit: int) -> None:
        """Move tasks of the same function into a batch, up to *limit*."""
        function, waiting = batch[0].function, self.waiting
        wanted = limit - len(batch)
        if wanted < 1:
            return
        with contextlib.suppress(IndexError):  # no more tasks wait
            batch.extend(itertools.starmap(waiting.popleft, itertools.repeat((), wanted)))
        for position, task in enumerate(batch):
            if task.function is not function or not task.batched or task.is_cancelled:
                # It is returned together with the tasks behind it, in one C call.
                if position:
                    waiting.extendleft(map(batch.pop, itertools.repeat(-1, len(batch) - position)))
                return

    def give_back(self, batch: Batch) -> None:
        """Return a batch that was not sent to its place in the queue. Can be repeated."""
        self.leave(batch)
        # One C call removes the tasks from the batch and adds them to the queue, until the batch is empty. A handler or
        # thread may do the same at once.
        with contextlib.suppress(IndexError):
            self.waiting.extendleft(map(batch.pop, itertools.repeat(-1)))
        self.batches.pop(batch.key, None)

    def enter(self, batch: Batch) -> int:
        """Record that a batch is going to be sent; return the number of its first task."""
        count = len(batch)
        # No call may come between these: a signal handler sends tasks, too, and would get the same numbers.
        first = self._next
        self._next = first + count
        batch.numbers = range(first, first + count)
        if count == 1:
            task = batch[0]
            task.number = task.message = task.last = first
            self.messages[first] = 1
            self.sent[first] = task
            self.sent_bytes += task.copied
            return first
        for number, task in zip(batch.numbers, batch, strict=True):
            task.number, task.message, task.last = number, first, first + count - 1
        copied, entries = batch[0].copied, dict(zip(batch.numbers, batch, strict=True))
        self.messages[first] = count
        self.sent.update(entries)
        self.sent_bytes += copied
        return first

    def leave(self, batch: Batch) -> None:
        """Undo `enter`. Can be repeated."""
        for number in batch.numbers:
            self.take_sent(number)

    def sent_off(self, batch: Batch) -> None:
        """Remove a batch that was sent."""
        self.batches.pop(batch.key, None)

    def take_sent(self, number: int) -> None:
        """Remove a task that was sent; the caller has it."""
        sent, messages = self.sent, self.messages
        # No call may come from here to the end.
        if number in sent:
            task = sent[number]
            message = task.message
            del sent[number]
            self.sent_bytes -= task.copied
            if message in messages:
                if messages[message] == 1:
                    del messages[message]
                else:
                    messages[message] -= 1

    def answer(self, number: int, answer: Answer) -> Task | None:
        """Record the answer to a sent task, and return the task; None if it was answered before, or never sent."""
        sent, messages, answered = self.sent, self.messages, self.answered
        task = sent.get(number)
        if task is None:
            return None
        message, entry = task.message, (task, answer)
        # No call may come from here to the end, so that the task is in one of the two places at every moment.
        if number not in sent:
            return None
        del sent[number]
        self.sent_bytes -= task.copied
        if message in messages:
            if messages[message] == 1:
                del messages[message]
            else:
                messages[message] -= 1
        answered[number] = entry
        return task

    def answer_unsent(self, batch: Batch, answer: Answer) -> None:
        """Record the answer to the task of a batch that was not sent."""
        key = -next(self._keys)  # sent tasks have positive numbers
        # No call may come between these.
        self.answered[key] = batch[0], answer
        batch.clear()

    def send_again(self, numbers: Iterable[int], *, after_death: bool = False) -> None:
        """Queue tasks that were sent for another send, in the order of their numbers."""
        sent, messages, again = self.sent, self.messages, self.again
        for number in sorted(numbers):
            task = sent.get(number)
            if task is None:
                continue
            message = task.message
            # No call may come from here to the end of the loop.
            if number in sent:
                del sent[number]
                self.sent_bytes -= task.copied
                if message in messages:
                    if messages[message] == 1:
                        del messages[message]
                    else:
                        messages[message] -= 1
                if after_death:
                    task.retries -= 1
                again[number] = task

    def deliver(self) -> bool:
        """Deliver answers to their sinks; return whether there were any."""
        answered = self.answered
        any_there = bool(answered)
        while answered:
            try:
                entries = list(answered.items())
            except RuntimeError:  # another thread does the same
                continue
            for number, (task, answer) in entries:
                if task.payload is not None:
                    task.close()
                task.sink.deliver(task, answer)  # repeated if an earlier delivery was interrupted
                # A sink may keep the task, in a cycle of references that only a garbage collection ends.
                task.arguments = _NO_ARGUMENTS
                answered.pop(number, None)
        return any_there


class ThreadedOutstanding(Outstanding):
    """The unanswered tasks on a free-threaded build, where threads switch also where no call comes."""

    def __init__(self, sent: dict[int, Task]) -> None:
        super().__init__(sent)
        # Reentrant: a signal handler may use the pool.
        self._moving = _interrupts.RLock()

    def take(self, batch: Batch) -> bool:
        with self._moving:
            return super().take(batch)

    def take_more(self, batch: Batch, limit: int) -> None:
        with self._moving:
            super().take_more(batch, limit)

    def give_back(self, batch: Batch) -> None:
        with self._moving:
            super().give_back(batch)

    def enter(self, batch: Batch) -> int:
        with self._moving:
            return super().enter(batch)

    def take_sent(self, number: int) -> None:
        with self._moving:
            super().take_sent(number)

    def answer(self, number: int, answer: Answer) -> Task | None:
        with self._moving:
            return super().answer(number, answer)

    def send_again(self, numbers: Iterable[int], *, after_death: bool = False) -> None:
        with self._moving:
            super().send_again(numbers, after_death=after_death)
