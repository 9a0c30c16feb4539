"""Pool for asyncio: its calls are awaited.

    async with forkshm.aio.Pool() as pool:
        total = await pool.call(sum, range(10))
        async for value in pool.imap(function, items):
            ...

The event loop itself monitors the pool's socket and workers, without a helper thread. On Windows, where event loops
monitor only sockets, one thread of the pool waits and wakes the loop.
"""

from __future__ import annotations

import asyncio
import collections
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from forkshm import _system
from forkshm import pool as _pool
from forkshm._help import publish
from forkshm.channel import Kind
from forkshm.pool import PickledCallable, Task, chunked
from forkshm.pool.event_loop import LoopDriver, LoopResultSink
from forkshm.pool.observe import length_of, open_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Self

    from typing_extensions import ParamSpec

    from forkshm.pool import PoolReport, PoolStatistics

    P = ParamSpec("P")

__all__ = ("Pool", "Results")

T = TypeVar("T")

# Chunks of an ``imap`` in flight, for each worker.
_WINDOW = 4


class Pool:
    """A `forkshm.Pool` for asyncio, with the same arguments.

    Use it with ``async with``. Leaving the block ends the workers at once, so await all results inside the block.

    **Canceling** the task that awaits a call stops the call. A call that no worker has begun is not started; a worker
    that runs the call is killed and replaced. Other calls continue.

    Args:
        args: Arguments of `forkshm.Pool`.
        kwargs: Keyword arguments of `forkshm.Pool`.

    Raises:
        Exception: As for `forkshm.Pool`.

    Fork and threads:
        A pool belongs to the event loop of its first call and to that loop's thread, until the loop ends. The loop must
        have ``add_reader``, as asyncio's and uvloop's loops do; on Windows, any loop works.

    Example:
        >>> import asyncio, forkshm
        >>> async def main():
        ...     async with forkshm.aio.Pool(2) as pool:
        ...         print(await pool.call(pow, 2, 10))
        ...         print([x async for x in pool.imap(abs, [-1, 2])])
        >>> asyncio.run(main())
        1024
        [1, 2]
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pool = _pool.Pool(*args, **kwargs)
        self._driver: LoopDriver | None = None

    def _running_driver(self) -> LoopDriver:
        loop = asyncio.get_running_loop()
        if self._driver is None or self._driver.loop is not loop:
            if self._driver is not None:
                if not self._driver.is_idle() and not self._driver.loop.is_closed():
                    raise RuntimeError(f"{self!r} is in use in another event loop. Create a pool for this loop.")
                self._driver.close()
            self._driver = LoopDriver(self._pool)
        return self._driver

    async def apply(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> T:
        """Return the result of ``func(*args, **kwds)``, called in a worker; the arguments match `forkshm.Pool.apply`.

        Raises:
            PoolClosedError: The pool has ended.
            WorkerDiedError: The worker died while running the call.
            Exception: The call, or pickling its arguments, raised it.
        """
        # The driver sets the result sink.
        task = self._pool._call(func, args, kwds, cast("Any", None))
        ((success, value),) = await self._running_driver().run([task])
        if success:
            return cast("T", value)
        try:
            raise value
        finally:
            del value  # no cycle of the exception, its traceback and this frame

    async def call(self, func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of ``func(*args, **kwargs)``, called in a worker; like `apply`, with plain arguments.

        Raises:
            Exception: As for `apply`.
        """
        return await self.apply(func, args, kwargs)

    async def map(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        progress: bool | str = False,
    ) -> list[T]:
        """Return ``[func(item) for item in iterable]``, computed by the workers; see `forkshm.Pool.map`."""
        return await self._whole(Kind.MAP, func, iterable, chunksize, progress)

    async def starmap(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        *,
        progress: bool | str = False,
    ) -> list[T]:
        """Return ``[func(*item) for item in iterable]``, computed by the workers."""
        return await self._whole(Kind.STARMAP, func, iterable, chunksize, progress)

    async def _whole(
        self, kind: Kind, func: Callable[..., T], iterable: Iterable[Any], chunksize: int | None, progress: bool | str
    ) -> list[T]:
        result, tasks = self._pool._map(kind, func, iterable, chunksize)
        for task in tasks:
            task.batched = False  # so that each task can be canceled separately
        values: list[T] = []
        lengths = [len(task.arguments) for task in tasks]
        driver = self._running_driver()
        bar = open_bar(progress, result.items, self._pool._dispatcher)
        try:
            answers = await driver.run(tasks, lambda position: bar.update(lengths[position]))
        finally:
            bar.close()
        value: Any = None
        try:
            for success, value in answers:
                if not success:
                    raise value
                values += value
            return values
        finally:
            del answers, value  # no cycle of an exception, its traceback and this frame

    def imap(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        progress: bool | str = False,
    ) -> Results[T]:
        """Return an asynchronous iterator over the results, in order, that reads input as needed.

        For each worker, at most four chunks are in flight or have results that are not consumed yet. Chunks that take
        microseconds are counted in groups of up to 128.
        """
        return Results(self._running_driver(), func, iterable, chunksize, ordered=True, progress=progress)

    def imap_unordered(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        progress: bool | str = False,
    ) -> Results[T]:
        """Return an asynchronous iterator over the results in the order in which they arrive; else like `imap`."""
        return Results(self._running_driver(), func, iterable, chunksize, ordered=False, progress=progress)

    def terminate(self) -> None:
        """End the workers now; awaited calls raise `PoolClosedError`."""
        try:
            self._pool.terminate()
        finally:
            if self._driver is not None:
                self._driver.close()

    def statistics(self) -> PoolStatistics:
        """Return counts of the tasks, messages and bytes moved so far; see `forkshm.Pool.statistics`."""
        return self._pool.statistics()

    def report(self) -> PoolReport:
        """Return how the workers spent their time; see `forkshm.Pool.report`."""
        return self._pool.report()

    async def __aenter__(self) -> Self:
        self._pool._dispatcher.check_accepting()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            self.terminate()
        except BaseException:  # interrupted: nobody else would end the workers
            self.terminate()
            raise

    def __repr__(self) -> str:
        return f"<{_system.path_of(type(self))} of {self._pool!r}>"


class Results(Generic[T]):
    """Asynchronous iterator over results, returned by `Pool.imap` and `Pool.imap_unordered`; use ``async for``.

    An exception is raised in place of its chunk; iteration can continue after it. Call `aclose` to stop early and
    cancel the remaining work.
    """

    def __init__(
        self,
        driver: LoopDriver,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int,
        *,
        ordered: bool,
        progress: bool | str = False,
    ) -> None:
        driver.pool._dispatcher.check_accepting()
        if chunksize < 1:
            raise ValueError(f"chunksize must be at least 1, got {chunksize}")
        self._driver = driver
        self._ordered = ordered
        self._function = PickledCallable(driver.pool._dispatcher.packer, func, for_many=True)
        self._chunks: Iterator[list[Any]] = chunked(iter(iterable), chunksize)
        self._window = _WINDOW * driver.pool._worker_group.size
        self._sink = LoopResultSink(driver, self._wake, chunksize)
        self._submitted = 0
        self._taken = 0
        self._exhausted = False
        self._input_error: Exception | None = None
        self._values: collections.deque[T] = collections.deque()
        self._came = asyncio.Event()
        self._bar = open_bar(progress, length_of(iterable), driver.pool._dispatcher)
        if progress:
            # For consumers that stop early: a bar may have a thread.
            weakref.finalize(self, self._bar.close)
        self._fill()

    def _fill(self) -> None:
        while not self._exhausted and self._submitted - self._taken < self._window:
            try:
                chunk = next(self._chunks, None)
                if chunk is None:
                    self._exhausted = True
                    return
                task = Task(Kind.MAP, self._function, chunk, self._sink, self._submitted)
                cast("Any", task).retries = getattr(self._driver.pool._dispatcher, "retries", 0)
                self._driver.submit(self._sink, [task])
                self._submitted += 1
            except Exception as error:  # raised to the consumer at this position
                self._input_error = error
                self._exhausted = True

    def _wake(self) -> None:
        # Cleared first: an event that is set wakes nobody, even if a signal handler raised before it woke everybody.
        self._came.clear()
        self._came.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._values:
            self._fill()
            if self._taken == self._submitted:
                if self._input_error is not None:
                    error, self._input_error = self._input_error, None
                    try:
                        raise error
                    finally:
                        del error  # no cycle of the exception, its traceback and this frame
                self._bar.close()
                raise StopAsyncIteration
            answers = self._sink.answers
            position = self._taken if self._ordered else next(iter(answers), -1)
            if position not in answers:
                self._came.clear()
                await self._came.wait()
                continue
            success, value = self._driver.pool._dispatcher.open(answers[position])
            values: collections.deque[T] = collections.deque(value if success else ())
            # No call between these stores: a signal handler that raises costs no result.
            del answers[position]
            self._taken += 1
            self._values = values
            self._fill()
            if not success:
                self._bar.update(self._sink.chunksize)
                try:
                    raise value
                finally:
                    del value
        self._bar.update(1)
        return self._values.popleft()

    async def aclose(self) -> None:
        """Read no more input, and cancel the chunks in flight."""
        self._bar.close()
        self._exhausted = True
        self._input_error = None
        self._submitted = self._taken
        self._sink.answers.clear()
        self._values.clear()
        self._driver.cancel(self._sink)
        self._came.set()


publish(globals())
