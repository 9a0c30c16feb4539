"""How ctypes objects cross whose memory is not their own: parts of others, and those made by ``from_buffer``."""

from __future__ import annotations

import ctypes
import pickle
from typing import Any

from forkshm.pickler._reducers import register_family

# The base class of all ctypes objects, which has no public name.
_CDATA: Any = ctypes._SimpleCData.__mro__[-2]


def reduce_ctypes(thing: Any) -> Any:
    """Send the memory of a ctypes object as a buffer, so that shared memory is recognized by its address.

    Raises:
        ValueError: The object contains pointers.
    """
    kind: Any = type(thing)
    owner = thing
    while owner._b_base_ is not None:
        owner = owner._b_base_
    if owner._b_needsfree_ or kind.__reduce__ is not _CDATA.__reduce__:
        return NotImplemented
    (kind * 0)().__reduce__()  # refuses pointers, and copies nothing
    return rebuild_ctypes, (kind, pickle.PickleBuffer(thing), thing.__dict__)


def rebuild_ctypes(kind: Any, buffer: Any, attributes: dict[str, Any]) -> Any:
    """Return the ctypes object whose memory arrived; a copy of memory that is read-only."""
    made = (kind.from_buffer_copy if memoryview(buffer).readonly else kind.from_buffer)(buffer)
    made.__dict__.update(attributes)
    return made


register_family(_CDATA, reduce_ctypes)
