"""Executor: the interface of concurrent.futures over a pool."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import sys
import time
from typing import TYPE_CHECKING, Any, TypeVar

from forkshm import _interrupts
from forkshm.backend import kernel
from forkshm.channel import Kind
from forkshm.context import get_context
from forkshm.executor._futures import Chunks, Future, Work, WorkPool
from forkshm.pool import PickledCallable, Task, check_options, chunked
from forkshm.pool.observe import Bar, open_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from typing_extensions import ParamSpec

    from forkshm.pool import Pool

    P = ParamSpec("P")

__all__ = ("Executor",)

T = TypeVar("T")

# The options that a pool does not have, or has under another name.
_OWN_OPTIONS = ("max_workers", "mp_context", "initializer", "initargs", "max_tasks_per_child", "cluster")


if TYPE_CHECKING:
    _StandardExecutor = concurrent.futures.Executor
else:
    # Some programs test for this class to see whether an executor uses processes.
    from concurrent.futures import ProcessPoolExecutor as _StandardExecutor


class Executor(_StandardExecutor):
    """Run calls in worker processes, with the interface of ``concurrent.futures.ProcessPoolExecutor``.

    The class is a subclass of ``ProcessPoolExecutor`` and takes the same arguments. It differs in these points:

    * Arrays and regions in shared memory are sent as descriptors. Other large buffers are copied once.
    * Functions may be lambdas, closures, or defined after the executor was created.
    * A worker that dies fails only the future it was running, with `WorkerDiedError`, a ``BrokenProcessPool``. A
      replacement is started and the executor stays usable.
    * Any other ``BrokenProcessPool`` means that workers cannot be started or that *initializer* raised; its
      ``__cause__`` has the reason.
    * *max_tasks_per_child* works with fork.

    Workers start with the first call. They end with `shutdown`, or once all calls are done after the executor is
    garbage-collected, or when the program ends, which waits for all submitted calls.

    Args:
        max_workers: Number of workers; by default the number of cores that this process may use.
        mp_context: A context of forkshm or of ``multiprocessing``; only its start method is used.
        initializer: Called once in each worker before its first task.
        initargs: Arguments of *initializer*.
        max_tasks_per_child: Number of tasks after which a worker is replaced; None for never.
        cluster: A ``distributed.Client``, a cluster such as ``LocalCluster``, or the address of a Dask scheduler. The
            workers then run on that cluster, and the call returns a `forkshm.cluster.ClusterExecutor`.
        pool_options: ``born_shared``, ``task_timeout``, ``retries``, ``worker_init``, ``worker_exit``,
            ``cpu_ids``, ``inner_threads`` and ``copy_at_call``, as for `Pool`.

    Raises:
        ValueError: *max_workers* or *max_tasks_per_child* is less than 1, or a pool option has an invalid value.
        TypeError: *initializer* is not callable, *max_tasks_per_child* is not an int, or there is no such option.

    Fork and threads:
        Any thread may submit calls. The pool runs a helper thread only while more calls are submitted than the
        workers have been given, and for callbacks, ``wait`` and ``as_completed``. Waiting for a result needs no
        helper thread. A forked child that uses its parent's executor gets `PoolClosedError`.

    Example:
        >>> from forkshm import Executor
        >>> with Executor(2) as executor:
        ...     future = executor.submit(pow, 2, 10)
        ...     list(executor.map(abs, [-1, 2, -3])), future.result()
        ([1, 2, 3], 1024)

    See Also:
        `concurrent.futures.ProcessPoolExecutor`.
    """

    def __new__(cls, *args: Any, cluster: Any = None, **options: Any) -> Self:
        """Return an executor on this machine or, with *cluster*, a `forkshm.cluster.ClusterExecutor`."""
        if cluster is None:
            return super().__new__(cls)
        from forkshm.cluster import ClusterExecutor

        made: Any = ClusterExecutor(cluster, *args, local=Executor, **options)
        return made  # type: ignore[no-any-return]  # another class, so that `__init__` is not called

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        max_tasks_per_child: int | None = None,
        cluster: Any = None,
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
        check_options(own=_OWN_OPTIONS, **pool_options)
        self._max_workers = max_workers or kernel.default_workers()
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
        self._work = Work(make_pool)

    @_interrupts.promptly
    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # At interpreter teardown the pool has ended, and the names that closing needs may be gone.
        if is_finalizing():
            return
        # The submitted calls are still completed.
        try:
            work = self._work
        except AttributeError:  # it was never complete
            return
        work.close()

    # ``help()`` and editors show the signature of `__init__`.
    __new__.__wrapped__ = __init__  # type: ignore[attr-defined]

    @property
    def pool(self) -> Pool:
        """The pool that runs the calls; started on first use.

        Raises:
            RuntimeError: The executor was shut down.
        """
        return self._work.running_pool()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        """Return the future of ``fn(*args, **kwargs)``, called in a worker.

        Raises:
            RuntimeError: The executor was shut down.
            BrokenProcessPool: Workers cannot be started, or *initializer* raised.
            WorkerStartError: The kernel refused a worker. The first call starts all workers, and a worker may have
                begun the call before the failure. All workers are ended, and the next call tries again.
            PoolClosedError: This is a forked child of the process that created the executor.
        """
        future: Future[T] = Future(self._work)
        self._work.submit(future, fn, args, kwargs)
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
        """Return an iterator over ``fn(*items)`` for each ``items`` in ``zip(*iterables)``, in order.

        Args:
            fn: The function to call.
            iterables: Inputs; consumed completely by this call unless *buffersize* is given.
            timeout: Seconds from this call after which waiting for a result raises TimeoutError.
            chunksize: Number of items in one task.
            buffersize: Maximum number of chunks submitted whose results have not been consumed. More input is read as
                results are consumed.
            progress: Show a progress bar: True or ``"tqdm"``, or ``"rich"``.

        Raises:
            ValueError: *chunksize* or *buffersize* is less than 1.
            TypeError: *buffersize* is not an int.
            MissingDependencyError: The library that *progress* needs is not installed.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None:
            if not isinstance(buffersize, int):
                raise TypeError("buffersize must be an integer or None")
            if buffersize < 1:
                raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        pool = self._work.pool()
        length: int | None = None
        chunks: Iterator[Task] | None = None
        if buffersize is None:
            # Like the standard library, submit everything now; dropping the iterator cancels the rest.
            kind, items = Kind.STARMAP, list(zip(*iterables, strict=False)) if len(iterables) != 1 else iterables[0]
            _, tasks = pool._map(Kind.MAP if len(iterables) == 1 else kind, fn, items, chunksize)
            length = sum(len(task.arguments) for task in tasks)
            sink = Chunks(self._work, chunksize, tasks[0].function if tasks else None)
        else:
            sink = Chunks(self._work, chunksize)
            chunks = _chunked(pool, fn, zip(*iterables, strict=False), chunksize, sink)
            tasks = list(itertools.islice(chunks, buffersize))
        bar = open_bar(progress, length, pool._dispatcher)
        for task in tasks:
            task.sink = sink
        sink.tasks = tasks
        if tasks:
            try:
                self._work.add(pool, tasks)
            except BaseException:
                sink.tasks = []  # they refer to the sink, and keep their arguments
                raise
        # A separate generator function, so that the code above runs at the call and not at the first `next`.
        return _results(self if chunks is not None else None, self._work, sink, chunks, deadline, bar)

    def cancel_running(self, futures: Iterable[concurrent.futures.Future[Any]]) -> None:
        """Cancel calls of this executor, including running ones, whose workers are killed and replaced.

        The futures are cancelled when this returns, and raise `concurrent.futures.CancelledError`.

        Args:
            futures: Futures returned by `submit` of this executor. Finished futures do not change.
        """
        pending = {
            id(future._task): future
            for future in futures
            if isinstance(future, Future) and not future.done() and future._task is not None
        }
        tasks = [future._task for future in pending.values()]
        for task in self._work.cancel([task for task in tasks if task is not None], running=True):
            pending[id(task)].finish_cancelled()

    @property
    def _processes(self) -> dict[int, Any]:
        # Programs read this attribute of the standard library's executor.
        pool = self._work._pool
        return _Processes({} if pool is None else {process.pid: process for process in pool._pool}, self._max_workers)

    def terminate_workers(self) -> None:
        """Shut down and end the workers now with SIGTERM, as in Python 3.14.

        Unfinished calls raise `PoolClosedError`. A worker that does not end within a second is killed.

        Fork and threads:
            Any thread may call it. In a forked child the call does nothing, because the workers belong to the parent.
        """
        self._end_workers(kill=False)

    def kill_workers(self) -> None:
        """Shut down and end the workers now with SIGKILL, as in Python 3.14; see `terminate_workers`."""
        self._end_workers(kill=True)

    def _end_workers(self, *, kill: bool) -> None:
        work = self._work
        if not work._has_ended and work.is_ours():
            work.close()
            if (pool := work._pool) is not None:
                if kill:
                    for process in pool._pool:
                        with contextlib.suppress(ValueError):  # the process has ended and was closed
                            process.kill()
                pool.terminate()
            work.settle()
            work.wait()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and end the workers when all submitted calls are done.

        Args:
            wait: Return only after the callbacks of the calls have run, and the workers have ended.
            cancel_futures: Cancel calls that have not been given to a worker.
        """
        self._work.close(cancel=cancel_futures)
        if wait:
            self._work.wait()

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle an executor: its workers belong to this process. Create one where it is used.")


def _make_pool(method: str | None, *args: Any, **options: Any) -> WorkPool:
    workers, initializer, initargs, max_tasks = args
    return WorkPool(workers, initializer, initargs, max_tasks, context=get_context(method), **options)


def _chunked(
    pool: Pool, fn: Callable[..., Any], items: Iterator[tuple[Any, ...]], chunksize: int, sink: Chunks
) -> Iterator[Task]:
    function = PickledCallable(pool._dispatcher.packer, fn, for_many=True)
    for position, chunk in enumerate(chunked(items, chunksize)):
        yield Task(Kind.STARMAP, function, chunk, sink, position, retries=pool._dispatcher.retries)


def _results(
    executor: Executor | None,
    work: Work,
    sink: Chunks,
    more: Iterator[Task] | None,
    deadline: float | None,
    bar: Bar,
) -> Iterator[Any]:
    """Yield the results of a map. The iterator keeps the executor while there may be more tasks to submit."""
    position = 0
    try:
        while True:
            if position >= len(sink.tasks):
                break
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not work.drive(functools.partial(sink.outcomes.__contains__, position), left):
                raise concurrent.futures.TimeoutError
            success, values = work.open(sink.outcomes.pop(position))
            position += 1
            if not success:
                try:
                    raise values
                finally:
                    del values  # no cycle of the exception, its traceback and this frame
            values.reverse()
            while True:
                if not values:
                    break
                bar.update(1)
                yield values.pop()
            # Read only now: the input may depend on these results.
            task = None if more is None else next(more, None)
            if task is None:
                continue
            sink.tasks.append(task)
            work.add_or_fail(task)
    finally:
        # Reached on exhaustion, on an error, and when the consumer stops early: the remaining results are not needed.
        bar.close()
        work.cancel([task for task in sink.tasks if not task.is_delivered])
        if not all(task.is_delivered for task in sink.tasks):
            work.help_from_finalizer()  # workers run the others, whose arguments and results must be freed


class _Processes(dict[int, Any]):
    """The workers of an executor by pid.

    In the standard library, the attribute ``_processes`` is a number in a pool, and a dict in an executor. nautilus
    calculates with it in both cases, so this dict also acts as a number.
    """

    def __init__(self, processes: dict[int, Any], count: int) -> None:
        super().__init__(processes)
        self._count = count

    def __index__(self) -> int:
        return self._count

    def __radd__(self, other: int) -> int:
        return other + self._count

    def __rfloordiv__(self, other: int) -> int:
        return other // self._count

    def __rmod__(self, other: int) -> int:
        return other % self._count

    def __rmul__(self, other: int) -> int:
        return other * self._count
