"""Iterators of `Pool.imap` and `Pool.imap_unordered`, and the reading of their input."""

from __future__ import annotations

import _thread
import collections
import contextlib
import itertools
import operator
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from forkshm.channel import Kind
from forkshm.errors import ForkshmError, TaskTimeoutError, as_text, without_frames
from forkshm.pool._results import Outcome, PlainOutcome, delivering, first_of
from forkshm.pool._taking import take_arguments
from forkshm.pool._tasks import ResultSink, Task

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from forkshm.pool._dispatch import Dispatcher
    from forkshm.pool._tasks import Answer, PickledCallable
    from forkshm.pool.observe import Bar

__all__ = ("IMapIterator", "IMapUnorderedIterator")

T = TypeVar("T")

_keys = itertools.count(1)
_NOTHING: Iterator[Any] = iter(())
# Maximum number of tiny results that are unpickled together.
_TOGETHER = 64
# Iterators that run no code of the program, so an item does not change when the next one is read.
_NO_ITEMS: tuple[Iterable[Any], ...] = (
    *([], (), range(0), "", b"", bytearray(), set(), collections.deque()),
    *({}, {}.values(), {}.items()),
)
_PLAIN_ITERATORS = frozenset(type(iter(items)) for items in _NO_ITEMS)
# The reading thread checks this often whether the results are still wanted.
_LOOK_SECONDS = 1.0


class _Failure:
    """The exception of a chunk, in place of its results."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class IMapIterator(ResultSink, Generic[T]):
    """The results of `Pool.imap`, in the order of the input; iterate or call ``next(timeout)``.

    At most ``window`` chunks of the input are in flight, or as many batches while chunks are tiny. Input that has a
    length is read by the thread that takes the results. Other input may block, even to wait for its own results, so a
    separate thread reads it, as in the standard library.
    """

    comes_in_batches = True

    def __init__(
        self,
        dispatcher: Dispatcher,
        function: PickledCallable,
        iterable: Iterable[Any],
        chunksize: int,
        window: int,
        *,
        waited_for: bool,
        batched: bool = False,
    ) -> None:
        super().__init__()
        self.chunksize = chunksize
        # Whether a message may hold several tasks.
        self._batched = batched
        self._dispatcher = dispatcher
        self._function = function
        self._items = iter(iterable)
        # Whether the input may change an item when the next one is read, as a generator does that fills a buffer again.
        # Such an item is taken when it is read, as in the standard library.
        self._may_change = type(self._items) not in _PLAIN_ITERATORS and not _is_array(iterable)
        # Whether the last item that was taken is large or has shared memory, so that it keeps an fd open.
        self._has_fds = False
        self._window = window
        self._waited_for = waited_for
        # The chunks that were read, and the tasks made of them, until the tasks are submitted.
        self._taking: list[Any] = []
        self._submitting: list[Task] = []
        # Whether submitting the tasks was begun before, and may have been interrupted.
        self._is_again = False
        self._exhausted = False
        self._submitted = 0
        self._delivered = 0
        self._taken = 0
        self._outcomes: dict[int, Answer] = {}
        # The positions whose results are in `_values`, or were returned.
        self._spent: tuple[int, ...] = ()
        self._values: collections.deque[T | _Failure] = collections.deque()
        self._input_error: BaseException | None = None
        # Advances when results are taken.
        self.bar: Bar | None = None
        # The key of the reading thread in the dispatcher, and the lock that wakes the thread when it is released.
        self._reader = 0
        self._gate = _thread.allocate_lock()
        # The unanswered tasks, by position.
        self._open: dict[int, Task] = {}

    def begin(self, *, has_length: bool) -> None:
        """Begin to read input."""
        if has_length:
            self.fill(self._window)
            return
        self._reader = next(_keys)
        arguments = weakref.ref(self), self._dispatcher, self._reader, self._gate
        try:
            self._dispatcher.begin_reading(self._reader)
            threading.Thread(target=_read, args=arguments, name="forkshm-imap-input", daemon=True).start()
        except RuntimeError:  # no thread can be started
            self._dispatcher.end_reading(self._reader)
            self._reader = 0
            self.fill(self._window)
        except BaseException:
            # If the thread was started, it ends because this iterator is not referenced.
            self._dispatcher.end_reading(self._reader)
            raise

    def __iter__(self) -> Iterator[T]:
        return self

    def fill(self, window: int | None = None) -> None:
        """Read input until the window is full, or without a limit. Does nothing if a thread reads."""
        while not self._reader and not self._exhausted and (window is None or self.has_room()):
            self.take_input()

    def read_all(self) -> None:
        """Read the rest of the input, also if no thread takes the results.

        A thread that joins the pool waits for the reading thread, and may be the one that would take the results.
        """
        self._window = sys.maxsize
        self._open_gate()

    def _room(self) -> int:
        """Return how many chunks may be read. The chunks of a batch are read together."""
        batch = 1 if self._has_fds else self.pace.batch
        on_their_way = self._submitted - self._taken
        room = self._window * batch - on_their_way
        return room if room >= batch or not on_their_way else 0

    def _wanted(self) -> int:
        """Return how many chunks to read together."""
        batch = self.pace.batch
        # A thread reads one by one, because the next item may depend on the answer to this one.
        if batch == 1 or self._reader or self._may_change:
            return 1
        # Divide the last chunks among the workers.
        left = operator.length_hint(self._items, 0) // self.chunksize
        return max(1, min(batch, self._room(), left // self._window))

    def has_room(self) -> bool:
        """Return whether more input may be read now."""
        return not self._exhausted and self._room() > 0

    def take_input(self) -> None:
        """Read chunks of the input, and submit them. The next call continues an interrupted one."""
        if not self._submitting:
            taking, size = self._taking, self.chunksize
            wanted = size * self._wanted()
            if self._input_error is None and len(taking) < wanted:
                taken: list[None] = []
                # Items are read and kept in one C call, unless the input is Python code.
                extending = map(taking.extend, (itertools.islice(self._items, wanted - len(taking)),))
                try:
                    taken.extend(extending)
                except BaseException as error:
                    # In the main thread, a signal handler may have raised.
                    if taken or not (self._reader or isinstance(error, Exception)):
                        raise
                    # As in the standard library, the error is raised at its place in the order.
                    self._input_error = error
            # If the input ended inside a chunk, the chunk is short. If it failed there, the chunk is dropped.
            whole = len(taking) if self._input_error is None else len(taking) // size * size
            if not whole:
                self._exhausted = True
                self._items = _NOTHING  # the iterator of a list keeps the list on free-threaded builds
                return
            first, retries = self._submitted, self._dispatcher.retries
            tasks = [
                Task(
                    Kind.MAP,
                    self._function,
                    taking[start : start + size],
                    self,
                    first + start // size,
                    batched=self._batched,
                    retries=retries,
                )
                for start in range(0, whole, size)
            ]
            if self._may_change:
                take_arguments(self._dispatcher, tasks, always=True, in_batches=self.pace.batch > 1)
                self._has_fds = (payload := tasks[0].payload) is not None and bool(payload.fds)
            self._open.update(zip(range(first, first + len(tasks)), tasks, strict=True))
            fresh: list[Any] = []
            # No call may come between these assignments.
            self._submitting = tasks
            self._taking = fresh
            self._is_again = False
        self._submit()

    def _submit(self) -> None:
        dispatcher = self._dispatcher
        while tasks := self._submitting:
            if not self.may_read():
                return
            unsent = tasks
            if self._is_again:
                unsent = [task for task in tasks if not task.is_delivered and not dispatcher.knows(task)]
            self._is_again = True
            try:
                if unsent:
                    dispatcher.submit(unsent, waited_for=self._waited_for, reader=self._reader)
            except Exception as error:  # a task that cannot be pickled fails at its place; the others go on
                first = unsent[0]
                if first.is_delivered or dispatcher.knows(first) or dispatcher.packing.is_interrupt([first], error):
                    raise
                self.deliver(first, Outcome(error=as_text(error)))
                continue
            count = len(tasks)
            done: list[Task] = []
            # No call may come between these assignments.
            self._submitted += count
            self._submitting = done

    def may_read(self) -> bool:
        """Return whether the pool takes more tasks; otherwise release the input."""
        try:
            self._dispatcher.check_accepting(self._reader)
        except ForkshmError as error:
            # Without the frames, which refer to this iterator.
            self._input_error = error.with_traceback(None)
            self._exhausted = True
            self._items = _NOTHING
            return False
        return True

    def cancel(self) -> None:
        """Read no more input, and cancel tasks that no worker has begun."""
        self._exhausted = True
        self._items = _NOTHING
        self._open_gate()
        self._dispatcher.cancel(list(self._open.values()))

    def deliver(self, task: Task, answer: Answer) -> None:
        position = task.position
        with delivering:
            if not task.is_delivered:
                self._outcomes[position] = answer
                self._delivered += 1
                task.is_delivered = True
        self._open.pop(position, None)
        if self.is_done():
            self.keeps = None

    def is_done(self) -> bool:
        """Return whether all input was read and answered."""
        return self._exhausted and self._delivered == self._submitted

    def _next_position(self) -> int:
        """Return the position of the result to be returned next, or -1 if it has not arrived."""
        return self._taken if self._taken in self._outcomes else -1

    def _may_go_on(self) -> bool:
        return self._next_position() >= 0 or (self._taken == self._submitted and (self._exhausted or self._is_cut()))

    def _is_cut(self) -> bool:
        """Return whether a thread still reads input, but no more tasks can be submitted."""
        return self._reader > 0 and self._dispatcher.failure() is not None

    def next(self, timeout: float | None = None) -> T:
        """Return the next result.

        Args:
            timeout: Maximum seconds to wait; None waits forever.

        Raises:
            StopIteration: There are no more results.
            TaskTimeoutError: The result did not arrive in time. The task goes on, so the call can be repeated.
            Exception: Whatever the function raised for this item. Later items are still available.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if not self._values:
                self._next_chunk(timeout, deadline)
            if self.bar is not None and self._values:
                self.bar.update(self.chunksize if isinstance(self._values[0], _Failure) else 1)
            taken: list[Any] = []
            try:
                with delivering:
                    # No call may come in this block.
                    if self._values:
                        taken = [self._values[0]]
                        del self._values[0]
                if taken:
                    if type(taken[0]) is not _Failure:
                        return taken[0]  # type: ignore[no-any-return]  # it came through pickle
                    error = without_frames(taken[0].error)
                    break
            except BaseException:
                self._values.extendleft(taken)  # interrupted: the next call returns it
                raise
        del taken
        self._dispatcher.wait_out_program()
        try:
            raise error
        finally:
            del error  # no cycle of the exception, its traceback and this frame

    def _next_chunk(self, timeout: float | None, deadline: float | None) -> None:
        """Wait for the next chunk of results and unpickle it, together with tiny results that follow it."""
        while not self._values:
            self.fill(self._window)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._may_go_on() and not self._dispatcher.drive(self._may_go_on, timeout=left):
                raise TaskTimeoutError(f"no result within {timeout} seconds; the task goes on")
            taken = self._taken
            self._drop_spent()
            answers = self._ready()
            if not answers:
                if not self._exhausted and self._taken == self._submitted and self._is_cut():
                    # The input may block for long, so the reading thread is not waited for.
                    self._exhausted = True
                    self._items = _NOTHING
                    self._dispatcher.check_accepting()
                if not self._exhausted or self._taken != self._submitted:
                    continue  # another thread took it
                if self._input_error is not None:
                    failure, self._input_error = self._input_error, None
                    try:
                        raise failure
                    finally:
                        del failure
                if self.bar is not None:
                    self.bar.close()
                raise StopIteration
            values: collections.deque[Any] = collections.deque()
            for answer in answers.values():
                success, value = answer.open() if type(answer) is PlainOutcome else self._dispatcher.open(answer)
                values.extend(value if success else (_Failure(value),))
            count, positions = len(answers), tuple(answers)
            del answer, answers
            with delivering:
                # No call may come in this block, so that the results of a chunk are returned once.
                if self._taken == taken:
                    self._values = values
                    self._spent = positions
                    self._taken += count
            if self._reader:
                self._open_gate()
        self._drop_spent()
        self.fill(self._window)

    def _ready(self) -> dict[int, Answer]:
        """Return the next answer by position, and the following ones if all are tiny; empty if it has not arrived."""
        first = self._next_position()
        answer = self._outcomes.get(first)
        if answer is None:
            return {}
        answers = {first: answer}
        if type(answer) is PlainOutcome:
            for position in self._positions_after(first):
                answer = self._outcomes.get(position)
                if type(answer) is not PlainOutcome:
                    break
                answers[position] = answer
        return answers

    def _positions_after(self, position: int) -> Iterable[int]:
        return range(position + 1, position + _TOGETHER)

    def _drop_spent(self) -> None:
        """Drop the answers whose results are being returned. Can be repeated."""
        for position in self._spent:
            self._outcomes.pop(position, None)

    def __next__(self) -> T:
        return self.next()

    def _open_gate(self) -> None:
        with contextlib.suppress(RuntimeError):  # the lock is open
            self._gate.release()

    def __del__(self) -> None:
        # Wake the reading thread, which then ends.
        if getattr(self, "_reader", 0) and self._gate.locked():
            self._gate.release()


def _is_array(things: object) -> bool:
    """Return whether things are an array, whose items are views of one memory."""
    return isinstance(things, getattr(sys.modules.get("numpy"), "ndarray", ()))


# Runs in a thread of its own, so no signal handler interrupts it.
def _read(sink: weakref.ref[IMapIterator[Any]], dispatcher: Dispatcher, key: int, gate: _thread.LockType) -> None:
    """Read the input of an iterator while the iterator exists."""
    try:
        while True:
            if (wanted := sink()) is None or wanted._exhausted:
                break
            if wanted.has_room():
                wanted.take_input()
                continue
            wanted.may_read()
            del wanted
            gate.acquire(True, _LOOK_SECONDS)
        if wanted is not None:
            dispatcher.nudge()
    finally:
        dispatcher.end_reading(key)


class IMapUnorderedIterator(IMapIterator[T]):
    """The results of `Pool.imap_unordered`, in the order in which they arrive."""

    def _next_position(self) -> int:
        return first_of(self._outcomes)

    def _positions_after(self, position: int) -> Iterable[int]:
        return list(self._outcomes)[1:_TOGETHER]
