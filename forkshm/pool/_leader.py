"""Chooses the thread that does the work of a pool's parent: the leader/followers pattern.

The pool has no thread of its own. A thread that waits for a result *leads*: it takes all answers, for every thread, and
replaces dead workers. Other waiting threads *follow*: they sleep until their result has arrived or no thread leads. A
helper thread is needed only for work that no thread waits for: callbacks, and asynchronous calls that the kernel's
queue has no room for. It lives while there is such work.

No thread waits without a limit, because a signal handler may raise in the thread that was about to wake the others. In
that case they check after a while.

See Also:
    Schmidt et al., "Pattern-Oriented Software Architecture", volume 2: Leader/Followers.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import itertools
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

from forkshm import _interrupts

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("Leader", "Work")

# A follower checks this often.
_FOLLOW_SECONDS = 0.2
# The helper checks after this time whether the threads that replaced it still drive, and then less and less often.
_STAND_BY_SECONDS = 0.001
_LONGEST_STAND_BY_SECONDS = 0.016
# Any time will do: the interpreter ends the thread when it wakes up.
_WAIT_OUT_SECONDS = 60.0
# Arguments of `acquire`, for a call that `map` makes.
_DO_NOT_WAIT = (False,)


class Work(Protocol):
    """The work that the leading thread does."""

    def feed(self) -> None:
        """Send waiting tasks while there is room. User code may run in it, so no lock is held."""
        ...

    def step(self, deadline: float | None) -> bool:
        """Wait for an answer or a death, and handle it; return False at the deadline. Called by the leader only."""
        ...

    def take_answers(self) -> bool:
        """Take all answers that have arrived; return whether there were any. Called by the leader only."""
        ...

    def may_come(self) -> bool:
        """Return whether anything can arrive."""
        ...

    def has_unsent(self) -> bool:
        """Return whether there is something for `feed` to send."""
        ...

    def is_idle(self) -> bool:
        """Return whether there is nothing left to do."""
        ...

    def wake(self) -> None:
        """Make `step` return, in the thread that waits in it."""
        ...


class Leader:
    """Lets waiting threads do the work, one at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        # Returns an object that keeps the workers from being ended; held while this class runs.
        self.keeper: Callable[[], object] = bool
        # Held by the leading thread. Reentrant: a signal handler or finalizer in the leading thread may use the pool.
        self._lead = _interrupts.RLock()
        # The sleeping threads, each by a lock that is released to wake it.
        self._followers: dict[int, _thread.LockType] = {}
        self._keys = itertools.count(1)
        self._callbacks: collections.deque[Callable[[], None]] = collections.deque()
        # Identifiers of the threads that run a callback, keyed by an object for each callback.
        self._in_callback: dict[object, int] = {}
        # The helper thread's identifier, set by the helper thread itself.
        self._helper: int | None = None
        self._helper_thread: threading.Thread | None = None
        # Guards `_helper`. No call is made while it is held.
        self._helping = _interrupts.Lock()
        self._helper_gate = _thread.allocate_lock()
        self._is_called_now = False
        # Number of steps that threads have made.
        self._steps = 0
        # Set when the program ends with this pool still open.
        self._program_ends = False

    # -- waiting ----------------------------------------------------------------------

    def drive(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Drive the pool until *done* returns True or for *timeout* seconds.

        Returns:
            Whether *done* is True.
        """
        deadline = None if timeout is None else time.perf_counter() + timeout
        work = self._work
        # The last answer may release the object that keeps the workers, while this thread still receives from them.
        keeper = self.keeper()  # noqa: F841
        while not done():
            work.feed()
            if not self._try_lead(done, deadline):
                self._follow(done, deadline)
            if self._callbacks and self._helper is None:
                self._call_back()
            if deadline is not None and time.perf_counter() >= deadline:
                self.look()
                return done()
        return True

    def wait_out_program(self) -> None:
        """Never return in a daemon thread of a program that ends: an exception there would only be printed.

        As with ``multiprocessing``, whose pool gives such a thread no answer.
        """
        while self._program_ends and threading.current_thread().daemon and not self.is_helper():
            time.sleep(_WAIT_OUT_SECONDS)

    def _try_lead(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Lead until something has arrived. Return False if another thread leads, or nothing can arrive."""
        work = self._work
        if not work.may_come():
            return False
        leads: list[bool] = []
        try:
            # Acquired and recorded in one C call.
            leads.extend(map(self._lead.acquire, _DO_NOT_WAIT))
            if leads[0] and not done():
                self._steps += 1
                work.step(deadline)
            return leads[0]
        finally:
            if leads and leads[0]:
                self._lead.release()
                self.notify()

    def _follow(self, done: Callable[[], bool], deadline: float | None) -> None:
        """Sleep until another thread has made a step, for a limited time."""
        gate = _thread.allocate_lock()
        gate.acquire()
        key = next(self._keys)
        self._followers[key] = gate
        try:
            # Check again after the thread is registered, so that it misses no wake-up.
            if done() or (self._work.may_come() and self._is_lead_free()):
                return
            left = _FOLLOW_SECONDS
            if deadline is not None:
                left = min(left, deadline - time.perf_counter())
            if left > 0:
                gate.acquire(True, left)
        finally:
            self._followers.pop(key, None)

    def _is_lead_free(self) -> bool:
        leads: list[bool] = []
        try:
            leads.extend(map(self._lead.acquire, _DO_NOT_WAIT))
            return leads[0]
        finally:
            if leads and leads[0]:
                self._lead.release()

    def has_followers(self) -> bool:
        """Return whether threads sleep until a step is made."""
        return bool(self._followers)

    def notify(self) -> None:
        """Wake all followers."""
        if self._followers:
            for gate in list(self._followers.values()):
                with contextlib.suppress(RuntimeError):  # another thread has released it
                    gate.release()

    def nudge(self) -> None:
        """Wake every waiting thread, because its result did not arrive through the channel."""
        self._work.wake()
        self.notify()

    def look(self) -> bool:
        """Take the answers that have arrived, unless another thread leads; return whether there were any."""
        leads: list[bool] = []
        try:
            leads.extend(map(self._lead.acquire, _DO_NOT_WAIT))
            if not leads[0]:
                return False
            keeper = self.keeper()  # noqa: F841 - see `drive`
            self._steps += 1
            return self._work.take_answers()
        finally:
            if leads and leads[0]:
                self._lead.release()
                self.notify()

    def under_lead(self, action: Callable[[], None], *, patience: float = -1) -> None:
        """Run *action* while no other thread leads, or after *patience* seconds in any case."""
        self._work.wake()
        leads: list[bool] = []
        try:
            leads.extend(map(self._lead.acquire, (True,), (patience,)))
            action()
        finally:
            if leads and leads[0]:
                self._lead.release()
        self.notify()

    # -- the helper -------------------------------------------------------------------

    def call_later(self, callback: Callable[[], None]) -> None:
        """Schedule *callback* on the helper thread. If no thread can be started, a waiting thread calls it."""
        self._callbacks.append(callback)
        with contextlib.suppress(RuntimeError):
            self.start_helper()

    def start_helper(self, *, now: bool = True) -> None:
        """Start the helper thread, which drives the pool while no thread waits; without *now* it starts after a pause.

        Raises:
            RuntimeError: No thread can be started. A later call tries again.
        """
        if now:
            self._is_called_now = True
        self._open_helper_gate()
        with self._helping:
            is_there = self._helper is not None
        if not is_there:
            threading.Thread(target=self._help, name="forkshm-pool-helper", daemon=True).start()
        self.notify()

    def end_helper(self) -> None:
        """Wait until the helper thread has ended, which it does when no tasks and callbacks are left.

        A thread that lives until the program ends would keep the objects of ``__main__``, and their ``__del__`` would
        not run.
        """
        while (thread := self._helper_thread) is not None and thread is not threading.current_thread():
            self._open_helper_gate()
            thread.join()
            if thread is self._helper_thread:  # otherwise it has started another one
                return

    def _open_helper_gate(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._helper_gate.release()

    def has_helper(self) -> bool:
        """Return whether the helper thread is running; it runs while tasks or callbacks are left."""
        return self._helper is not None

    def is_helper(self) -> bool:
        """Return whether this is the helper thread."""
        return self._helper == threading.get_ident()

    def has_callbacks(self) -> bool:
        """Return whether callbacks are left that another thread runs or may run."""
        if self.is_helper():
            return False
        me = threading.get_ident()
        return bool(self._callbacks) or any(thread != me for thread in list(self._in_callback.values()))

    def _call_back(self) -> bool:
        """Call the next callback; return whether there was one."""
        key = object()
        try:
            # Before the callback leaves the queue, so that `has_callbacks` sees it at all times.
            self._in_callback[key] = threading.get_ident()
            try:
                callback = self._callbacks.popleft()
            except IndexError:
                return False
            try:
                callback()
            except Exception as error:
                sys.excepthook(type(error), error, error.__traceback__)
        finally:
            self._in_callback.pop(key, None)
        self.nudge()  # a thread may wait for the callback
        return True

    # No signal handler runs in this thread, because it is not the main thread.
    def _help(self) -> None:
        keeper = self.keeper()  # noqa: F841 - see `drive`
        me, thread = threading.get_ident(), threading.current_thread()
        with self._helping:
            if self._helper is not None:
                return  # two threads were started at once
            self._helper, self._helper_thread = me, thread
        try:
            is_needed = True
            while True:
                if not is_needed:
                    break
                is_needed = self._help_once()
        finally:
            # Also after a failure, so that the next request starts another thread.
            with self._helping:
                self._helper = None
            self.notify()
            if self._callbacks or not self._work.is_idle():
                with contextlib.suppress(RuntimeError):
                    self._restart_helper()

    def _restart_helper(self) -> None:
        # For work that was added between the last check and the end.
        if sys.exc_info()[0] is None:
            self.start_helper()

    def _help_once(self) -> bool:
        """Work until there is nothing for this thread to do. Return False if nothing is left at all."""
        work = self._work
        pause = _STAND_BY_SECONDS
        seen = -1
        while True:
            if self._is_called_now:
                self._is_called_now = False
                seen = self._steps
            while not self._followers and self._steps == seen and not self._callbacks:
                work.feed()
                if not self._lead_as_helper():
                    break
                pause = _STAND_BY_SECONDS
            if self._call_back():
                seen = self._steps
                continue
            if work.is_idle():
                return False
            # A waiting thread drives faster, because it need not wake another thread. This thread only checks that one
            # does.
            seen = self._steps
            if self._helper_gate.acquire(True, pause):
                pause = _STAND_BY_SECONDS
            else:
                pause = min(2 * pause, _LONGEST_STAND_BY_SECONDS)

    def _lead_as_helper(self) -> bool:
        work = self._work
        if not work.may_come() or not self._lead.acquire(blocking=False):
            return False
        try:
            while True:
                work.step(None)
                if work.may_come() and not (work.has_unsent() or self._callbacks or self._followers):
                    continue
                break
        finally:
            self._lead.release()
            self.notify()
        return True
