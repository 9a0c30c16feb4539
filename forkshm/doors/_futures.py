"""What an executor has to do, and the futures that wait for it.

The life of one future: it waits here, where it can be cancelled; a few for each worker are running, which means
handed to the pool. Whoever waits for a result drives the pool, as everywhere, and hands out what has come, for
everybody. A thread is needed only for what nobody waits for in that way: callbacks, ``wait`` and ``as_completed``
of `concurrent.futures`, and while more was submitted than the pool was given.
"""

from __future__ import annotations

import _thread
import collections
import concurrent.futures
import contextlib
import functools
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, cast

from forkshm.errors import PoolClosedError
from forkshm.pool import Pool
from forkshm.pool._results import Job, Pace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forkshm.pool._dispatch import Function, Task
    from forkshm.pool._results import Outcome

__all__ = ("Call", "Chunks", "Future", "Work", "WorkPool", "finish_all")

T = TypeVar("T")

#: Futures handed to the pool beyond two for each worker: enough to keep tiny tasks flowing, few
#: enough that most of those submitted can still be cancelled.
_AHEAD = 8
#: And so many times as many while calls take microseconds and go several in a message: some milliseconds of work.
_MOST_TIMES_AHEAD = 8
#: Chunks of a map, which nobody cancels one by one: enough that tiny ones share messages.
_CHUNKS_AHEAD = 256


class _Waiters(list[Any]):
    """Those who wait for a future by ``wait`` or ``as_completed``: they sleep, so somebody must drive."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        self._work.help()


class Future(concurrent.futures.Future[T]):
    """The future of one call, whose waiting drives the pool."""

    _waiters: list[Any]
    _state: str
    _done_callbacks: list[Callable[[Any], object]]
    # Here and not in the module, whose names are gone when the last futures are.
    _FINISHED = ("CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED")

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work
        if hasattr(self, "_waiters"):
            self._waiters = _Waiters(work)
        else:
            work.help()

    def is_finished(self) -> bool:
        """Whether there is something to be had, without looking for it."""
        return self._state in self._FINISHED

    def done(self) -> bool:
        """Return True if the future was cancelled or finished executing."""
        if not self.is_finished():
            self._work.drive(self.is_finished, 0)
        return super().done()

    def result(self, timeout: float | None = None) -> T:
        """Return what the call returned, or raise what it raised; see `concurrent.futures.Future.result`."""
        return super().result(self._wait(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or None; see `concurrent.futures.Future.exception`."""
        return super().exception(self._wait(timeout))

    def _wait(self, timeout: float | None) -> float | None:
        if self.is_finished():
            return timeout
        began = time.monotonic()
        self._work.drive(self.is_finished, timeout)
        return None if timeout is None else max(0.0, timeout - (time.monotonic() - began))

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
        """Cancel the call unless a worker was given it; see `concurrent.futures.Future.cancel`."""
        cancelled = super().cancel()
        if cancelled:
            self._work.nudge()
        return cancelled

    def _invoke_callbacks(self) -> None:
        self._work.kept.discard(self)
        # Users' code: not in the thread that happened to wait for another future.
        if not self._done_callbacks:
            return
        call = super()._invoke_callbacks  # type: ignore[misc]  # no public name
        if self._state != "FINISHED" or not self._work.call_later(call):
            call()

    def __del__(self) -> None:
        # Nobody will ask, and the call is to be done, and its arguments freed, all the same. The collector may be
        # at work amid anything, so that here no lock may be taken.
        if self._state not in self._FINISHED and self._work.is_ours():
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                _thread.start_new_thread(self._work.help, ())


class Call(Job):
    """One submitted call."""

    def __init__(
        self,
        work: Work,
        future: Future[Any],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        # Not one of its own: how many may share a message is known from those before it.
        self.pace = work.pace
        self.keeps = None
        # Where nobody has it any more, nobody needs it.
        self._future = weakref.ref(future)
        self._work = work
        self.function, self._args, self._kwargs = function, args, kwargs

    def begin(self, pool: Pool) -> Task | None:
        """Return the task, unless it was cancelled."""
        future = self._future()
        if future is not None and not future.set_running_or_notify_cancel():
            return None
        task = pool._call(self._work.shared(self.function), self._args, self._kwargs, cast("Any", self))
        del self.function, self._args, self._kwargs
        return task

    def deliver(self, position: int, outcome: Outcome) -> None:
        self._work.deliver(self, position, outcome)

    def take(self, position: int, outcome: Outcome, work: Work) -> None:
        """Hand the answer out."""
        future = self._future()
        if future is None:
            return
        success, value = work.open(outcome)
        if success:
            future.set_result(value)
        else:
            future.set_exception(value)

    def fail(self, position: int, error: BaseException) -> None:
        """It is not going to be done."""
        future = self._future()
        if future is not None and (future.running() or future.set_running_or_notify_cancel()):
            future.set_exception(error)

    def cancel(self) -> None:
        """It is not going to be done because nobody wants it."""
        future = self._future()
        if future is not None:
            future.cancel()
            future.set_running_or_notify_cancel()


class Chunks(Job):
    """The tasks of one map.

    Args:
        work: What they belong to.
        chunksize: Items in each, but for the last.
        count: How many there are; 0 where that is not known before.
        function: Of those, kept as it was packed until all of them are answered.
    """

    def __init__(self, work: Work, chunksize: int, count: int = 0, function: Function | None = None) -> None:
        super().__init__()
        self.chunksize = chunksize
        self._work = work
        self._left = count
        self._function = function
        if function is not None:
            function.users += 1
        self.outcomes: dict[int, tuple[bool, Any] | Outcome] = {}

    def deliver(self, position: int, outcome: Outcome) -> None:
        self._work.deliver(self, position, outcome)

    def take(self, position: int, outcome: tuple[bool, Any] | Outcome, work: Work) -> None:
        """Keep an answer until its turn comes."""
        self.outcomes[position] = outcome
        self._left -= 1
        if not self._left and self._function is not None:
            self._function.done()
            self._function = None

    def fail(self, position: int, error: BaseException) -> None:
        """It is not going to be done."""
        self.take(position, (False, error), self._work)

    def cancel(self, position: int) -> None:
        """It is not going to be done because nobody wants it."""
        self.fail(position, concurrent.futures.CancelledError())


class WorkPool(Pool):
    """A pool whose first task waits for the workers."""

    def _start(self) -> None:
        """Start nothing yet."""

    def start_workers(self) -> None:
        """Start the workers, unless they are. No other thread drives the pool yet, and it has none of its own.

        Raises:
            WorkerStartError: The kernel refused one; the pool is stopped.
        """
        if not self._crew.started:
            self._crew.start_all()


class Work:
    """What an executor has to do; lives until that is done, also when the executor was collected."""

    def __init__(self, make_pool: Callable[[], WorkPool], workers: int) -> None:
        self._make_pool = make_pool
        self._limit = 2 * workers + _AHEAD
        #: How fast the calls are.
        self.pace = Pace()
        self._shared: Function | None = None
        self._owner = os.getpid()
        # Reentrant: the collector may close an executor anywhere.
        self._lock = threading.RLock()
        self._pool: WorkPool | None = None
        #: Calls, and tasks of maps, in their order.
        self._waiting: collections.deque[Call | Task] = collections.deque()
        self._running = 0
        #: Futures that are to call something, whoever has them.
        self.kept: set[Future[Any]] = set()
        #: What has come, and was not handed out.
        self._arrived: collections.deque[tuple[Call | Chunks, int, Outcome]] = collections.deque()
        # Who hands out. Reentrant: unpickling is the user's code.
        self._settling = threading.RLock()
        self._settler: int | None = None
        # Threads that wait and drive; and whether the pool's thread is to drive when there are none.
        self._drivers = 0
        self._is_helped = self._is_helped_now = False
        self._is_settle_called = False
        self._closed = False
        self._is_ending = False
        self._ended = threading.Event()
        self._broken: BaseException | None = None
        _works.add(self)

    def is_ours(self) -> bool:
        """Whether this is the process that made it, and no child."""
        return self._owner == os.getpid()

    def running_pool(self) -> WorkPool:
        """Return the pool; started if need be."""
        with self._lock:
            self._check()
            return self._begun_pool() or self._start(())

    def _begun_pool(self) -> WorkPool | None:
        """Return the pool if there is one, with its workers. Needs the lock."""
        pool = self._pool
        if pool is not None:
            # Pickling the first call's arguments may come here, to wait for another call.
            pool.start_workers()
        return pool

    def _start(self, units: Sequence[Call | Task]) -> WorkPool:
        """Start the pool, which begins with these. Needs the lock: nobody drives it meanwhile."""
        pool = self._pool = self._make_pool()
        try:
            # Before the first fork: after each, whatever is touched is copied. And only one, which workers are not kept
            # waiting for.
            self._waiting.extend(units[:1])
            self._hand_over()
            pool.start_workers()
            self._waiting.extend(units[1:])
        except BaseException:
            pool.terminate()
            self._pool = self._shared = None
            self._waiting.clear()
            self.settle()  # what the pool was given
            raise
        return pool

    def _check(self) -> None:
        if not self.is_ours():
            raise PoolClosedError(
                f"this executor belongs to process {self._owner}, and this is its child {os.getpid()}: "
                "make one in this process"
            )
        if self._broken is not None:
            raise broken_by(self._broken)
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")

    # -- on the way out -------------------------------------------------------------------------

    def add(self, units: Sequence[Call | Task]) -> None:
        """Take what is to be done, and hand it to the pool now or as soon as there is room."""
        with self._lock:
            self._check()
            if (pool := self._begun_pool()) is None:
                pool = self._start(units)
            else:
                self._waiting.extend(units)
        self._hand_over()
        if self._waiting or pool._dispatcher.has_unsent() or pool._dispatcher._watch is not None:
            self.help(now=False)
            # And not only there: the pool's thread would have to wait for this one's leave to run.
            if pool._dispatcher.look():
                self.settle()

    def _hand_over(self) -> None:
        while True:
            with self._lock:
                pool, waiting = self._pool, self._waiting
                if pool is None or not waiting:
                    break
                unit = waiting[0]
                units: list[Call | Task]
                if isinstance(unit, Call):
                    units = self._take_calls(unit.function)
                    if not units:
                        break
                else:
                    # All at once, so that they may share messages.
                    units = []
                    while waiting and not isinstance(waiting[0], Call) and self._running + len(units) < _CHUNKS_AHEAD:
                        units.append(waiting.popleft())
                    if not units:
                        break
                self._running += len(units)
            self._begin(pool, units)
            # It ends when the pool has nothing to do, as just now, perhaps; while this is on its way it does not.
            if self._is_helped and not pool._dispatcher.has_helper():
                pool._dispatcher.start_helper(now=False)
            del unit, units
        self._end_if_done()

    def _take_calls(self, function: Callable[..., Any]) -> list[Call | Task]:
        """Take what may be handed over now: a call, or while they are tiny, many of the same function."""
        waiting = self._waiting
        times = min(self.pace.batch, _MOST_TIMES_AHEAD)
        if times == 1:
            return [waiting.popleft()] if self._running < self._limit else []
        ahead = times * self._limit
        if 2 * self._running > ahead:
            return []  # in a while there is room for many, which then share messages
        calls: list[Call | Task] = []
        while waiting and self._running + len(calls) < ahead:
            unit = waiting[0]
            if not isinstance(unit, Call) or unit.function is not function:
                break
            calls.append(waiting.popleft())
        return calls

    def shared(self, function: Callable[..., Any]) -> Callable[..., Any] | Function:
        """Return what the tasks of one function have in common, if it crosses by its name and so is always the same."""
        pool, shared = self._pool, self._shared
        if shared is not None and shared.function is function:
            return shared
        if pool is None or (shared := pool._dispatcher.named_function(function)) is None:
            return function
        self._shared = shared
        return shared

    def _begin(self, pool: Pool, units: Sequence[Call | Task]) -> None:
        tasks: list[Task] = []
        try:
            for unit in units:
                task = unit.begin(pool) if isinstance(unit, Call) else unit
                if task is not None:
                    tasks.append(task)
            if tasks:
                pool._dispatcher.submit(tasks, waited_for=True)
        except BaseException as error:
            reason = self._explained(pool, error)
            for unit in units:
                if isinstance(unit, Call):
                    unit.fail(0, reason)
                else:
                    cast("Chunks", unit.job).fail(unit.position, reason)
            tasks = []
            self.nudge()
            if not isinstance(error, Exception):  # Ctrl-C
                raise
        finally:
            with self._lock:
                self._running -= len(units) - len(tasks)

    def _explained(self, pool: Pool, error: BaseException) -> BaseException:
        """Return what a future gets in place of an error: another one when it is that the pool cannot go on."""
        if pool._dispatcher._failure is not error:
            return error
        with self._lock:
            self._broken = error
        return broken_by(error)

    # -- on the way back ------------------------------------------------------------------------

    def deliver(self, job: Call | Chunks, position: int, outcome: Outcome) -> None:
        """Take an answer, from whoever drives the pool; under the dispatcher's lock, perhaps."""
        self._arrived.append((job, position, outcome))
        if not self._drivers and self._is_helped and not self._is_settle_called:
            self._is_settle_called = True
            self.call_later(self.settle)

    def open(self, outcome: Outcome) -> tuple[bool, Any]:
        """Unpickle an answer; and notice when it is that the pool cannot go on."""
        pool = self._pool
        if pool is None:
            return outcome.open()
        success, value = pool._dispatcher.open(outcome)
        return success, value if success else self._explained(pool, value)

    def settle(self) -> None:
        """Hand out what has come, and hand over what waits."""
        self._is_settle_called = False
        with self._settling:
            before, self._settler = self._settler, threading.get_ident()
            try:
                while self._arrived:
                    job, position, outcome = self._arrived.popleft()
                    with self._lock:
                        self._running -= 1
                    job.take(position, outcome, self)
                    del job, outcome
            finally:
                self._settler = before
        if self._broken is not None:
            self._give_up(broken_by(self._broken))
        self._hand_over()

    def drive(self, done: Callable[[], bool], timeout: float | None) -> bool:
        """Keep things going until *done*, or *timeout* seconds; return whether it is.

        Raises:
            PoolClosedError: This is a forked child of the process that made the executor.
        """
        if not self.is_ours():
            self._check()
        deadline = None if timeout is None else time.monotonic() + timeout
        me = threading.get_ident()

        def has_news() -> bool:
            return bool(self._arrived) or self._settler not in (None, me) or done()

        with self._lock:
            self._drivers += 1
        try:
            while not done():
                pool = self._pool
                if pool is None:
                    break  # ended: whatever there was is answered
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                came = pool._dispatcher.drive(has_news, left)
                self.settle()
                if not came and not done():
                    return False
        finally:
            with self._lock:
                self._drivers -= 1
            if self._arrived:
                self.settle()
        return done()

    def help(self, *, now: bool = True) -> None:
        """See to it that things move although nobody waits who drives; if need not be *now*, when nobody does."""
        pool = self._pool
        if pool is None or not self.is_ours():
            return
        is_first = now and not self._is_helped_now
        self._is_helped = True
        self._is_helped_now |= now
        # After that: what comes from now on is seen to by `deliver`.
        if now and self._arrived:
            pool._dispatcher.call_later(self.settle)
        elif is_first or not pool._dispatcher.has_helper():
            pool._dispatcher.start_helper(now=now)

    def call_later(self, callback: Callable[[], None]) -> bool:
        """Let the pool's thread call it; False if there is none any more."""
        pool = self._pool
        if pool is not None:
            pool._dispatcher.call_later(callback)
        return pool is not None

    def nudge(self) -> None:
        """Let those who wait look again: a future was answered, and not by the pool."""
        pool = self._pool
        if pool is not None and self.is_ours():
            pool._dispatcher.nudge()

    # -- the end ----------------------------------------------------------------------------------

    def _give_up(self, error: BaseException) -> None:
        with self._lock:
            waiting, self._waiting = list(self._waiting), collections.deque()
        for unit in waiting:
            if isinstance(unit, Call):
                unit.fail(0, error)
            else:
                cast("Chunks", unit.job).fail(unit.position, error)
        if waiting:
            self.nudge()

    def cancel(self, job: Chunks | None = None) -> None:
        """Cancel what the pool was not given yet, of everything or of one map."""
        with self._lock:
            cancelled = [
                unit for unit in self._waiting if job is None or (not isinstance(unit, Call) and unit.job is job)
            ]
            if job is None:
                self._waiting.clear()
            elif cancelled:
                gone = set(map(id, cancelled))
                self._waiting = collections.deque(unit for unit in self._waiting if id(unit) not in gone)
        for unit in cancelled:
            if isinstance(unit, Call):
                unit.cancel()
            else:
                cast("Chunks", unit.job).cancel(unit.position)
        if cancelled:
            self.nudge()

    def close(self, *, cancel: bool = False) -> None:
        """Take no more; end when all is done."""
        if not self.is_ours():
            return
        with self._lock:
            self._closed = True
        if cancel:
            self.cancel()
        self._end_if_done()
        if not self._ended.is_set():
            self.help()

    def _end_if_done(self, *, now: bool = False) -> None:
        with self._lock:
            is_done = not self._waiting and not self._running and not self._arrived
            if is_done:
                self._is_helped = self._is_helped_now = False
            if not self._closed or not is_done or self._ended.is_set():
                return
            if self._drivers and not now and self._pool is not None:
                # Who waits for a future does not wait for the workers to leave.
                self.call_later(functools.partial(self._end_if_done, now=True))
                return
            pool, self._pool = self._pool, None
            if pool is None:
                # Nothing was ever started, or another thread is ending it.
                if not self._is_ending:
                    self._ended.set()
                return
            self._is_ending = True
        try:
            pool.close()
            pool.join()
        finally:
            self._ended.set()

    def wait(self) -> None:
        """Wait until all is done and the workers have ended."""
        if not self.is_ours():
            return
        pool = self._pool
        if pool is not None and pool._dispatcher._helper is threading.current_thread():
            return  # called by a callback of a future: it is this thread that is going to end the pool
        self._ended.wait()


def broken_by(error: BaseException) -> concurrent.futures.BrokenExecutor:
    """Return what those get who use an executor that cannot go on."""
    broken = concurrent.futures.BrokenExecutor(f"the workers of this executor cannot go on: {error!r}; make a new one")
    broken.__cause__ = error
    return broken


_works: weakref.WeakSet[Work] = weakref.WeakSet()


def finish_all() -> None:
    """Let all executors end, before the interpreter ends threads and pools, as concurrent.futures does with its own."""
    for work in list(_works):
        try:
            work.close()
        except RuntimeError:  # since Python 3.12 no thread is started any more
            pool = work._pool
            if pool is None:
                raise
            pool._dispatcher.finish_here()
        work.wait()


cast("Any", threading)._register_atexit(finish_all)
