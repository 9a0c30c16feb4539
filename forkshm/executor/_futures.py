"""Calls of an executor and their futures.

A call is submitted to the pool at once. A thread that waits for a future drives the pool and finishes every future
whose answer has arrived. The pool's helper thread is needed only where no thread waits that way: for callbacks, for
``wait`` and ``as_completed`` of `concurrent.futures`, and for calls that the kernel's queue has no room for yet.
"""

from __future__ import annotations

import _thread
import concurrent.futures
import contextlib
import functools
import os
import sys
import threading
import time
import weakref
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, TypeVar, cast

from forkshm import _interrupts
from forkshm.errors import PoolClosedError, as_text
from forkshm.pool import CANCELLED, Outcome, Pace, PickledCallable, Pool, ResultSink, delivering, take_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forkshm.pool import Answer, Task

__all__ = ("Call", "Chunks", "Future", "Work", "WorkPool", "finish_all")

T = TypeVar("T")

# Reserves an answer for the helper thread. No thread has this identifier.
_FOR_HELPER = -1

_CANCELLED = ("CANCELLED", "CANCELLED_AND_NOTIFIED")
_FINISHED = (*_CANCELLED, "FINISHED")


class _Waiters(list[Any]):
    """Waiters registered by ``wait`` and ``as_completed``. Their threads sleep, so the helper thread must drive.

    Both register with finished futures, too, and have counted these already. Such a waiter must not be notified.
    """

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work
        self.is_closed = False
        self._late: list[Any] = []

    def append(self, waiter: Any) -> None:
        if self.is_closed:
            self._late.append(waiter)
            return
        super().append(waiter)
        self._work.help()

    def remove(self, waiter: Any) -> None:
        if waiter in self._late:
            self._late.remove(waiter)
        else:
            super().remove(waiter)


class Future(concurrent.futures.Future[T]):
    """The future of one call; waiting for the future drives the pool."""

    _waiters: _Waiters
    # For `__del__`, if a signal handler has raised before the future was complete.
    _state: str = _FINISHED[0]
    _condition: threading.Condition
    _result: T
    _exception: BaseException | None
    _done_callbacks: list[Callable[[Any], object]]

    def __init__(self, work: Work) -> None:
        super().__init__()
        if _interrupts.RLock is not threading.RLock:
            self._condition = threading.Condition(_interrupts.RLock())
        self._work = work
        # Set before the task is submitted.
        self._task: Task | None = None
        self._waiters = _Waiters(work)
        # Yields True once, so that only one thread notifies waiters and callbacks.
        self._telling = iter((True,))

    # The state is read without the condition's lock: a signal handler that raises inside the condition's own code
    # would leave the lock held forever.

    def is_finished(self, finished: tuple[str, ...] = _FINISHED) -> bool:
        """Return whether the future has a result, without driving the pool."""
        return self._state in finished

    def is_held_here(self) -> bool:
        """Return whether this thread holds the future's condition, as in a signal handler that interrupted `wait`."""
        return bool(self._condition._is_owned())  # type: ignore[attr-defined]

    def has_listeners(self) -> bool:
        """Return whether waiters or callbacks must be notified when the future finishes."""
        return bool(self._waiters or self._done_callbacks)

    def cancelled(self) -> bool:
        """Return True if the call was cancelled."""
        return self._state in _CANCELLED

    def running(self) -> bool:
        """Return True if a worker is running the call."""
        return not self.is_finished() and self._task is not None and self._work.is_running(self._task)

    def done(self) -> bool:
        """Return True if the future was cancelled or finished executing."""
        if not self.is_finished():
            self._work.drive(self.is_finished, 0)
        return self.is_finished()

    def result(self, timeout: float | None = None) -> T:
        """Return what the call returned, or raise what it raised; see `concurrent.futures.Future.result`."""
        error = self.exception(timeout)
        if error is not None:
            try:
                raise error
            finally:
                # No cycle of the exception, its traceback and this frame.
                del error
                # Not deleted: IPython shows the arguments of each frame.
                self = None  # type: ignore[assignment]  # noqa: PLW0642
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or None; see `concurrent.futures.Future.exception`."""
        if not self.is_finished():
            self._work.drive(self.is_finished, timeout)
        if self._state in _CANCELLED:
            raise concurrent.futures.CancelledError
        if self._state != "FINISHED":
            raise concurrent.futures.TimeoutError
        return self._exception

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        """Call *fn* with this future when it is done; see `concurrent.futures.Future.add_done_callback`."""
        kept = self._work.kept
        kept.add(self)
        super().add_done_callback(fn)
        if self.is_finished():
            kept.discard(self)
        else:
            self._work.help()

    def cancel(self) -> bool:
        """Cancel the call unless a worker has begun it; see `concurrent.futures.Future.cancel`."""
        if not self.is_finished() and (self._task is None or self._work.cancel([self._task])):
            return self.finish_cancelled()
        return self._state in _CANCELLED

    def finish_cancelled(self) -> bool:
        """Make this a cancelled future, unless it has a result; return whether it is one."""
        if self.is_held_here():
            # A signal handler interrupted `wait`, which has counted this future as pending and is about to register.
            self._work.call_later(functools.partial(self.finish, cancelled=True))
            return True
        self.finish(cancelled=True)
        return self._state in _CANCELLED

    def finish(self, *, cancelled: bool = False, value: Any = None, error: BaseException | None = None) -> None:
        """Set the result unless there is one already. Can be repeated."""
        with self._condition._lock:  # type: ignore[attr-defined]  # entered by C code; see above
            # No call in the block.
            if self._state in ("PENDING", "RUNNING"):
                if cancelled:
                    self._state = "CANCELLED_AND_NOTIFIED"
                else:
                    self._result = value
                    self._exception = error
                    self._state = "FINISHED"
                self._waiters.is_closed = True
        if self.has_listeners():
            # Not in this thread: callbacks are the user's code, and a signal handler may raise in the code that
            # notifies waiters.
            self._work.call_later(self._tell)
        else:
            self._work.kept.discard(self)

    def __del__(
        self, finished: tuple[str, ...] = _FINISHED, is_finalizing: Callable[[], bool] = sys.is_finalizing
    ) -> None:
        # The result is no longer wanted, but the call must still run and its arguments be freed. The garbage
        # collector may run at any point, for example inside the code that starts a thread.
        if self._state not in finished and not is_finalizing():
            self._work.help_from_finalizer()

    def _tell(self) -> None:
        try:
            if next(self._telling, False):
                with self._condition:
                    for waiter in self._waiters:
                        if self._state in _CANCELLED:
                            waiter.add_cancelled(self)
                        elif self._exception is not None:
                            waiter.add_exception(self)
                        else:
                            waiter.add_result(self)
                    self._condition.notify_all()
                self._invoke_callbacks()  # type: ignore[attr-defined]  # no public name
        finally:
            # After a SystemExit of a callback, too: `Work.wait` waits for it.
            self._work.kept.discard(self)


class Call(ResultSink):
    """One submitted call."""

    def __init__(self, work: Work, future: Future[Any]) -> None:
        # Shared by all calls: the speed of earlier calls decides how many later ones share a message.
        self.pace = work.pace
        self.keeps = None
        # A weak reference: a future that was dropped needs no result.
        self._future = weakref.ref(future)
        self._work = work

    def deliver(self, task: Task, answer: Answer) -> None:
        arrived, key = self._work.arrived, id(task)
        entry = self, task, answer
        with delivering:
            if not task.is_delivered:
                arrived[key] = entry
                task.is_delivered = True
        future = self._future()
        if future is None:
            arrived.pop(key, None)
        elif future.has_listeners() or self._work.is_helped():
            self._work.settle_later()

    def take(self, answer: Answer) -> None:
        """Finish the future. Can be repeated."""
        future = self._future()
        if future is not None and not future.is_finished():
            success, value = self._work.open(answer)
            if success:
                future.finish(value=value)
            elif answer is CANCELLED:
                future.finish(cancelled=True)
            else:
                future.finish(error=value)
        elif future is not None:
            future.finish()  # notifies the listeners if an earlier attempt was interrupted

    def is_held_here(self) -> bool:
        """Return whether this thread holds the future's condition; then another thread must finish the future."""
        future = self._future()
        return future is not None and future.is_held_here()

    def fail(self, error: BaseException) -> None:
        """Finish the future with *error*, because the call will not run."""
        future = self._future()
        if future is not None:
            future.finish(error=error)


class Chunks(ResultSink):
    """The tasks of one map.

    Args:
        work: The executor's work.
        chunksize: Number of items in each task; the last may have fewer.
        function: The pickled function of the tasks, kept until all of them are answered.
    """

    def __init__(self, work: Work, chunksize: int, function: PickledCallable | None = None) -> None:
        super().__init__()
        self.chunksize = chunksize
        self._work = work
        self._function = function
        self.outcomes: dict[int, Answer] = {}
        # All tasks submitted so far.
        self.tasks: list[Task] = []

    def deliver(self, task: Task, answer: Answer) -> None:
        with delivering:
            if not task.is_delivered:
                self.outcomes[task.position] = answer
                task.is_delivered = True


class WorkPool(Pool):
    """A pool whose first task waits for the workers."""

    def _start(self) -> None:
        """Defer starting the workers to `start_workers`."""
        self._starting = _interrupts.RLock()

    def start_workers(self) -> None:
        """Start the workers unless they are running. After an exception, the caller terminates the pool.

        Raises:
            WorkerStartError: The kernel refused a worker.
        """
        if not self._worker_group.started:
            with self._starting:
                if not self._worker_group.started:
                    self._worker_group.start_all()


class Work:
    """The calls of an executor; outlives a garbage-collected executor until all calls are done."""

    def __init__(self, make_pool: Callable[[], WorkPool]) -> None:
        self._make_pool = make_pool
        # Measures how long the calls take.
        self.pace = Pace()
        self._shared: PickledCallable | None = None
        self._owner = os.getpid()
        self._lock = _interrupts.RLock()
        self._pool: WorkPool | None = None
        # Keeps futures with callbacks alive until the callbacks have run.
        self.kept: set[Future[Any]] = set()
        # Answers that have arrived but whose futures are unfinished, keyed by the id of the task.
        self.arrived: dict[int, tuple[Call, Task, Answer]] = {}
        # Identifier of the thread that unpickles each answer, with the same keys.
        self._opening: dict[int, int] = {}
        self._is_settle_called = False
        self._closed = False
        self._has_ended = False
        _works.add(self)

    def is_ours(self) -> bool:
        """Return whether this process created the executor, as opposed to a forked child."""
        return self._owner == os.getpid()

    def _check(self) -> None:
        if not self.is_ours():
            raise PoolClosedError(
                f"cannot use this executor in process {os.getpid()}: it belongs to the parent process {self._owner}. "
                "Create an executor in this process."
            )
        pool = self._pool
        if pool is not None and (failure := pool._dispatcher.failure()) is not None and not self._closed:
            raise broken_by(failure)
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")

    # -- on the way out -------------------------------------------------------------------------

    def running_pool(self) -> WorkPool:
        """Return the pool, with its workers started."""
        pool = self.pool()
        self._start(pool)
        return pool

    def pool(self) -> WorkPool:
        """Return the pool; its workers may not have been started, see `add`."""
        self._check()
        pool = self._pool
        if pool is None:
            with self._lock:
                if self._pool is None:
                    self._pool = self._make_pool()
                pool = self._pool
        return pool

    def _start(self, pool: WorkPool) -> None:
        try:
            pool.start_workers()
        except BaseException:

            def undo() -> None:
                if self._pool is pool:
                    self._pool = self._shared = None
                pool.terminate()
                self.settle()  # finish the futures of the terminated pool

            _interrupts.repeat(undo)
            raise

    def shared(self, pool: Pool, function: Callable[..., Any]) -> Callable[..., Any] | PickledCallable:
        """Return the pickled function that all its tasks share, if it is pickled by name; else the function."""
        shared = self._shared
        if shared is not None and shared.function is function and pool._dispatcher.is_named(function):
            return shared
        if (shared := pool._dispatcher.named_function(function)) is None:
            return function
        self._shared = shared
        return shared

    def add(self, pool: WorkPool, tasks: Sequence[Task]) -> None:
        """Give tasks to the pool.

        Raises:
            Exception: Pickling the arguments of the first task failed. Nothing was submitted.
        """
        dispatcher = pool._dispatcher
        take_arguments(dispatcher, tasks, always=pool._copies_at_call)
        if pool._worker_group.started:
            dispatcher.submit(tasks, waited_for=True)
        else:
            # Send before the first fork, because after a fork every page that is written is copied. Send only one
            # task, so that starting the workers is not delayed.
            try:
                dispatcher.submit(tasks[:1], waited_for=True)
                self._start(pool)
            except BaseException:

                def undo() -> None:
                    # No worker will run the task, and `shutdown` would wait for it.
                    if not pool._worker_group.started:
                        dispatcher.cancel(tasks)

                _interrupts.repeat(undo)
                raise
            if len(tasks) > 1:
                dispatcher.submit(tasks[1:], waited_for=True)
        if dispatcher.has_unsent() or dispatcher.is_timed():
            with contextlib.suppress(RuntimeError):  # no thread can be started: the waiting thread drives instead
                dispatcher.start_helper(now=False)
            # Also look here: the helper thread would first have to get the GIL from this thread.
            if dispatcher.look():
                self.settle()

    def add_or_fail(self, task: Task) -> None:
        """Give a task to the pool. If its arguments cannot be pickled, the error is its answer."""
        pool = self.pool()
        try:
            self.add(pool, [task])
        except Exception as error:
            if pool._dispatcher.knows(task) or not self._is_of_arguments(pool, task, error):
                raise
            task.sink.deliver(task, Outcome(error=as_text(error)))

    def _is_of_arguments(self, pool: WorkPool, task: Task, error: Exception) -> bool:
        """Return whether adding a task failed because its arguments cannot be pickled."""
        if pool._dispatcher.packing.is_interrupt([task], error):
            pool._dispatcher.cancel([task])
            return False
        return bool(pool._worker_group.started) and not self._closed and pool._dispatcher.failure() is None

    def submit(
        self, future: Future[Any], function: Callable[..., Any] | PickledCallable, args: Any, kwargs: Any
    ) -> None:
        """Submit a call to the pool."""
        pool = self.pool()
        call = Call(self, future)
        task: Task | None = None
        try:
            if not isinstance(function, PickledCallable):
                function = self.shared(pool, function)
            task = pool._call(function, args, kwargs, cast("Any", call))
            future._task = task
            self.add(pool, [task])
        except Exception as error:
            if task is None:
                raise
            if self._is_of_arguments(pool, task, error):
                # The frames of the traceback hold the future, so they become text.
                call.fail(as_text(error))
            else:
                self._check()
                raise

    # -- on the way back ------------------------------------------------------------------------

    def open(self, answer: Answer) -> tuple[bool, Any]:
        """Unpickle an answer, and turn a fatal failure of the pool into BrokenExecutor."""
        pool = self._pool
        if pool is None:
            return answer.open()
        success, value = pool._dispatcher.open(answer)
        failure = pool._dispatcher.failure()
        if failure is not None and value is failure and not isinstance(failure, PoolClosedError):
            value = broken_by(failure)
        return success, value

    def _has_news(self) -> bool:
        me = threading.get_ident()
        return any(self._opening.get(key, me) == me for key in list(self.arrived))

    def settle(self) -> None:
        """Finish the futures whose answers have arrived. An answer is dropped only after its future is finished."""
        self._is_settle_called = False
        me = threading.get_ident()
        for key in list(self.arrived):
            # One thread at a time unpickles an answer. Other threads skip it instead of waiting on a lock, because
            # unpickling runs the user's code.
            entry = self.arrived.get(key)
            if entry is not None and entry[0].is_held_here():
                # `wait` of concurrent.futures has checked the state and is about to register its waiter.
                self._opening.setdefault(key, _FOR_HELPER)
                self.settle_later()
                continue
            if self._opening.get(key) == _FOR_HELPER and self.is_helped():
                self._opening[key] = me
            if self._opening.setdefault(key, me) != me:
                continue
            try:
                entry = self.arrived.get(key)
                if entry is not None:
                    call, _, answer = entry
                    call.take(answer)
                    self.arrived.pop(key, None)
            finally:
                self._opening.pop(key, None)
        pool = self._pool
        if pool is not None:
            pool._dispatcher.notify()
            if self._closed and pool._dispatcher.is_idle() and not pool._dispatcher.is_helper():
                self._end_later()

    def settle_later(self) -> None:
        """Call `settle` in the helper thread."""
        if not self._is_settle_called:
            self._is_settle_called = True
            self.call_later(self.settle)

    def drive(self, done: Callable[[], bool], timeout: float | None) -> bool:
        """Drive the pool until *done* or for *timeout* seconds; return whether *done* is true.

        Raises:
            PoolClosedError: This is a forked child of the process that created the executor.
        """
        if not self.is_ours():
            self._check()
        deadline = None if timeout is None else time.monotonic() + timeout

        def has_news() -> bool:
            return (bool(self.arrived) and self._has_news()) or done()

        while not done():
            if self.arrived:
                self.settle()
                if done():
                    break
            pool = self._pool
            if pool is None:
                break  # the pool has ended, and everything is answered
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            came = pool._dispatcher.drive(has_news, left)
            self.settle()
            if not came and not done():
                return False
        return done()

    def help(self) -> None:
        """Start the helper thread, which drives the pool while no other thread does.

        Raises:
            RuntimeError: No thread can be started.
        """
        pool = self._pool
        if pool is not None and self.is_ours():
            if self.arrived:
                self.settle_later()
            pool._dispatcher.start_helper()

    def help_from_finalizer(self) -> None:
        """Start the helper thread from code that the garbage collector may run at any point."""
        if self.is_ours():
            with contextlib.suppress(RuntimeError):  # no thread can be started, or the interpreter is exiting
                _thread.start_new_thread(self.help, ())

    def call_later(self, callback: Callable[[], None]) -> None:
        """Call *callback* in the helper thread or, without a pool, in this thread."""
        pool = self._pool
        if pool is not None:
            pool._dispatcher.call_later(callback)
        else:
            callback()

    def is_helped(self) -> bool:
        """Return whether this is the pool's helper thread."""
        pool = self._pool
        return pool is not None and pool._dispatcher.is_helper()

    def is_running(self, task: Task) -> bool:
        """Return whether a worker is running the task."""
        pool = self._pool
        return pool is not None and pool._dispatcher.is_running(task)

    def cancel(self, tasks: Sequence[Task], *, running: bool = False) -> list[Task]:
        """Cancel tasks that no worker has begun and, with *running*, running ones; return the cancelled tasks."""
        pool = self._pool
        if pool is None or not self.is_ours():
            return []
        return pool._dispatcher.cancel(tasks, running=running)

    # -- the end ----------------------------------------------------------------------------------

    def close(self, *, cancel: bool = False) -> None:
        """Accept no more calls, and end the pool when all calls are done."""
        # A ``__del__`` may get here at interpreter teardown: the pool has ended by then, and the names of modules are
        # gone.
        if self._has_ended or not self.is_ours():
            return
        self._closed = True
        pool = self._pool
        if pool is None:
            self._has_ended = True
            return
        if cancel:
            pool._dispatcher.cancel_all()
            self.settle()
        pool.close()
        if not self._has_ended:
            self._end_later()

    def _end_later(self) -> None:
        pool = self._pool
        if pool is not None and not self._has_ended:
            pool._dispatcher.call_later(self._end_if_done)

    def _end_if_done(self) -> None:
        pool = self._pool
        if pool is not None and pool._dispatcher.is_idle() and not self.arrived:
            self._end(pool)

    def _end(self, pool: WorkPool) -> None:
        """Wait until all calls are done and the workers have ended. Can be repeated and called by several threads."""
        self.drive(pool._dispatcher.is_idle, None)
        pool.close()  # a callback may get here while `close` is still canceling
        pool.join()
        self.settle()
        self._has_ended = True

    def wait(self) -> None:
        """Wait until all calls are done, their callbacks have run, and the workers have ended."""
        pool = self._pool
        if pool is None or (self._has_ended and not self.kept) or not self.is_ours():
            return
        if pool._dispatcher.is_helper():
            return  # called from a future's callback, in the thread that will end the pool
        if not self._has_ended:
            self._end(pool)
        self.drive(self._have_called_back, None)

    def _have_called_back(self) -> bool:
        # A future that is held here was interrupted by a signal handler, whose return its callbacks await.
        return not self.kept or all(future.is_held_here() for future in list(self.kept))

    def end_helper(self) -> None:
        """Wait until the helper thread of the ended pool has ended."""
        if self._pool is not None and self._has_ended:
            self._pool._dispatcher.end_helper()


def broken_by(error: BaseException) -> BrokenProcessPool:
    """Return the exception for calls to an executor whose pool has failed with *error*."""
    broken = BrokenProcessPool(f"this executor is broken: {error!r}. Create a new executor.")
    broken.__cause__ = error
    return broken


_works: weakref.WeakSet[Work] = weakref.WeakSet()


def finish_all() -> None:
    """End all executors before the interpreter ends threads and pools, as concurrent.futures does with its own."""
    for work in list(_works):
        work.close()
        work.wait()
        work.end_helper()


with contextlib.suppress(RuntimeError):  # this is first imported while the interpreter exits
    cast("Any", threading)._register_atexit(finish_all)
