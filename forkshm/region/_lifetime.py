"""The end of mapped memory: with the last view, at fork, at exit, and after SIGKILL.

The state of this layer stays consistent if it is interrupted between any two instructions;
docs/internals/interruptions.md has the rules. In short, a signal handler or a finalizer may run, and a system call may
fail, wherever Python code calls something. So a lock only keeps other *threads* out; it never makes several changes
look like one. Each change is one store, one call of a C function, or a run of stores with no call between them.
Anything longer waits in a queue and can be repeated.

* **Last view.** `watch` queues an action when an object is collected, through a C function that cannot be interrupted.
  The action runs at once unless this thread is changing something in this layer; then it runs with the next call into
  the layer. An interrupted action is run again from its start.
* **fork.** `guard` is held around every ``fork``, so a child never inherits the unfinished change of another thread.
  Each hook runs even if another one raised. It is called twice, so that an interrupted first call is completed.
* **exit and SIGKILL.** This layer does nothing: the kernel releases fds, mappings and locks.
"""

from __future__ import annotations

import _thread
import atexit
import collections
import gc
import itertools
import time
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _system
from forkshm.backend import IS_FREE_THREADED, kernel

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("at_fork", "guard", "is_changing", "leave_changes", "new_key", "settle", "unwatch", "watch")

guard = _interrupts.RLock()
"""The lock that keeps other threads out of this layer.

It is reentrant, because a signal handler or a finalizer may use the library while this thread holds it. Enter it only
by ``with``: its enter and exit are C functions, so no KeyboardInterrupt can come between taking and releasing it."""

is_changing: Callable[[], bool] = guard._is_owned  # type: ignore[attr-defined]  # as threading.Condition does
"""Returns whether this thread is inside a change of this layer, for example in a finalizer that interrupted it."""

new_key: Callable[[], int] = itertools.count(1).__next__
"""Returns a number that was never returned before. An `id` may be reused while work about its object is queued."""

# Number of attempts to run an action that is interrupted each time.
_TRIES = 3


class _Watch(weakref.ref[Any]):
    """A weak reference with the action to run once its object is gone."""

    __slots__ = ("action", "failures", "last", "prompt")

    action: Callable[[], object]
    prompt: weakref.ref[Any] | None
    last: weakref.ref[Any]
    # Set when the action is interrupted for the first time.
    failures: int


# Actions to run, in order. The first one is dropped only after it has completed.
_due: collections.deque[_Watch] = collections.deque()
_program_is_alive = [True]
# A weak reference calls back only while it is itself alive, so references are kept here. They are keyed by id, because
# hashing a weak reference hashes its object.
_watched: dict[int, _Watch] = {}


def watch(thing: Any, action: Callable[[], None], *, now: bool = True) -> weakref.ref[Any]:
    """Return a weak reference to *thing*, and run *action* under `guard` once *thing* has been collected.

    Without *now*, the action runs with the next call into this layer. Else *thing* must be in no reference cycle,
    because the garbage collector ignores it from now on.

    The action may be interrupted anywhere and is then run again; a second run after a complete one must do nothing. It
    is not run at interpreter exit, because views may outlive everything there, and the kernel cleans up.
    """
    if now:
        # For garbage in a cycle, Python calls the callbacks of weak references before any ``__del__``, which may still
        # use the memory. An object that the collector ignores is gone only after them.
        kernel.hide_from_gc(thing)
    # Callbacks run in the opposite order of their creation. So the C function that queues the action runs first, and
    # cannot be interrupted; then follows the attempt to run the action now. The garbage collector of free-threaded
    # builds calls in the order of creation.
    prompt = weakref.ref(thing, _run_now) if now else None
    reference = _Watch(thing, _due.append)
    reference.action = action
    reference.prompt = prompt
    if IS_FREE_THREADED and now:
        reference.last = weakref.ref(thing, _run_now)
    _watched[id(reference)] = reference
    return reference


def unwatch(reference: weakref.ref[Any]) -> None:
    """Undo `watch`: nothing happens when the object is collected."""
    if isinstance(reference, _Watch):
        # A debugger or a traceback may keep the reference longer than the object.
        reference.action = bool
    _watched.pop(id(reference), None)


# With defaults, because the names of this module may be gone when the program ends.
def _run_now(_: object, is_changing: Callable[[], bool] = is_changing, alive: list[bool] = _program_is_alive) -> None:
    if alive and not is_changing():
        try:
            settle()
        except KeyboardInterrupt:
            # Python ignores exceptions of callbacks. So the interrupt is raised again in the code that was running: the
            # new thread runs only after this callback has returned.
            _thread.start_new_thread(_thread.interrupt_main, ())


def settle() -> None:
    """Run due actions, unless this thread is inside a change, which runs them when it ends."""
    if not _due or is_changing():
        return
    with guard:
        while True:
            if not _due:
                break
            due = _due[0]
            try:
                due.action()
            except BaseException:
                due.failures = getattr(due, "failures", 0) + 1
                if due.failures >= _TRIES:
                    due.action = bool
                raise
            _watched.pop(id(due), None)
            _due.popleft()


def leave_changes() -> None:
    """Leave all changes, in a child that does not return to the code of its parent that made them.

    A signal handler or a finalizer may fork in the middle of a change. Without this, nothing would be released in the
    child.
    """
    while is_changing():
        guard.release()
    settle()


# At exit, modules are torn down before the last views are gone. The kernel unmaps their memory.
atexit.register(_watched.clear)
atexit.register(_program_is_alive.clear)


_before: list[Callable[[], None]] = []
_in_parent: list[Callable[[], None]] = []
_in_child: list[Callable[[], None]] = []


def at_fork(
    *,
    before: Callable[[], None] | None = None,
    in_parent: Callable[[], None] | None = None,
    in_child: Callable[[], None] | None = None,
) -> None:
    """Register actions to run around ``fork``, with `guard` held.

    Each action is called twice. If the first call completed, the second must do nothing. ``in_parent`` also runs when
    the fork fails.
    """
    for actions, action in ((_before, before), (_in_parent, in_parent), (_in_child, in_child)):
        if action is not None:
            actions.append(action)


def _run(actions: list[Callable[[], None]]) -> None:
    """Run every action; raise the first exception after the last action."""
    failures: list[BaseException] = []
    for action in actions:
        try:
            action()
        except BaseException as error:
            failures.append(error)
    if failures:
        raise failures[0]


# Whether the collector was enabled before a fork.
_collected: list[bool] = []
# The thread that collects garbage, if there is one.
_collecting: list[int] = []
# How long a fork waits for it.
_COLLECTION_SECONDS = 1.0


def _note_collection(phase: str, _: object) -> None:
    _collecting[:] = (_thread.get_ident(),) if phase == "start" else ()


def _pause_collector() -> None:
    if not _collected:
        _collected.append(gc.isenabled())
    gc.disable()


def _await_collection() -> None:
    deadline = time.monotonic() + _COLLECTION_SECONDS
    while _collecting[:] not in ([], [_thread.get_ident()]) and time.monotonic() < deadline:
        time.sleep(0.0001)


def _resume_collector() -> None:
    if _collected:
        if _collected[0]:
            gc.enable()
        _collected.clear()


def _in_child_of_collector() -> None:
    _collecting.clear()
    _resume_collector()


if IS_FREE_THREADED:
    # CPython 3.13t may fork while another thread, which collects garbage, waits to stop all threads. The child inherits
    # that thread's lock without the thread, and waits forever in its own first collection.
    gc.callbacks.append(_note_collection)
    at_fork(before=_pause_collector, in_parent=_resume_collector, in_child=_in_child_of_collector)
    _system.register_at_fork(before=_await_collection)  # runs after the actions below

# Python ignores exceptions of fork hooks and runs the next one. So a hook that was interrupted is completed by its
# second call.
for _ in range(2):
    _system.register_at_fork(
        before=lambda: _run(_before),
        after_in_parent=lambda: _run(_in_parent),
        after_in_child=lambda: _run(_in_child),
    )
# "Before" functions run in reverse order of registration, the others in order. So the lock is taken before all hooks
# above and released after them.
_system.register_at_fork(before=guard.acquire, after_in_parent=guard.release, after_in_child=guard.release)
# Views that a signal handler dropped meanwhile: otherwise a child would hold their memory until its next call.
_system.register_at_fork(after_in_parent=settle, after_in_child=settle)
