"""@parallel: a function that stays a function, and can be mapped over workers."""

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
from forkshm.errors import RemoteTraceback, UnsupportedError, remote_text
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
        """Raise for what can be told before there is a pool."""
        if self.on_error not in _ON_ERROR:
            raise ValueError(f"on_error must be one of {', '.join(map(repr, _ON_ERROR))}, got {self.on_error!r}")
        if self.chunksize is not None and self.chunksize < 1:
            raise ValueError(f"chunksize must be at least 1, got {self.chunksize}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.worker_exit is not None and self.worker_state is None:
            raise ValueError("worker_exit gets what worker_state returned, and there is no worker_state")
        if self.out is not None and self.cluster is not None:
            raise UnsupportedError(
                "cannot fill out on a cluster: it is memory of this machine, and other nodes cannot write to it. "
                "Take the results that map returns.",
                capability="cluster",
            )
        if self.out is not None and self.on_error == "return":
            raise ValueError("on_error='return' gives exceptions back, and out has no room for them: use 'skip'")

    def pool_key(self) -> Any:
        """What functions have in common that share their workers."""
        cpus = None if self.cpu_ids is None else tuple(map(str, self.cpu_ids))
        cluster = self.cluster if isinstance(self.cluster, str) else id(self.cluster)
        return self.workers, self.start_method, self.initializer, self.timeout, self.retries, cpus, cluster


# -- the workers behind the functions ---------------------------------------------------------

_executors: dict[Any, Executor] = {}

# Chunks that an iterator over the results of a cluster sends before it hands out the first.
_AHEAD = 64
#: By the token of a function: what its ``worker_state`` made in this process.
_states: dict[str, Any] = {}
_counter = itertools.count()

# A child has neither its parent's workers nor its connections.
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
        except Exception:  # its initializer raised, say: the next call may have better luck
            executor.shutdown(wait=False, cancel_futures=True)
        else:
            return executor
    # Passed on only if given.
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
    """Tell whether this process is a worker of a pool, ours or the standard library's."""
    return "PoolWorker" in current_process().name or "PoolWorker" in multiprocessing.current_process().name


# -- the function -------------------------------------------------------------------------------


class ParallelFunction(Generic[P, R]):
    """A function that `parallel` has decorated: call it as ever, or map it over workers.

    Every call of a map-like method takes ``chunksize``, ``progress``, ``ordered`` and ``on_error`` in place of the
    decorator's. The workers start with the first call that needs them, are used again by later ones, and by every
    function with equal ``workers``, ``start_method``, ``initializer``, ``timeout``, ``retries`` and ``cpu_ids``, and
    end with the program, or with `close`.

    Fork and threads:
        Any thread may call it. A forked child has workers of its own, from its first call on. In a worker of a pool a
        map runs in place, unless the function was decorated with ``nested=True``.
    """

    __wrapped__: Callable[P, R]
    __name__: str

    def __init__(self, function: Callable[P, R], settings: _Settings, token: str) -> None:
        functools.update_wrapper(self, function)
        self._settings = settings
        self._token = token

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function, here."""
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
        """What ``worker_state`` returned in this process; it is called when this is first asked for.

        Raises:
            AttributeError: The function was decorated without ``worker_state``.
        """
        if self._settings.worker_state is None:
            raise AttributeError(f"{self!r} has no state: decorate it with worker_state=")
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
            iterable: Taken whole before the first task is sent.
            out: An array in shared memory: workers write ``out[i] = f(item)`` for the i-th item themselves, nothing is
                sent back, and *out* is what you get.
            options: Options of `parallel`, in place of the decorator's.

        Raises:
            ValueError: *out* is not in shared memory, or an option has a value it cannot have.
            WorkerDiedError: A worker died, and ``on_error`` is ``"raise"``.
            Exception: The first that the function raised, with ``on_error="raise"``.
        """
        return self._whole(iterable, self._with(out, options), starred=False)

    @overload
    def starmap(
        self, iterable: Iterable[Iterable[Any]], *, out: None = None, **options: Unpack[CallOptions]
    ) -> list[R]: ...

    @overload
    def starmap(self, iterable: Iterable[Iterable[Any]], *, out: Out, **options: Unpack[CallOptions]) -> Out: ...

    def starmap(self, iterable: Iterable[Iterable[Any]], *, out: Any = None, **options: Any) -> Any:
        """Return ``[f(*items) for items in iterable]``, computed by the workers; else as `map`."""
        return self._whole(iterable, self._with(out, options), starred=True)

    def imap(self, iterable: Iterable[Any], **options: Unpack[CallOptions]) -> Iterator[R]:
        """Return an iterator over the results, in order, that takes input as it is needed; see `Pool.imap`.

        A worker that dies fails its whole chunk: there is one exception for it.
        """
        settings = self._with(None, options)
        return self._lazily(iterable, settings, ordered=settings.ordered)

    def imap_unordered(self, iterable: Iterable[Any], **options: Unpack[CallOptions]) -> Iterator[R]:
        """Like `imap`, but in the order in which results come."""
        return self._lazily(iterable, self._with(None, options), ordered=False)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[R]:
        """Let a worker call the function; return the future of its result."""
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
        """Like `map`, for asyncio: the event loop goes on meanwhile.

        When the awaiting task is cancelled, items that no worker was given yet are not begun.
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
        """Return where the time of the workers behind this function went; see `Pool.report`.

        Raises:
            RuntimeError: There are none: nothing was mapped yet, or they were closed.
        """
        executor = _executors.get(self._settings.pool_key())
        if executor is None:
            raise RuntimeError(f"{self!r} has no workers yet, or no more: map something")
        return executor.pool.report()

    def close(self) -> None:
        """End the workers behind this function once they have done what was submitted.

        The next call of this, or of a function that shares them, starts new ones.
        """
        executor = _executors.pop(self._settings.pool_key(), None)
        if executor is not None:
            executor.shutdown()

    # -- how ----------------------------------------------------------------------------------

    def _with(self, out: Any, options: Any) -> _Settings:
        if unknown := set(options) - {"chunksize", "progress", "ordered", "on_error"}:
            raise TypeError(f"{', '.join(sorted(unknown))}: not an option of a call; give it to the decorator")
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
            raise ValueError("out is for map and starmap: an iterator gives you the results")
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
    """Yield the results, and cancel the rest when the consumer has enough, or is interrupted."""
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


# What a worker has of __main__ it need not be sent.
register_named(ParallelFunction)


# -- what workers run, and what comes back ------------------------------------------------------


class _Raised:
    """In place of a result: what was raised for it."""

    def __init__(self, error: BaseException, text: str | None = None) -> None:
        self.error = error
        self.text = text

    def get(self) -> BaseException:
        """Return the exception, with the worker's traceback as its cause."""
        if self.text is not None:
            self.error.__cause__ = RemoteTraceback(self.text)
        return self.error


class _Guarded:
    """Calls a function, and returns what it raises."""

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
            # Its frames hold the arguments.
            error.__traceback__ = None
            return _Raised(error, text)


class _Into:
    """Calls a function, and puts what it returns where it belongs."""

    def __init__(self, function: Callable[..., Any], out: Any, *, starred: bool) -> None:
        self.function = function
        self.out = out
        self.starred = starred

    def __call__(self, index: int, item: Any) -> None:
        self.out[index] = self.function(*item) if self.starred else self.function(item)


class _ByArrival(ResultSink):
    """The answers to the chunks of one map, as they come."""

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
    """Return the tasks of a map, whose job is still to be set."""
    chunksize = settings.chunksize
    if settings.on_error != "raise":
        function, starred = _Guarded(function, starred=starred), False
        chunksize = chunksize or 1  # so that a worker that dies fails one item; tiny ones share messages all the same
    return pool._map(Kind.STARMAP if starred else Kind.MAP, function, items, chunksize)[1]


def _by_arrival(
    pool: Pool, function: Any, items: Sequence[Any], settings: _Settings, *, starred: bool
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the position of each chunk and its results, as they come."""
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
        # An interrupt: nobody wants the rest.
        pool._dispatcher.cancel([task for task in tasks if not task.is_delivered])


def _sorted_out(chunks: Iterable[tuple[int, list[Any]]], settings: _Settings) -> list[Any]:
    """Return the results as they are wanted."""
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
            except Exception as error:  # of a whole chunk, or of the input
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
    """Yield the results of a map over the nodes of a cluster, in order; a `_Raised` for an exception."""
    executor: Any = _executor_of(settings)
    iterables = zip(*items, strict=True) if starred else (items,)
    outcomes = executor.outcomes(function, *iterables, chunksize=settings.chunksize, buffersize=buffersize)
    try:
        for error, value in outcomes:
            yield value if error is None else _Raised(error)
    finally:
        outcomes.close()


def _check_shared(out: Any) -> None:
    interface = getattr(out, "__array_interface__", None)  # of an array whose bytes do not lie together, too
    address = kernel.address_of(memoryview(out)) if interface is None else interface["data"][0]
    mapping = mapping_at(address)
    if mapping is None or mapping.mode is not Mode.read_write:
        raise ValueError(
            f"out, of type {type(out).__name__}, is not in shared memory that workers can write: "
            "make it with forkshm.empty()"
        )


# -- the decorator ------------------------------------------------------------------------------


@overload
def parallel(function: Callable[P, R], /) -> ParallelFunction[P, R]: ...


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
    """Decorate a function, bare or with options, so that it can be mapped over worker processes.

    Called, it is the function it was. Beside that it has ``map``, ``starmap``, ``imap``, ``imap_unordered``, ``submit``
    and ``amap``: see `ParallelFunction`. It works on methods, too, whose object is sent once for each map. What a
    function closes over is copied once for all workers.

    Args:
        function: The function, where there are no options.
        workers: How many; by default as many as this process may use cores.
        start_method: ``"fork"``, ``"spawn"`` or ``"forkserver"``; by default the one that is set.
        chunksize: Items in one task; by default such that each worker gets about four, and one where errors
            do not raise and in ``imap``.
        progress: Show a bar: True or ``"tqdm"``, or ``"rich"``.
        timeout: Seconds that an item may take; see *task_timeout* of `Pool`.
        retries: How often a task whose worker died is done again; see `Pool`.
        initializer: Called in each worker before its first task.
        worker_state: Called once in each process that asks for ``function.state``, which is what it returned: a
            connection, a model, a cache.
        worker_exit: Called with what *worker_state* returned, when a process that asked for it ends in order; see
            `Pool`.
        cpu_ids: The cores that workers may use; see `Pool`.
        ordered: False for results in the order in which they come.
        out: An array in shared memory that ``map`` and ``starmap`` fill; see `ParallelFunction.map`.
        on_error: ``"raise"`` the first exception, ``"return"`` exceptions in place of results, ``"skip"`` what failed.
        nested: Use workers also inside a worker; else a map runs in place there.
        cluster: A Dask cluster, as for `forkshm.Executor`: the workers run on its nodes, *workers* of them on each.

    Raises:
        TypeError: What is decorated is no function, or a coroutine function.
        ValueError: An option has a value it cannot have.

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
    if function is None:
        settings = _Settings(**options)
        settings.check()
        return functools.partial(_decorate, settings=settings)
    return _decorate(function, settings=_Settings())


def _decorate(function: Any, *, settings: _Settings) -> Any:
    plain = getattr(function, "__func__", function)  # of a classmethod or staticmethod
    if not callable(plain) or not hasattr(function, "__get__"):
        raise TypeError(f"@parallel decorates functions and methods, got {function!r}")
    if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
        raise TypeError(f"{function!r} is a coroutine function, which a worker cannot await: decorate a plain one")
    return ParallelFunction(function, settings, f"{os.getpid()}-{next(_counter)}")
