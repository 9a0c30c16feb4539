"""Bundles: containers of many small arrays are sent as a few large arrays.

Pickling an array of ten numbers by itself takes 2 us, and more if its memory has to be located. Here a list of
thousands of them is one call of ``concatenate``. The receiver copies each array, so no array keeps the memory of the
others.

The arrays must arrive unchanged in every other respect. An array that is in the message twice arrives once, and a view
of another array arrives as a view of it. So a bundle is made only where no array can be seen from anywhere else: only
the container refers to it, or the message contains nothing else, and each array has memory of its own.
"""

from __future__ import annotations

import itertools
import mmap
import operator
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from forkshm.integrations.numpy_memory import has_born
from forkshm.pickler import MIN_BUNDLE, register, register_bundler, register_simple
from forkshm.region import mapping_at
from forkshm.region.blocks import claim_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Larger arrays are sent one by one: copying them takes as long as everything else.
_LARGEST = 8 * 1024

_dtype, _nbytes, _shape, _base = (operator.attrgetter(name) for name in ("dtype", "nbytes", "shape", "base"))
_metadata = operator.attrgetter("metadata")
_in_c_order = operator.attrgetter("flags.c_contiguous")

# Tells a pickler to write each array by itself, with its elements in the stream, without running Python code.
in_stream: Callable[[Any], Any] = operator.methodcaller("__reduce_ex__", 4)

# Owners of memory that no other process has, unless it lies in a region.
_OF_ONE_PROCESS = frozenset({np.ndarray, bytes, bytearray})
_ATOMS = frozenset({int, float, bool, type(None), complex, str, bytes})


class Bundle:
    """A list, tuple or dict of arrays that is being sent."""

    __slots__ = ("arrays", "container")

    def __init__(self, container: Any, arrays: list[np.ndarray[Any, Any]]) -> None:
        self.container = container
        self.arrays = arrays


def _counted(things: Any) -> set[int]:
    return set(map(sys.getrefcount, things))


# Reference counts of an object that only a list refers to, and of one that only an attribute refers to.
_ONLY_IN_LIST = max(_counted([np.empty(1) for _ in range(4)]))
_ONLY_A_BASE = max(_counted(map(_base, [np.empty(4)[::2] for _ in range(4)])))


def bundle(container: Any, *, is_all: bool) -> Bundle | bool:
    """Return a bundle to send in place of a list, tuple or dict; False if it cannot be bundled.

    Args:
        container: The list, tuple or dict, with many items.
        is_all: Whether *container* has all arrays of the message.

    Returns:
        True if the arrays cannot be bundled, but each of them may be sent in the stream.
    """
    arrays = list(container.values()) if type(container) is dict else container
    if set(map(type, arrays)) != {np.ndarray}:
        return bool(is_all and _may_go_in_stream(container))
    if type(container) is dict and not _ATOMS.issuperset(map(type, container)):
        return False
    if not _are_small(arrays) or not _are_apart(arrays, is_all=is_all):
        return False
    found = list(map(_dtype, arrays))
    dtypes = set(found)
    # Types that differ only in their metadata are equal.
    if len(dtypes) == 1 and len(set(map(id, found))) > 1 and any(map(_metadata, found)):
        return is_all
    shapes = set(map(_shape, arrays))
    ndims = set(map(len, shapes))
    fits = len(dtypes) == len(ndims) == 1 and ndims != {0} and min(map(_nbytes, arrays)) > 0
    if fits and ndims != {1} and not all(map(_in_c_order, arrays)):
        fits = False  # the order of the elements in memory would change
    return Bundle(container, list(arrays)) if fits else is_all and _keep_byte_order(arrays)


def _are_small(arrays: Sequence[Any]) -> bool:
    return max(map(_nbytes, arrays)) <= _LARGEST and not any(dtype.hasobject for dtype in set(map(_dtype, arrays)))


def _keep_byte_order(arrays: Sequence[Any]) -> bool:
    """Return whether arrays in the stream arrive in their byte order; NumPy makes the machine's of any other."""
    return all(dtype.isnative for dtype in set(map(_dtype, arrays)))


def _are_apart(arrays: Sequence[Any], *, is_all: bool) -> bool:
    """Return whether each array has private memory that nothing else in the message sees."""
    if len(set(map(id, arrays))) != len(arrays):
        return False
    if not is_all and max(_counted(arrays)) > _ONLY_IN_LIST:
        return False
    bases = [base for base in map(_base, arrays) if base is not None]
    if not bases:
        return not has_born() or not _may_be_shared(arrays)
    own = set(map(type, bases)) == {np.ndarray} and set(map(type, map(_base, bases))) == {type(None)}
    if own and len(set(map(id, bases)).difference(map(id, arrays))) == len(arrays):
        # Views, each of an array of its own.
        del bases
        seen_elsewhere = not is_all and max(_counted(map(_base, arrays))) > _ONLY_A_BASE
        return not seen_elsewhere and not (has_born() and _may_be_shared(arrays))
    return is_all and all(map(_in_c_order, arrays)) and not _overlap(arrays) and not _may_be_shared(arrays)


def _overlap(arrays: Sequence[Any]) -> bool:
    starts = np.array([array.__array_interface__["data"][0] for array in arrays], np.uint64)
    ends = starts + np.fromiter(map(_nbytes, arrays), np.uint64, len(arrays))
    order = np.argsort(starts)
    return bool((ends[order][:-1] > starts[order][1:]).any())


def _may_be_shared(arrays: Sequence[Any]) -> bool:
    """Return whether any array lies in memory that is sent as a descriptor; arrays of one base share its memory."""
    for array in arrays:
        origin = array
        while isinstance(origin, np.ndarray) and origin.base is not None:
            origin = origin.base
        kind = type(origin.obj) if type(origin) is memoryview else type(origin)
        # Memory of another library may be that of a file.
        if kind is mmap.mmap or (kind not in _OF_ONE_PROCESS and array.flags.writeable):
            return True
    by_base = {id(array.base) if array.base is not None else id(array): array for array in arrays}
    for array in by_base.values():
        address = array.__array_interface__["data"][0]
        if mapping_at(address) is not None or claim_at(address) is not None:
            return True
    return False


def _may_go_in_stream(container: Any) -> bool:
    """Return whether nested lists, tuples and dicts hold only numbers, text, and small independent arrays."""
    arrays: list[Any] = []
    found = {id(container)}
    pending = [container]
    for part in pending:  # the loop appends to it
        values = [*part.values(), *part] if type(part) is dict else part
        for value in values:
            kind = type(value)
            if kind is np.ndarray:
                arrays.append(value)
            elif kind is list or kind is tuple or kind is dict:
                if id(value) not in found:
                    found.add(id(value))
                    pending.append(value)
            elif kind not in _ATOMS:
                return False
    return (
        len(arrays) >= MIN_BUNDLE
        and _are_small(arrays)
        and _keep_byte_order(arrays)
        and _are_apart(arrays, is_all=True)
    )


def reduce_bundle(bundle: Bundle) -> Any:
    """Send the concatenated elements of all arrays, and how they are divided."""
    arrays = bundle.arrays
    shape = arrays[0].shape
    shapes: Any = None if len(set(map(_shape, arrays))) == 1 else list(map(_shape, arrays))
    kind = type(bundle.container)
    keys = list(bundle.container) if kind is dict else None
    rows = arrays if len(shape) == 1 else [array.reshape(-1) for array in arrays]
    elements = np.concatenate(rows, dtype=arrays[0].dtype, casting="no")
    return rebuild_bundle, (kind, keys, elements, len(arrays), shape if shapes is None else shapes)


def rebuild_bundle(
    kind: type, keys: list[Any] | None, elements: np.ndarray[Any, Any], count: int, shapes: Any
) -> list[Any] | tuple[Any, ...] | dict[Any, Any]:
    """Return the container that arrived, with arrays that have memory of their own."""
    if isinstance(shapes, tuple):
        arrays = [row.copy() for row in elements.reshape((count, *shapes))]
    elif len(shapes[0]) == 1:
        ends = list(itertools.accumulate(length for (length,) in shapes))
        arrays = [elements[begin:end].copy() for begin, end in zip([0, *ends], ends, strict=False)]
    else:
        ends = list(itertools.accumulate(map(_product, shapes)))
        arrays = [
            elements[begin:end].reshape(shape).copy()
            for begin, end, shape in zip([0, *ends], ends, shapes, strict=False)
        ]
    if keys is not None:
        return dict(zip(keys, arrays, strict=True))
    return tuple(arrays) if kind is tuple else arrays


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product


register(Bundle, reduce_bundle)
register_simple(Bundle)
register_bundler(bundle, {np.ndarray: in_stream})
