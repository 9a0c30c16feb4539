"""Takes the arguments of asynchronous calls at the call if they are small.

A call that waits for room is pickled when it is sent. Without this module it would see later changes to its arguments.
So arguments that could change are taken at the call:

* Plain containers and small arrays are copied, which takes a microsecond or two. The task may still share a message
  with others.
* A task with other objects is pickled at the call. This costs nothing extra, because it is done only once. The task is
  sent in a message of its own.

Arguments above `SMALL` bytes are copied when they are sent, so that waiting arguments are not in memory twice. With
``copy_at_call`` they are taken at the call, too. Small arguments beside a large one are taken at the call; other
objects among them are pickled together, because they may refer to each other.

Items that an iterator yields to `imap` are taken before it is asked for the next one, whatever their size.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

from forkshm.channel import Kind
from forkshm.pickler import attribute_of, take_small

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    """Copies plain containers and small arrays; leaves other objects in place and records that there were some.

    Args:
        taken: By id, what takes the place of other objects.
    """

    def __init__(self, taken: dict[int, Any] | None = None) -> None:
        # Whether there was an object that only a pickler can take.
        self.has_others = False
        # Whether there was an object that is too large to be taken now.
        self.has_large = False
        self._parts = 0
        # By id, so that an object that occurs twice is one object in the copy as well.
        self._memo: dict[int, Any] = taken or {}
        # The objects that only a pickler can take, by their id.
        self.others: dict[int, Any] = {}
        # The arrays that were copied, by their id. Other objects may have views of them.
        self.arrays: dict[int, Any] = {}
        numpy = sys.modules.get("numpy")
        self._array: Any = getattr(numpy, "ndarray", None)
        self._scalar: Any = getattr(numpy, "number", ())

    def copy_arguments(self, arguments: Any, kind: Kind) -> Any:
        """Copy the arguments of a task. What contains them keeps its type, also if there are very many."""
        if kind is Kind.CALL:
            args, kwargs = arguments
            return tuple(map(self.copy, args)), {name: self.copy(value) for name, value in kwargs.items()}
        if type(arguments) is not list and type(arguments) is not tuple:
            self.has_others = True
            return arguments
        if kind is Kind.STARMAP:
            copied = [type(item)(map(self.copy, item)) if type(item) in (list, tuple) else item for item in arguments]
            self.has_others |= any(type(item) not in (list, tuple) for item in arguments)
        else:
            copied = list(map(self.copy, arguments))
        return copied if type(arguments) is list else tuple(copied)

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
                if len(thing) <= SMALL:
                    self.others[id(thing)] = thing
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
                if self._is_apart(thing):
                    self.others[id(thing)] = thing
                return thing
            made = thing.copy(order="K")
            self.arrays[id(thing)] = thing
        elif isinstance(thing, self._scalar):
            return thing
        else:
            nbytes = attribute_of(thing, "nbytes")
            if isinstance(nbytes, int) and nbytes > SMALL:
                self.has_large = True
            else:
                self.has_others = True
                if str(kind.__module__).partition(".")[0] != "forkshm":
                    self.others[id(thing)] = thing
                # Our own types contain shared memory, and no objects of the program.
            return thing
        memo[id(thing)] = made
        return made

    def _is_apart(self, array: Any) -> bool:
        """Return whether no large argument can have the memory of an array that is a view."""
        while isinstance(array.base, self._array):
            array = array.base
        return array.base is None and bool(array.flags.owndata) and array.nbytes <= SMALL

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
            # One of its parts may refer to it.
            made = self._memo.setdefault(id(thing), made)
        return made


def take_arguments(
    dispatcher: Dispatcher, tasks: Sequence[Task], *, always: bool = False, in_batches: bool = False
) -> None:
    """Take the arguments of tasks that are going to be submitted.

    Args:
        dispatcher: The dispatcher, which pickles them.
        tasks: The tasks, which no other thread knows yet.
        always: Whether large arguments are taken as well.
        in_batches: Whether the tasks are going to share messages, as tiny ones do.
    """
    for task in tasks:
        arguments = task.arguments
        if type(arguments) is tuple and task.kind is Kind.CALL:
            args, kwargs = arguments
            if not kwargs and _are_fixed(args):
                continue
        elif type(arguments) is range or _are_fixed(arguments):
            continue
        elif (
            task.kind is Kind.MAP
            and type(arguments) is list
            and len(arguments) == 1
            and (made := _copy_flat(arguments[0])) is not None
        ):
            task.arguments = [made]
            continue
        copier = _Copier()
        try:
            copied = copier.copy_arguments(arguments, task.kind)
        except RecursionError:
            copier.has_others, copied = True, arguments
        if not (copier.has_others or copier.has_large):
            task.arguments = copied
        elif copier.has_large and not always:
            task.arguments, _ = _with_others(dispatcher, task, copier, copied)  # large ones are in place
        elif not (in_batches and not copier.has_large and _take_others(dispatcher, task, copier, copied)):
            _pack(dispatcher, task, copier, copied, always=always)


def _are_fixed(things: Iterable[Any]) -> bool:
    """Return whether none of these can change: a fast path of `_Copier` for most small arguments."""
    if _FIXED.issuperset(map(type, things)):
        return True
    return all(
        type(thing) in _FIXED or (type(thing) is tuple and _FIXED.issuperset(map(type, thing))) for thing in things
    )


def _copy_flat(thing: Any) -> Any:
    """Return a copy of a list or dict whose values cannot change: a fast path of `_Copier`. Otherwise return None."""
    if type(thing) is list:
        copied: Any = thing[:]
        values: Any = copied
    elif type(thing) is dict:
        copied = thing.copy()
        values = copied.values()
    else:
        return None
    return copied if len(copied) <= _MOST_PARTS and _FIXED.issuperset(map(type, values)) else None


def _take_others(dispatcher: Dispatcher, task: Task, copier: _Copier, copied: Any) -> bool:
    """Take the arguments of a task that stays one of a batch; return False if that is not possible."""
    taken, is_complete = _with_others(dispatcher, task, copier, copied)
    if is_complete:
        task.arguments = taken
    return is_complete


def _with_others(dispatcher: Dispatcher, task: Task, copier: _Copier, copied: Any) -> tuple[Any, bool]:
    """Return copied arguments in which the other objects are pickled, if these are small and not shared.

    Also return whether all of the arguments were taken.
    """
    if not copier.others:
        return copied, False
    things = {**copier.others, **copier.arrays}
    limit = SMALL + sum(array.nbytes for array in copier.arrays.values())
    try:
        taken = take_small(list(things.values()), limit, dispatcher.importable)
    except Exception:  # raised again when the task is sent
        return copied, False
    if taken is None:
        return copied, False
    replaced = _Copier(dict(zip(things, taken, strict=True)))
    copied = replaced.copy_arguments(task.arguments, task.kind)
    return copied, not (replaced.has_others or replaced.has_large)


def _pack(dispatcher: Dispatcher, task: Task, copier: _Copier, copied: Any, *, always: bool) -> None:
    try:
        dispatcher.packing.pack(task)
    except Exception:  # raised again when the task is sent, and reported in the call's own way
        task.close()
        return
    if (payload := task.payload) is not None and payload.fds and not always:
        # The object contains large or shared memory. Each such task would keep fds open, and many may wait.
        task.close()
        task.arguments, _ = _with_others(dispatcher, task, copier, copied)
    else:
        task.batched = False
