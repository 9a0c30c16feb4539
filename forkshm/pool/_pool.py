"""Pool: the standard library's interface over descriptors and kernel queues.

The life of one task::

    caller                       kernel                        worker
    pack: pickle, copy large  ->
    buffers into the arena
    lease the block
    send  ------------------->   message + fds  ----------->   take: "I hold task 17"
    close the lease              (keeps the lease)              claim the block
    drive: spin, then sleep                                     unpickle, call the function
                                                                pack the result
    receive  <----------------   message + fds  <-----------    send
    claim the block                                             let go of the arguments
    unpickle: plain arrays
    over the worker's block
"""

from __future__ import annotations

import _thread
import contextlib
import operator
import os
import sys
import threading
import warnings
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, cast

from forkshm import _interrupts, _multiprocess, _system
from forkshm.backend import kernel
from forkshm.channel import Kind
from forkshm.errors import ChannelError, MissingDependencyError, PoolClosedError, as_text, refuse_if_green
from forkshm.pickler import repeated
from forkshm.pool._cpus import usable_cpus
from forkshm.pool._dispatch import Dispatcher
from forkshm.pool._imap import IMapIterator, IMapUnorderedIterator
from forkshm.pool._results import ApplyResult, MapResult, Outcome
from forkshm.pool._taking import take_arguments
from forkshm.pool._tasks import PickledCallable, Task
from forkshm.pool._worker_group import WorkerGroup
from forkshm.pool.observe import PoolReport, PoolStatistics, Trace, length_of, open_bar
from forkshm.region.blocks import arena, forget_abandoned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Literal, Self

__all__ = ("Pool",)

T = TypeVar("T")

# Chunks of an ``imap`` in flight for each worker.
_IMAP_WINDOW = 4

# Seconds that interpreter exit waits for a thread that drives the pool, because it may be pickling.
_PATIENCE_SECONDS = 1.0

# A chunk of a range shorter than this pickles faster as a list.
_RANGE_PAYS = 16


class _Life:
    """A token that keeps the workers alive while it is referenced.

    The pool holds it, and so does each asynchronous result or iterator until it is answered. The thread that drives
    the dispatcher holds it too, because the workers must not be stopped meanwhile.
    """

    __slots__ = ("__weakref__",)


if TYPE_CHECKING:
    # The annotations differ: the standard library's methods return its own result types.
    _StandardPool = object
else:
    from multiprocessing.pool import Pool as _StandardPool


def check_options(
    *,
    own: Sequence[str] = (),
    task_timeout: float | None = None,
    retries: int = 0,
    worker_init: Callable[[], object] | None = None,
    worker_exit: Callable[[Any], object] | None = None,
    inner_threads: int | Literal["share"] | None = "share",
    **others: Any,
) -> None:
    """Check the keyword-only options of a pool that mean the same on every machine.

    The message about an unknown option also lists *own*, the options that only the caller has.

    Raises:
        TypeError: There is no such option, or a function is not callable.
        ValueError: An option has an invalid value.
    """
    known = Pool.__init__.__kwdefaults__ or {}
    if (unknown := next((name for name in others if name not in known), None)) is not None:
        raise TypeError(f"there is no option {unknown!r}. The options are {', '.join([*own, *known])}.")
    for name, function in (("worker_init", worker_init), ("worker_exit", worker_exit)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a callable, got {function!r}")
    if task_timeout is not None and not float(task_timeout) > 0:
        raise ValueError(f"task_timeout must be a positive number of seconds or None, got {task_timeout!r}")
    if operator.index(retries) < 0:
        raise ValueError(f"retries must be at least 0, got {retries!r}")
    if inner_threads not in (None, "share") and (isinstance(inner_threads, str) or operator.index(inner_threads) < 1):
        raise ValueError(f"inner_threads must be at least 1, 'share', or None for no limit; got {inner_threads!r}")


class Pool(_StandardPool):
    """Create a pool of worker processes: a subclass of ``multiprocessing.Pool`` with shared-memory transfer.

    The interface, defaults and results are the standard library's. The differences:

    * Arrays and regions of shared memory are sent as descriptors, including those made after the
      pool. Other large buffers are copied once, at memcpy speed, and arrive writable.
    * A worker that dies fails the task it was running with `WorkerDiedError` and is
      replaced. Nothing else is affected.
    * Functions may be lambdas, closures, or functions defined in ``__main__`` after the pool was made.
    * Terminating the pool answers open tasks with `PoolClosedError`.
    * A pool without references ends once its asynchronous results and iterators are answered. The tasks of an
      interrupted synchronous call are abandoned.

    Args:
        processes: Number of workers. The default is the number of cores this process may use: those of its
            affinity, within the quota of its control group (rounded up).
        initializer: Called once in each worker before its first task. If it raises, the
            pool fails with that exception. If it raises ``SystemExit``, the worker ends and is replaced; if that
            keeps happening, the pool fails with `WorkerDiedError`.
        initargs: Arguments of *initializer*.
        maxtasksperchild: Number of tasks after which a worker is replaced. A chunk of a map counts as one task.
            None means never.
        context: A context of forkshm; by default the one of `get_context`.
        born_shared: Allocate large NumPy arrays in workers in shared memory from the start, including those that
            libraries make, so that results are not copied. The arrays remain the parent's own: a worker that keeps
            one sees only its own writes. Each array of 1 MiB or more costs the worker 12 us. Threads that a task
            starts allocate as usual.
        task_timeout: Seconds that one call of a function may take in its worker, including unpickling
            and pickling. Each item of a map has its own limit. A worker that exceeds it is ended and replaced,
            and the task fails with `TaskTimeoutError`. This includes a worker that was stopped (SIGSTOP).
            None means no limit. Initializers have no limit.
        retries: How often to rerun a task whose worker dies. The task gets its arguments as they were sent:
            the dead worker's writes to them are discarded, unless they are explicitly shared memory.
            Exceptions and timeouts are answers and are not retried. Other side effects, such as writing files,
            may happen twice. Copies of the arguments are kept until the task is answered, and tiny tasks do not
            share messages.
        worker_init: Called in each worker after *initializer*, without arguments. Its return value is the worker's
            state, which functions get from `forkshm.worker_state`. If it raises, the pool fails with
            that exception.
        worker_exit: Called with that state (None without *worker_init*) when a worker ends in order: after its last
            task because of *maxtasksperchild* or `close`, and when the pool is terminated (as at the end of a
            ``with`` block) while the worker is idle. It has ten seconds, or one second when the pool is
            terminated. Exceptions from it are printed. A worker that is killed, or ended during a task, does not
            call it.
        cpu_ids: Cores that workers may use: for each worker a number, or several. With fewer entries than
            workers, the entries are used in turn. A replacement worker gets the cores of the one it replaces.
            Threads that a worker starts use them, too. None means all cores that this process may use.
        inner_threads: Number of threads BLAS, OpenMP, Numba and numexpr may use in each worker. The default is its
            share of the cores (cores // workers, at least 1), unless the user set ``OMP_NUM_THREADS`` or the
            library's own variable. A number overrides these variables. None means no limit. Libraries already
            loaded in a forked worker are limited through ``threadpoolctl`` if that is installed, others by
            environment variables.
        copy_at_call: If True, copy the arguments of asynchronous calls (``apply_async``, ``map_async``,
            `Executor.submit`, `Executor.map`) at the call; arguments of all waiting calls are then in memory twice.
            Arguments of up to 64 KiB are always taken at the call, so later changes have no effect. By default,
            larger ones are copied when the call is sent to the workers. That is at once while fewer than two calls
            for each worker are in flight, and later otherwise: do not change them before the result arrives.
            Explicitly shared memory is never copied. If a call has shared memory, its objects of other classes are
            pickled when the call is sent. ``imap`` takes its input piece by piece.

    Raises:
        ValueError: *processes* or *maxtasksperchild* is less than 1, *retries* is less than 0,
            *task_timeout* is not positive, or *cpu_ids* names a core that this process may not use.
        MissingDependencyError: *born_shared* is set and NumPy is not installed.
        UnsupportedError: *cpu_ids* is given and the system does not support CPU affinity; or *born_shared* is set
            and NumPy's hook cannot be used here: see `forkshm.shared_allocations`.
        TypeError: *initializer*, *worker_init* or *worker_exit* is not callable.
        WorkerStartError: fork(2) failed.

    Fork and threads:
        Any thread may use the pool. Synchronous calls start no thread. Using the pool in a forked child
        raises an error. The workers end with this process, however it ends.

    Example:
        >>> from forkshm import Pool
        >>> with Pool(2) as pool:
        ...     pool.map(abs, [-1, 2, -3])
        [1, 2, 3]
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: _multiprocess.context.BaseContext | None = None,
        *,
        born_shared: bool = False,
        task_timeout: float | None = None,
        retries: int = 0,
        worker_init: Callable[[], object] | None = None,
        worker_exit: Callable[[Any], object] | None = None,
        cpu_ids: Iterable[int | Iterable[int]] | None = None,
        inner_threads: int | Literal["share"] | None = "share",
        copy_at_call: bool = False,
    ) -> None:
        refuse_if_green("a pool")
        if processes is None:
            processes = kernel.default_workers()
        if not hasattr(processes, "__index__"):
            raise TypeError(f"number of processes must be an int or None, got {processes!r}")
        if processes < 1:
            raise ValueError(f"number of processes must be at least 1, got {processes}")
        if maxtasksperchild is not None and (type(maxtasksperchild) is not int or maxtasksperchild < 1):
            raise ValueError(f"maxtasksperchild must be a positive int or None, got {maxtasksperchild!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be a callable, got {initializer!r}")
        check_options(
            task_timeout=task_timeout,
            retries=retries,
            worker_init=worker_init,
            worker_exit=worker_exit,
            inner_threads=inner_threads,
        )
        cpus = usable_cpus(cpu_ids) if cpu_ids is not None else []
        if context is None:
            context = _multiprocess.default_context.get_context()
        # Under the name by which programs look it up in the standard library's pool.
        self._ctx = context
        make_process = cast("Any", context).Process
        if born_shared:
            _prepare_memory()
        self._worker_group = WorkerGroup(
            processes,
            make_process,
            initializer,
            tuple(initargs),
            maxtasksperchild,
            bool(born_shared),
            worker_init,
            worker_exit,
            cpus,
            inner_threads,
        )
        self._dispatcher = Dispatcher(self._worker_group, task_timeout=task_timeout, retries=retries)
        self._copies_at_call = bool(copy_at_call)
        self._is_timed = task_timeout is not None
        self._imaps: list[IMapIterator[Any]] = []
        self._life = _Life()
        self._dispatcher.keeper = weakref.ref(self._life)
        # Called when the pool is collected and its results are answered, or at exit. At exit it runs before
        # multiprocess waits for its processes, which would take forever if one was stopped.
        self._finalizer = _multiprocess.util.Finalize(
            self._life, _end, (self._worker_group, self._dispatcher), exitpriority=15
        )
        self._start()
        self._state = "RUN"

    def _start(self) -> None:
        try:
            self._worker_group.start_all()
        except BaseException:
            self._worker_group.stop()
            raise

    # Default arguments, because the names of this module may be gone before the pool when the program ends.
    def __del__(self, warn: Any = warnings.warn) -> None:
        if getattr(self, "_state", "TERMINATE") == "TERMINATE" or not self._is_ours():
            return
        if self._dispatcher.has_kept_tasks():
            # The results may still be asked for. As in the standard library, the tasks are completed in any case.
            self._dispatcher.start_helper(now=False)
        if self._state == "RUN":
            warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, stacklevel=2, source=self)

    @property
    def _pool(self) -> list[Any]:
        # The processes, under the name by which programs look them up in the standard library's pool.
        return [worker.process for worker in self._worker_group.workers]

    @property
    def size(self) -> int:
        """Number of workers."""
        own: int | None = self.__dict__.get("size")
        return self._worker_group.size if own is None else own

    @size.setter
    def size(self, value: int) -> None:
        # A subclass of the standard library's pool may set an attribute of this name, as schwimmbad's does.
        self.__dict__["size"] = value

    @property
    def _processes(self) -> int:
        # Programs written for the standard library's pool read this attribute.
        return self._worker_group.size

    def _repopulate_pool(self) -> None:
        # Programs written for the standard library's pool call this. Otherwise, ended workers are replaced only
        # while a thread waits for a result.
        self._dispatcher.under_lead(self._dispatcher.replace_ended)

    # -- calls ------------------------------------------------------------------------

    def apply(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> T:
        """Call ``func(*args, **kwds)`` in a worker and return its result.

        Raises:
            PoolClosedError: The pool was closed or terminated.
            WorkerDiedError: The worker died while running the call.
            TaskTimeoutError: The call took longer than *task_timeout*.
            BaseException: Whatever the call, or pickling its arguments, raised. This includes ``SystemExit`` and
                ``KeyboardInterrupt``, with their type, and the worker lives on: ``sys.exit()`` in a
                task ends only the task, as with ``ProcessPoolExecutor``. ``os._exit()`` ends the worker.
        """
        result: ApplyResult[T] = ApplyResult(self._dispatcher)
        task = self._call(func, args, kwds, result)
        try:
            self._dispatcher.submit([task], waited_for=True)
            return result.get()
        except BaseException:
            if not result.is_answered():  # interrupted: nothing will read the result
                self._dispatcher.cancel([task])
            raise
        finally:
            del result, task  # no reference cycle with the traceback of a raised exception

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> ApplyResult[T]:
        """Like `apply`, but return at once with an `AsyncResult`.

        Args:
            func: The function to call.
            args: Its arguments.
            kwds: Its keyword arguments.
            callback: Called with the result, in a thread of the pool.
            error_callback: Called with the exception instead, if the call raises one, or cannot be pickled.
        """
        result: ApplyResult[T] = ApplyResult(self._dispatcher, callback, error_callback)
        self._submit_async([self._call(func, args, kwds, result)], result)
        return result

    def map(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        progress: bool | str = False,
    ) -> list[T]:
        """Return ``[func(item) for item in iterable]``, computed by the workers.

        Args:
            func: Called with each item.
            iterable: Read completely before the first task is sent.
            chunksize: Items in one task; by default such that each worker gets about four tasks.
            progress: Show a bar: True or ``"tqdm"``, which works in terminals and notebooks, or ``"rich"``. It
                shows how many items are done, how fast, the remaining time, and how many bytes were copied
                and shared.

        Raises:
            MissingDependencyError: The library of *progress* is not installed.
            PoolClosedError: The pool was closed or terminated.
            WorkerDiedError: A worker died while running one of the calls.
            BaseException: The first exception that *func* raised; see `apply`.
        """
        return self._whole(Kind.MAP, func, iterable, chunksize, progress)

    def map_async(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        progress: bool | str = False,
    ) -> MapResult[T]:
        """Like `map`, but return at once with an `AsyncResult`."""
        result, tasks = self._map(Kind.MAP, func, iterable, chunksize, callback, error_callback, progress)
        self._submit_async(tasks, result)
        return result

    def starmap(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        *,
        progress: bool | str = False,
    ) -> list[T]:
        """Return ``[func(*item) for item in iterable]``, computed by the workers; otherwise the same as `map`."""
        return self._whole(Kind.STARMAP, func, iterable, chunksize, progress)

    def starmap_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        progress: bool | str = False,
    ) -> MapResult[T]:
        """Like `starmap`, but return at once with an `AsyncResult`."""
        result, tasks = self._map(Kind.STARMAP, func, iterable, chunksize, callback, error_callback, progress)
        self._submit_async(tasks, result)
        return result

    def imap(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        progress: bool | str = False,
    ) -> IMapIterator[T]:
        """Return an iterator over the results, in order, that reads its input as needed.

        At most four chunks for each worker are in flight, or answered and not yet taken from the iterator. Chunks that
        take microseconds are counted in groups of up to 128. The bar of *progress* (see `map`) advances as results are
        taken.
        """
        sink: IMapIterator[T] = self._imap(IMapIterator, func, iterable, chunksize, progress)
        return sink

    def imap_unordered(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        progress: bool | str = False,
    ) -> IMapUnorderedIterator[T]:
        """Like `imap`, but return results in the order in which they arrive."""
        sink: IMapUnorderedIterator[T] = self._imap(IMapUnorderedIterator, func, iterable, chunksize, progress)
        return sink

    def _whole(
        self,
        kind: Kind,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None,
        progress: bool | str,
    ) -> list[T]:
        result, tasks = self._map(kind, func, iterable, chunksize)
        bar = open_bar(progress, result.items, self._dispatcher) if progress else None
        try:
            if tasks:
                self._dispatcher.submit(tasks, waited_for=True)
            if bar is not None:
                result.show(bar)
            return result.get()
        except BaseException:
            if not result.is_answered():  # interrupted: nothing will read the remaining results
                self._dispatcher.cancel(tasks)
            raise
        finally:
            if bar is not None:
                bar.close()
            del result, tasks  # no reference cycle with the traceback of a raised exception

    def _call(
        self,
        func: Callable[..., Any] | PickledCallable,
        args: Iterable[Any],
        kwds: Mapping[str, Any],
        result: ApplyResult[Any],
    ) -> Task:
        retries = self._dispatcher.retries
        if not hasattr(args, "__iter__") and not hasattr(args, "__getitem__"):
            raise TypeError(f"args must be an iterable of arguments, got {args!r}. For one argument x, write (x,).")
        arguments = tuple(args), dict(kwds)
        if isinstance(func, PickledCallable):
            batched = self._may_share_messages()
            return Task(Kind.CALL, func, arguments, result, 0, batched=batched, retries=retries)
        function = PickledCallable(self._dispatcher.packer, func, for_many=retries > 0)
        return Task(Kind.CALL, function, arguments, result, 0, retries=retries)

    def _may_share_messages(self) -> bool:
        # A task that may be resent is kept as it was sent, so it needs a message of its own.
        return self._worker_group.max_tasks is None and not self._dispatcher.retries

    def _map(
        self,
        kind: Kind,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        progress: bool | str = False,
    ) -> tuple[MapResult[T], list[Task]]:
        self._dispatcher.check_accepting()
        items = iterable if isinstance(iterable, (list, tuple, range)) else list(iterable)
        if chunksize is None:
            chunksize, extra = divmod(len(items), self._worker_group.size * 4)
            chunksize += bool(extra)
        if items:
            _check_chunksize(chunksize)
        common: frozenset[int] = frozenset()
        if chunksize < len(items) and not isinstance(items, range):
            common = repeated(items, starred=kind is Kind.STARMAP)
        function = PickledCallable(self._dispatcher.packer, func, for_many=True, repeated=common)
        if isinstance(items, range) and chunksize < _RANGE_PAYS:
            items = list(items)
        chunks = [items[start : start + chunksize] for start in range(0, len(items), chunksize)] if items else []
        bar = open_bar(progress, len(items), self._dispatcher) if progress else None
        result: MapResult[T] = MapResult(self._dispatcher, len(chunks), callback, error_callback, bar)
        result.chunksize, result.items = chunksize, len(items)
        retries = self._dispatcher.retries
        batched = self._may_share_messages()
        return result, [
            Task(kind, function, chunk, result, position, batched=batched, retries=retries)
            for position, chunk in enumerate(chunks)
        ]

    def _imap(
        self, kind: Any, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int, progress: bool | str
    ) -> Any:
        self._dispatcher.check_accepting()
        _check_chunksize(chunksize)
        function = PickledCallable(self._dispatcher.packer, func, for_many=True)
        window = _IMAP_WINDOW * self._worker_group.size
        sink: IMapIterator[T] = kind(
            self._dispatcher,
            function,
            iterable,
            chunksize,
            window,
            waited_for=not self._is_timed,
            batched=self._may_share_messages(),
        )
        sink.keeps = self._life
        if progress:
            bar = sink.bar = open_bar(progress, length_of(iterable), self._dispatcher)
            # Closes the bar, which may have a thread, when iteration stops early.
            weakref.finalize(sink, bar.close)
        self._imaps = [*(other for other in self._imaps if not other.is_done()), sink]
        sink.begin(has_length=length_of(iterable) is not None)
        return sink

    def _submit_async(self, tasks: list[Task], result: ApplyResult[Any]) -> None:
        if not tasks:
            return
        result.keeps = self._life
        dispatcher = self._dispatcher
        take_arguments(dispatcher, tasks, always=self._copies_at_call)
        try:
            while tasks:
                try:
                    dispatcher.submit(tasks, waited_for=False)
                    break
                except Exception as error:
                    first, *tasks = tasks
                    if (
                        isinstance(error, PoolClosedError | ChannelError)
                        or dispatcher.failure() is not None
                        or first.is_delivered
                        or dispatcher.knows(first)
                        or dispatcher.packing.is_interrupt([first], error)
                    ):
                        raise
                    # It cannot be pickled. As in the standard library, the result reports that.
                    result.deliver(first, Outcome(error=as_text(error)))
        except BaseException:
            result.close_bar()
            raise
        if result.wants_callback:
            dispatcher.start_helper()

    # -- the end ----------------------------------------------------------------------

    def close(self) -> None:
        """Stop accepting tasks. Workers leave once every submitted task is answered."""
        if self._state == "RUN" and self._is_ours():
            for sink in self._imaps:
                sink.fill(None)
            self._dispatcher.stop_accepting()
            self._state = "CLOSE"

    def terminate(self) -> None:
        """End the workers now and answer open tasks with `PoolClosedError`.

        Returns within about a second, whatever the workers do, or two seconds if there is a *worker_exit*.
        """
        if self._state != "TERMINATE" and self._is_ours():
            # An interrupted call can be repeated, and resumes.
            self._dispatcher.fail_all(PoolClosedError("the pool was terminated before this task was answered"))
            self._dispatcher.under_lead(self._release)
            self._imaps = []  # their input may be generators, which are closed while names of modules exist
            self._state = "TERMINATE"

    def join(self) -> None:
        """Wait for the workers to end. Call `close` or `terminate` first.

        After `close`, it returns when all callbacks have run, too.

        Once every task is answered, workers have ten seconds for their finalizers and threads before
        they are ended. A worker that has not started by then, and has no initializer, *worker_init* or
        *worker_exit* to run, is ended at once.

        Raises:
            ValueError: The pool is still running.
        """
        if not self._is_ours():
            return
        if self._state == "RUN":
            raise ValueError("cannot join: the pool is still running; close() or terminate() it first")
        if self._state == "CLOSE":
            for sink in self._imaps:
                sink.read_all()
            self._dispatcher.drive(self._dispatcher.is_idle)
            self._dispatcher.under_lead(self._join_idle)
            self._dispatcher.drive(lambda: not self._dispatcher.has_callbacks())
            self._imaps = []
            self._state = "TERMINATE"

    # Default arguments: see __del__.
    def _is_ours(
        self, getpid: Callable[[], int] = os.getpid, is_finalizing: Callable[[], bool] = sys.is_finalizing
    ) -> bool:
        # A forked child has a copy of this object, but the workers are its parent's. At interpreter teardown
        # the workers have already been ended.
        return not is_finalizing() and self._worker_group.owner == getpid()

    def _join_idle(self) -> None:
        self._worker_group.join_idle()
        self._release()

    def _release(self) -> None:
        if (trace := self._dispatcher.record.trace) is not None:
            trace.collect()
        self._worker_group.stop()
        self._finalizer.cancel()  # last, so that an interrupted end can be finished by the next call or the finalizer
        forget_abandoned()
        arena.trim()

    def statistics(self) -> PoolStatistics:
        """Return how much data has been moved so far."""
        return self._dispatcher.statistics()

    def report(self) -> PoolReport:
        """Return where the time went since the pool was made, and hints for making it faster.

        The report lists, for each worker, how long it was busy, waited, and moved data. It also lists the slowest
        tasks, with a hint where moving data takes longer than computing, or where one worker has most of the work.
        Recording is always on and costs half a microsecond a message; `trace` records every task. A pool that has
        ended returns its last known numbers.

        Fork and threads:
            Any thread may call it, also while workers are busy: running tasks count so far. In a forked child
            the numbers are those of its parent's pool.

        Example:
            >>> import time
            >>> with Pool(2) as pool:
            ...     _ = pool.map(time.sleep, [0.1, 0, 0, 0], chunksize=1)
            ...     report = pool.report()  # print(report) shows all of it
            >>> report.slowest[0].task, report.hints[0].split(". ")[-1]
            ('sleep, item 0 of the input', 'Split that task.')
        """
        return self._dispatcher.report()

    def trace(self, path: str | os.PathLike[str]) -> Trace:
        """Return a context manager that records the tasks in its block and writes them to a file.

        A path that ends in ``.html`` gets a page with a timeline and the pool's report, which opens without a network.
        Open any other file in https://ui.perfetto.dev or chrome://tracing. It has rows for the workers and for the
        threads of this process. A worker's row shows its time for waiting, receiving (reading and unpickling),
        computing (by the name of the function) and sending (pickling, copying, sending). Events of a worker before it
        was killed are included.

        The last 16,383 tasks of each worker and the last 100,000 events of this process are kept. The file has the
        number of dropped ones (``otherData.dropped``). Tasks that began before the block are left out. A task that
        continues after it, or that died with its worker, is marked ``unfinished``.

        Args:
            path: The file; it is overwritten.

        Raises:
            OSError: At the start of the block: the file cannot be written. At its end: for example, the disk is full.
            RuntimeError: At the start of the block: the pool is being traced already.
            PoolClosedError: At the start of the block: the pool was closed.

        Fork and threads:
            Activity of all threads is recorded, whichever thread starts the trace. A
            forked child writes nothing.

        Example:
            >>> import json, pathlib, tempfile
            >>> path = pathlib.Path(tempfile.mkdtemp(), "trace.json")
            >>> with Pool(2) as pool, pool.trace(path):
            ...     _ = pool.map(abs, range(100))
            >>> events = json.loads(path.read_text())["traceEvents"]
            >>> sorted({event["cat"] for event in events if event["ph"] == "X"})
            ['computing', 'pickling', 'receiving', 'sending', 'unpickling', 'waiting']

        See Also:
            The format is Chrome's "Trace Event Format".
        """
        return Trace(path, self._worker_group, self._dispatcher, self)

    def __enter__(self) -> Self:
        self._dispatcher.check_accepting()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.terminate()
        except BaseException:  # interrupted: nobody else would end the workers
            self.terminate()
            raise

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def __repr__(self) -> str:
        return f"<{_system.path_of(type(self))} state={self._state} pool_size={self._worker_group.size}>"

    def _repr_html_(self) -> str:
        return (
            f"<p>forkshm.Pool, {self._worker_group.size} workers, state {self._state}</p>{self.report()._repr_html_()}"
        )


@_interrupts.promptly
def _end(worker_group: WorkerGroup, dispatcher: Dispatcher) -> None:
    """End the workers of a pool at its collection, its termination, or the end of the program."""
    try:
        if worker_group.owner != os.getpid():
            return
        if _multiprocess.util.is_exiting():
            dispatcher.end_with_program()
        if not dispatcher.is_idle():
            # A thread may be driving the pool and must not find its channels closed.
            dispatcher.fail_all(PoolClosedError("the program ended before this task was answered"))
        dispatcher.under_lead(worker_group.stop, patience=_PATIENCE_SECONDS)
    except BaseException:
        # This is the last call. Signal handlers run in the main thread only, so the new one cannot be interrupted.
        if threading.current_thread() is threading.main_thread():
            with contextlib.suppress(RuntimeError):
                _thread.start_new_thread(_end, (worker_group, dispatcher))
        raise


def _prepare_memory() -> None:
    """Prepare this process for ``born_shared``, or raise an error that explains why that is impossible."""
    try:
        from forkshm.integrations import numpy_memory
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise MissingDependencyError(
            "cannot use born_shared: NumPy is not installed. Run: pip install 'forkshm[numpy]'", extra="numpy"
        ) from error
    numpy_memory.own_blocks()


def _check_chunksize(chunksize: int) -> None:
    if chunksize < 1:
        raise ValueError(f"chunksize must be at least 1, got {chunksize}")
