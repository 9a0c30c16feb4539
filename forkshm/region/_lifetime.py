"""When mapped memory ends: at the last view's death, at fork, at exit, at SIGKILL.

State of this layer survives an interruption between any two instructions; docs/internals/interruptions.md,
has the rules. In short: a signal handler, a finalizer or a failed system call may
run or raise wherever Python code calls something. So a lock is held to keep other *threads* out and
never makes several changes look like one. Each change is one store, one call of a C function, or a
run of stores with no call between them; anything longer waits in a queue and can be repeated.

* **Last view.** `watch` queues an action when an object is collected, by a C function that nothing
  interrupts. The action runs at once if this thread is not changing anything of this layer, and
  otherwise with the next call into it. An interrupted action is run again from its start.
* **fork.** `guard` is held around every ``fork``, so the child finds no other thread's half-made change.
  Each hook runs even if another one raised, and is called twice, so that an interrupt of one call
  leaves nothing undone.
* **exit and SIGKILL.** Nothing is done: the kernel takes fds, mappings and locks back.
"""

from __future__ import annotations

import _thread
import atexit
import collections
import itertools
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _interrupts, _system

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("at_fork", "guard", "is_changing", "new_key", "settle", "unwatch", "watch")

guard = _interrupts.RLock()
"""The lock that keeps other threads out of this layer. Reentrant, because a signal handler or a finalizer
may use the library while this thread holds it. Enter it by ``with`` only: its enter and exit
are C functions, so no KeyboardInterrupt can come between taking and releasing it."""

is_changing: Callable[[], bool] = guard._is_owned  # type: ignore[attr-defined]  # as threading.Condition does
"""Return whether this thread is inside a change of this layer, perhaps in a finalizer that interrupted it."""

new_key: Callable[[], int] = itertools.count(1).__next__
"""Return a number that was never returned before. An `id` may be used again while work about it is queued."""

# How often an action is tried that is interrupted each time.
_TRIES = 3


class _Watch(weakref.ref[Any]):
    """A weak reference that carries what to do once its object is gone."""

    __slots__ = ("action", "prompt", "tries")

    action: Callable[[], object]
    prompt: weakref.ref[Any] | None
    tries: int


# What is due, in order. The first one is dropped only after its action has completed.
_due: collections.deque[_Watch] = collections.deque()
_program_is_alive = [True]
# A weak reference calls back only while it is itself alive, so these are kept here, by id:
# hashing a weak reference hashes its object.
_watched: dict[int, _Watch] = {}


def watch(thing: Any, action: Callable[[], None], *, now: bool = True) -> weakref.ref[Any]:
    """Return a weak reference to *thing*, and run *action* under `guard` once *thing* has been collected.

    If it need not be *now*, it runs with the next call into this layer.

    The action must do nothing when it is run again after it was interrupted anywhere. It is not run at
    interpreter exit: views may outlive everything there, and the kernel cleans up.
    """
    # Callbacks run in the opposite order of their creation: first the C function that queues the action
    # and cannot be interrupted, then the attempt to run it now.
    prompt = weakref.ref(thing, _run_now) if now else None
    reference = _Watch(thing, _due.append)
    reference.action = action
    reference.prompt = prompt
    reference.tries = _TRIES
    _watched[id(reference)] = reference
    return reference


def unwatch(reference: weakref.ref[Any]) -> None:
    """End what `watch` began: nothing happens when the object is collected."""
    if isinstance(reference, _Watch):
        # A debugger or a traceback may keep the reference longer than the object.
        reference.action = bool
    _watched.pop(id(reference), None)


# With defaults: at the end of the program the names of this module may be gone.
def _run_now(_: object, is_changing: Callable[[], bool] = is_changing, alive: list[bool] = _program_is_alive) -> None:
    if alive and not is_changing():
        try:
            settle()
        except KeyboardInterrupt:
            # Python ignores what leaves a callback, so it is raised again where that was called from: a thread
            # runs only once this one has returned.
            _thread.start_new_thread(_thread.interrupt_main, ())


def settle() -> None:
    """Run what is due, unless this thread is inside a change: then the end of that change is waited for."""
    if not _due or is_changing():
        return
    with guard:
        while _due:
            due = _due[0]
            due.tries -= 1
            if due.tries >= 0:
                due.action()
            _watched.pop(id(due), None)
            _due.popleft()


# At exit the modules are taken apart before the last views are gone; the kernel unmaps.
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

    Each is called twice, and must do nothing the second time if it completed the first time.
    ``in_parent`` runs as well when the fork fails.
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


# Python ignores what a fork hook raises and goes on to the next, so a hook that an interrupt ended is
# completed by the second call of it.
for _ in range(2):
    _system.register_at_fork(
        before=lambda: _run(_before),
        after_in_parent=lambda: _run(_in_parent),
        after_in_child=lambda: _run(_in_child),
    )
# "Before" functions run last registered first, the others in order: so the lock is taken
# before all of the above and released after it.
_system.register_at_fork(before=guard.acquire, after_in_parent=guard.release, after_in_child=guard.release)
