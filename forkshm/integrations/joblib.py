"""The joblib backend ``"forkshm"``.

joblib submits batches of calls with a callback each, and waits for the callbacks. The batches go to an
`Executor` that is kept for the next call of ``Parallel`` in this process with the same settings.

Data that several batches of a call share, for example a table that each of them reads, is copied once and mapped
copy-on-write by the workers: see `RecentCopies`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import queue
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

from forkshm import _system
from forkshm.context import get_start_method
from forkshm.errors import (
    ForkshmError,
    ForkshmWarning,
    LocalTraceback,
    MissingDependencyError,
    NotPicklableError,
    PoolClosedError,
    RemoteTraceback,
    safe_repr,
)
from forkshm.executor import Executor, Future
from forkshm.pickler import RecentCopies, name_of
from forkshm.pool import PickledCallable, Wrapper
from forkshm.pool.observe import Bar, no_bar, open_bar

try:
    import joblib.parallel as _joblib
except ModuleNotFoundError as error:
    if error.name != "joblib":
        raise
    raise MissingDependencyError(
        "forkshm.joblib needs joblib: pip install 'forkshm[joblib]'", extra="joblib"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ("ForkshmBackend", "shutdown")

# Options of other backends that this one ignores: memory is sent as descriptors, or copied once.
_NOT_NEEDED = frozenset(
    {
        "context",
        "context_id",
        "idle_worker_timeout",
        "max_nbytes",
        "mmap_mode",
        "prefer",
        "require",
        "temp_folder",
        "verbose",
    }
)
# How long an aborted call waits for a callback that reads more of the caller's iterator.
_CALLBACK_SECONDS = 1.0
_POOL_OPTIONS = frozenset(
    {"born_shared", "cpu_ids", "retries", "task_timeout", "worker_exit", "worker_init", "max_tasks_per_child"}
)
_OWN_OPTIONS = frozenset({"initargs", "initializer", "progress", "start_method"})


class ForkshmBackend(_joblib.AutoBatchingMixin, _joblib.ParallelBackendBase):  # type: ignore[misc]  # has no types
    """Run the calls of ``joblib.Parallel``, and so of scikit-learn, in forkshm workers.

    ``import forkshm.joblib`` registers it as ``"forkshm"``. It has every feature of joblib's own process backend:
    ``n_jobs``, ``return_as="generator"`` and ``"generator_unordered"``, ``timeout``, ``inner_max_num_threads``, nested
    calls (threads inside workers by default), callbacks and abort. Differences:

    * Large arrays are sent through shared memory: explicitly shared arrays without a copy, others copied once for all
      calls that get the same bytes, whatever object holds them. They arrive writable, and writes stay in the worker.
      ``max_nbytes``, ``mmap_mode`` and ``temp_folder`` are accepted and ignored.
    * A worker that is killed fails the calls it was running with `WorkerDiedError`, and is replaced.
    * Abort, timeout and Ctrl-C end the workers that run calls of this ``Parallel``, and no others.
    * Workers stay for the next call with the same settings, until the program ends; see `shutdown`.
    * The default of ``n_jobs`` is -1, all cores, as with joblib's backend of Dask.

    Args:
        nesting_level: Number of calls of ``Parallel`` that this one is nested in; set by joblib.
        inner_max_num_threads: Threads of BLAS and OpenMP in each worker; by default cores divided by *n_jobs*, unless
            the environment says otherwise.
        progress: Show a bar: True or ``"tqdm"``, or ``"rich"``. Not shown for ``n_jobs=1``, which uses no workers.
        start_method: ``"fork"``, ``"forkserver"`` or ``"spawn"``. By default that of `forkshm.get_start_method`.
            ``"forkserver"`` replaces fork if workers may use several OpenMP threads and GNU's OpenMP is loaded in
            this process, because its threads hang in a forked child.
        options: *initializer*, *initargs*, *max_tasks_per_child*, *born_shared*, *task_timeout*, *retries*,
            *worker_init*, *worker_exit* and *cpu_ids*, as for `forkshm.Executor`. All may also be given to
            ``Parallel``.

    Unknown options are ignored with a warning, because programs pass options of joblib's own backends.

    Raises:
        MissingDependencyError: joblib, or the library of *progress*, is not installed.

    Fork and threads:
        joblib keeps one backend for each ``parallel_config``; several threads may use it, because each ``Parallel``
        gets a copy. A forked child starts workers of its own.

    Example:
        >>> import joblib, forkshm.joblib
        >>> with joblib.parallel_config("forkshm", n_jobs=2):
        ...     joblib.Parallel()(joblib.delayed(pow)(2, n) for n in range(5))
        [1, 2, 4, 8, 16]

    See Also:
        ``joblib.parallel_config``, ``joblib.Parallel``.
    """

    default_n_jobs = -1
    supports_inner_max_num_threads = True
    supports_retrieve_callback = True

    def __init__(
        self, nesting_level: int | None = None, inner_max_num_threads: int | None = None, **options: Any
    ) -> None:
        options = _without_unknown(options)
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads, **options)
        # The Parallel that this backend belongs to; None if any Parallel may find it, which then gets a copy.
        self.parallel: Any = None
        self._progress: bool | str = False
        # Arguments of `_warm_executor`, and what it returned.
        self._settings: _Settings | None = None
        self._executor: Executor | None = None
        self._call: _Call | None = None

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return the number of workers for a call with *n_jobs*.

        Raises:
            ValueError: *n_jobs* is 0.
        """
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning: pass a positive number, or -1 for all cores")
        if n_jobs is None:
            return 1
        why = ""
        if not self.in_main_thread() and self.nesting_level:
            # A thread of an outer call, which already uses the cores.
            why = "runs in a thread of another one. Pass n_jobs=1 here, or use a process backend for the outer call."
        elif threading.get_ident() in list(_callback_threads.values()):
            # Its callbacks would wait for the end of this one.
            why = (
                "is made by the input of another one, in the thread that receives its results. Pass n_jobs=1 here, or "
                "make the input before the outer call."
            )
        if why:
            if n_jobs != 1:
                warnings.warn(
                    f"n_jobs={n_jobs} is ignored and 1 is used: this call of Parallel {why}",
                    ForkshmWarning,
                    stacklevel=3,
                )
            return 1
        if n_jobs < 0:
            n_jobs = max(_joblib.cpu_count() + 1 + n_jobs, 1)
        return n_jobs

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Prepare the workers and return their number; called by joblib."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise _joblib.FallbackToBackend(_joblib.SequentialBackend(nesting_level=self.nesting_level))
        options = _without_unknown(options, warn=self.parallel is not parallel)
        if self.parallel is not parallel:
            # The objects of one parallel_config, each with workers and a running call of its own, share this backend.
            raise _joblib.FallbackToBackend(self._copy_for(parallel))
        options = {**self.backend_kwargs, **options}
        self._progress = options.pop("progress", False)
        self._settings = (
            n_jobs,
            options.pop("start_method", None),
            self._prepare_worker_env(n_jobs=n_jobs),
            {name: value for name, value in options.items() if name not in _NOT_NEEDED and value is not None},
        )
        self._executor = _warm_executor(*self._settings)
        return n_jobs

    def _copy_for(self, parallel: Any) -> Any:
        copy: Any = object.__new__(type(self))
        vars(copy).update(vars(self), parallel=parallel)
        return copy

    def start_call(self) -> None:
        """Prepare for the batches of a call, and show the progress bar; called by joblib when the call begins."""
        # The last call of this Parallel may have been aborted while a callback prepared batches.
        _forget_batches(self.parallel)
        if self._settings is not None and (self._executor is None or not _is_usable(self._executor)):
            self._executor = _warm_executor(*self._settings)
        assert self._executor is not None
        self._call = _Call(self._executor, self._settings[0] if self._settings else 1, self.parallel.n_tasks)
        if self._progress:
            self._call.open_bar(self._progress)

    def stop_call(self) -> None:
        """Release the data shared by the batches of a call; called by joblib when the call ends."""
        call, self._call = self._call, None
        if call is not None:
            call.close()

    @contextlib.contextmanager
    def retrieval_context(self) -> Iterator[None]:
        """Raise the error of a call that ended without its results; entered by joblib while it waits for them.

        joblib returns if all batches that were submitted are done, also if the caller's iterator raised an exception
        in place of the next one.
        """
        yield
        if self.parallel._aborting:
            self.parallel._raise_error_fast()

    def terminate(self) -> None:
        """Release the workers, which stay for the next call."""
        self.stop_call()
        self._executor = None
        self.reset_batch_stats()

    def submit(self, func: Any, callback: Callable[[Any], object] | None = None) -> concurrent.futures.Future[Any]:
        """Submit a batch of calls to a worker; *callback* gets the future when the batch is done.

        Never raises an Exception: joblib also calls it from a callback, where the exception would be lost and joblib
        would keep waiting.
        """
        future: concurrent.futures.Future[Any]
        try:
            call = self._call
            if call is None:
                raise PoolClosedError("cannot submit a batch of calls: its Parallel has ended. Create a new one.")
            callback = callback and functools.partial(call.run_callback, self.parallel, callback)
            future = call.submit(func)
        except Exception as error:
            future = concurrent.futures.Future()
            future.set_exception(error)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    # The name that joblib before 1.4 uses.
    apply_async = submit

    def retrieve_result_callback(self, out: concurrent.futures.Future[Any]) -> Any:
        """Return the results of a batch, or raise its exception."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """End the workers that run calls of this ``Parallel``, and start no more of its batches."""
        if self._call is not None:
            self._call.cancel()
        _forget_batches(self.parallel)

    def __reduce__(self) -> Any:
        # The nested backend that a worker gets has no workers yet, and starts its own.
        return _rebuild, (type(self), self.nesting_level, self.inner_max_num_threads, self.backend_kwargs)


def _rebuild(
    kind: type[ForkshmBackend], nesting_level: int | None, threads: int | None, options: dict[str, Any]
) -> ForkshmBackend:
    return kind(nesting_level=nesting_level, inner_max_num_threads=threads, **options)


def _forget_batches(parallel: Any) -> None:
    """Remove the batches that *parallel* has prepared and not submitted, which its next call would run.

    joblib keeps them when a call fails, and the next call's result would begin with theirs.
    """
    prepared = getattr(parallel, "_ready_batches", None)
    with contextlib.suppress(queue.Empty):
        while True:
            if prepared is None:
                break
            prepared.get(block=False)


def _fail(parallel: Any, error: BaseException) -> None:
    """End the running call of *parallel* with *error*, as joblib does for an Exception of the caller's iterator."""
    with parallel._lock:
        if not parallel._aborting:
            tracker = _joblib.BatchCompletionCallBack(0, 1, parallel)
            parallel._register_new_job(tracker)
            tracker._register_outcome({"result": error, "status": _joblib.TASK_ERROR})


def _without_unknown(options: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Return the options that exist. joblib's default backend ignores others, too."""
    known = _NOT_NEEDED | _POOL_OPTIONS | _OWN_OPTIONS
    if warn and (unknown := sorted(set(options) - known)):
        warnings.warn(
            f"the joblib backend forkshm ignores {', '.join(map(repr, unknown))}, which it has no option for: "
            f"use one of {', '.join(sorted(_POOL_OPTIONS | _OWN_OPTIONS))}",
            ForkshmWarning,
            stacklevel=5,  # the caller of parallel_config, or of the Parallel
        )
    return {name: value for name, value in options.items() if name in known}


# The threads that run a callback of any call, keyed by an object for each callback.
_callback_threads: dict[object, int] = {}


class _Call:
    """One call of a ``Parallel``: its pending batches, and the data they share."""

    def __init__(self, executor: Executor, n_jobs: int, n_tasks: int | None) -> None:
        self.bar: Bar = no_bar
        self._executor = executor
        self._n_tasks = n_tasks
        self._copies = RecentCopies(spare=4 * n_jobs)
        self._function: PickledCallable | None = None
        self._futures: set[Future[Any]] = set()
        self._aborted = False
        # The threads that run a callback of this call, keyed by an object for each callback.
        self._in_callback: dict[object, int] = {}
        # Runs callbacks while another thread reads the caller's iterator.
        self._later = concurrent.futures.ThreadPoolExecutor(1, "forkshm-joblib")

    def open_bar(self, progress: bool | str) -> None:
        self.bar.close()
        self.bar = open_bar(progress, self._n_tasks, self._executor._work.pool()._dispatcher)

    def submit(self, batch: Any) -> Future[Any]:
        work = self._executor._work
        function = self._function
        if function is None:
            packer = work.pool()._dispatcher.packer
            run = _RunBatch(name_of(batch.items[0][0]))
            function = self._function = PickledCallable(packer, run, for_many=True, repeats=self._copies)
        self._copies.next_payload()
        future: Future[Any] = Future(work)
        self._futures.add(future)
        try:
            work.submit(future, function, (batch,), {})
        except Exception as error:  # of an interrupted submit, the batch may be on its way: `cancel` ends it
            self._futures.discard(future)
            if _is_about_pickling(error) and not work._closed:
                raise _not_picklable(error) from error
            raise
        if future.done() and not future.cancelled():
            refusal = future.exception()
            if refusal is not None and _is_about_pickling(refusal):
                self._futures.discard(future)
                raise _not_picklable(refusal) from refusal
        future.add_done_callback(functools.partial(self._note, len(batch)))
        return future

    def _note(self, count: int, future: Any) -> None:
        self._futures.discard(future)
        if not future.cancelled() and future.exception() is None:
            self.bar.update(count)

    def run_callback(self, parallel: Any, callback: Callable[[Any], object], future: Any) -> None:
        """Pass a batch's future to joblib, unless the call was aborted."""
        if self._aborted:
            return  # without the lock, which a callback that reads the caller's iterator may hold
        if parallel._lock.acquire(blocking=False):
            try:
                self._run_callback(parallel, callback, future)
            finally:
                parallel._lock.release()
        else:
            # Another thread reads the caller's iterator, which may wait for the callbacks of a call of its own. These
            # run in this thread.
            self._later.submit(self._run_callback, parallel, callback, future)

    def _run_callback(self, parallel: Any, callback: Callable[[Any], object], future: Any) -> None:
        key = object()
        try:
            self._in_callback[key] = _callback_threads[key] = threading.get_ident()
            # The next call begins with this lock. joblib's callback releases it on its way, and would then count
            # this batch for the next call.
            with parallel._lock:
                if not self._aborted:  # read after the entry is there: see `cancel`
                    callback(future)
        except BaseException as error:
            # The caller's iterator raised it, or a method of a subclass of Parallel. joblib would wait for the batches
            # that its callback did not submit.
            _fail(parallel, error)
        finally:
            self._in_callback.pop(key, None)
            _callback_threads.pop(key, None)

    def cancel(self) -> None:
        """Cancel the batches. A callback that has begun is waited for, because it would change the next call.

        A callback that takes longer reads the caller's own iterator, and holds the lock that the next call needs.
        """
        self._aborted = True
        self._executor.cancel_running(list(self._futures))
        this_thread, deadline = threading.get_ident(), time.monotonic() + _CALLBACK_SECONDS
        while any(thread != this_thread for thread in list(self._in_callback.values())):
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)

    def close(self) -> None:
        self._later.shutdown(wait=False)
        self.bar.close()
        self.bar = no_bar
        self._copies.close()


def _is_about_pickling(error: BaseException) -> bool:
    """Return whether pickling an object raised *error*, as opposed to a worker, the pool or the kernel."""
    others = ForkshmError, OSError, MemoryError, concurrent.futures.BrokenExecutor
    cause = error.__cause__
    is_remote = isinstance(cause, RemoteTraceback) and not isinstance(cause, LocalTraceback)
    return isinstance(error, Exception) and not isinstance(error, others) and not is_remote


def _not_picklable(error: BaseException) -> NotPicklableError:
    """Return the exception that joblib's own process backend raises."""
    return NotPicklableError(f"cannot pickle the task to send to the workers: {safe_repr(error)}")


class _RunBatch(Wrapper):
    """Runs the calls of one task, in a worker. Messages about a worker that died show the first of them.

    Args:
        name: The name of the function of the first batch, for traces.
    """

    def __init__(self, name: str) -> None:
        self.__qualname__ = name

    def __call__(self, batch: Callable[[], Any]) -> Any:
        return batch()

    def describe(self, args: Sequence[Any], describe: Callable[[Any], str]) -> str:
        items = args[0].items
        function, given, named = items[0]
        parts = [*map(describe, given), *(f"{name}={describe(value)}" for name, value in named.items())]
        rest = f" and {len(items) - 1} more" if len(items) > 1 else ""
        return f"{name_of(function)}({', '.join(parts)}){rest}"

    def names(self, args: Sequence[Any]) -> dict[str, Any]:
        items = args[0].items
        found = {}
        for number, (function, given, named) in enumerate(items):
            where = f"call {number + 1} of {len(items)}: " if len(items) > 1 else ""
            found.update({f"{where}func": function, f"{where}args": given, f"{where}kwargs": named})
        return found


# -- persistent workers ---------------------------------------------------------------------------

# The number of jobs, the start method, variables of the environment, and options of the executor.
_Settings = tuple[int, "str | None", dict[str, str], dict[str, Any]]

# The settings and the executor of the last call. A call with other settings replaces it: the workers of an
# unreferenced executor end once their work is done.
_warm: list[tuple[Any, Executor]] = []


def _warm_executor(
    n_jobs: int, start_method: str | None, environment: dict[str, str], options: dict[str, Any]
) -> Executor:
    method = start_method or _start_method(environment)
    options = dict(options)
    key = n_jobs, method, environment, dict(options)
    for known, executor in _warm:
        if known == key and _is_usable(executor):
            return executor
    initializer, initargs = options.pop("initializer", None), options.pop("initargs", ())
    executor = Executor(n_jobs, _Method(method), _start_worker, (environment, initializer, tuple(initargs)), **options)
    _warm[:] = [(key, executor)]
    return executor


def shutdown(wait: bool = True) -> None:
    """End the workers that were kept for the next call of ``Parallel``. Otherwise they end with the program.

    Running calls are completed first. The next call starts workers of its own.

    Args:
        wait: Return only when the workers have ended.

    Fork and threads:
        Any thread may call it. In a forked child it does nothing, because the workers belong to its parent.

    Example:
        >>> import forkshm.joblib
        >>> forkshm.joblib.shutdown()
    """
    kept = [executor for _, executor in _warm]
    _warm.clear()
    for executor in kept:
        executor.shutdown(wait)


def _is_usable(executor: Executor) -> bool:
    try:
        executor._work.pool()
    except (RuntimeError, PoolClosedError):
        return False
    return True


class _Method:
    """The part of a context that an executor needs."""

    def __init__(self, method: str) -> None:
        self._method = method

    def get_start_method(self) -> str:
        return self._method


def _start_method(environment: dict[str, str]) -> str:
    method: str = get_start_method() or "fork"
    if method == "fork" and environment.get("OMP_NUM_THREADS") != "1" and _has_gnu_openmp():
        return "forkserver"
    return method


def _has_gnu_openmp() -> bool:
    with contextlib.suppress(ImportError):
        import threadpoolctl

        return any(library.get("prefix") == "libgomp" for library in threadpoolctl.threadpool_info())
    return False


def _start_worker(
    environment: dict[str, str], initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    # Libraries loaded before the fork have already read the environment.
    openmp, blas = _number(environment, "OMP_NUM_THREADS"), _number(environment, "OPENBLAS_NUM_THREADS")
    limits = {kind: limit for kind, limit in (("openmp", openmp), ("blas", blas)) if limit}
    with contextlib.suppress(ImportError):
        import threadpoolctl

        threadpoolctl.threadpool_limits(limits)
    for library, variable in (("numba", "NUMBA_NUM_THREADS"), ("numexpr", "NUMEXPR_NUM_THREADS")):
        if (module := sys.modules.get(library)) is not None and (limit := _number(environment, variable)):
            with contextlib.suppress(Exception):  # the library may refuse the number
                module.set_num_threads(limit)
    if initializer is not None:
        initializer(*initargs)


def _number(environment: dict[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else 0


def _in_child() -> None:
    _warm.clear()  # the workers belong to the parent


_system.register_at_fork(after_in_child=_in_child)
_joblib.register_parallel_backend("forkshm", ForkshmBackend)
