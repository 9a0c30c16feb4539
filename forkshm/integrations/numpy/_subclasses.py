"""How arrays of ndarray subclasses are sent."""

from __future__ import annotations

from typing import Any

import numpy as np

from forkshm.integrations.numpy._array import SharedArray
from forkshm.integrations.numpy._files import is_over_file
from forkshm.integrations.numpy._send import is_shared

__all__ = ("rebuild_masked", "rebuild_subclass", "reduce_subclass")


def reduce_subclass(array: np.ndarray[Any, Any]) -> Any:
    """Reduce an ndarray subclass: as a descriptor if it lies in shared memory, else by the subclass's own method.

    A masked array is reduced to its elements and mask, wherever they lie.

    It arrives as a view of that type with its attributes, after a call of ``__array_finalize__``.
    """
    kind = type(array)
    # NumPy's own way with a masked array takes several copies, and expands a broadcast one.
    is_ours = isinstance(array, np.ma.MaskedArray) or is_shared(array) or is_over_file(array)
    if array.dtype.hasobject or not is_ours:
        return NotImplemented
    if isinstance(array, np.ma.MaskedArray):
        if kind.__reduce__ is not np.ma.MaskedArray.__reduce__:
            return NotImplemented
        state = {name: value for name, value in vars(array).items() if name not in _OF_MASKED}
        mask = np.ma.getmask(array)
        masked: Any = array
        parts = array.view(np.ndarray), None if mask is np.ma.nomask else mask, masked._fill_value, masked._hardmask
        if masked._baseclass not in (np.ndarray, SharedArray):
            state["_baseclass"] = masked._baseclass
        return rebuild_masked, (kind, *parts, state)
    for base in kind.__mro__:
        if base in (np.ndarray, SharedArray):
            break
        if not {"__reduce__", "__reduce_ex__", "__setstate__"}.isdisjoint(vars(base)):
            return NotImplemented  # only the type knows what it needs
    return rebuild_subclass, (kind, array.view(np.ndarray), dict(getattr(array, "__dict__", {})))


# Attributes that the receiver's view sets by itself.
_OF_MASKED = frozenset({"_mask", "_fill_value", "_hardmask", "_sharedmask", "_isfield", "_baseclass"})


def rebuild_subclass(
    kind: type[np.ndarray[Any, Any]], elements: np.ndarray[Any, Any], state: dict[str, Any]
) -> np.ndarray[Any, Any]:
    """Return the array of an ndarray subclass whose elements arrived."""
    made = elements.view(kind)
    if state:
        made.__dict__.update(state)
    return made


def rebuild_masked(
    kind: Any, elements: np.ndarray[Any, Any], mask: Any, fill_value: Any, hard: bool, state: dict[str, Any]
) -> Any:
    """Return the masked array whose elements and mask arrived."""
    made: Any = elements.view(kind)
    if mask is not None:
        made._mask = mask
    made._fill_value = fill_value
    made._hardmask = hard
    made.__dict__.update(state)
    return made
