"""Executor: the interface of concurrent.futures over a pool."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from forkshm.backend import kernel
from forkshm.channel import Kind
from forkshm.context import get_context
from forkshm.executor._futures import Chunks, Future, Work, WorkPool
from forkshm.pool import PickledCallable, Task, chunked
from forkshm.pool.observe import Bar, open_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import ParamSpec

    from forkshm.pool import Pool

    P = ParamSpec("P")

__all__ = ("Executor",)

T = TypeVar("T")


if TYPE_CHECKING:
    _StandardExecutor = concurrent.futures.Executor
else:
    # Programs ask for that class where they want processes.
    from concurrent.futures import ProcessPoolExecutor as _StandardExecutor


class Executor(_StandardExecutor):
    """A `concurrent.futures.Executor` whose workers are those of a `Pool`; a subclass of ``ProcessPoolExecutor``.

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
        cluster: A ``distributed.Client``, a cluster such as ``LocalCluster``, or the address of a Dask scheduler: the
            workers run there, and you get a `forkshm.cluster.ClusterExecutor`.
        pool_options: ``born_shared``, ``task_timeout``, ``retries``, ``worker_init``, ``worker_exit``,
            ``cpu_ids``, ``inner_threads`` and ``copy_at_call``, as for `Pool`.

    Raises:
        ValueError: *max_workers* or *max_tasks_per_child* is less than 1.
        TypeError: *initializer* cannot be called, or *max_tasks_per_child* is no int.

    Fork and threads:
        Any thread may submit. A thread of the pool's own exists while more is submitted than workers were given,
        and for callbacks, ``wait`` and ``as_completed``; who waits for a result needs none. A forked child
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

    def __new__(cls, *args: Any, cluster: Any = None, **options: Any) -> Any:
        """Return an executor of this machine, or with *cluster* a `forkshm.cluster.ClusterExecutor`."""
        if cluster is None:
            return super().__new__(cls)
        from forkshm.cluster import ClusterExecutor

        return ClusterExecutor(cluster, *args, **options)

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: Any = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        *,
        max_tasks_per_child: int | None = None,
        cluster: None = None,
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
            WorkerStartError: The kernel refused a worker. At the first call all are started, and the first of them may
                have begun it; none is left, and the next call tries again.
            PoolClosedError: This is a forked child of the process that made the executor.
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
        pool = self._work.pool()
        length: int | None = None
        chunks: Iterator[Task] | None = None
        if buffersize is None:
            # As the standard library's, all is submitted now, and done unless somebody lets go of the results.
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
            self._work.add(pool, tasks)
        # An iterator of a function of its own, so that all of the above happens now.
        return _results(weakref.ref(self), self._work, sink, chunks, deadline, bar)

    def cancel_running(self, futures: Iterable[concurrent.futures.Future[Any]]) -> None:
        """Cancel calls of this executor, also those that run: their workers are killed and replaced.

        A call that no worker has begun raises `concurrent.futures.CancelledError`, one that ran `WorkerDiedError`.

        Args:
            futures: What `submit` of this executor returned. Futures that have finished stay as they are.
        """
        tasks = [future._task for future in futures if isinstance(future, Future) and future._task is not None]
        self._work.cancel(tasks, running=True)

    @property
    def _processes(self) -> dict[int, Any]:
        # By their pids, as programs look them up in the standard library's executor.
        pool = self._work._pool
        return {} if pool is None else {process.pid: process for process in pool._pool}

    def terminate_workers(self) -> None:
        """Shut down, and end the workers now, by SIGTERM; as in Python 3.14.

        What is not done yet raises `PoolClosedError`. A worker that lives on is killed after a second.

        Fork and threads:
            Any thread may call it. A forked child does nothing: the workers are its parent's.
        """
        self._end_workers(kill=False)

    def kill_workers(self) -> None:
        """Shut down, and end the workers now, by SIGKILL; as in Python 3.14. See `terminate_workers`."""
        self._end_workers(kill=True)

    def _end_workers(self, *, kill: bool) -> None:
        work = self._work
        if work.is_ours():
            work.close()
            if (pool := work._pool) is not None:
                if kill:
                    for process in pool._pool:
                        with contextlib.suppress(ValueError):  # it has ended, and is closed
                            process.kill()
                pool.terminate()
            work.settle()
            work.wait()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end the workers when all is done.

        Args:
            wait: Return only then.
            cancel_futures: Cancel what no worker was given yet.
        """
        self._work.close(cancel=cancel_futures)
        if wait:
            self._work.wait()


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
    executor: weakref.ref[Executor],
    work: Work,
    sink: Chunks,
    more: Iterator[Task] | None,
    deadline: float | None,
    bar: Bar,
) -> Iterator[Any]:
    position = 0
    try:
        while position < len(sink.tasks):
            if more is not None and executor() is not None and (task := next(more, None)) is not None:
                sink.tasks.append(task)
                work.add(work.pool(), [task])
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not work.drive(functools.partial(sink.outcomes.__contains__, position), left):
                raise concurrent.futures.TimeoutError
            success, values = work.open(sink.outcomes.pop(position))
            position += 1
            if not success:
                raise values
            values.reverse()
            while values:
                bar.update(1)
                yield values.pop()
    finally:
        # Whether all was taken, something raised, or the consumer has enough: nobody wants the rest.
        bar.close()
        work.cancel([task for task in sink.tasks if not task.is_delivered])
