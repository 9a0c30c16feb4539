"""Describes tasks and values in a few words."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from forkshm.channel import Kind
from forkshm.pickler import Taken, attribute_of, name_of
from forkshm.pool._tasks import Wrapper

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from forkshm.pool._tasks import Task

__all__ = (
    "brief",
    "describe",
    "describe_call",
    "describe_chunk",
    "describe_task",
    "index_of",
    "names_of_arguments",
)

_PLAIN = (bool, bytes, complex, float, int, str, type(None))

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 40


def describe_task(task: Task, item: int | None) -> str:
    """Return a description, such as ``"resize(ndarray float64 (8, 8), scale=2)"``, or the items of a chunk."""
    function = task.function.function
    name = name_of(function)
    if task.kind is Kind.CALL:
        args, kwargs = task.arguments
        if isinstance(function, Wrapper):
            return function.describe(args, describe)
        return describe_call(name, args, kwargs)
    items, index = task.arguments, index_of(task, item)
    if item is not None and item < len(items):
        given = items[item]
        values = given if task.kind is Kind.STARMAP and isinstance(given, (tuple, list)) else (given,)
        return describe_call(name, values, {}, index)
    return describe_chunk(name, index or 0, len(items))


def describe_call(name: str, args: Iterable[Any], kwargs: Mapping[str, Any], index: int | None = None) -> str:
    """Return a description of a call; *index* is the number of its item in the input of a map."""
    parts = [describe(value) for value in args]
    parts += [f"{key}={describe(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(parts)}){'' if index is None else f', item {index} of the input'}"


def describe_chunk(name: str, first: int, length: int) -> str:
    """Return a description of a chunk of a map, of which it is unknown which item ran."""
    if length == 1:
        return f"{name}, item {first} of the input"
    return f"{name}, items {first} to {first + length - 1} of the input"


def brief(task: Task) -> str:
    """Return a description like that of `describe_task`, without running code of the user."""
    if task.kind is not Kind.CALL:
        return describe_task(task, None)
    function, (args, kwargs) = task.function.function, task.arguments
    if isinstance(function, Wrapper):
        return function.describe(args, _brief)
    parts = [_brief(value) for value in args] + [f"{key}={_brief(value)}" for key, value in kwargs.items()]
    return f"{name_of(function)}({', '.join(parts)})"


def _brief(value: Any) -> str:
    kind = type(value)
    if kind is Taken:
        return repr(value)
    if kind in _PLAIN or kind.__module__ == "numpy":
        return describe(value)
    return f"{kind.__name__} of {len(value):,}" if kind in (list, tuple, dict, set) else kind.__name__


def index_of(task: Task, item: int | None) -> int | None:
    """Return the index of the item in the input of its map, or of its chunk's first item if only the chunk is known.

    A task that is no chunk has an index only if it has noted one by itself.
    """
    if task.kind is Kind.CALL:
        return item
    return task.position * task.sink.chunksize + (item or 0)


def names_of_arguments(task: Task) -> dict[str, Any]:
    """Return the arguments, keyed by the names that the caller knows."""
    if task.kind is Kind.CALL:
        function, (args, kwargs) = task.function.function, task.arguments
        return function.names(args) if isinstance(function, Wrapper) else {"args": args, "kwds": kwargs}
    first = task.position * task.sink.chunksize
    return {f"iterable[{number}]": item for number, item in enumerate(task.arguments, first)}


def describe(value: Any) -> str:
    """Return, for example, ``"ndarray float64 (8, 8)"``, or the repr of a small object."""
    shape, dtype = attribute_of(value, "shape"), attribute_of(value, "dtype")
    if isinstance(shape, tuple):
        return f"{type(value).__name__} {dtype if dtype is not None else ''} {shape}".replace("  ", " ")
    if isinstance(value, (bytes, bytearray, str, list, tuple, dict, set)) and len(value) > (
        40 if isinstance(value, str) else 6
    ):
        return f"{type(value).__name__} of {len(value):,}"
    try:
        return _short.repr(value)
    except Exception:
        return type(value).__name__
