"""What a caller waits for."""

from __future__ import annotations

import collections
import functools
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from forkshm.channel import open_answer, read_message
from forkshm.errors import NotUnpicklableError, RemoteTraceback, TaskTimeoutError
from forkshm.pickler import open_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forkshm.channel import Message, Received
    from forkshm.pool._dispatch import Dispatcher
    from forkshm.pool._progress import Bar

__all__ = ("ApplyResult", "AsyncResult", "IMapIterator", "IMapUnorderedIterator", "MapResult", "Outcome")

T = TypeVar("T")


class Outcome:
    """The answer to one task: what it returned or raised, not yet unpickled."""

    __slots__ = ("_error", "_message", "_parcel", "_received")

    def __init__(
        self,
        received: Received | None = None,
        message: Message | None = None,
        error: BaseException | None = None,
        parcel: bytes | None = None,
    ) -> None:
        self._received = received
        self._parcel = parcel
        self._message = message
        self._error = error

    def traffic(self) -> tuple[int, int]:
        """Bytes that were copied and shared for it."""
        parcels = [arrival for arrival in self._message.parcels if arrival] if self._message else []
        return sum(arrival.copied for arrival in parcels), sum(arrival.shared for arrival in parcels)

    def open(self) -> tuple[bool, Any]:
        """Unpickle: (True, value), or (False, exception)."""
        if self._error is not None:
            return False, self._error
        if self._parcel is not None:
            try:
                return True, open_plain(self._parcel, 0)
            except (Exception, SystemExit) as error:
                return False, _cannot_unpickle(error)
        if self._received is not None:
            try:
                return True, open_answer(self._received.data)
            except LookupError:
                pass  # an exception, or something larger: the long way tells
            except (Exception, SystemExit) as error:
                return False, _cannot_unpickle(error)
        try:
            message = self._message if self._received is None else read_message(self._received)
            parcels = [] if message is None else message.parcels
            value, *text = parcels or [None]
            if value is None:
                raise NotUnpicklableError("an answer came without its parcel: please report this")
        except Exception as error:
            return False, error
        if not text:
            try:
                return True, value.open()
            except (Exception, SystemExit) as error:
                return False, _cannot_unpickle(error)
        try:
            traceback = RemoteTraceback(text[0].open() if text[0] is not None else "")
        except (Exception, SystemExit) as error:
            return False, _cannot_unpickle(error)
        try:
            raised = value.open()
        except Exception as reason:
            raised = NotUnpicklableError(f"a task raised an exception that cannot be unpickled here: {reason!r}")
        if not isinstance(raised, BaseException):
            raised = NotUnpicklableError(f"a task raised what is no exception: {raised!r}")
        raised.__cause__ = traceback
        return False, raised


def _cannot_unpickle(reason: BaseException) -> NotUnpicklableError:
    refusal = NotUnpicklableError(f"the result of a task arrived, and unpickling it raised {reason!r}")
    refusal.__cause__ = reason
    return refusal


class Pace:
    """How fast the tasks of a job are, and so how many may go in one message."""

    __slots__ = ("_tasks", "batch")

    #: No batch is expected to take longer than this, so none waits long behind another.
    _BATCH_NS = 500_000
    _BATCH_BYTES = 8 * 1024
    _MOST = 32

    def __init__(self) -> None:
        #: Tasks for one message.
        self.batch = 1
        self._tasks = 0

    def note(self, nanoseconds: int, nbytes: int) -> None:
        """Count a task that took so long and was answered with so many bytes."""
        if nanoseconds > self._BATCH_NS or nbytes > self._BATCH_BYTES:
            # Some are slow: from here on each goes alone until many have been fast again.
            self._tasks = 0
            self.batch = 1
            return
        self._tasks += 1
        if self._tasks % 8 == 0:
            self.batch = max(1, min(self._MOST, self._tasks // 2, self._BATCH_NS // max(nanoseconds, 1)))


class Job:
    """Something that is answered by one or more tasks."""

    #: Of a map: how many items of its input each task has, but for the last.
    chunksize = 1

    def __init__(self) -> None:
        self.pace = Pace()
        #: The pool, which must not be collected before the answer is there.
        self.keeps: object = None

    def deliver(self, position: int, outcome: Outcome) -> None:
        """Take the answer of the task at *position*. Called by whoever drives the pool."""
        raise NotImplementedError


class ApplyResult(Job, Generic[T]):
    """The answer to come of `Pool.apply_async`; the interface of ``multiprocessing``'s.

    Fork and threads:
        Any thread of the process that made the call may wait for it.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        bar: Bar | None = None,
    ) -> None:
        Job.__init__(self)
        self._bar = bar
        self._dispatcher = dispatcher
        self._callback = callback
        self._error_callback = error_callback
        self._outcome: Outcome | None = None
        self._opened: tuple[bool, Any] | None = None
        self._answered = False
        # Two threads may ask at once, and a result can be unpickled only once.
        self._opening = threading.RLock()

    @property
    def wants_callback(self) -> bool:
        """Whether there is something to call."""
        return self._callback is not None or self._error_callback is not None or self._bar is not None

    def deliver(self, position: int, outcome: Outcome) -> None:
        self._outcome = outcome
        self._answer()

    def _answer(self) -> None:
        self.keeps = None
        if self.wants_callback:
            # The helper thread calls it, and marks the result answered afterwards: as in
            # the standard library, get() returns after the callback did.
            self._dispatcher.call_later(self._run_callback)
        else:
            self._answered = True

    def _run_callback(self) -> None:
        try:
            success, value = self._open()
            call = self._callback if success else self._error_callback
            if call is not None:
                call(value)
        finally:
            self.close_bar()
            self._answered = True

    def close_bar(self) -> None:
        """Let the bar be, where there is one."""
        if self._bar is not None:
            self._bar.close()

    def _open(self) -> tuple[bool, Any]:
        if self._opened is None:
            with self._opening:
                if self._opened is None:
                    self._opened = self._unpickle()
        return self._opened

    def _unpickle(self) -> tuple[bool, Any]:
        outcome, self._outcome = self._outcome, None
        return self._dispatcher.open(outcome) if outcome is not None else (True, None)

    def is_answered(self) -> bool:
        """Whether the answer is there, without looking into the channel."""
        return self._answered

    def ready(self) -> bool:
        """Whether the call has completed."""
        return self._answered or self._dispatcher.drive(self.is_answered, timeout=0)

    def successful(self) -> bool:
        """Whether the call completed without raising.

        Raises:
            ValueError: It has not completed.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._open()[0]

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the call has completed, or *timeout* seconds."""
        if not self._answered:
            self._dispatcher.drive(self.is_answered, timeout=timeout)

    def get(self, timeout: float | None = None) -> T:
        """Return what the call returned, or raise what it raised.

        Args:
            timeout: Seconds to wait at the most; None waits for as long as it takes.

        Raises:
            TaskTimeoutError: No answer in time; the task goes on. Or, with ``task_timeout``: it took longer than that.
            WorkerDiedError: The process that ran it died.
            Exception: What the function raised; the worker's traceback is its ``__cause__``.
        """
        if not self._answered and not self._dispatcher.drive(self.is_answered, timeout=timeout):
            raise TaskTimeoutError(f"no result within {timeout} seconds; the task goes on")
        success, value = self._open()
        if success:
            return value  # type: ignore[no-any-return]  # it came through pickle
        raise value.with_traceback(None)


AsyncResult = ApplyResult


class MapResult(ApplyResult["list[T]"]):
    """The answers to come of `Pool.map_async` and `Pool.starmap_async`, in order."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        chunks: int,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        bar: Bar | None = None,
    ) -> None:
        super().__init__(dispatcher, callback, error_callback, bar)
        #: How many there are in the input.
        self.items = 0
        self._chunks: list[Outcome | None] = [None] * chunks
        self._left = chunks
        if not chunks:
            self._answered = not self.wants_callback
            if self.wants_callback:
                dispatcher.call_later(self._run_callback)

    def deliver(self, position: int, outcome: Outcome) -> None:
        self._chunks[position] = outcome
        self._left -= 1
        if self._bar is not None:
            self._dispatcher.call_later(functools.partial(self._bar.update, self._length_of(position)))
        if not self._left:
            self._answer()

    def _length_of(self, position: int) -> int:
        # The last chunk has the rest.
        return min(self.chunksize, self.items - position * self.chunksize)

    def show(self, bar: Bar) -> None:
        """Wait until all is answered, and show how far it is."""
        shown = 0
        while shown < self.items:
            # Not which of them are answered, but how many: only with the last one it is exact.
            self._dispatcher.drive(functools.partial(self._has_more_than, shown))
            now = self._count()
            bar.update(now - shown)
            shown = now

    def _has_more_than(self, shown: int) -> bool:
        return self._count() > shown

    def _count(self) -> int:
        return min(self.items, (len(self._chunks) - self._left) * self.chunksize) if self._left else self.items

    def _unpickle(self) -> tuple[bool, Any]:
        chunks, self._chunks = self._chunks, []
        values: list[T] = []
        began = time.perf_counter_ns()
        try:
            for outcome in chunks:
                if outcome is not None:
                    success, value = outcome.open()
                    if not success:
                        return False, value
                    values += value
        finally:
            # Once for all: chunks may be tiny, and many.
            self._dispatcher.note_unpacking(time.perf_counter_ns() - began)
        return True, values


class IMapIterator(Job, Generic[T]):
    """The results of `Pool.imap`, in the order of the input; iterate or call ``next(timeout)``.

    Input is taken as workers need it: at most ``window`` chunks are on their way.
    """

    def __init__(self, dispatcher: Dispatcher, submit: Callable[[IMapIterator[T]], bool], window: int) -> None:
        super().__init__()
        self._dispatcher = dispatcher
        # Sends one more chunk, or returns False when the input is exhausted.
        self._submit = submit
        self._window = window
        self._exhausted = False
        self._submitted = 0
        self._delivered = 0
        self._taken = 0
        self._outcomes: dict[int, Outcome] = {}
        self._values: collections.deque[T] = collections.deque()
        self._input_error: BaseException | None = None
        #: Goes on as results are taken.
        self.bar: Bar | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def next_position(self) -> int:
        """Number the next chunk of the input."""
        self._submitted += 1
        return self._submitted - 1

    def fill(self, window: int | None = None) -> None:
        """Take input until the window is full, or without bound."""
        while not self._exhausted and (window is None or self._submitted - self._taken < window):
            try:
                self._exhausted = not self._submit(self)
            except Exception as error:
                # As in the standard library, the consumer sees it at its place in the order.
                self._input_error = error
                self._exhausted = True

    def deliver(self, position: int, outcome: Outcome) -> None:
        self._outcomes[position] = outcome
        self._delivered += 1
        if self.is_done():
            self.keeps = None

    def is_done(self) -> bool:
        """Whether all input was taken and answered."""
        return self._exhausted and self._delivered == self._submitted

    def _next_outcome(self) -> Outcome | None:
        return self._outcomes.pop(self._taken, None)

    def _is_next_there(self) -> bool:
        return self._taken in self._outcomes

    def next(self, timeout: float | None = None) -> T:
        """Return the next result.

        Args:
            timeout: Seconds to wait at the most; None waits for as long as it takes.

        Raises:
            StopIteration: There are no more.
            TaskTimeoutError: It did not come in time; the task goes on, call again.
            Exception: What the function raised for this item. Later items can still be had.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._values:
            self.fill(self._window)
            if self._taken == self._submitted:
                if self._input_error is not None:
                    error, self._input_error = self._input_error, None
                    raise error
                if self.bar is not None:
                    self.bar.close()
                raise StopIteration
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._dispatcher.drive(self._is_next_there, timeout=left):
                raise TaskTimeoutError(f"no result within {timeout} seconds; the task goes on")
            outcome = self._next_outcome()
            if outcome is None:
                continue  # another thread took it
            self._taken += 1
            success, value = self._dispatcher.open(outcome)
            if not success:
                if self.bar is not None:
                    self.bar.update(self.chunksize)
                raise value.with_traceback(None)
            self._values.extend(value)
            self.fill(self._window)
        if self.bar is not None:
            self.bar.update(1)
        return self._values.popleft()

    def __next__(self) -> T:
        return self.next()


class IMapUnorderedIterator(IMapIterator[T]):
    """The results of `Pool.imap_unordered`, as they come."""

    def _next_outcome(self) -> Outcome | None:
        try:
            return self._outcomes.pop(next(iter(self._outcomes)))
        except (StopIteration, KeyError):
            return None

    def _is_next_there(self) -> bool:
        return bool(self._outcomes)


def chunked(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Cut *items* into lists of *size*; the last may be shorter."""
    while chunk := list(itertools.islice(items, size)):
        yield chunk
