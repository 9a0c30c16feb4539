"""Results that callers wait for."""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from forkshm import _interrupts
from forkshm.channel import open_answer, read_message
from forkshm.errors import (
    ForkshmError,
    NotUnpicklableError,
    RemoteTraceback,
    TaskTimeoutError,
    safe_repr,
    set_cause,
    without_frames,
)
from forkshm.pool._tasks import ResultSink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forkshm.channel import Message, Received
    from forkshm.pool._interfaces import Bar, Driver
    from forkshm.pool._tasks import Answer, Task

__all__ = (
    "ApplyResult",
    "AsyncResult",
    "MapResult",
    "Outcome",
    "PlainOutcome",
    "chunked",
    "delivering",
    "first_of",
)

T = TypeVar("T")


def first_of(arrived: dict[int, Any]) -> int:
    """Return the first key of a dict that other threads may change, or -1 if it is empty."""
    while True:
        try:
            return next(iter(arrived), -1)
        except RuntimeError:  # on a free-threaded build, another thread has changed it in between
            continue


class Outcome:
    """The answer to one task: its result or exception, not unpickled yet."""

    __slots__ = ("_error", "_message", "_received", "_stream")

    def __init__(
        self,
        received: Received | None = None,
        message: Message | None = None,
        error: BaseException | None = None,
        stream: bytes | None = None,
    ) -> None:
        self._received = received
        self._stream = stream
        self._message = message
        self._error = error

    def traffic(self) -> tuple[int, int]:
        """Return how many bytes were copied and how many were shared for the answer."""
        payloads = [incoming for incoming in self._message.payloads if incoming] if self._message else []
        return sum(incoming.copied for incoming in payloads), sum(incoming.shared for incoming in payloads)

    def open(self) -> tuple[bool, Any]:
        """Unpickle the answer: return (True, value) or (False, exception)."""
        if self._error is not None:
            return False, self._error
        if self._stream is not None:
            return self._unpickled(functools.partial(pickle.loads, self._stream))
        if self._received is not None:
            try:
                return True, open_answer(self._received.data)
            except LookupError:
                pass  # an exception or a larger payload, which the code below handles
            except (Exception, SystemExit) as error:
                return _failed(error, functools.partial(open_answer, self._received.data))
        try:
            message = self._message if self._received is None else read_message(self._received)
            payloads = [] if message is None else message.payloads
            value, *text = payloads or [None]
            if value is None:
                raise NotUnpicklableError("an answer came without its payload: please report this")
        except Exception as error:
            if not isinstance(error, ForkshmError) and threading.current_thread() is threading.main_thread():
                raise  # raised by a signal handler: the message can still be read
            return False, error
        if not text:
            return self._unpickled(value.open)
        success, shown = self._unpickled(text[0].open) if text[0] is not None else (True, "")
        if not success:
            return False, shown
        traceback = RemoteTraceback(shown)
        success, raised = self._unpickled(value.open)
        if not success:
            reason = raised.__cause__
            raised = NotUnpicklableError(
                f"a task raised an exception that cannot be unpickled here: {safe_repr(reason)}"
            )
        elif not isinstance(raised, BaseException):
            raised = NotUnpicklableError(f"a task raised an object that is not an exception: {safe_repr(raised)}")
        traceback.__cause__ = raised.__cause__
        set_cause(raised, traceback)
        return False, raised

    @staticmethod
    def _unpickled(unpickle: Callable[[], Any]) -> tuple[bool, Any]:
        try:
            return True, unpickle()
        except (Exception, SystemExit) as error:
            return _failed(error, unpickle)


def _failed(error: BaseException, unpickle: Callable[[], Any]) -> tuple[bool, Any]:
    """Return the outcome of unpickling an answer that raised *error*.

    Raises:
        BaseException: *error* itself, if a signal handler raised it. The answer can then be read again.
    """
    is_interrupt = False
    if threading.current_thread() is threading.main_thread():
        with contextlib.suppress(Exception, SystemExit):
            unpickle()
            is_interrupt = True
    if is_interrupt:
        raise error
    return False, _cannot_unpickle(error)


def _cannot_unpickle(reason: BaseException) -> NotUnpicklableError:
    refusal = NotUnpicklableError(f"the result of a task arrived, and unpickling it raised {safe_repr(reason)}")
    refusal.__cause__ = reason
    return refusal


class PlainOutcome:
    """The answer of a tiny task, from a result batch."""

    __slots__ = ("stream",)

    def __init__(self, stream: bytes) -> None:
        # The pickle of the result.
        self.stream = stream

    def open(self) -> tuple[bool, Any]:
        """Unpickle the answer: return (True, value) or (False, exception)."""
        try:
            return True, pickle.loads(self.stream)
        except (Exception, SystemExit) as error:
            return _failed(error, functools.partial(pickle.loads, self.stream))


# Held while an answer is stored. The code under it calls nothing. Builds without a GIL need it.
delivering = _interrupts.Lock()


class ApplyResult(ResultSink, Generic[T]):
    """A pending result of `Pool.apply_async`, with the interface of ``multiprocessing``'s; also named ``AsyncResult``.

    Fork and threads:
        Any thread of the process that made the call may wait for the result.
    """

    def __init__(
        self,
        driver: Driver,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        bar: Bar | None = None,
    ) -> None:
        ResultSink.__init__(self)
        self._bar = bar
        self._driver = driver
        self._callback = callback
        self._error_callback = error_callback
        self._outcome: Answer | None = None
        self._opened: tuple[bool, Any] | None = None
        self._answered = False
        # Threads that call get() at the same time must receive the same object.
        self._opening = _interrupts.RLock()
        # Consumed once, by the thread that runs the callback.
        self._calling_back = iter((True,))

    @property
    def wants_callback(self) -> bool:
        """Whether there is a callback or a bar to run."""
        return self._callback is not None or self._error_callback is not None or self._bar is not None

    def deliver(self, task: Task, answer: Answer) -> None:
        with delivering:
            if not task.is_delivered:
                self._outcome = answer
                task.is_delivered = True
        self._answer()

    def _answer(self) -> None:
        if self.wants_callback:
            # The helper thread calls it, and marks the result answered afterwards: as in
            # the standard library, get() returns after the callback did.
            self._driver.call_later(self._call_once)
        else:
            self._answered = True
        self.keeps = None

    def _call_once(self) -> None:
        if next(self._calling_back, False):
            self._run_callback()

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
        """Close the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def _open(self) -> tuple[bool, Any]:
        if self._opened is None:
            with self._opening:
                if self._opened is None:
                    # The outcome is kept until it is unpickled, because unpickling may be interrupted.
                    self._opened = self._unpickle()
                    self._let_go()
        return self._opened

    def _unpickle(self) -> tuple[bool, Any]:
        return self._driver.open(self._outcome) if self._outcome is not None else (True, None)

    def _let_go(self) -> None:
        self._outcome = None

    def is_answered(self) -> bool:
        """Return whether the answer has arrived, without reading the channel."""
        return self._answered

    def ready(self) -> bool:
        """Return whether the call has completed."""
        return self._answered or self._driver.drive(self.is_answered, timeout=0)

    def successful(self) -> bool:
        """Return whether the call completed without raising.

        Raises:
            ValueError: The call has not completed.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._open()[0]

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the call has completed, or for *timeout* seconds."""
        if not self._answered:
            self._driver.drive(self.is_answered, timeout=timeout)

    def get(self, timeout: float | None = None) -> T:
        """Return what the call returned, or raise what it raised.

        Args:
            timeout: Maximum seconds to wait; None waits forever.

        Raises:
            TaskTimeoutError: No answer arrived in time and the task goes on; or the task exceeded ``task_timeout``.
            WorkerDiedError: The process that ran the task died.
            Exception: Whatever the function raised; the worker's traceback is its ``__cause__``.
        """
        if not self._answered and not self._driver.drive(self.is_answered, timeout=timeout):
            raise TaskTimeoutError(f"no result within {timeout} seconds; the task goes on")
        success, value = self._open()
        if success:
            return value  # type: ignore[no-any-return]  # it came through pickle
        self._driver.wait_out_program()
        try:
            raise without_frames(value)
        finally:
            # No cycle of the exception, its traceback and this frame.
            del value
            # Not deleted: IPython shows the arguments of each frame.
            self = None  # type: ignore[assignment]  # noqa: PLW0642


AsyncResult = ApplyResult


class MapResult(ApplyResult["list[T]"]):
    """A pending result of `Pool.map_async` or `Pool.starmap_async`; values are in input order."""

    def __init__(
        self,
        driver: Driver,
        chunks: int,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        bar: Bar | None = None,
    ) -> None:
        super().__init__(driver, callback, error_callback, bar)
        # Number of items in the input.
        self.items = 0
        self._chunks: list[Answer | None] = [None] * chunks
        self._left = chunks
        if not chunks:
            self._answered = not self.wants_callback
            if self.wants_callback:
                driver.call_later(self._call_once)

    def deliver(self, task: Task, answer: Answer) -> None:
        position = task.position
        is_new = False
        with delivering:
            if not task.is_delivered:
                self._chunks[position] = answer
                self._left -= 1
                task.is_delivered = is_new = True
        if self._bar is not None and is_new:
            self._driver.call_later(functools.partial(self._bar.update, self._length_of(position)))
        if not self._left:
            self._answer()

    def _length_of(self, position: int) -> int:
        # The last chunk may be shorter.
        return min(self.chunksize, self.items - position * self.chunksize)

    def show(self, bar: Bar) -> None:
        """Wait until all tasks are answered, and show the progress."""
        shown = 0
        while shown < self.items:
            # The number of answered tasks, not which ones: the count of items is exact only with the last task.
            self._driver.drive(functools.partial(self._has_more_than, shown))
            now = self._count()
            bar.update(now - shown)
            shown = now

    def _has_more_than(self, shown: int) -> bool:
        return self._count() > shown

    def _count(self) -> int:
        return min(self.items, (len(self._chunks) - self._left) * self.chunksize) if self._left else self.items

    def _unpickle(self) -> tuple[bool, Any]:
        values: list[T] = []
        loads = pickle.loads
        began = time.perf_counter_ns()
        try:
            for outcome in self._chunks:
                if type(outcome) is PlainOutcome:
                    # Does the work of `open` in half the time.
                    try:
                        values += loads(outcome.stream)
                    except (Exception, SystemExit) as error:
                        return _failed(error, functools.partial(loads, outcome.stream))
                    continue
                if outcome is None:
                    continue
                success, value = outcome.open()
                if not success:
                    return False, value
                values += value
        finally:
            # Counted once, because there may be many tiny chunks.
            self._driver.note_unpacking(time.perf_counter_ns() - began)
        return True, values

    def _let_go(self) -> None:
        self._chunks = []


def chunked(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Cut *items* into lists of *size*; the last may be shorter."""
    while chunk := list(itertools.islice(items, size)):
        yield chunk
