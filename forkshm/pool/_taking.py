"""Takes the arguments of asynchronous calls at the call if they are small.

A call that waits for room is pickled when it is sent. Without this module it would see later changes to its arguments.
So arguments that could change are taken at the call:

* Plain containers and small arrays are copied, which takes a microsecond or two. The task may still share a message
  with others.
* A task with other objects is pickled at the call. This costs nothing extra, because it is done only once. The task is
  sent in a message of its own.

Arguments above `SMALL` bytes are copied when they are sent, so that waiting arguments are not in memory twice. With
``copy_at_call`` they are taken at the call, too.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

from forkshm.channel import Kind
from forkshm.pickler import attribute_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forkshm.pool._dispatch import Dispatcher
    from forkshm.pool._tasks import Task

__all__ = ("SMALL", "take_arguments")

SMALL = 64 * 2**10
"""Maximum bytes of small arguments."""

_FIXED = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range, type, FunctionType, BuiltinFunctionType}
)
_MOST_PARTS = 1000


class _Copier:
    """Copies plain containers and small arrays; leaves other objects in place and records that there were some."""

    def __init__(self) -> None:
        # Whether there was an object that only a pickler can take.
        self.has_others = False
        # Whether there was an object that is too large to be taken now.
        self.has_large = False
        self._parts = 0
        # By id, so that an object that occurs twice is one object in the copy as well.
        self._memo: dict[int, Any] = {}
        numpy = sys.modules.get("numpy")
        self._array: Any = getattr(numpy, "ndarray", None)
        self._scalar: Any = getattr(numpy, "number", ())

    def copy(self, thing: Any) -> Any:
        kind = type(thing)
        if kind in _FIXED:
            return thing
        memo = self._memo
        if id(thing) in memo:
            return memo[id(thing)]
        if kind is list or kind is set or kind is dict or kind is tuple or kind is frozenset:
            self._parts += len(thing)
            if self._parts > _MOST_PARTS:
                self.has_others = True
                return thing
            return self._container(thing, kind)
        if kind is bytearray:
            made: Any = bytearray(thing) if len(thing) <= SMALL else thing
            self.has_large |= made is thing
        elif kind is self._array:
            if thing.nbytes > SMALL:
                self.has_large = True
                return thing
            # Other arrays may be views of shared memory, for example, so their memory is examined.
            if thing.base is not None or thing.dtype.hasobject or not thing.flags.owndata:
                self.has_others = True
                return thing
            made = thing.copy(order="K")
        elif isinstance(thing, self._scalar):
            return thing
        else:
            nbytes = attribute_of(thing, "nbytes")
            if isinstance(nbytes, int) and nbytes > SMALL:
                self.has_large = True
            else:
                self.has_others = True
            return thing
        memo[id(thing)] = made
        return made

    def _container(self, thing: Any, kind: type) -> Any:
        made: Any
        if kind is list:
            made = self._memo[id(thing)] = thing[:]
            if not _FIXED.issuperset(map(type, made)):
                made[:] = map(self.copy, thing)
        elif kind is dict:
            made = self._memo[id(thing)] = thing.copy()
            if not _FIXED.issuperset(map(type, made.values())):
                for key, value in list(made.items()):
                    made[key] = self.copy(value)
        elif kind is set:
            # Elements of a set and keys of a dict are hashable, so they are not expected to change.
            made = self._memo[id(thing)] = thing.copy()
        elif kind is frozenset or _FIXED.issuperset(map(type, thing)):
            return thing
        else:
            made = tuple(map(self.copy, thing))
        return made


def take_arguments(dispatcher: Dispatcher, tasks: Sequence[Task], *, always: bool = False) -> None:
    """Take the arguments of tasks that are going to be submitted.

    Args:
        dispatcher: The dispatcher, which pickles them.
        tasks: The tasks, which no other thread knows yet.
        always: Whether large arguments are taken as well.
    """
    for task in tasks:
        arguments = task.arguments
        if type(arguments) is tuple and task.kind is Kind.CALL:
            args, kwargs = arguments
            if not kwargs and _FIXED.issuperset(map(type, args)):
                continue
        elif type(arguments) is range or _FIXED.issuperset(map(type, arguments)):
            continue
        copier = _Copier()
        try:
            copied = copier.copy(arguments)
        except RecursionError:
            copier.has_others, copied = True, arguments
        if not (copier.has_others or copier.has_large):
            task.arguments = copied
        elif copier.has_large and not always:
            task.arguments = copied  # the small ones; large ones are in place
        else:
            _pack(dispatcher, task, copied, always=always)


def _pack(dispatcher: Dispatcher, task: Task, copied: Any, *, always: bool) -> None:
    try:
        dispatcher._pack(task)
    except Exception:  # raised again when the task is sent, and reported in the call's own way
        task.close()
        return
    if (payload := task.payload) is not None and payload.fds and not always:
        # The object contains large or shared memory. Each such task would keep fds open, and many may wait.
        task.close()
        task.arguments = copied
    else:
        task.batched = False
