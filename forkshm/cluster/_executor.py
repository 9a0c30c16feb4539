"""The client's side: an executor whose calls run on the nodes of a Dask cluster."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import os
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from forkshm import _interrupts
from forkshm.backend import kernel
from forkshm.cluster._calls import Group, GroupCall, LocalExecutor, Raised, Sent
from forkshm.cluster._values import NodeArray, Writer
from forkshm.errors import PoolClosedError, UnsupportedError
from forkshm.pickler import explain, name_of
from forkshm.pool import chunked
from forkshm.pool.observe import open_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from typing_extensions import ParamSpec

    from forkshm.pool.observe import Bar

    P = ParamSpec("P")

__all__ = ("ClusterExecutor", "ClusterFuture", "RemoteResult")

T = TypeVar("T")

# Number of arrays kept on the nodes for later calls.
_ARRAYS_KEPT = 8
# Number of Dask tasks per worker process in one map.
_TASKS_EACH = 4
# How often a call is sent again after its arrays were lost with their nodes.
_SENDS = 3


class ClusterFuture(concurrent.futures.Future[T]):
    """The future of a call on a cluster.

    `cancel` also ends a running call: its worker process is killed and replaced.
    """

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self._call = call

    def cancel(self) -> bool:
        """Cancel the call, wherever it is; return False if it has finished."""
        if super().cancel():
            self._call.cancel()
            return True
        return False


class RemoteResult(Generic[T]):
    """A result that stays on the node where it was computed.

    Pass it to other calls of the same executor, as an argument or inside one. They run on the node that has it, or get
    a copy from there. The node keeps it until this object is collected, or the executor ends.
    """

    def __init__(self, future: ClusterFuture[Any], call: _Call) -> None:
        self._future = future
        self._call = call

    def __repr__(self) -> str:
        return f"<RemoteResult {self._call.name}, {'there' if self.done() else 'pending'}>"

    def done(self) -> bool:
        """Return whether the call has finished, or was cancelled."""
        return self._future.done()

    def cancel(self) -> bool:
        """Cancel the call, wherever it is; return False if it has finished.

        A worker process that runs it is killed and replaced.
        """
        return self._future.cancel()

    def result(self, timeout: float | None = None) -> T:
        """Fetch the result.

        Raises:
            TimeoutError: The result is not available after *timeout* seconds.
            concurrent.futures.CancelledError: The call was cancelled.
            Exception: The call raised it.
        """
        fetched: T = self._future.result(timeout).result()
        return fetched


class _Array(NamedTuple):
    """An array that the nodes have, as it was when it was sent."""

    original: Any
    node: NodeArray
    future: Any


# The arrays of one call, keyed by their ids; the first item keeps the id from being reused.
_Seen = dict[int, tuple[Any, _Array]]


class _Call:
    """Groups of items that go to a node together."""

    def __init__(
        self,
        executor: ClusterExecutor,
        function: GroupCall,
        groups: Sequence[Group],
        arrays: dict[str, _Array],
        remote: dict[str, Any],
    ) -> None:
        self.name = uuid.uuid4().hex
        self.executor = executor
        self.function = function
        self.groups = groups
        self.arrays = arrays
        self.remote = remote
        self.sends = 0
        self.is_cancelled = False
        self.future: Any = None
        self.sink: Callable[[Any, BaseException | None], None] = lambda *_: None

    def send(self) -> None:
        """Submit the call to Dask."""
        self.sends += 1
        from forkshm.cluster import _agent

        client = self.executor.client
        self.future = client.submit(
            _agent.run,
            self.executor.name,
            self.name,
            self.function,
            list(self.groups),
            [array.future for array in self.arrays.values()],
            {name: remote.future for name, remote in self.remote.items()},
            key=f"forkshm-{self.name}-{self.sends}",
            pure=False,
        )
        self.future.add_done_callback(self._finished)

    def _finished(self, future: Any) -> None:
        if future is not self.future or self.is_cancelled:
            return
        try:
            error = future.exception()
        except (concurrent.futures.CancelledError, Exception) as raised:
            error = raised
        if future.status in ("cancelled", "lost") and self.sends < _SENDS and not self.executor.is_closed:
            # The nodes that had the call's arrays are gone.
            try:
                self.executor.send_again(self)
            except Exception as raised:
                error = raised
            else:
                return
        if error is not None:
            self.sink(None, error)
            return
        self.sink(future, None)

    def cancel(self) -> None:
        """End the call, wherever it is."""
        self.is_cancelled = True
        self.executor.cancel_calls([self])


if TYPE_CHECKING:
    _StandardExecutor = concurrent.futures.Executor
else:
    # As for `forkshm.Executor`: some programs test for this class.
    from concurrent.futures import ProcessPoolExecutor as _StandardExecutor


class ClusterExecutor(_StandardExecutor):
    """A `concurrent.futures.ProcessPoolExecutor` whose workers are processes on the nodes of a Dask cluster.

    ``forkshm.Executor(cluster=...)`` creates it. Each Dask worker is a node, and should be the only one of its machine.
    A node starts a pool of forkserver workers at its first call.

    * A large array in a function or its arguments is moved to each node once. All workers there read it from
      sealed shared memory and cannot write to it. It is kept for later calls, and compared before it is reused,
      so a call sees the array as it was at the call.
    * A worker that dies fails the calls it ran with `WorkerDiedError`. Calls of a node that dies go to another node.
    * Locks, queues, regions and teams belong to one machine: passing one raises `UnsupportedError`.

    Args:
        cluster: A ``distributed.Client``, a cluster object such as ``LocalCluster``, or the address of a scheduler.
        max_workers: Worker processes on each node; by default as many as the Dask worker has threads.
        mp_context: The context of the pools of the nodes, forkserver or spawn.
        initializer: Called once in each worker process before its first task. Globals that it sets are seen by
            functions of the same module.
        initargs: Arguments of *initializer*.
        local: `forkshm.Executor`, which creates the executor of each node.
        options: ``max_tasks_per_child``, ``task_timeout`` and other options of `forkshm.Executor`, for each node.

    Raises:
        MissingDependencyError: Dask is not installed.
        TypeError: There is no such option, or *initializer* is not callable.
        ValueError: An option has an invalid value, such as *max_workers* of 0.
        UnsupportedError: *mp_context* starts processes by fork; a node has threads.
        OSError: The scheduler does not answer.

    Fork and threads:
        Any thread may submit. Dask's client has threads of its own, so a forked child cannot use the executor.

    Example:
        >>> import forkshm
        >>> from distributed import LocalCluster  # doctest: +SKIP
        >>> with forkshm.Executor(cluster=LocalCluster(n_workers=2)) as executor:  # doctest: +SKIP
        ...     list(executor.map(abs, [-1, 2, -3]))
        [1, 2, 3]

    See Also:
        https://distributed.dask.org
    """

    def __init__(
        self,
        cluster: Any,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        local: Callable[..., LocalExecutor],
        **options: Any,
    ) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers must be at least 1, got {max_workers}")
        method = "forkserver" if mp_context is None else mp_context.get_start_method()
        if method == "fork":
            raise UnsupportedError(
                "cannot start the workers of a cluster by fork: a node has threads. Pass a context of forkserver or "
                "spawn, or none.",
                capability="cluster",
            )
        initargs = tuple(initargs)
        # It starts no process, and raises for wrong options here instead of on the nodes.
        local(max_workers, None, initializer, initargs, **options)
        from forkshm.cluster import _agent

        options.update(
            (name, Sent(Writer(share_globals=True).write(function)))
            for name, function in (
                ("initializer", None if initializer is None else functools.partial(initializer, *initargs)),
                ("worker_init", options.get("worker_init")),
                ("worker_exit", options.get("worker_exit")),
            )
            if function is not None
        )
        self.name = f"forkshm-{uuid.uuid4().hex[:12]}"
        self._workers_each = max_workers
        self.client, self._is_own_client = _agent.client_of(cluster)
        self.is_closed = False
        self._pid = os.getpid()
        self._lock = _interrupts.Lock()
        self._arrays: collections.OrderedDict[Any, _Array] = collections.OrderedDict()
        self._pending: set[ClusterFuture[Any]] = set()
        agent = _agent.Agent(self.name, max_workers, functools.partial(_agent.make_local, local, method, options))
        try:
            self.client.register_plugin(agent, name=self.name)
        except BaseException:
            self._close_client()
            raise

    def __repr__(self) -> str:
        return f"<ClusterExecutor {self.name} of {self.client!r}>"

    @property
    def _max_workers(self) -> int:
        # Programs read this attribute of the standard library's executor.
        threads = self.client.nthreads().values()
        return max(1, sum(threads) if self._workers_each is None else self._workers_each * len(threads))

    # -- calls --------------------------------------------------------------------------------

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> ClusterFuture[T]:
        """Submit ``fn(*args, **kwargs)`` to a worker of some node; return the future of its result.

        Raises:
            PoolClosedError: The executor was shut down, or this is a forked child.
            UnsupportedError: An argument can exist on one machine only.
            Exception: Pickling failed.
        """
        call = self._call_of(fn, args, kwargs)
        future: ClusterFuture[T] = ClusterFuture(call)

        def take(done: Any, error: BaseException | None) -> None:
            if error is None:
                (results,) = done.result()
                error, value = _opened(results.items[0])
                _settle(future, value, error)
            else:
                _settle(future, None, error)

        self._start(call, future, take)
        return future

    def submit_remote(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> RemoteResult[T]:
        """Submit a call whose result stays on its node, and can be an argument of other calls; see `submit`."""
        call = self._call_of(fn, args, kwargs)
        future: ClusterFuture[Any] = ClusterFuture(call)

        class Fetched:
            def __init__(self, done: Any) -> None:
                self.done = done

            def result(self) -> Any:
                error, value = _opened(self.done.result()[0].items[0])
                if error is not None:
                    raise error
                return value

        self._start(call, future, lambda done, error: _settle(future, None if error else Fetched(done), error))
        return RemoteResult(future, call)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
        progress: bool | str = False,
    ) -> Iterator[T]:
        """Return an iterator over ``fn(*items)`` for the zipped items of *iterables*, in order.

        Args:
            fn: The function to call.
            iterables: Consumed completely at once, unless *buffersize* is given.
            timeout: Seconds from this call after which waiting for a result raises TimeoutError.
            chunksize: Items that one worker process takes at a time; by default each process gets four chunks.
            buffersize: Maximum number of input parts that are in flight or whose results were not taken yet.
            progress: Show a progress bar: True or ``"tqdm"``, or ``"rich"``.

        Raises:
            ValueError: *chunksize* or *buffersize* is less than 1.
            TypeError: *buffersize* is not an int.
            PoolClosedError: The executor was shut down.
            MissingDependencyError: The library that *progress* needs is not installed.
        """
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        items: Any = zip(*iterables, strict=False)
        if buffersize is None:
            items = list(items)
        outcomes = self.outcomes(fn, items, timeout=timeout, chunksize=chunksize, buffersize=buffersize)
        bar = open_bar(progress, None if buffersize is not None else len(items))
        return _raising(outcomes, bar)

    def outcomes(
        self,
        fn: Callable[..., T],
        items: Iterable[tuple[Any, ...]],
        *,
        timeout: float | None = None,
        chunksize: int | None = None,
        buffersize: int | None = None,
    ) -> Iterator[tuple[BaseException | None, Any]]:
        """Yield the exception, or None, and the result of each call ``fn(*item)``; see `map`."""
        for name, number in (("chunksize", chunksize), ("buffersize", buffersize)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self._check_open()
        deadline = None if timeout is None else time.monotonic() + timeout
        slots = self._max_workers
        each = chunksize or 1
        together = 1
        if buffersize is None:
            items = items if isinstance(items, list) else list(items)
            each = chunksize or max(1, len(items) // (slots * _TASKS_EACH))
            together = max(1, -(-len(items) // each) // (slots * _TASKS_EACH))
        parts = self._parts(fn, items, each, together)
        futures = collections.deque(itertools.islice(parts, buffersize))
        return _taken(futures, parts, deadline)

    def _parts(
        self, fn: Callable[..., Any], items: Iterable[Any], each: int, together: int
    ) -> Iterator[ClusterFuture[list[Any]]]:
        """Send the items part by part; yield the future of each part's results."""
        arrays: dict[str, _Array] = {}
        remote: dict[str, Any] = {}
        seen: _Seen = {}
        function = GroupCall(name_of(fn), self._write(fn, arrays, remote, seen, {"function": fn}))
        groups = chunked(iter(items), each)
        numbers = itertools.count()
        while part := list(itertools.islice(groups, together)):
            own_arrays, own_remote = dict(arrays), dict(remote)
            sent = [
                Group(
                    len(group),
                    self._write([(args, {}) for args in group], own_arrays, own_remote, seen, _named(group, numbers)),
                )
                for group in part
            ]
            call = _Call(self, function, sent, own_arrays, own_remote)
            future: ClusterFuture[list[Any]] = ClusterFuture(call)

            def take(done: Any, error: BaseException | None, future: ClusterFuture[list[Any]] = future) -> None:
                _settle(future, None if error else [item for part in done.result() for item in part.items], error)

            self._start(call, future, take)
            yield future

    def _call_of(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> _Call:
        self._check_open()
        arrays: dict[str, _Array] = {}
        remote: dict[str, Any] = {}
        seen: _Seen = {}
        function = GroupCall(name_of(fn), self._write(fn, arrays, remote, seen, {"function": fn}))
        names = {"args": args, "kwds": kwargs}
        groups = [Group(1, self._write([(args, kwargs)], arrays, remote, seen, names))]
        return _Call(self, function, groups, arrays, remote)

    def _start(
        self, call: _Call, future: ClusterFuture[Any], sink: Callable[[Any, BaseException | None], None]
    ) -> None:
        def take(done: Any, error: BaseException | None) -> None:
            try:
                sink(done, error)
            except Exception as raised:  # fetching the result failed
                _settle(future, None, raised)

        call.sink = take
        try:
            self._pending.add(future)
            future.add_done_callback(self._pending.discard)
            call.send()
        except BaseException:
            self._pending.discard(future)
            raise

    # -- arrays on the nodes ----------------------------------------------------------------------

    def _write(
        self, thing: Any, arrays: dict[str, _Array], remote: dict[str, Any], seen: _Seen, names: Mapping[str, Any]
    ) -> bytes:
        """Return *thing* as bytes; *names* has its parts, by the names that an error uses for them."""

        def name_of_array(array: Any) -> str:
            found = seen.get(id(array))
            if found is None:
                found = seen[id(array)] = array, self._on_nodes(array)
            entry = found[1]
            arrays[entry.node.name] = entry
            return entry.node.name

        def name_of_remote(result: RemoteResult[Any]) -> str:
            call = result._call
            if call.executor is not self:
                raise UnsupportedError(
                    f"cannot pass {result!r}: it belongs to another executor. Pass its result() instead.",
                    capability="cluster",
                )
            remote[call.name] = call
            return call.name

        try:
            return Writer(name_of_array, (RemoteResult, name_of_remote), share_globals=True).write(thing)
        except Exception as error:
            explain(error, names)
            raise

    def _on_nodes(self, array: Any) -> _Array:
        """Return the nodes' array with the same elements, moving it to them if they have none."""
        key = array.__array_interface__["data"][0], array.nbytes, array.shape, array.strides, array.dtype.str
        with self._lock:
            entry = self._arrays.get(key)
            if entry is not None and not _is_same(entry, array):
                del self._arrays[key]
                entry = None
            if entry is None:
                entry = _Array(array, NodeArray(uuid.uuid4().hex, _snapshot(array)), None)
                entry = self._arrays[key] = entry._replace(future=self._scatter(entry.node))
                while len(self._arrays) > _ARRAYS_KEPT:
                    self._arrays.popitem(last=False)
            else:
                self._arrays.move_to_end(key)
            return entry

    def _scatter(self, node: NodeArray) -> Any:
        # Dask's active memory manager keeps one copy only while no call needs the array: a later call moves it again.
        (future,) = self.client.scatter([node], broadcast=True, direct=True, hash=False)
        return future

    def send_again(self, call: _Call) -> None:
        """Send a call whose arrays were lost with their nodes."""
        with self._lock:
            for name, entry in list(call.arrays.items()):
                fresh = entry._replace(future=self._scatter(entry.node))
                call.arrays[name] = fresh
                for key, kept in list(self._arrays.items()):
                    if kept.node is entry.node:
                        self._arrays[key] = fresh
        call.send()

    # -- the end ----------------------------------------------------------------------------------

    def cancel_calls(self, calls: Sequence[_Call]) -> None:
        """End calls: cancel those that wait, and kill workers that run one."""
        futures = [call.future for call in calls if call.future is not None]
        # Cancel on the nodes first: Dask forgets where a call runs once it is cancelled.
        from forkshm.cluster import _agent

        with contextlib.suppress(Exception):  # a node that has just died runs none of the calls
            self.client.run(_agent.cancel, self.name, [call.name for call in calls], on_error="ignore")
        self.client.cancel(futures)

    def cancel_running(self, futures: Iterable[concurrent.futures.Future[Any]]) -> None:
        """Cancel calls of this executor, including running ones, whose workers are killed and replaced.

        Args:
            futures: Futures returned by `submit` of this executor. Finished futures do not change.
        """
        self._cancel(future for future in futures if isinstance(future, ClusterFuture) and not future.done())

    def _cancel(self, futures: Iterable[ClusterFuture[Any]]) -> None:
        calls = [future._call for future in futures if concurrent.futures.Future.cancel(future)]
        for call in calls:
            call.is_cancelled = True
        if calls:
            self.cancel_calls(calls)

    def terminate_workers(self) -> None:
        """Shut down and end the worker processes on all nodes now; unfinished calls raise `PoolClosedError`."""
        self.is_closed = True
        if self._pid != os.getpid():
            return
        pending = list(self._pending)
        for future in pending:
            future._call.is_cancelled = True
            _settle(future, None, PoolClosedError("the workers were ended before this call finished"))
        if pending:
            self.cancel_calls([future._call for future in pending])
        self._end()

    def kill_workers(self) -> None:
        """Shut down and end the worker processes on all nodes now; see `terminate_workers`."""
        self.terminate_workers()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and end the pools of the nodes when all calls are done.

        Args:
            wait: Return only after the pools have ended.
            cancel_futures: Cancel all unfinished calls, including running ones.
        """
        self.is_closed = True
        if self._pid != os.getpid():
            return
        if cancel_futures:
            self._cancel(list(self._pending))
        if wait:
            concurrent.futures.wait(list(self._pending))
            self._end()
        elif not self._pending:
            self._end()
        else:
            threading.Thread(target=self._end_later, name="forkshm-cluster-end", daemon=True).start()

    def _end_later(self) -> None:
        concurrent.futures.wait(list(self._pending))
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._arrays.clear()
        with contextlib.suppress(Exception):  # the cluster is gone, and its pools with it
            self.client.unregister_worker_plugin(self.name)
        self._close_client()

    def _close_client(self) -> None:
        if self._is_own_client:
            with contextlib.suppress(Exception):
                self.client.close()

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise PoolClosedError("cannot use this executor: it belongs to the parent process. Create one here.")
        if self.is_closed:
            raise PoolClosedError("cannot schedule new futures after shutdown")


def _snapshot(array: Any) -> Any:
    import numpy as np

    copy = np.empty_like(array, subok=False)
    copy[...] = array
    copy.flags.writeable = False
    return copy


def _is_same(entry: _Array, array: Any) -> bool:
    """Return whether the nodes have the elements that *array* has now."""
    region = getattr(array, "region", None)
    if region is not None and region.sealed and entry.original is array:
        return True
    mine, theirs = array, entry.node.array
    if mine.strides != theirs.strides or not (mine.flags.c_contiguous or mine.flags.f_contiguous):
        return bool((mine == theirs).all())
    return kernel.is_same_memory(_address(mine), _address(theirs), mine.nbytes)


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def _opened(result: Any) -> tuple[BaseException | None, Any]:
    if isinstance(result, Raised):
        return result.open(), None
    return None, result[0]


def _named(items: Sequence[Any], numbers: Iterator[int]) -> dict[str, Any]:
    """Return the items of a group, by the names that an error uses for them."""
    return {f"iterable[{number}]": item for item, number in zip(items, numbers, strict=False)}


def _settle(future: concurrent.futures.Future[Any], value: Any, error: BaseException | None) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was cancelled meanwhile
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


def _raising(outcomes: Iterator[tuple[BaseException | None, Any]], bar: Bar) -> Iterator[Any]:
    try:
        for error, value in outcomes:
            if error is not None:
                raise error
            bar.update(1)
            yield value
    finally:
        bar.close()
        outcomes.close()  # type: ignore[attr-defined]  # a generator


def _taken(
    futures: collections.deque[ClusterFuture[list[Any]]],
    parts: Iterator[ClusterFuture[list[Any]]],
    deadline: float | None,
) -> Iterator[tuple[BaseException | None, Any]]:
    try:
        while futures:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            results = futures[0].result(left)
            futures.popleft()
            futures.extend(itertools.islice(parts, 1))
            yield from map(_opened, results)
    finally:
        # The consumer has all results, an exception, or enough: the remaining results are not needed.
        left_over = [future for future in futures if not future.done()]
        if left_over:
            left_over[0]._call.executor._cancel(left_over)
