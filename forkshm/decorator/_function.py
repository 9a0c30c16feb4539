"""A decorated function and its methods."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from forkshm import _system
from forkshm.decorator._results import (
    Guarded,
    Into,
    Raised,
    by_arrival,
    check_shared,
    on_cluster,
    one_by_one,
    sorted_out,
    tasks_of,
)
from forkshm.decorator._settings import executor_of, executors, is_worker
from forkshm.pickler import register_named
from forkshm.pool import at_worker_end
from forkshm.pool.observe import length_of, open_bar
from forkshm.processes import refuse_while_main_is_imported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Concatenate, Self, TypedDict

    from typing_extensions import ParamSpec, Unpack

    from forkshm.decorator._settings import Settings
    from forkshm.pool import IMapIterator, PoolReport

    P = ParamSpec("P")
    Q = ParamSpec("Q")

    class CallOptions(TypedDict, total=False):
        """Options that a call may give in place of the decorator's."""

        chunksize: int | None
        progress: bool | str
        ordered: bool
        on_error: str

else:
    from typing import ParamSpec

    P = ParamSpec("P")

__all__ = ("ParallelFunction",)

R = TypeVar("R")
S = TypeVar("S")
Out = TypeVar("Out")

# Number of chunks that an iterator over cluster results submits ahead of the consumer.
_AHEAD = 64
# What ``worker_init`` returned in this process, keyed by the function's token.
_states: dict[str, Any] = {}

# A forked child cannot use the connections in its parent's states.
_system.register_at_fork(after_in_child=_states.clear)


class ParallelFunction(Generic[P, R]):
    """A function decorated with `parallel`: call it directly, or map it over workers.

    The map-like methods accept ``chunksize``, ``progress``, ``ordered`` and ``on_error``, which override the
    decorator's options. The workers start with the first call that needs them and are reused by later calls. Functions
    with equal ``workers``, ``start_method``, ``initializer``, ``task_timeout``, ``retries`` and ``cpu_ids`` share their
    workers. The workers end with `close` or with the program.

    Fork and threads:
        Any thread may call it. A forked child starts its own workers with its first call. In a worker of a pool, a map
        runs in place unless the function was decorated with ``nested=True``.
    """

    __wrapped__: Callable[P, R]
    __name__: str

    def __init__(self, function: Callable[P, R], settings: Settings, token: str) -> None:
        functools.update_wrapper(self, function)
        self._settings = settings
        self._token = token

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function in this process."""
        return self.__wrapped__(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<parallel {self.__wrapped__!r}>"

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(
        self: ParallelFunction[Concatenate[S, Q], R], instance: S, owner: type | None = None
    ) -> ParallelFunction[Q, R]: ...

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        bound = cast("Any", self.__wrapped__).__get__(instance, owner)
        return self if bound is self.__wrapped__ else ParallelFunction(bound, self._settings, self._token)

    def __reduce__(self) -> Any:
        function: Any = self.__wrapped__
        if inspect.ismethod(function):
            return getattr, (function.__self__, function.__name__)
        if function.__module__ != "__main__" and _found(function.__module__, function.__qualname__) is self:
            return str(function.__qualname__)
        return _rebuild, (function, dataclasses.replace(self._settings, cluster=None), self._token)

    @property
    def state(self) -> Any:
        """The value that ``worker_init`` returned in this process; the first access calls it.

        Raises:
            AttributeError: The function was decorated without ``worker_init``.
        """
        if self._settings.worker_init is None:
            raise AttributeError(f"{self!r} has no state: it was decorated without worker_init. Pass worker_init=.")
        if self._token not in _states:
            state = _states[self._token] = self._settings.worker_init()
            if self._settings.worker_exit is not None:
                at_worker_end(self._settings.worker_exit, state)
        return _states[self._token]

    # -- calls --------------------------------------------------------------------------------

    @overload
    def map(self, iterable: Iterable[Any], *, out: None = None, **options: Unpack[CallOptions]) -> list[R]: ...

    @overload
    def map(self, iterable: Iterable[Any], *, out: Out, **options: Unpack[CallOptions]) -> Out: ...

    def map(self, iterable: Iterable[Any], *, out: Any = None, **options: Any) -> Any:
        """Return ``[f(item) for item in iterable]``, computed by the workers.

        Args:
            iterable: The items; consumed completely before the first task is sent.
            out: An array in shared memory. The workers write ``out[i] = f(item)`` for the i-th item, no results are
                sent back, and *out* is returned.
            options: Options of `parallel` that override the decorator's.

        Raises:
            ValueError: *out* is not in shared memory, or an option has an invalid value.
            WorkerDiedError: A worker died, and ``on_error`` is ``"raise"``.
            Exception: The first exception that the function raised, with ``on_error="raise"``.
        """
        return self._whole(iterable, self._with(out, options), starred=False)

    @overload
    def starmap(
        self, iterable: Iterable[Iterable[Any]], *, out: None = None, **options: Unpack[CallOptions]
    ) -> list[R]: ...

    @overload
    def starmap(self, iterable: Iterable[Iterable[Any]], *, out: Out, **options: Unpack[CallOptions]) -> Out: ...

    def starmap(self, iterable: Iterable[Iterable[Any]], *, out: Any = None, **options: Any) -> Any:
        """Return ``[f(*items) for items in iterable]``, computed by the workers; otherwise like `map`."""
        return self._whole(iterable, self._with(out, options), starred=True)

    def imap(self, iterable: Iterable[Any], **options: Unpack[CallOptions]) -> Iterator[R]:
        """Return an iterator over the results, in order, that reads input as needed; see `Pool.imap`.

        A worker that dies fails its whole chunk, with one exception for all of its items.
        """
        settings = self._with(None, options)
        return self._lazily(iterable, settings, ordered=settings.ordered)

    def imap_unordered(self, iterable: Iterable[Any], **options: Unpack[CallOptions]) -> Iterator[R]:
        """Return an iterator over the results in the order in which they arrive; otherwise like `imap`."""
        return self._lazily(iterable, self._with(None, options), ordered=False)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[R]:
        """Return the future of one call, made in a worker."""
        if not self._is_in_place(self._settings):
            return executor_of(self._settings).submit(self, *args, **kwargs)
        future: concurrent.futures.Future[R] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(self(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    async def amap(self, iterable: Iterable[Any], **options: Unpack[CallOptions]) -> list[R]:
        """Return the results like `map`, without blocking the event loop.

        If the awaiting task is canceled, items that have not been given to a worker are not started.
        """
        settings = self._with(None, options)
        if self._is_in_place(settings):
            return self.map(iterable, **options)
        if settings.cluster is not None:
            import asyncio

            return await asyncio.to_thread(lambda: self.map(iterable, **options))
        from forkshm.pool.event_loop import LoopDriver

        items = iterable if isinstance(iterable, (list, tuple, range)) else list(iterable)
        pool = executor_of(settings).pool
        tasks = tasks_of(pool, self, items, settings, starred=False)
        lengths = [len(task.arguments) for task in tasks]
        bar = open_bar(settings.progress, len(items), pool._dispatcher)
        driver = LoopDriver(pool)
        try:
            answers = await driver.run(tasks, lambda position: bar.update(lengths[position]))
        finally:
            driver.close()
            bar.close()
        return sorted_out(
            (
                (position, values if success else [Raised(values)] * lengths[position])
                for position, (success, values) in enumerate(answers)
            ),
            settings,
        )

    def report(self) -> PoolReport:
        """Return how this function's workers spent their time; see `Pool.report`.

        Raises:
            RuntimeError: There are no workers: nothing was mapped yet, or they were closed.
        """
        executor = executors.get(self._settings.pool_key())
        if executor is None:
            raise RuntimeError(f"{self!r} has no workers to report on: they were not started yet, or closed. Call map.")
        return executor.pool.report()

    def close(self) -> None:
        """End this function's workers once they have completed all submitted calls.

        The next mapped call of this function, or of one that shares its workers, starts new workers.
        """
        executor = executors.pop(self._settings.pool_key(), None)
        if executor is not None:
            executor.shutdown()

    # -- how ----------------------------------------------------------------------------------

    def _with(self, out: Any, options: Any) -> Settings:
        if unknown := set(options) - {"chunksize", "progress", "ordered", "on_error"}:
            raise TypeError(
                f"unknown options of a call: {', '.join(sorted(unknown))}. A call takes chunksize, progress, ordered "
                "and on_error; pass other options to the decorator, and further arguments of the function in the "
                "tuples of starmap."
            )
        settings = dataclasses.replace(self._settings, **options)
        if out is not None:
            settings = dataclasses.replace(settings, out=out)
        settings.check()
        return settings

    def _is_in_place(self, settings: Settings) -> bool:
        if settings.nested or not is_worker():
            return False
        refuse_while_main_is_imported()
        return True

    def _whole(self, iterable: Iterable[Any], settings: Settings, *, starred: bool) -> Any:
        items: Any = iterable if isinstance(iterable, (list, tuple, range)) else list(iterable)
        function: Any = self
        if settings.out is not None:
            check_shared(settings.out)
            function = Into(self, settings.out, starred=starred)
            items = list(enumerate(items))
            starred = True
        is_plain = settings.on_error == "raise" and settings.ordered and not settings.progress
        if settings.cluster is not None and not self._is_in_place(settings):
            bar = open_bar(settings.progress, len(items))
            results = []
            try:
                for result in on_cluster(function, items, settings, starred=starred):
                    results.append(result)
                    bar.update(1)
            finally:
                bar.close()
            values = sorted_out([(0, results)], settings)
        elif not self._is_in_place(settings):
            pool = executor_of(settings).pool
            if is_plain:
                call = pool.starmap if starred else pool.map
                values = call(function, items, settings.chunksize)
            else:
                values = sorted_out(by_arrival(pool, function, items, settings, starred=starred), settings)
        else:
            guard = Guarded(function, starred=starred)
            values = sorted_out(((0, [guard(item)]) for item in items), settings)
        return values if settings.out is None else settings.out

    def _lazily(self, iterable: Iterable[Any], settings: Settings, *, ordered: bool) -> Iterator[Any]:
        if settings.out is not None:
            raise ValueError("cannot fill out from imap: it returns the results. Use map or starmap with out.")
        function: Any = self
        guard = Guarded(function, starred=False)
        if self._is_in_place(settings):
            values: Iterator[Any] = map(guard, iterable)
            pool = None
        elif settings.cluster is not None:
            values = on_cluster(function, iterable, settings, starred=False, buffersize=_AHEAD)
            pool = None
        else:
            pool = executor_of(settings).pool
            call = pool.imap if ordered else pool.imap_unordered
            if settings.on_error == "raise":
                values = call(function, iterable, settings.chunksize or 1)
                if not settings.progress:
                    return _until_closed(values)
            else:
                values = call(guard, iterable, settings.chunksize or 1)
        return one_by_one(values, settings, length_of(iterable), pool)


def _until_closed(values: IMapIterator[Any]) -> Iterator[Any]:
    """Yield the results, and cancel the rest when the consumer stops early or is interrupted."""
    try:
        yield from values
    finally:
        values.cancel()


def _found(module: str, qualname: str) -> Any:
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = getattr(found, name, None)
    return found


def _rebuild(function: Any, settings: Settings, token: str) -> Any:
    return ParallelFunction(function, settings, token)


# Functions that a worker can find in its own __main__ are pickled by name.
register_named(ParallelFunction)
