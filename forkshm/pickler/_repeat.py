"""Large objects that many tasks of one call share, and that are copied once for all of them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from forkshm.pickler._attributes import attribute_of
from forkshm.pickler._policy import OUT_OF_BAND
from forkshm.pickler._view import View

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ("Repeat", "mark", "repeated")

# Types whose objects never hold a buffer that is copied.
_WITHOUT_BUFFERS = frozenset({int, float, bool, type(None), complex, str, bytes})

# Limits of the search for something large: its depth, and the number of items of a container.
_DEPTH, _FAR = 2, 1000


class Repeat:
    """An object that other payloads contain as well; it arrives without this wrapper."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def repeated(items: Sequence[Any], *, starred: bool) -> frozenset[int]:
    """Return the ids of large objects that are in *items* more than once.

    Args:
        items: The arguments of all tasks; they have to stay alive for as long as the ids are used.
        starred: Whether each item is a tuple of arguments.
    """
    if starred:
        if not {tuple, list}.issuperset(map(type, items)):
            return frozenset()
        items = list(itertools.chain.from_iterable(items))
    if _WITHOUT_BUFFERS.issuperset(map(type, items)):
        return frozenset()
    seen: set[int] = set()
    again: dict[int, Any] = {}
    for item in items:
        if type(item) not in _WITHOUT_BUFFERS:
            if id(item) in seen:
                again[id(item)] = item
            seen.add(id(item))
    return frozenset(which for which, item in again.items() if _is_large(item, _DEPTH))


def mark(items: Iterable[Any], which: frozenset[int], *, starred: bool) -> list[Any]:
    """Return *items* with the repeated objects wrapped."""
    if starred:
        return [tuple(Repeat(part) if id(part) in which else part for part in item) for item in items]
    return [Repeat(item) if id(item) in which else item for item in items]


def _is_large(thing: Any, depth: int) -> bool:
    if isinstance(thing, View):
        thing = thing.value
    nbytes = attribute_of(thing, "nbytes")
    if isinstance(nbytes, int):
        return nbytes >= OUT_OF_BAND
    # A data frame: assume that it is large, because asking would be slow.
    if attribute_of(thing, "memory_usage") is not None:
        return True
    if not depth:
        return False
    parts: Iterable[Any]
    if isinstance(thing, dict):
        parts = thing.values()
    elif isinstance(thing, (list, tuple)):
        parts = thing
    elif isinstance(thing, (bytearray, memoryview)):
        return len(thing) >= OUT_OF_BAND
    else:
        attributes = attribute_of(thing, "__dict__")
        parts = attributes.values() if isinstance(attributes, dict) else ()
    return any(_is_large(part, depth - 1) for part in itertools.islice(parts, _FAR))
