"""How arrays are sent to other processes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from forkshm.pickler import (
    OUT_OF_BAND,
)
from forkshm.region import mapping_at
from forkshm.region.blocks import Share, claim_at

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # before NumPy 2
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]
from forkshm.integrations.numpy._array import WARNS, WRITABLE, SharedArray, as_plain, is_writable
from forkshm.integrations.numpy._files import MUST_BE_NAMED, mapping_of, named_of, over_mmap, over_named

__all__ = (
    "is_shared",
    "is_simple",
    "rebuild_array",
    "rebuild_broadcast",
    "rebuild_overlapping",
    "rebuild_plain",
    "rebuild_repeated",
    "rebuild_shared",
    "reduce_array",
)


def reduce_array(array: np.ndarray[Any, Any]) -> Any:
    """Reduce an array: as a descriptor if it lies in shared memory, else with one copy of its elements.

    An array sent by value arrives writable, whether or not it may be written to here. Only the memory that a view
    covers is sent, once, even if the view shows an element several times.
    """
    is_shared_type = type(array) is SharedArray
    base: Any = None if is_shared_type else array.base
    if base is not None and (type(base) is not np.ndarray or base.base is not None):
        # Not the usual view of an array that owns its memory.
        if (mapped := mapping_of(array)) is not None and array.nbytes:
            return _apart(array, over_mmap(array, mapped))
        # A small view that is read-only here arrives as a copy, which costs less.
        if MUST_BE_NAMED and array.nbytes and (is_writable(array) or array.nbytes >= OUT_OF_BAND):
            found = named_of(array, as_copy=not is_writable(array))
            if found is not None:
                return _apart(array, over_named(array, *found))
    flags = array.flags
    contiguous = flags.forc
    dtype = array.dtype
    if contiguous and dtype.isbuiltin == 1 and dtype.kind not in "mMVO":
        # Fast paths for most arrays.
        if is_shared_type:
            # The pickler finds out from the address whether the buffer is shared. The buffer of an array that owns its
            # elements is not.
            if array.base is not None:
                return rebuild_shared, (
                    pickle.PickleBuffer(array),  # type: ignore[arg-type]  # typed as no buffer before Python 3.12
                    dtype.str,
                    array.shape,
                    # NumPy's defaults need not be sent.
                    None if array.ndim == 1 and array.strides[0] == dtype.itemsize else array.strides,
                )
        elif array.nbytes:
            # Same as NumPy's own reduction in a third of the time: NumPy spends most of it on the dtype.
            strides = None if flags.c_contiguous else array.strides
            exports_writable = flags.num & (WRITABLE | WARNS) == WRITABLE
            buffer = pickle.PickleBuffer(array) if exports_writable else _exporter(array)  # type: ignore[arg-type]  # as above
            return rebuild_plain, (buffer, dtype.str, array.shape, strides)
    if dtype.hasobject or not array.nbytes:
        if not dtype.isnative and not dtype.hasobject:
            return as_plain(array).copy(order="K").__reduce_ex__(5)  # protocol 4 arrives in the machine's byte order
        # Use the protocol without buffers: an array rebuilt from a buffer would be as read-only as this one.
        return as_plain(array).__reduce_ex__(4)
    address = array.__array_interface__["data"][0]
    shared = _shares_writes(address)
    if is_shared_type and not shared:
        return reduce_array(as_plain(array))
    # Send a plain type by its name: pickling a dtype takes ten times as long.
    named = dtype.str if dtype.isbuiltin == 1 else dtype
    if contiguous:
        return rebuild_array, (_exporter(array), named, array.shape, array.strides, 0, is_shared_type)
    return _reduce_strided(array, address, named, shared=shared)


def _apart(array: np.ndarray[Any, Any], over_file: Any) -> Any:
    """Return how to reduce a view of a file: if it repeats elements and arrives writable, with memory for each."""
    if is_writable(array) or (_span(array)[1] >= array.nbytes and _seen_once(array) is array):
        return over_file
    return rebuild_repeated, over_file


def _span(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Return the distance from the lowest element to the first one, and the bytes between the ends of all elements."""
    # With negative strides, elements lie before the first one.
    reach = [stride * (extent - 1) for stride, extent in zip(array.strides, array.shape, strict=True)]
    before = -sum(distance for distance in reach if distance < 0)
    return before, before + sum(distance for distance in reach if distance > 0) + array.itemsize


def _reduce_strided(array: np.ndarray[Any, Any], address: int, named: Any, *, shared: bool) -> Any:
    """Reduce an array with gaps or repetitions: the span of memory that it sees, and its strides."""
    is_shared_type = type(array) is SharedArray
    if not shared and 0 in array.strides and (core := _seen_once(array)) is not array:
        return rebuild_broadcast, (core, array.shape)
    # Send all bytes between the first and the last element, so that views stay views of one memory.
    before, nbytes = _span(array)
    low = address - before
    high = low + nbytes
    if not shared and high - low > _GAPS * array.nbytes:
        if (mapping := mapping_at(low)) is not None:
            mapping.refuse_truncated(low, nbytes)
        return reduce_array(np.ascontiguousarray(array))
    owner: Any = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    first, last = byte_bounds(owner)
    if low < first or high > last:
        return NotImplemented  # as_strided beyond the memory: leave the error to NumPy
    layout = _exporter(array, low, high - low), named, array.shape, array.strides, address - low
    if not shared and high - low < array.nbytes:
        return rebuild_overlapping, layout
    return rebuild_array, (*layout, is_shared_type)


def is_simple(array: np.ndarray[Any, Any]) -> bool:
    """Return whether a plain array is contiguous and its elements are numbers."""
    dtype = array.dtype
    return bool(array.flags.forc and dtype.isbuiltin == 1 and dtype.kind not in "mMVO" and array.nbytes)


def _shares_writes(address: int) -> bool:
    """Return whether other processes see writes to this address."""
    mapping = mapping_at(address)
    if mapping is not None:
        return mapping.shares_writes
    claim = claim_at(address)
    return claim is not None and claim.share is Share.shared


def is_shared(array: np.ndarray[Any, Any]) -> bool:
    """Return whether other processes see writes to an array."""
    return bool(array.nbytes) and _shares_writes(array.__array_interface__["data"][0])


def _seen_once(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the elements without the axes along which they are repeated."""
    if not any(not stride and extent > 1 for stride, extent in zip(array.strides, array.shape, strict=True)):
        return array
    return array[tuple(slice(None) if stride else slice(1) for stride in array.strides)]


# A view with gaps is sent with its gaps, so that it stays a view. If it spans more than this many
# times its bytes, only its elements are copied.
_GAPS = 2
# The receiver gives each element of an overlapping array its own memory, up to this many bytes.
_SPREAD_OUT = 2**30


class _Exporter:
    """The bytes around a view, in a form from which NumPy makes an array."""

    def __init__(self, array: np.ndarray[Any, Any], address: int, nbytes: int, *, writable: bool) -> None:
        self.base = array  # as an array calls the owner of its memory
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, not writable),
        }


def _exporter(array: np.ndarray[Any, Any], address: int = 0, nbytes: int = 0) -> pickle.PickleBuffer:
    """Return the bytes of a contiguous array, or those at an address, as a buffer.

    The buffer is writable, so the array arrives writable, unless the memory is shared and the array read-only. This
    process does not write to the buffer.
    """
    address = address or array.__array_interface__["data"][0]
    writable = is_writable(array) or not _shares_writes(address)
    made = np.asarray(_Exporter(array, address, nbytes or array.nbytes, writable=writable))
    return pickle.PickleBuffer(made)  # type: ignore[arg-type]  # typed as no buffer before Python 3.12


def rebuild_array(
    buffer: Any, dtype: np.dtype[Any] | str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int, shared: bool
) -> np.ndarray[Any, Any]:
    """Return the array whose bytes arrived."""
    kind = SharedArray if shared else np.ndarray
    return kind(shape, dtype, _firm(buffer), offset, strides)


def rebuild_overlapping(
    buffer: Any, dtype: np.dtype[Any] | str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> np.ndarray[Any, Any]:
    """Return an array whose elements overlapped at the sender, with separate memory for each."""
    return _spread_out(np.ndarray(shape, dtype, _firm(buffer), offset, strides))


def rebuild_broadcast(core: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return an array that was broadcast at the sender, with separate memory for each element."""
    return _spread_out(np.broadcast_to(core, shape))


def rebuild_repeated(rebuild: Any, arguments: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """Return a view that repeated elements of a file at the sender, with separate memory for each."""
    return _spread_out(rebuild(*arguments))


def _spread_out(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.nbytes <= _SPREAD_OUT:
        return array.copy()
    # Too large to copy. A write to one element would show in others, so the array is read-only.
    array.flags.writeable = False
    return array


def rebuild_shared(buffer: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> SharedArray:
    """Return the contiguous SharedArray whose bytes arrived."""
    return SharedArray(shape, dtype, _firm(buffer), 0, strides)


def rebuild_plain(
    buffer: Any, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...] | None
) -> np.ndarray[Any, Any]:
    """Return the contiguous array whose bytes arrived."""
    return np.ndarray(shape, dtype, _firm(buffer), 0, strides)


def _firm(buffer: Any) -> Any:
    # NumPy keeps the object behind a memoryview, which may be writeable. NumPy would then
    # allow setting flags.writeable, and the first write would kill the process.
    if isinstance(buffer, memoryview) and buffer.readonly:
        return np.frombuffer(buffer, np.uint8)
    return buffer
