"""Explains which argument of a failed task was read-only, and how to send it writable.

A write to read-only memory fails far below the call that sent it, in NumPy, Cython or C code. That code can only report
that some destination is not writable.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING, Any

from forkshm.channel import Kind
from forkshm.errors import add_note
from forkshm.pickler import attribute_of, name_of
from forkshm.pool.observe import describe
from forkshm.region import MappedRegion, Mode, mapping_at

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("explain_read_only",)

# Messages of NumPy, Cython, memoryview, struct, io and ctypes.
_SAID = re.compile(r"read[- _]?only|not writ(e)?able|read-write bytes-like|WRITEABLE")
# Limits: the elements of a container that are checked, and the arguments that are named.
_ELEMENTS = 1000
_NAMED = 5

_FOR_READING = frozenset({Mode.read_only, Mode.read_private})


def explain_read_only(error: BaseException, function: Any, kind: Kind, arguments: Any, item: int) -> None:
    """Add a note to an *error* about read-only memory that names the read-only arguments.

    Args:
        error: The exception of the task.
        function: The function that raised it.
        kind: Whether *arguments* are those of a call, or the items of a chunk.
        arguments: The arguments of the task.
        item: The index of the item.
    """
    if not isinstance(error, (ValueError, TypeError, BufferError)) or not _SAID.search(str(error)):
        return
    found = itertools.islice(_read_only(_named(kind, arguments, item)), _NAMED)
    for where, thing in found:
        text = f"{where} of {name_of(function)}(), {describe(thing)}, {_why(thing)}"
        add_note(error, text)


def _named(kind: Kind, arguments: Any, item: int) -> Iterator[tuple[str, Any]]:
    if kind is Kind.CALL:
        args, kwargs = arguments
        yield from ((f"argument {name!r}", value) for name, value in kwargs.items())
    elif kind is Kind.STARMAP:
        args = tuple(arguments[item])
    else:
        args = (arguments[item],)
    yield from ((f"argument {position}", value) for position, value in enumerate(args))


def _read_only(named: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for where, value in named:
        if _is_read_only(value):
            yield where, value
        elif isinstance(value, dict):
            elements = [(f"{where}[{key!r}]", element) for key, element in itertools.islice(value.items(), _ELEMENTS)]
            yield from (pair for pair in elements if _is_read_only(pair[1]))
        elif isinstance(value, (list, tuple)):
            elements = [(f"{where}[{index}]", element) for index, element in enumerate(value[:_ELEMENTS])]
            yield from (pair for pair in elements if _is_read_only(pair[1]))


def _is_read_only(thing: Any) -> bool:
    if isinstance(thing, MappedRegion):
        return not thing.closed and thing.mode in _FOR_READING
    if isinstance(thing, memoryview):
        return thing.readonly
    return _address(thing) is not None and attribute_of(attribute_of(thing, "flags"), "writeable") is False


def _address(thing: Any) -> int | None:
    # A NumPy array, or an object with the same protocol.
    interface = attribute_of(thing, "__array_interface__")
    data = interface.get("data") if isinstance(interface, dict) else None
    return data[0] if isinstance(data, tuple) else None


def _why(thing: Any) -> str:
    address = _address(thing)
    mapping = mapping_at(address) if address is not None else None
    if mapping is not None and mapping.mode not in _FOR_READING:
        return (
            "is read-only here because it was read-only in the process that sent it, although its memory is not. "
            "Set its flags.writeable before sending it, or let the task write to a copy."
        )
    return (
        "is read-only here: it was sent with forkshm.view(x, 'read_only') or 'read_private', or its region is sealed "
        "or mapped read-only. Send forkshm.view(x, 'copy_on_write') of a "
        "writable one, so that the task writes to its own copy."
    )
