"""@parallel: turn a function into one that can also be mapped over workers."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import inspect
import itertools
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from forkshm import _system
from forkshm._multiprocess import current_process
from forkshm.backend import kernel
from forkshm.channel import Kind
from forkshm.errors import RemoteTraceback, UnsupportedError, remote_text, set_cause, without_frames
from forkshm.executor import Executor
from forkshm.pickler import register_named
from forkshm.pool import IMapIterator, ResultSink, at_worker_end, delivering
from forkshm.pool.observe import length_of, open_bar
from forkshm.region import Mode, mapping_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Concatenate, Self, TypedDict

    from typing_extensions import ParamSpec, Unpack

    from forkshm.pool import Answer, Pool, PoolReport, Task

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

__all__ = ("ParallelFunction", "parallel")

R = TypeVar("R")
S = TypeVar("S")
Out = TypeVar("Out")

_ON_ERROR = ("raise", "return", "skip")


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The options of one decorator."""

    workers: int | None = None
    start_method: str | None = None
    initializer: Callable[[], object] | None = None
    timeout: float | None = None
    retries: int | None = None
    chunksize: int | None = None
    progress: bool | str = False
    worker_state: Callable[[], object] | None = None
    worker_exit: Callable[[Any], object] | None = None
    cpu_ids: Any = None
    ordered: bool = True
    out: Any = None
    on_error: str = "raise"
    nested: bool = False
    cluster: Any = None

    def check(self) -> None:
        """Raise for invalid options, before a pool is created."""
        if self.on_error not in _ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(map(repr, _ON_ERROR))}, got {self.on_error!r}")
        if self.chunksize is not None and self.chunksize < 1:
            raise ValueError(f"chunksize must be at least 1, got {self.chunksize}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.worker_exit is not None and self.worker_state is None:
            raise ValueError(
                "cannot use worker_exit without worker_state: worker_exit is called with the value that worker_state "
                "returned. Pass worker_state as well."
            )
        if self.out is not None and self.cluster is not None:
            raise UnsupportedError(
                "cannot fill out on a cluster: out is memory of this machine, which other nodes cannot write to. "
                "Use the list that map returns.",
                capability="cluster",
            )
        if self.out is not None and self.on_error == "return":
            raise ValueError("cannot use on_error='return' with out: out cannot hold exceptions. Use on_error='skip'.")

    def pool_key(self) -> Any:
        """Return the key of the pool; functions with equal keys share their workers."""
        cpus = None if self.cpu_ids is None else tuple(map(str, self.cpu_ids))
        cluster = self.cluster if isinstance(self.cluster, str) else id(self.cluster)
        return self.workers, self.start_method, self.initializer, self.timeout, self.retries, cpus, cluster


# -- the workers behind the functions ---------------------------------------------------------

_executors: dict[Any, Executor] = {}

# Number of chunks that an iterator over cluster results submits ahead of the consumer.
_AHEAD = 64
# What ``worker_state`` returned in this process, keyed by the function's token.
_states: dict[str, Any] = {}
_counter = itertools.count()

# A forked child cannot use its parent's workers or the connections in its parent's states.
_system.register_at_fork(after_in_child=_executors.clear)
_system.register_at_fork(after_in_child=_states.clear)


def _executor_of(settings: _Settings) -> Executor:
    key = settings.pool_key()
    executor = _executors.get(key)
    if executor is not None:
        if settings.cluster is not None:
            return executor
        try:
            executor.pool._dispatcher.check_accepting()
        except Exception:  # for example, the initializer raised; a new pool may succeed
            executor.shutdown(wait=False, cancel_futures=True)
        else:
            return executor
    # Options that were not given keep the executor's defaults.
    given = {"task_timeout": settings.timeout, "retries": settings.retries, "cpu_ids": settings.cpu_ids}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if settings.cluster is not None:
        if settings.initializer is not None:
            options["initializer"] = settings.initializer
        executor = _executors[key] = Executor(settings.workers, cluster=settings.cluster, **options)
        return executor
    context = None
    if settings.start_method is not None:
        context = multiprocessing.get_context(settings.start_method)
    executor = _executors[key] = Executor(settings.workers, context, settings.initializer, **options)
    return executor


def _is_worker() -> bool:
    """Return whether this process is a worker of a pool, forkshm's or the standard library's."""
    return "PoolWorker" in current_process().name or "PoolWorker" in multiprocessing.current_process().name


# -- the function -------------------------------------------------------------------------------


class ParallelFunction(Generic[P, R]):
    """A function decorated with `parallel`: call it directly, or map it over workers.

    The map-like methods accept ``chunksize``, ``progress``, ``ordered`` and ``on_error``, which override the
    decorator's options. The workers start with the first call that needs them and are reused by later calls. Functions
    with equal ``workers``, ``start_method``, ``initializer``, ``timeout``, ``retries`` and ``cpu_ids`` share their
    workers. The workers end with `close` or with the program.

    Fork and threads:
        Any thread may call it. A forked child starts its own workers with its first call. In a worker of a pool, a map
        runs in place unless the function was decorated with ``nested=True``.
    """

    __wrapped__: Callable[P, R]
    __name__: str

    def __init__(self, function: Callable[P, R], settings: _Settings, token: str) -> None:
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
        """The value that ``worker_state`` returned in this process; the first access calls it.

        Raises:
            AttributeError: The function was decorated without ``worker_state``.
        """
        if self._settings.worker_state is None:
            raise AttributeError(f"{self!r} has no state: it was decorated without worker_state. Pass worker_state=.")
        if self._token not in _states:
            state = _states[self._token] = self._settings.worker_state()
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
            return _executor_of(self._settings).submit(self, *args, **kwargs)
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
        pool = _executor_of(settings).pool
        tasks = _tasks(pool, self, items, settings, starred=False)
        lengths = [len(task.arguments) for task in tasks]
        bar = open_bar(settings.progress, len(items), pool._dispatcher)
        driver = LoopDriver(pool)
        try:
            answers = await driver.run(tasks, lambda position: bar.update(lengths[position]))
        finally:
            driver.close()
            bar.close()
        return _sorted_out(
            (
                (position, values if success else [_Raised(values)] * lengths[position])
                for position, (success, values) in enumerate(answers)
            ),
            settings,
        )

    def report(self) -> PoolReport:
        """Return how this function's workers spent their time; see `Pool.report`.

        Raises:
            RuntimeError: There are no workers: nothing was mapped yet, or they were closed.
        """
        executor = _executors.get(self._settings.pool_key())
        if executor is None:
            raise RuntimeError(f"{self!r} has no workers to report on: they were not started yet, or closed. Call map.")
        return executor.pool.report()

    def close(self) -> None:
        """End this function's workers once they have completed all submitted calls.

        The next mapped call of this function, or of one that shares its workers, starts new workers.
        """
        executor = _executors.pop(self._settings.pool_key(), None)
        if executor is not None:
            executor.shutdown()

    # -- how ----------------------------------------------------------------------------------

    def _with(self, out: Any, options: Any) -> _Settings:
        if unknown := set(options) - {"chunksize", "progress", "ordered", "on_error"}:
            raise TypeError(
                f"unknown options of a call: {', '.join(sorted(unknown))}. A call takes chunksize, progress, ordered "
                "and on_error; pass other options to the decorator."
            )
        settings = dataclasses.replace(self._settings, **options)
        if out is not None:
            settings = dataclasses.replace(settings, out=out)
        settings.check()
        return settings

    def _is_in_place(self, settings: _Settings) -> bool:
        return not settings.nested and _is_worker()

    def _whole(self, iterable: Iterable[Any], settings: _Settings, *, starred: bool) -> Any:
        items: Any = iterable if isinstance(iterable, (list, tuple, range)) else list(iterable)
        function: Any = self
        if settings.out is not None:
            _check_shared(settings.out)
            function = _Into(self, settings.out, starred=starred)
            items = list(enumerate(items))
            starred = True
        is_plain = settings.on_error == "raise" and settings.ordered and not settings.progress
        if settings.cluster is not None and not self._is_in_place(settings):
            results = _on_cluster(function, items, settings, starred=starred)
            values = _sorted_out(((index, [result]) for index, result in enumerate(results)), settings)
        elif not self._is_in_place(settings):
            pool = _executor_of(settings).pool
            if is_plain:
                call = pool.starmap if starred else pool.map
                values = call(function, items, settings.chunksize)
            else:
                values = _sorted_out(_by_arrival(pool, function, items, settings, starred=starred), settings)
        else:
            guard = _Guarded(function, starred=starred)
            values = _sorted_out(((0, [guard(item)]) for item in items), settings)
        return values if settings.out is None else settings.out

    def _lazily(self, iterable: Iterable[Any], settings: _Settings, *, ordered: bool) -> Iterator[Any]:
        if settings.out is not None:
            raise ValueError("cannot fill out from imap: it returns the results. Use map or starmap with out.")
        function: Any = self
        guard = _Guarded(function, starred=False)
        if self._is_in_place(settings):
            values: Iterator[Any] = map(guard, iterable)
            pool = None
        elif settings.cluster is not None:
            values = _on_cluster(function, iterable, settings, starred=False, buffersize=_AHEAD)
            pool = None
        else:
            pool = _executor_of(settings).pool
            call = pool.imap if ordered else pool.imap_unordered
            if settings.on_error == "raise":
                values = call(function, iterable, settings.chunksize or 1)
                if not settings.progress:
                    return _until_closed(values)
            else:
                values = call(guard, iterable, settings.chunksize or 1)
        return _one_by_one(values, settings, length_of(iterable), pool)


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


def _rebuild(function: Any, settings: _Settings, token: str) -> Any:
    return ParallelFunction(function, settings, token)


# Functions that a worker can find in its own __main__ are pickled by name.
register_named(ParallelFunction)


# -- what workers run, and what comes back ------------------------------------------------------


class _Raised:
    """An exception that stands in place of a result."""

    def __init__(self, error: BaseException, text: str | None = None) -> None:
        self.error = error
        self.text = text

    def get(self) -> BaseException:
        """Return the exception, with the worker's traceback as its cause."""
        if self.text is not None:
            set_cause(self.error, RemoteTraceback(self.text))
        return self.error


class _Guarded:
    """Call a function, and return its exception instead of raising it."""

    def __init__(self, function: Callable[..., Any], *, starred: bool) -> None:
        self.function = function
        self.starred = starred

    def __call__(self, item: Any) -> Any:
        try:
            return self.function(*item) if self.starred else self.function(item)
        except Exception as error:
            if not _is_worker():
                return _Raised(error)
            text = remote_text(error)
            # The traceback's frames keep the arguments alive.
            without_frames(error)
            return _Raised(error, text)


class _Into:
    """Call a function, and store its result at the item's index of *out*."""

    def __init__(self, function: Callable[..., Any], out: Any, *, starred: bool) -> None:
        self.function = function
        self.out = out
        self.starred = starred

    def __call__(self, index: int, item: Any) -> None:
        self.out[index] = self.function(*item) if self.starred else self.function(item)


class _ByArrival(ResultSink):
    """Collects the answers to the chunks of one map as they arrive."""

    def __init__(self, chunksize: int) -> None:
        super().__init__()
        self.chunksize = chunksize
        self.arrived: dict[int, Answer] = {}

    def deliver(self, task: Task, answer: Answer) -> None:
        with delivering:
            if not task.is_delivered:
                self.arrived[task.position] = answer
                task.is_delivered = True


def _tasks(pool: Pool, function: Any, items: Sequence[Any], settings: _Settings, *, starred: bool) -> list[Task]:
    """Return the tasks of a map; their sink is not set yet."""
    chunksize = settings.chunksize
    if settings.on_error != "raise":
        function, starred = _Guarded(function, starred=starred), False
        chunksize = chunksize or 1  # a worker that dies then fails one item; tiny tasks are still sent together
    return pool._map(Kind.STARMAP if starred else Kind.MAP, function, items, chunksize)[1]


def _by_arrival(
    pool: Pool, function: Any, items: Sequence[Any], settings: _Settings, *, starred: bool
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the position and the results of each chunk, as they arrive."""
    tasks = _tasks(pool, function, items, settings, starred=starred)
    sink = _ByArrival(len(tasks[0].arguments) if tasks else 1)
    for task in tasks:
        task.sink = sink
    lengths = [len(task.arguments) for task in tasks]
    bar = open_bar(settings.progress, len(items), pool._dispatcher)
    try:
        if tasks:
            pool._dispatcher.submit(tasks, waited_for=True)
        for _ in lengths:
            pool._dispatcher.drive(lambda: bool(sink.arrived))
            position = next(iter(sink.arrived))
            success, values = pool._dispatcher.open(sink.arrived.pop(position))
            yield position, values if success else [_Raised(values)] * lengths[position]
            bar.update(lengths[position])
    finally:
        bar.close()
        # After an interrupt, the remaining results are not needed.
        pool._dispatcher.cancel([task for task in tasks if not task.is_delivered])


def _sorted_out(chunks: Iterable[tuple[int, list[Any]]], settings: _Settings) -> list[Any]:
    """Return the results in the requested order, with errors handled as requested."""
    came = list(chunks)
    if settings.ordered:
        came.sort(key=lambda chunk: chunk[0])
    return list(_as_wanted((value for _, values in came for value in values), settings))


def _as_wanted(values: Iterable[Any], settings: _Settings) -> Iterator[Any]:
    for value in values:
        if not isinstance(value, _Raised):
            yield value
        elif settings.on_error == "raise":
            raise value.get()
        elif settings.on_error == "return":
            yield value.get()


def _one_by_one(values: Iterator[Any], settings: _Settings, total: int | None, pool: Pool | None) -> Iterator[Any]:
    def guarded() -> Iterator[Any]:
        while True:
            try:
                value = next(values)
            except StopIteration:
                return
            except Exception as error:  # raised for a whole chunk, or by the input
                value = _Raised(error)
            yield value
            bar.update(1)

    bar = open_bar(settings.progress, total, None if pool is None else pool._dispatcher)
    try:
        yield from _as_wanted(guarded(), settings)
    finally:
        bar.close()
        if isinstance(values, IMapIterator):
            values.cancel()
        elif settings.cluster is not None:
            values.close()  # type: ignore[attr-defined]  # a generator


def _on_cluster(
    function: Any, items: Iterable[Any], settings: _Settings, *, starred: bool, buffersize: int | None = None
) -> Iterator[Any]:
    """Yield the results of a map over the nodes of a cluster, in order, with a `_Raised` for each exception."""
    executor: Any = _executor_of(settings)
    iterables = zip(*items, strict=True) if starred else (items,)
    outcomes = executor.outcomes(function, *iterables, chunksize=settings.chunksize, buffersize=buffersize)
    try:
        for error, value in outcomes:
            yield value if error is None else _Raised(error)
    finally:
        outcomes.close()


def _check_shared(out: Any) -> None:
    interface = getattr(out, "__array_interface__", None)  # works for non-contiguous arrays as well
    address = kernel.address_of(memoryview(out)) if interface is None else interface["data"][0]
    mapping = mapping_at(address)
    if mapping is None or mapping.mode is not Mode.read_write:
        raise ValueError(
            f"cannot fill out, of type {type(out).__name__}: it is not in shared memory that workers can write. "
            "Create it with forkshm.empty()."
        )


# -- the decorator ------------------------------------------------------------------------------


@overload
def parallel(function: Callable[P, R], /, **options: Any) -> ParallelFunction[P, R]: ...


@overload
def parallel(
    *,
    workers: int | None = None,
    start_method: str | None = None,
    chunksize: int | None = None,
    progress: bool | str = False,
    timeout: float | None = None,
    retries: int | None = None,
    initializer: Callable[[], object] | None = None,
    worker_state: Callable[[], S] | None = None,
    worker_exit: Callable[[S], object] | None = None,
    cpu_ids: Sequence[int | Sequence[int]] | None = None,
    ordered: bool = True,
    out: Any = None,
    on_error: str = "raise",
    nested: bool = False,
    cluster: Any = None,
) -> Callable[[Callable[P, R]], ParallelFunction[P, R]]: ...


def parallel(function: Any = None, /, **options: Any) -> Any:  # noqa: D417 - they are the keywords above
    """Return the function with methods that map it over worker processes; use as a decorator, bare or with options.

    A plain call of the decorated function runs in this process, unchanged. The methods ``map``, ``starmap``, ``imap``,
    ``imap_unordered``, ``submit`` and ``amap`` use workers; see `ParallelFunction`. Methods can be decorated, too:
    their object is sent once for each map. Variables that a function closes over are copied once for all workers.

    Args:
        function: The function, if this is called with it: as a decorator without options, or
            ``parallel(function, workers=2)``.
        workers: Number of workers; by default the number of cores that this process may use.
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; by default the current start method.
        chunksize: Number of items in one task. By default each worker gets about four tasks; in ``imap``, and if
            *on_error* is not ``"raise"``, a task has one item.
        progress: Show a progress bar: True or ``"tqdm"``, or ``"rich"``.
        timeout: Time limit for an item, in seconds; see *task_timeout* of `Pool`.
        retries: How often a task is repeated after its worker died; see `Pool`.
        initializer: Called in each worker before its first task.
        worker_state: Called once in each process that reads ``function.state``, which is its return value: for example
            a connection, a model or a cache.
        worker_exit: Called with the value that *worker_state* returned when its process ends normally; see `Pool`.
        cpu_ids: Cores that workers may use; see `Pool`.
        ordered: If false, return results in the order in which they arrive.
        out: An array in shared memory that ``map`` and ``starmap`` fill; see `ParallelFunction.map`.
        on_error: ``"raise"`` raises the first exception, ``"return"`` returns exceptions in place of results, and
            ``"skip"`` omits failed items.
        nested: If true, use workers even inside a worker; otherwise a map runs in place there.
        cluster: A Dask cluster, as for `forkshm.Executor`. The workers run on its nodes, *workers* on each node.

    Raises:
        TypeError: The decorated object is not a function, or is a coroutine function.
        ValueError: An option has an invalid value.

    Fork and threads:
        See `ParallelFunction`.

    Example:
        >>> import forkshm
        >>> @forkshm.parallel(workers=2)
        ... def square(x):
        ...     return x * x
        >>> square(3), square.map(range(5)), square.submit(7).result()
        (9, [0, 1, 4, 9, 16], 49)
        >>> square.close()

    See Also:
        ``Parallel`` and ``delayed`` of joblib.
    """
    settings = _Settings(**options)
    settings.check()
    if function is None:
        return functools.partial(_decorate, settings=settings)
    return _decorate(function, settings=settings)


def _decorate(function: Any, *, settings: _Settings) -> Any:
    plain = getattr(function, "__func__", function)  # of a classmethod or staticmethod
    if not callable(plain) or not hasattr(function, "__get__"):
        raise TypeError(f"@parallel can decorate only functions and methods, got {function!r}")
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError(
            f"cannot decorate the coroutine function {function!r}: a worker cannot await it. Decorate a plain function."
        )
    return ParallelFunction(function, settings, f"{os.getpid()}-{next(_counter)}")
