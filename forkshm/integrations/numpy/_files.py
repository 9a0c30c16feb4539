"""How memmaps and other views of files are sent."""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # before NumPy 2
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]

from forkshm.backend import kernel
from forkshm.integrations.numpy._array import is_writable
from forkshm.pickler import NamedMapping, SendableMapping, Snapshot, find_named, sendable

__all__ = (
    "MUST_BE_NAMED",
    "is_over_file",
    "is_simple_memmap",
    "mapping_of",
    "named_of",
    "over_mmap",
    "over_named",
    "rebuild_copied_memmap",
    "rebuild_memmap",
    "rebuild_over_mmap",
    "rebuild_over_named",
    "reduce_memmap",
)

# -- sending --------------------------------------------------------------------------


# Whether a mapped file can be found only by its name.
MUST_BE_NAMED = kernel.name == "posix"
# Owners of the memory of an array that are looked at. Each is the owner of the one before.
_MOST_OWNERS = 20


def mapping_of(array: np.ndarray[Any, Any]) -> SendableMapping | None:
    """Return the file mapping that an array is a view of, or None if it cannot be sent."""
    origin, is_surely_inside = _origin_of(array, mmap.mmap)
    if type(origin) is not mmap.mmap or not (is_surely_inside or _is_inside(array, origin)):
        return None
    return sendable(origin)


def _origin_of(array: np.ndarray[Any, Any], kind: type[Any]) -> tuple[Any, bool]:
    """Return the object of class *kind* that an array is a view of, else None, and whether NumPy checked its bounds."""
    origin: Any = array
    is_surely_inside = True
    for _ in range(_MOST_OWNERS):
        if origin is None or isinstance(origin, kind):
            return origin, is_surely_inside
        if type(origin) is memoryview:
            origin = origin.obj
        else:
            # `as_strided` puts an object of its own between an array and the owner of its memory.
            is_surely_inside &= isinstance(origin, np.ndarray)
            origin = getattr(origin, "base", None)
    return None, False


def _is_inside(array: np.ndarray[Any, Any], mapping: mmap.mmap) -> bool:
    start = kernel.address_of(mapping)
    first, last = byte_bounds(array)
    return start <= first and last <= start + len(mapping)


def named_of(array: np.ndarray[Any, Any], *, as_copy: bool) -> tuple[mmap.mmap, NamedMapping] | None:
    """Return the mapping of the memmap that *array* is, or is a view of, and the object to send for it.

    For kernels that do not report which file is mapped at an address.

    Args:
        array: The array.
        as_copy: Whether the receiver may write to memory that is mapped read-only here. Nobody else sees its writes.
    """
    memmap = _origin_of(array, np.memmap)[0]
    if memmap is None:
        return None
    # These are None, or missing, for a memmap of a file without a name, and for the result of a computation with one.
    mapping, path, offset, mode = (getattr(memmap, name, None) for name in ("_mmap", "filename", "offset", "mode"))
    if type(mapping) is not mmap.mmap or mapping.closed or path is None or offset is None:
        return None
    if mode not in ("r", "r+", "w+"):
        return None  # the kernel does not report which pages of a private mapping were written
    if not _is_inside(array, mapping):
        return None
    access = mmap.ACCESS_COPY if as_copy else mmap.ACCESS_READ if mode == "r" else mmap.ACCESS_WRITE
    named = find_named(mapping, os.fspath(path), offset - offset % mmap.ALLOCATIONGRANULARITY, access)
    return None if named is None else (mapping, named)


def over_mmap(array: np.ndarray[Any, Any], found: SendableMapping) -> Any:
    """Reduce a view of a file: shared if it is writable, else as a copy-on-write view."""
    return _over(array, found.address, found if is_writable(array) else Snapshot(found))


def over_named(array: np.ndarray[Any, Any], mapping: mmap.mmap, named: NamedMapping) -> Any:
    """Reduce a view of a file that is known by its name."""
    rebuild, arguments = _over(array, kernel.address_of(mapping), named)
    if named.access == mmap.ACCESS_WRITE:
        # The receiver may send the view on, so it needs the name as well.
        return rebuild_over_named, (named.path, named.offset, *arguments)
    return rebuild, arguments


def _over(array: np.ndarray[Any, Any], start: int, sent: Any) -> Any:
    where = array.__array_interface__["data"][0] - start
    return rebuild_over_mmap, (sent, _short(array.dtype), array.shape, array.strides, where)


def rebuild_over_named(path: str, offset: int, mapping: mmap.mmap, *layout: Any) -> np.ndarray[Any, Any]:
    """Return the writable view of the file that arrived. It is a view of a memmap that knows the file's name."""
    dtype, shape, strides, where = layout
    memmap: Any = np.ndarray.__new__(np.memmap, (len(mapping),), np.uint8, mapping)
    memmap._mmap = mapping
    memmap.__dict__.update(filename=path, offset=offset, mode="r+")
    return np.ndarray(shape, dtype, memmap, where, strides)


def _short(dtype: np.dtype[Any]) -> Any:
    # Pickling a dtype takes ten times as long as pickling its name.
    return dtype.str if dtype.isbuiltin == 1 else dtype


def rebuild_over_mmap(
    mapping: mmap.mmap, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], where: int
) -> np.ndarray[Any, Any]:
    """Return the view of the file that arrived."""
    return np.ndarray(shape, dtype, mapping, where, strides)


def reduce_memmap(array: np.memmap[Any, Any]) -> Any:
    """Reduce a memmap, or a part of one, to a memmap of the same file."""
    if not array.nbytes:
        return array.__reduce_ex__(4)
    sent: Any = mapping_of(array)
    if sent is not None:
        start = sent.address
    else:
        named = named_of(array, as_copy=False) if MUST_BE_NAMED else None
        if named is None:
            return _copied(array)
        start, sent = kernel.address_of(named[0]), named[1]
    where = array.__array_interface__["data"][0] - start
    layout = _short(array.dtype), array.shape, array.strides, where, is_writable(array)
    return rebuild_memmap, (sent, *layout, _state_of(array))


def _state_of(array: Any) -> dict[str, Any]:
    return {name: getattr(array, name) for name in ("filename", "offset", "mode")}


def _copied(array: np.memmap[Any, Any]) -> Any:
    """Reduce a memmap whose file cannot be sent. In mode ``c`` a copy behaves as the mapping does, so it says so."""
    if getattr(array, "mode", None) != "c" or array.dtype.hasobject:
        return array.__reduce_ex__(4)
    return rebuild_copied_memmap, (array.view(np.ndarray), _state_of(array))


def rebuild_copied_memmap(array: np.ndarray[Any, Any], state: dict[str, Any]) -> Any:
    """Return the memmap that arrived by value."""
    made = array.view(np.memmap)
    made.__dict__.update(state)
    return made


def is_simple_memmap(array: np.memmap[Any, Any]) -> bool:
    """Return whether a memmap holds numbers, and has a file with a name."""
    return array.dtype.isbuiltin == 1 and not array.dtype.hasobject and type(getattr(array, "filename", None)) is str


def rebuild_memmap(
    mapping: mmap.mmap,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    where: int,
    writable: bool,
    state: dict[str, Any],
) -> Any:
    """Return the memmap that arrived."""
    made: Any = np.ndarray.__new__(np.memmap, shape, dtype, mapping, where, strides)
    made._mmap = mapping
    made.__dict__.update(state)
    if made.flags.writeable and not writable:
        made.flags.writeable = False
    return made


def is_over_file(array: np.ndarray[Any, Any]) -> bool:
    """Return whether the plain view of an array crosses as a mapping of a file."""
    if array.base is None or not array.nbytes:
        return False
    if mapping_of(array) is not None:
        return True
    return MUST_BE_NAMED and named_of(array, as_copy=not is_writable(array)) is not None
