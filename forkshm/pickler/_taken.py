"""Objects that are pickled before the message that contains them."""

from __future__ import annotations

import operator
import pickle
from typing import TYPE_CHECKING, Any

from forkshm.pickler._names import NO_NAMES, ImportableNames
from forkshm.pickler._pack import SmallStream, small_stream

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("Taken", "take_small")


class Taken:
    """Stands for an object that was pickled at the call. It arrives as that object."""

    __slots__ = ("index", "kind", "together")

    def __init__(self, together: _Together, index: int, kind: type) -> None:
        self.together = together
        self.index = index
        self.kind = kind

    def __repr__(self) -> str:
        return self.kind.__name__

    def __reduce__(self) -> Any:
        return operator.getitem, (self.together, self.index)


class _Together:
    """Objects that were pickled in one stream. They arrive as a list."""

    __slots__ = ("pickled",)

    def __init__(self, pickled: SmallStream) -> None:
        self.pickled = pickled

    def __reduce__(self) -> Any:
        return load_together, tuple(self.pickled)


def load_together(stream: bytes, memory: bytearray, places: list[tuple[int, int, bool]]) -> Any:
    """Return the objects that arrived; their arrays are views of one memory."""
    view = memoryview(memory)
    buffers = [(view.toreadonly() if is_read_only else view)[start:end] for start, end, is_read_only in places]
    return pickle.loads(stream, buffers=buffers)


def take_small(things: Sequence[Any], limit: int, importable: ImportableNames = NO_NAMES) -> list[Taken] | None:
    """Return objects as they are now; None if they have more than *limit* bytes, or contain shared memory.

    They are pickled together, because they may refer to each other.

    Raises:
        Exception: Whatever pickling the objects raises.
    """
    pickled = small_stream(list(things), limit, importable)
    if pickled is None:
        return None
    together = _Together(pickled)
    return [Taken(together, index, type(thing)) for index, thing in enumerate(things)]
