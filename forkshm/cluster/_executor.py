"""The client's side: an executor whose calls run on the nodes of a Dask cluster."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
import threading
import time
import uuid
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from forkshm import _interrupts
from forkshm.backend import kernel
from forkshm.cluster._calls import Group, GroupCall, LocalExecutor, Sent
from forkshm.cluster._dead_workers import name_arguments
from forkshm.cluster._values import NodeArray, Raised, Writer
from forkshm.errors import PoolClosedError, UnsupportedError, safe_repr
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

# Number of Dask tasks per worker process in one map.
_TASKS_EACH = 4
# Share of the client's memory that copies of arrays take for later calls.
_MEMORY_SHARE = 0.25
# How often the client tries to send an array to a node before the calls that need it fail.
_SENDS = 5
# Seconds in which a node must be found that is neither dead nor short of memory.
_FIND_NODE = 2


class ClusterFuture(concurrent.futures.Future[T]):
    """The future of a call on a cluster.

    `cancel` also ends a running call: its worker process is killed and replaced. `running` returns False at all times.
    Callbacks run one after the other in a thread of the executor, and may wait for other calls.
    """

    _done_callbacks: list[Callable[[Any], object]]

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self._call = call
        # Yields True once, so that only one thread notifies waiters.
        self._telling = iter((True,))

    def cancel(self) -> bool:
        """Cancel the call, wherever it is; return False if it has finished."""
        if self.mark_cancelled():
            self._call.cancel()
        return self.cancelled()

    def mark_cancelled(self) -> bool:
        """Make this a cancelled future; return False if it has finished or was cancelled before."""
        if not super().cancel() or not next(self._telling, False):
            return False
        # Otherwise `wait` and `as_completed` would never see it: no thread runs the call here.
        self.set_running_or_notify_cancel()
        return True

    def _invoke_callbacks(self) -> None:
        # The standard library's method, which would call them in this thread.
        self._call.executor.finished(self)
        if self._done_callbacks:
            self._call.executor.call_later(super()._invoke_callbacks)  # type: ignore[misc]


class _Fetched:
    """The result of a call, which is fetched from its node when it is asked for."""

    def __init__(self, call: _Call, done: Any) -> None:
        self._call = call
        self._done = done

    def result(self) -> Any:
        """Fetch the result, or raise the exception of the call."""
        error, value = _opened(self._call.results(self._done)[0])
        if error is not None:
            raise error
        return value


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


class _Array:
    """An array that the nodes have, or can ask for, as it was at a call.

    Attributes:
        node: The client's copy, which is sent to a node.
        original: The array that was passed.
        owner: The array that owns the memory of the original.
        source: The Dask future of the array. Dask moves it from node to node.
        kept: For each node, the Dask future that keeps the array there, and when it was submitted; or None, and when
            sending the array failed.
        failures: How often sending the array to a node has failed since it last succeeded.
    """

    def __init__(self, array: Any, forget: Callable[[Any], None]) -> None:
        self.node = NodeArray.copied(uuid.uuid4().hex, array)
        self.original = weakref.ref(array)
        self.owner = weakref.ref(_owner(array), forget)
        self.source: Any = None
        self.kept: dict[str, tuple[Any, float]] = {}
        self.sending = asyncio.Lock()
        self.failures: collections.Counter[str] = collections.Counter()

    def passed(self) -> Any:
        """Return the array that was passed, or an equal one if it was collected."""
        import numpy as np

        original = self.original()
        return np.asarray(self.node.array) if original is None else original


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
        self.groups: Sequence[Group] = groups
        self.arrays = arrays
        self.remote = remote
        self.is_cancelled = False
        self.stays = False
        self.future: Any = None
        self.sink: Callable[[Any, BaseException | None], None] = _ignore

    def __repr__(self) -> str:
        # It stands for its result in messages about a worker that died.
        return f"<RemoteResult of {self.function.__qualname__}>"

    def send(self) -> None:
        """Submit the call to Dask."""
        from forkshm.cluster import _agent

        self.future = self.executor.client.submit(
            _agent.run,
            self.executor.name,
            self.name,
            self.function,
            list(self.groups),
            list(self.arrays),
            {name: remote.future for name, remote in self.remote.items()},
            key=_agent.key_of(self.name),
            pure=False,
        )
        self.future.add_done_callback(self._finished)

    def _finished(self, future: Any) -> None:
        # Dask has one thread for the callbacks of all clients.
        with contextlib.suppress(RuntimeError):  # the executor has ended, and no call waits
            self.executor.take_later(functools.partial(self._take, future))

    def _take(self, future: Any) -> None:
        if self.is_cancelled:
            return
        try:
            error = future.exception()
            if error is None and future.cancelled():
                error = concurrent.futures.CancelledError(f"{future!r} was cancelled")
        except (concurrent.futures.CancelledError, Exception) as raised:
            error = raised
        self.sink(None if error is not None else future, None if error is None else self._explained(error))

    def results(self, done: Any) -> list[Any]:
        """Return the items of the results of a Dask future of this call."""
        return [
            self._named(item, number) if isinstance(item, Raised) else item
            for number, results in enumerate(done.result())
            for item in results.open()
        ]

    def _explained(self, error: BaseException) -> BaseException:
        """Return an error of Dask as the error that users of this executor expect."""
        if isinstance(error, concurrent.futures.CancelledError):
            closed = PoolClosedError(
                "the result of this call is lost: Dask has cancelled the call, as it does when the client is closed or "
                "the scheduler ends. Create a new executor, and call again."
            )
            closed.__cause__ = error
            return closed
        from forkshm.cluster import _agent

        died = _agent.dead_nodes(error)
        if died is not None:
            length = sum(group.length for group in self.groups)
            whole = self.groups[0]._replace(length=length)
            died.index = 0 if length == 1 else None
            name_arguments(died, self.function.__qualname__, whole, self._values())
        return died or error

    def _values(self) -> dict[str, Any]:
        """Return what the items name, for messages."""
        return {**{name: array.passed() for name, array in self.arrays.items()}, **self.remote}

    def _named(self, raised: Raised, group: int) -> Raised:
        """Return an exception that names the arguments, if a worker died."""
        # A result that is an argument of this call is of another call, with one group.
        call, group = (self, group) if raised.call == self.name else (self.remote.get(raised.call or ""), 0)
        if call is None or not call.groups:
            return raised
        error = raised.open()
        is_named = name_arguments(error, call.function.__qualname__, call.groups[group], call._values())
        return Raised(error, None) if is_named else raised

    def forget(self) -> None:
        """Release what the cluster and the client keep for this call, although its future may be kept."""
        self.groups, self.arrays, self.remote, self.sink, self.future = (), {}, {}, _ignore, None

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

    * A large array in a function or its arguments is moved once to each node that runs such a call. All workers there
      read it from sealed shared memory and cannot write to it. The nodes keep it as long as the client's array exists.
      It is compared before it is reused, so a call sees the array as it was at the call.
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
        UnsupportedError: *mp_context* starts processes by fork; a node has threads. Or *cluster* is asynchronous.
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
        self._most_bytes = int(_agent.memory_limit() * _MEMORY_SHARE)
        self._pid = os.getpid()
        self._lock = _interrupts.Lock()
        # The arrays for later calls, and those of unfinished calls by name.
        self._arrays: dict[Any, _Array] = {}
        self._named: weakref.WeakValueDictionary[str, _Array] = weakref.WeakValueDictionary()
        self._sending: set[asyncio.Future[None]] = set()
        self._pending: set[ClusterFuture[Any]] = set()
        # One thread fetches results, and another one runs callbacks of futures, which may wait for results.
        self._results = concurrent.futures.ThreadPoolExecutor(1, f"{self.name}-results")
        self._callbacks = concurrent.futures.ThreadPoolExecutor(1, f"{self.name}-callbacks", _mark_thread, (self.name,))
        agent = _agent.Agent(self.name, max_workers, functools.partial(_agent.make_local, local, method, options))
        try:
            self.client.subscribe_topic(self.name, functools.partial(_asked, weakref.ref(self)))
            _agent.register(self.client, agent)
        except BaseException:
            self._close_client()
            raise
        # An executor that is not shut down ends its pools when it is collected, as on one machine.
        self._end_agents = weakref.finalize(self, _end_later, self.client, self.name)
        self._end_agents.atexit = False  # the client then ends, too

    def __repr__(self) -> str:
        return f"<ClusterExecutor {self.name} of {self.client!r}>"

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle an executor: its calls belong to this process. Create one where it is used.")

    @property
    def _max_workers(self) -> int:
        # Programs read this attribute of the standard library's executor.
        threads = self.client.nthreads().values()
        return max(1, sum(threads) if self._workers_each is None else self._workers_each * len(threads))

    # -- calls --------------------------------------------------------------------------------

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> ClusterFuture[T]:
        """Submit ``fn(*args, **kwargs)`` to a worker of some node; return the future of its result.

        Raises:
            RuntimeError: The executor was shut down.
            PoolClosedError: This is a forked child of the process that created the executor.
            UnsupportedError: An argument can exist on one machine only.
            Exception: Pickling failed.
        """
        call = self._call_of(fn, args, kwargs)
        future: ClusterFuture[T] = ClusterFuture(call)

        def take(done: Any, error: BaseException | None) -> None:
            if error is None:
                error, value = _opened(call.results(done)[0])
                _settle(future, value, error)
            else:
                _settle(future, None, error)

        self._start(call, future, take)
        return future

    def submit_remote(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> RemoteResult[T]:
        """Submit a call whose result stays on its node, and can be an argument of other calls; see `submit`."""
        call = self._call_of(fn, args, kwargs)
        call.stays = True
        future: ClusterFuture[Any] = ClusterFuture(call)

        def take(done: Any, error: BaseException | None) -> None:
            _settle(future, None if error else _Fetched(call, done), error)

        self._start(call, future, take)
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
            RuntimeError: The executor was shut down.
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
        numbers = itertools.count(0, each)
        while part := list(itertools.islice(groups, together)):
            own_arrays, own_remote = dict(arrays), dict(remote)
            sent = [
                Group(
                    len(group),
                    self._write([(args, {}) for args in group], own_arrays, own_remote, seen, _named(group, first)),
                    first,
                )
                for group, first in zip(part, numbers, strict=False)
            ]
            call = _Call(self, function, sent, own_arrays, own_remote)
            future: ClusterFuture[list[Any]] = ClusterFuture(call)

            def take(done: Any, error: BaseException | None, future: ClusterFuture[list[Any]] = future) -> None:
                _settle(future, None if error else future._call.results(done), error)

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
            finally:
                # It refers to the future, which refers to the call. A remote result must end with its last reference.
                call.sink = _ignore

        call.sink = take
        try:
            self._pending.add(future)
            call.send()
        except BaseException:
            self._pending.discard(future)
            raise

    def take_later(self, take: Callable[[], None]) -> None:
        """Call *take* in the thread that fetches results.

        Raises:
            RuntimeError: The executor has ended.
        """
        self._results.submit(take)

    def call_later(self, callback: Callable[[], None]) -> None:
        """Call *callback* in the thread that runs callbacks; in this thread if the executor has ended."""
        try:
            self._callbacks.submit(callback)
        except RuntimeError:
            callback()

    def finished(self, future: ClusterFuture[Any]) -> None:
        """Release what a finished call needed. Dask repeats calls whose results stay on a node that dies."""
        self._pending.discard(future)
        call = future._call
        if future.cancelled() or call.is_cancelled:
            return  # the thread that cancels still needs it
        if not call.stays or future.exception() is not None:
            call.forget()

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
            if call.future is None:  # the call was cancelled, or failed on the cluster
                raise result._future.exception() or concurrent.futures.CancelledError(f"{result!r} was cancelled")
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
            entry = self._arrays.pop(key, None)
            if entry is None or not _is_same(entry, array):
                entry = _Array(array, functools.partial(_forget, self._arrays, key))
                self._named[entry.node.name] = entry
            self._arrays[key] = entry  # as the last one
            while True:
                if len(self._arrays) <= 1 or _total_bytes(self._arrays) <= self._most_bytes:
                    break
                self._arrays.pop(next(iter(self._arrays)), None)
            return entry

    def asked(self, node: str, names: Sequence[str]) -> None:
        """Send arrays to a node that asks for them; called in the thread of Dask's event loop."""
        for name in names:
            entry = self._named.get(name)
            if entry is not None:
                task = asyncio.ensure_future(self._send(entry, node, time.monotonic()))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)

    async def _send(self, entry: _Array, node: str, asked_at: float) -> None:
        async with entry.sending:
            kept, sent_at = entry.kept.get(node, (None, -math.inf))
            if sent_at > asked_at or (kept is not None and kept.status == "pending"):
                return  # the array is on its way; or it could not be sent, and the node asks again unless it is dead
            from forkshm.cluster import _agent

            try:
                if entry.source is None or entry.source.status not in ("pending", "finished"):
                    (entry.source,) = await self.client.scatter(
                        [entry.node], workers=[node], direct=True, hash=False, timeout=_FIND_NODE, asynchronous=True
                    )
                kept = self.client.submit(_agent.keep, entry.source, workers=[node], pure=False)
            except Exception as error:
                entry.kept[node] = None, time.monotonic()
                entry.failures[node] += 1
                if entry.failures[node] >= _SENDS:
                    self._fail(entry, node, error)
            else:
                entry.kept[node] = kept, time.monotonic()
                del entry.failures[node]

    def _fail(self, entry: _Array, node: str, reason: Exception) -> None:
        """Fail the calls that need an array which cannot be sent."""
        message = (
            f"cannot send an array of {entry.node.array.nbytes:,} bytes to node {node}: {safe_repr(reason)}. The "
            "client must be able to connect to each node."
        )
        for future in list(self._pending):
            if entry.node.name in future._call.arrays:
                _settle(future, None, ConnectionError(message))

    # -- the end ----------------------------------------------------------------------------------

    def cancel_calls(self, calls: Sequence[_Call]) -> None:
        """End calls: cancel those that wait, and kill workers that run one."""
        futures = [future for call in calls if (future := call.future) is not None]
        # Cancel on the nodes first: Dask forgets where a call runs once it is cancelled.
        from forkshm.cluster import _agent

        with contextlib.suppress(Exception):  # a node that has just died runs none of the calls
            self.client.run(_agent.cancel, self.name, [call.name for call in calls], on_error="ignore")
        self.client.cancel(futures)
        for call in calls:
            call.forget()

    def cancel_running(self, futures: Iterable[concurrent.futures.Future[Any]]) -> None:
        """Cancel calls of this executor, including running ones, whose workers are killed and replaced.

        Args:
            futures: Futures returned by `submit` of this executor. Finished futures do not change.
        """
        self._cancel(future for future in futures if isinstance(future, ClusterFuture) and not future.done())

    def _cancel(self, futures: Iterable[ClusterFuture[Any]]) -> None:
        calls = [future._call for future in futures if future.mark_cancelled()]
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
            wait: Return only after the callbacks of the calls have run, and the pools have ended.
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
            threading.Thread(target=self._end_when_idle, name="forkshm-cluster-end", daemon=True).start()

    def _end_when_idle(self) -> None:
        concurrent.futures.wait(list(self._pending))
        self._end()

    def _end(self) -> None:
        from forkshm.cluster import _agent

        with self._lock:
            self._arrays.clear()
        self._end_agents.detach()
        _agent.unregister(self.client, self.name)
        # A result that is fetched needs the client. A callback may end the executor.
        self._results.shutdown()
        self._callbacks.shutdown(wait=getattr(_local, "runs_callbacks_of", None) != self.name)
        self._close_client()

    def _close_client(self) -> None:
        if self._is_own_client:
            with contextlib.suppress(Exception):
                self.client.close()

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise PoolClosedError("cannot use this executor: it belongs to the parent process. Create one here.")
        if self.is_closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self.client.status in ("closing", "closed"):
            raise PoolClosedError(
                "cannot submit a call: the Dask client of this executor was closed, or has lost its scheduler. Create "
                "another executor."
            )


def _end_later(client: Any, name: str) -> None:
    """End the pools of an executor that was collected, perhaps by the thread of Dask's event loop."""
    from forkshm.cluster import _agent

    with contextlib.suppress(RuntimeError):  # the program ends
        threading.Thread(target=_agent.unregister, args=(client, name), name="forkshm-cluster-end", daemon=True).start()


def _asked(executor: weakref.ref[ClusterExecutor], event: tuple[Any, Mapping[str, Any]]) -> None:
    alive = executor()
    if alive is not None:
        alive.asked(event[1]["node"], event[1]["arrays"])


def _owner(array: Any) -> Any:
    """Return the array that owns the memory of *array*, which may be a view."""
    import numpy as np

    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _forget(arrays: dict[Any, _Array], key: Any, owner: Any) -> None:
    """Drop an array whose owner was collected."""
    entry = arrays.get(key)
    if entry is not None and entry.owner is owner:
        arrays.pop(key, None)


def _total_bytes(arrays: dict[Any, _Array]) -> int:
    return sum([entry.node.array.nbytes for entry in list(arrays.values())])


def _is_same(entry: _Array, array: Any) -> bool:
    """Return whether the nodes have the elements that *array* has now."""
    region = getattr(array, "region", None)
    if region is not None and region.sealed and entry.original() is array:
        return True
    copy = entry.node.array
    is_contiguous, order = (
        (array.flags.c_contiguous, "C") if copy.flags.c_contiguous else (array.flags.f_contiguous, "F")
    )
    mine = array if is_contiguous else array.copy(order)
    return kernel.is_same_memory(_address(mine), _address(copy), mine.nbytes)


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def _opened(result: Any) -> tuple[BaseException | None, Any]:
    if isinstance(result, Raised):
        return result.open(), None
    return None, result[0]


def _named(items: Sequence[Any], first: int) -> dict[str, Any]:
    """Return the items of a group, by the names that an error uses for them."""
    return {f"iterable[{number}]": item for number, item in enumerate(items, first)}


def _ignore(done: Any, error: BaseException | None) -> None:
    """Take the outcome of a call that nobody waits for."""


_local = threading.local()


def _mark_thread(name: str) -> None:
    """Record of which executor this thread runs callbacks."""
    _local.runs_callbacks_of = name


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
        while True:
            if not futures:
                break
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
