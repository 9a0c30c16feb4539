"""Executor: the interface of concurrent.futures over a pool.

The life of one future: it waits here, where it can be cancelled; a few for each worker are
running, which means handed to the pool; the pool's helper thread, which exists only while there
is work, sets the result and hands over the next.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from forkshm.backend import kernel
from forkshm.context import get_context
from forkshm.doors._progress import Bar, no_bar, open_bar
from forkshm.errors import PoolClosedError
from forkshm.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import ParamSpec

    P = ParamSpec("P")

__all__ = ("Executor",)

T = TypeVar("T")

#: Futures handed to the pool beyond two for each worker: enough to keep tiny tasks flowing, few
#: enough that most of those submitted can still be cancelled.
_AHEAD = 8


class Executor(concurrent.futures.Executor):
    """A `concurrent.futures.Executor` whose workers are those of a `Pool`.

    What ``ProcessPoolExecutor`` does, with the same arguments. What differs:

    * Arrays and regions of shared memory cross as descriptors, and other large buffers are copied
      once; functions may be lambdas, closures, or defined after the executor was made.
    * A worker that dies fails the one future it was running, with `WorkerDiedError`, and is
      replaced: the executor lives on. `concurrent.futures.BrokenExecutor` means that workers
      cannot be started, or that *initializer* raised: that is its ``__cause__``.
    * *max_tasks_per_child* works with fork.

    Workers start with the first call. They end with `shutdown`, once all is done when the executor
    is collected, or when the program ends, which waits for what was submitted.

    Args:
        max_workers: How many; by default as many as this process may use cores.
        mp_context: A context of forkshm, or of ``multiprocessing``, of which only the start method
            is used.
        initializer: Called once in each worker before its first task.
        initargs: Its arguments.
        max_tasks_per_child: After so many tasks a worker makes room for a fresh one; None for never.
        pool_options: ``born_shared``, ``task_timeout`` and ``retries``, as for `Pool`.

    Raises:
        ValueError: *max_workers* or *max_tasks_per_child* is less than 1.
        TypeError: *initializer* cannot be called, or *max_tasks_per_child* is no int.

    Fork and threads:
        Any thread may submit. A thread of the pool's own exists while there is work. A forked child
        cannot use its parent's executor, and is told so.

    Example:
        >>> from forkshm import Executor
        >>> with Executor(2) as executor:
        ...     future = executor.submit(pow, 2, 10)
        ...     list(executor.map(abs, [-1, 2, -3])), future.result()
        ([1, 2, 3], 1024)

    See Also:
        `concurrent.futures.ProcessPoolExecutor`.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        max_tasks_per_child: int | None = None,
        **pool_options: Any,
    ) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child < 1:
                raise ValueError("max_tasks_per_child must be >= 1")
        self._max_workers = max_workers or kernel.usable_cores()
        method = None if mp_context is None else mp_context.get_start_method()
        make_pool = functools.partial(
            _make_pool,
            method,
            self._max_workers,
            initializer,
            tuple(initargs),
            max_tasks_per_child,
            **pool_options,
        )
        self._work = _Work(make_pool, 2 * self._max_workers + _AHEAD)
        # Collected: what was submitted is still done.
        weakref.finalize(self, self._work.close).atexit = False

    @property
    def pool(self) -> Pool:
        """The pool behind it; started if it is not running yet.

        Raises:
            RuntimeError: The executor was shut down.
        """
        return self._work.running_pool()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Let a worker call ``fn(*args, **kwargs)``; return the future of its result.

        Raises:
            RuntimeError: The executor was shut down.
            concurrent.futures.BrokenExecutor: See the class.
            PoolClosedError: This is a forked child of the process that made the executor.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._work.add(_Call(future, fn, args, kwargs))
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: bool | str = False,
    ) -> Iterator[T]:
        """Return an iterator over ``fn(*items)`` for the items of *iterables* side by side, in their order.

        Args:
            fn: What to call.
            iterables: Taken whole at once, unless there is a *buffersize*.
            timeout: Seconds from this call after which waiting for a result raises TimeoutError.
            chunksize: Items in one task.
            buffersize: Chunks whose results were not taken yet, at the most; more input is taken
                as results are.
            progress: Show a bar: True or ``"tqdm"``, or ``"rich"``.

        Raises:
            ValueError: *chunksize* or *buffersize* is less than 1.
            TypeError: *buffersize* is no int.
            MissingDependencyError: The library of *progress* is not installed.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None:
            if not isinstance(buffersize, int):
                raise TypeError("buffersize must be an integer or None")
            if buffersize < 1:
                raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        whole = None if buffersize is not None else list(zip(*iterables, strict=False))
        bar = open_bar(progress, None if whole is None else len(whole)) if progress else no_bar
        items = iter(zip(*iterables, strict=False) if whole is None else whole)
        chunks = iter(lambda: list(itertools.islice(items, chunksize)), [])
        first = chunks if buffersize is None else itertools.islice(chunks, buffersize)
        futures = collections.deque(self.submit(_call_each, fn, chunk) for chunk in first)
        # An iterator of a function of its own, so that all of the above happens now.
        more = (lambda: None) if buffersize is None else _submit_next(weakref.ref(self), fn, chunks)
        return _results(futures, more, deadline, bar)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end the workers when all is done.

        Args:
            wait: Return only then.
            cancel_futures: Cancel what no worker was given yet.
        """
        self._work.close(cancel=cancel_futures)
        if wait:
            self._work.wait()


class _Call(NamedTuple):
    future: concurrent.futures.Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Work:
    """What an executor has to do; lives until that is done, also when the executor was collected."""

    def __init__(self, make_pool: Callable[[], Pool], limit: int) -> None:
        self._make_pool = make_pool
        self._limit = limit
        self._owner = os.getpid()
        # Reentrant: the collector may close an executor anywhere.
        self._lock = threading.RLock()
        self._pool: Pool | None = None
        self._waiting: collections.deque[_Call] = collections.deque()
        self._running = 0
        self._closed = False
        self._ended = threading.Event()
        self._broken: BaseException | None = None
        _works.add(self)

    def running_pool(self) -> Pool:
        """Return the pool; started if need be."""
        with self._lock:
            self._check()
            if self._pool is None:
                self._pool = self._make_pool()
            return self._pool

    def _check(self) -> None:
        if self._owner != os.getpid():
            raise PoolClosedError(
                f"this executor belongs to process {self._owner}, and this is its child {os.getpid()}: "
                "make one in this process"
            )
        if self._broken is not None:
            raise _broken_by(self._broken)
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def add(self, call: _Call) -> None:
        """Take a call, and hand it to the pool now or as soon as there is room."""
        with self._lock:
            self.running_pool()
            self._waiting.append(call)
        self._hand_over()

    def _hand_over(self) -> None:
        while True:
            with self._lock:
                pool = self._pool
                if pool is None or not self._waiting or self._running >= self._limit:
                    break
                call = self._waiting.popleft()
                self._running += 1
            if not call.future.set_running_or_notify_cancel():
                with self._lock:
                    self._running -= 1
                continue
            answer = functools.partial(self._answer, call.future)
            fail = functools.partial(self._fail, call.future)
            try:
                pool.apply_async(call.function, call.args, call.kwargs, answer, fail)
            except Exception as error:
                fail(error)
            del call, answer, fail
        self._end_if_done()

    def _answer(self, future: concurrent.futures.Future[Any], value: Any) -> None:
        with self._lock:
            self._running -= 1
        future.set_result(value)
        del future, value
        self._hand_over()

    def _fail(self, future: concurrent.futures.Future[Any], error: BaseException) -> None:
        pool = self._pool
        with self._lock:
            self._running -= 1
            if pool is not None and self._broken is None and pool._dispatcher._failure is error:
                self._broken = error  # not the task's: the pool cannot go on
            waiting: list[_Call] = []
            if self._broken is not None:
                waiting, self._waiting = list(self._waiting), collections.deque()
        future.set_exception(_broken_by(error) if error is self._broken else error)
        for call in waiting:
            if call.future.set_running_or_notify_cancel():
                call.future.set_exception(_broken_by(error))
        del future, error
        self._hand_over()

    def close(self, *, cancel: bool = False) -> None:
        """Take no more; end when all is done."""
        if self._owner != os.getpid():
            return
        with self._lock:
            self._closed = True
            cancelled: list[_Call] = []
            if cancel:
                cancelled, self._waiting = list(self._waiting), collections.deque()
        for call in cancelled:
            call.future.cancel()
            call.future.set_running_or_notify_cancel()
        self._end_if_done()

    def _end_if_done(self) -> None:
        with self._lock:
            if not self._closed or self._waiting or self._running or self._ended.is_set():
                return
            pool, self._pool = self._pool, None
            if pool is None:
                # Nothing was ever started, or another thread is ending it.
                if not self._is_ending:
                    self._ended.set()
                return
            self._is_ending = True
        try:
            pool.close()
            pool.join()
        finally:
            self._ended.set()

    _is_ending = False

    def wait(self) -> None:
        """Wait until all is done and the workers have ended."""
        if self._owner != os.getpid():
            return
        pool = self._pool
        if pool is not None and pool._dispatcher._helper is threading.current_thread():
            return  # called by a callback of a future: it is this thread that is going to end the pool
        self._ended.wait()


def _make_pool(method: str | None, *args: Any, **options: Any) -> Pool:
    workers, initializer, initargs, max_tasks = args
    return Pool(workers, initializer, initargs, max_tasks, context=get_context(method), **options)


def _broken_by(error: BaseException) -> concurrent.futures.BrokenExecutor:
    broken = concurrent.futures.BrokenExecutor(f"the workers of this executor cannot go on: {error!r}; make a new one")
    broken.__cause__ = error
    return broken


def _call_each(function: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    return [function(*args) for args in chunk]


def _submit_next(
    executor: weakref.ref[Executor], fn: Callable[..., T], chunks: Iterator[list[tuple[Any, ...]]]
) -> Callable[[], concurrent.futures.Future[list[T]] | None]:
    def submit_next() -> concurrent.futures.Future[list[T]] | None:
        alive = executor()
        chunk = next(chunks, None) if alive is not None else None
        if alive is None or chunk is None:
            return None
        return alive.submit(_call_each, fn, chunk)

    return submit_next


def _results(
    futures: collections.deque[concurrent.futures.Future[list[T]]],
    more: Callable[[], concurrent.futures.Future[list[T]] | None],
    deadline: float | None,
    bar: Bar,
) -> Iterator[T]:
    try:
        while futures:
            next_future = more()
            if next_future is not None:
                futures.append(next_future)
            # Taken off first, so that nothing here holds what the caller has let go of.
            values = _result_of(futures.popleft(), deadline)
            values.reverse()
            while values:
                bar.update(1)
                yield values.pop()
    finally:
        bar.close()
        for future in futures:
            future.cancel()


def _result_of(future: concurrent.futures.Future[list[T]], deadline: float | None) -> list[T]:
    try:
        return future.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except concurrent.futures.TimeoutError:
        future.cancel()
        raise
    finally:
        del future  # it holds the exception, whose traceback holds this frame


_works: weakref.WeakSet[_Work] = weakref.WeakSet()


def _finish_all() -> None:
    # Before the interpreter ends threads and pools, as concurrent.futures does with its own.
    for work in list(_works):
        work.close()
        work.wait()


cast("Any", threading)._register_atexit(_finish_all)
