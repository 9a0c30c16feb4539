"""Who created, who maps; at the last view's death, at fork, at exit, at SIGKILL.

* **Last view.** `watch` runs an action when an object is collected. That may happen
  inside any allocation, in any thread, even while the tables are being changed: so the
  action is queued, and run as soon as nobody holds `guard`.
* **fork.** All state of this layer is guarded by one lock, which is taken around every
  ``fork``: the child never sees a half-made change. What has to be handed on to the
  child registers with `at_fork`.
* **exit and SIGKILL.** Nothing is done, because nothing need be: fds, mappings and
  locks are the kernel's, and it takes them back.
"""

from __future__ import annotations

import atexit
import collections
import threading
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _system

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ("at_fork", "guard", "settle", "watch")

#: The one lock of this layer. Not reentrant; held for microseconds, and never while
#: anything of the user's runs. A bare Lock, entered by ``with`` only: its enter and exit
#: are C functions, so no KeyboardInterrupt can come between taking and releasing it.
guard = threading.Lock()

_due: collections.deque[Callable[[], None]] = collections.deque()
# A weak reference is called only while it is itself alive, so they are kept here, by
# id: hashing one would hash what it refers to.
_watched: dict[int, tuple[weakref.ref[Any], Callable[[], None]]] = {}


def watch(thing: Any, action: Callable[[], None]) -> weakref.ref[Any]:
    """Run *action* under `guard`, once *thing* has been collected; return a weak reference to it.

    Not at interpreter exit: views may outlive everything there, and the kernel cleans up.
    """
    reference = weakref.ref(thing, _collected)
    _watched[id(reference)] = reference, action
    return reference


# At the end of the program the names of this module may be gone before the last views: hence
# a default for the one that is needed then.
def _collected(reference: weakref.ref[Any], watched: dict[int, Any] = _watched) -> None:
    found = watched.pop(id(reference), None)
    if found is not None:
        settle(found[1])


def settle(action: Callable[[], None] | None = None) -> None:
    """Run what is due, and *action*, unless somebody holds `guard`; whoever does calls this afterwards."""
    if action is not None:
        _due.append(action)
    # A collection inside a guarded section of this very thread sees the lock taken and
    # leaves; so this never waits for itself.
    while _due and not guard.locked():
        with guard:
            while _due:
                _due.popleft()()


# At exit the modules are taken apart before the last views are gone; the kernel unmaps.
atexit.register(_watched.clear)


_before: list[Callable[[], None]] = []
_in_parent: list[Callable[[], None]] = []
_in_child: list[Callable[[], None]] = []


def at_fork(
    *,
    before: Callable[[], None] | None = None,
    in_parent: Callable[[], None] | None = None,
    in_child: Callable[[], None] | None = None,
) -> None:
    """Register what has to happen around ``fork``, with `guard` held.

    ``in_parent`` runs as well when the fork fails.
    """
    for actions, action in ((_before, before), (_in_parent, in_parent), (_in_child, in_child)):
        if action is not None:
            actions.append(action)


def _run(actions: list[Callable[[], None]]) -> None:
    for action in actions:
        action()


_system.register_at_fork(
    before=lambda: _run(_before),
    after_in_parent=lambda: _run(_in_parent),
    after_in_child=lambda: _run(_in_child),
)
# "Before" functions run last registered first, the others in order: so the lock is taken
# before all of the above and released after it.
_system.register_at_fork(before=guard.acquire, after_in_parent=guard.release, after_in_child=guard.release)
