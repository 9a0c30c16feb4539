"""Which thread does the work of a pool's parent: the leader/followers pattern.

There is no thread of the pool's own. A thread that waits for a result *leads*: it takes what has come, for
everybody, and replaces dead workers. Other waiting threads *follow*: they sleep until their result is there
or nobody leads. Only what nobody waits for needs a helper thread: callbacks, and asynchronous calls that do
not fit the kernel's queue. It lives while there is such work.

Nobody waits without a bound, because a signal handler may raise in the thread that was about to wake the
others: then these look by themselves after a while.

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

# A follower looks by itself this often.
_FOLLOW_SECONDS = 0.2
# After so long the helper looks whether the threads that drove in its place still do, and then less and less often.
_STAND_BY_SECONDS = 0.001
_LONGEST_STAND_BY_SECONDS = 0.016
# Arguments of `acquire`, for a call that `map` makes.
_DO_NOT_WAIT = (False,)


class Work(Protocol):
    """What is to be done."""

    def feed(self) -> None:
        """Send what waits and fits. User code may run in it, so no lock is held."""
        ...

    def step(self, deadline: float | None) -> bool:
        """Wait for something to come, and take it; False when the time is over. Called by the leader only."""
        ...

    def take_answers(self) -> bool:
        """Take what has come, without waiting; return whether there was anything. Called by the leader only."""
        ...

    def may_come(self) -> bool:
        """Return whether anything can come."""
        ...

    def has_unsent(self) -> bool:
        """Return whether there is something for `feed`."""
        ...

    def is_idle(self) -> bool:
        """Return whether nothing is left to do."""
        ...

    def wake(self) -> None:
        """Make `step` return, in whichever thread it waits."""
        ...


class Leader:
    """Lets waiting threads do the work, one at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        # Gives what keeps the workers from being ended; held while something here runs.
        self.keeper: Callable[[], object] = bool
        # Held by the leading thread. Reentrant: a signal handler or finalizer in the leading thread may use the pool.
        self._lead = _interrupts.RLock()
        # The threads that sleep, each by a lock that is released to wake it.
        self._followers: dict[int, _thread.LockType] = {}
        self._keys = itertools.count(1)
        self._callbacks: collections.deque[Callable[[], None]] = collections.deque()
        # The helper thread, set by itself.
        self._helper: int | None = None
        # Orders its end and the requests for it. No call is made with it held.
        self._helping = _interrupts.Lock()
        self._helper_gate = _thread.allocate_lock()
        self._is_called_now = False
        # How often somebody has moved things on.
        self._steps = 0

    # -- waiting ----------------------------------------------------------------------

    def drive(self, done: Callable[[], bool], timeout: float | None = None) -> bool:
        """Keep things going until *done* returns True, or *timeout* seconds.

        Returns:
            Whether *done* is True.
        """
        deadline = None if timeout is None else time.perf_counter() + timeout
        work = self._work
        # The last answer may take away what keeps the workers, while this still receives from them.
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

    def _try_lead(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Lead until something has come; False when another thread leads, or nothing can come."""
        work = self._work
        if not work.may_come():
            return False
        leads: list[bool] = []
        try:
            # Taken and noted in one C call.
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
        """Sleep until something has moved on, for a bounded time."""
        gate = _thread.allocate_lock()
        gate.acquire()
        key = next(self._keys)
        self._followers[key] = gate
        try:
            # Looked at again while others know of this thread, so that it misses nothing.
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
        """Return whether threads sleep until something has moved on."""
        return bool(self._followers)

    def notify(self) -> None:
        """Wake all followers."""
        if self._followers:
            for gate in list(self._followers.values()):
                with contextlib.suppress(RuntimeError):  # another thread has opened it
                    gate.release()

    def nudge(self) -> None:
        """Wake every waiting thread, because its result arrived by another way than the channel."""
        self._work.wake()
        self.notify()

    def look(self) -> bool:
        """Take the answers that are there, unless another thread does; return whether there were any."""
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
        """Run *action* while no other thread leads; after *patience* seconds all the same."""
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

    def _open_helper_gate(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._helper_gate.release()

    def has_helper(self) -> bool:
        """Return whether the helper thread is there; it stays while anything is on its way."""
        return self._helper is not None

    def is_helper(self) -> bool:
        """Return whether this is the helper thread."""
        return self._helper == threading.get_ident()

    def _call_back(self) -> bool:
        """Call the next callback; return whether there was one."""
        try:
            callback = self._callbacks.popleft()
        except IndexError:
            return False
        try:
            callback()
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
        self.nudge()  # a thread may wait for what was just called
        return True

    # No signal handler runs in this thread, as in every one but the main thread.
    def _help(self) -> None:
        keeper = self.keeper()  # noqa: F841 - see `drive`
        me = threading.get_ident()
        with self._helping:
            if self._helper is not None:
                return  # two were asked for at once
            self._helper = me
        try:
            while self._help_once():
                pass
        finally:
            # Also when it fails: the next request starts another one.
            with self._helping:
                self._helper = None
            self.notify()
            if self._callbacks or not self._work.is_idle():
                with contextlib.suppress(RuntimeError):
                    self._restart_helper()

    def _restart_helper(self) -> None:
        # Work that came between the last look and the end.
        if sys.exc_info()[0] is None:
            self.start_helper()

    def _help_once(self) -> bool:
        """Work until there is nothing for this thread to do; False when nothing is left at all."""
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
            # A thread that waits drives better: it need not wake another. This one only looks whether one still does.
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
                if not work.may_come() or work.has_unsent() or self._callbacks or self._followers:
                    break
        finally:
            self._lead.release()
            self.notify()
        return True
