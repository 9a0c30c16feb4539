"""NumPy: arrays in shared memory, and how arrays are sent to other processes."""

from __future__ import annotations

import functools
import importlib
import mmap
import operator
import os
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np

from forkshm.backend import kernel
from forkshm.integrations.numpy_memory import shared_allocations
from forkshm.pickler import (
    OUT_OF_BAND,
    NamedMapping,
    Passage,
    Snapshot,
    can_be_sent,
    find_named,
    register,
    register_family,
    register_foreign,
    register_plain,
    register_simple,
    send_region,
    take_region,
)
from forkshm.region import MappedRegion, Mode, anonymous_shared_memory, mapping_at, region_at
from forkshm.region.blocks import Share, claim_at

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # before NumPy 2
    from numpy import byte_bounds  # type: ignore[attr-defined,no-redef]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal, SupportsIndex

    from numpy.typing import ArrayLike, DTypeLike

    Shape = SupportsIndex | Sequence[SupportsIndex]
    Order = Literal["C", "F"]

__all__ = (
    "SharedArray",
    "array",
    "asarray",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "shared_allocations",
    "zeros",
    "zeros_like",
)


_item_of = np.ndarray.__getitem__


class PrivateArray(np.ndarray[Any, Any]):
    """An array in private memory; ``np.array(a, subok=True)`` and ``np.require`` turn a SharedArray into one."""

    def __array_finalize__(self, parent: Any) -> None:
        pass

    def __array_wrap__(self, result: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return result[()] if return_scalar else np.asarray(result)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()


class SharedArray(np.ndarray[Any, Any]):
    """An ndarray whose elements lie in an anonymous region.

    Use it like any array. It is sent to other processes as a descriptor, so they see the same elements. That also holds
    for plain views of it (``np.asarray(a)``), slices, transposes and reversals. Arithmetic and copies return plain
    arrays.

    Create one with `forkshm.empty`, `zeros`, `ones`, `full`, `array` or `asarray`. The memory is freed when the last
    view in the last process is gone. All attributes and methods of ``numpy.ndarray`` work.

    Example:
        >>> import forkshm
        >>> array = forkshm.zeros(3)
        >>> with forkshm.Pool(1) as pool:
        ...     pool.apply(array.fill, (7,))
        >>> array.tolist(), type(array + 1).__name__
        ([7.0, 7.0, 7.0], 'ndarray')
    """

    @property
    def region(self) -> MappedRegion | None:
        """The region that holds the elements, or None if they are in private memory."""
        return _region_of(self)

    def __array_finalize__(self, parent: Any) -> None:
        # A few C functions of NumPy create a copy of the same type without asking this class. Such an array cannot be
        # turned into a plain array here, and must not be called shared.
        if self.flags.owndata and type(self) is SharedArray:
            self.__class__ = PrivateArray  # type: ignore[assignment]

    def __array_wrap__(self, result: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return result[()] if return_scalar else _owned(np.asarray(result).view(SharedArray))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        plain = tuple(_plain(value) for value in inputs)
        if out is None:
            return getattr(ufunc, method)(*plain, **kwargs)
        results = getattr(ufunc, method)(*plain, out=tuple(_plain(value) for value in out), **kwargs)
        # An array passed as out= is returned itself, as NumPy does.
        if len(out) == 1:
            return out[0]
        return tuple(made if asked is None else asked for asked, made in zip(out, results, strict=True))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _on_plain(func, args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        # Often called in a loop over elements, so this path does only what a single element needs.
        found = _item_of(self, key)
        if type(found) is not SharedArray:
            return found
        base = found.base
        if base is not None and (base is self or base is self.base):
            return found  # a view of the memory that this array is a view of
        return _owned(found)

    @property
    def imag(self) -> Any:
        """The imaginary part; for real elements, a plain array of zeros."""
        return _on_plain(getattr, (self, "imag"), {})

    @imag.setter
    def imag(self, values: Any) -> None:
        _plain(self).imag = _plain(values)

    @property
    def flat(self) -> Any:
        """The elements one after the other; slices of it are plain copies."""
        return _plain(self).flat

    @flat.setter
    def flat(self, values: Any) -> None:
        _plain(self).flat = _plain(values)

    def copy(self, order: Any = "C") -> np.ndarray[Any, Any]:  # type: ignore[override]  # plain, on purpose
        """Return a plain array with a copy of the elements in private memory."""
        return np.array(self, order=order, copy=True, subok=False)

    def __copy__(self) -> np.ndarray[Any, Any]:  # type: ignore[override]
        return self.copy()

    def __deepcopy__(self, memo: Any) -> np.ndarray[Any, Any]:  # type: ignore[override]
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A plain pickle goes anywhere, so it carries the elements, as a plain array.
        # The pickler of forkshm's channels never calls this.
        return np.asarray(self).__reduce_ex__(protocol)

    def __reduce__(self) -> Any:
        return np.asarray(self).__reduce__()


def _plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, SharedArray) else value


def _owned(value: Any) -> Any:
    """Return *value*, or a plain array if it is a SharedArray that is not in shared memory."""
    if isinstance(value, SharedArray) and value.region is None:
        return value.view(np.ndarray)
    return value


def _on_plain(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a NumPy function with plain arrays; return views of shared memory as shared arrays.

    So no intermediate array of NumPy, and no copy, becomes a SharedArray.
    """
    given: dict[int, Any] = {}
    result = func(*_taken(args, given), **_taken(kwargs, given))
    return _given_back(result, given)


def _taken(value: Any, given: dict[int, Any]) -> Any:
    """Return *value* with plain arrays in place of shared ones, which *given* records by the id of the plain one."""
    if isinstance(value, SharedArray):
        plain = value.view(np.ndarray)
        given[id(plain)] = plain, value
        return plain
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_taken(part, given) for part in value])
    if kind is dict:
        return {key: _taken(part, given) for key, part in value.items()}
    return value


def _given_back(value: Any, given: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is np.ndarray:
        found = given.get(id(value))
        if found is not None:
            return found[1]
        return value if value.base is None or _region_of(value) is None else value.view(SharedArray)
    if kind is tuple or kind is list:
        return kind([_given_back(part, given) for part in value])
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*[_given_back(part, given) for part in value])
    return value


def _plain_method(name: str) -> Any:
    """Return a NumPy method whose result is a plain array if the method copied."""
    method = getattr(np.ndarray, name)

    @functools.wraps(method)
    def call(self: SharedArray, *args: Any, **kwargs: Any) -> Any:
        return _on_plain(method, (self, *args), kwargs)

    # The examples in NumPy's own docstring do not apply.
    call.__doc__ = f"Call `numpy.ndarray.{name}`; return views as SharedArrays, and copies as plain arrays."
    return call


# Methods that return no array, or always a view of the requested type, or are defined above.
_NATIVE = frozenset({"copy", "fill", "item", "itemset", "partition", "put", "resize", "setfield", "setflags", "sort"})
_NATIVE |= {"dump", "dumps", "newbyteorder", "tobytes", "tofile", "tolist", "tostring", "view"}
_NATIVE |= {"diagonal", "getfield", "squeeze", "swapaxes", "transpose"}

for _name in dir(np.ndarray):
    if not _name.startswith("_") and _name not in _NATIVE and callable(getattr(np.ndarray, _name)):
        setattr(SharedArray, _name, _plain_method(_name))
del _name


def _region_of(array: np.ndarray[Any, Any]) -> MappedRegion | None:
    if not array.size:
        # An empty slice may start where the next region does, so use the start of its owner.
        while isinstance(array.base, np.ndarray):
            array = array.base
    return region_at(array.__array_interface__["data"][0])


# -- creating -------------------------------------------------------------------------


def empty(shape: Shape, dtype: DTypeLike | None = float, order: Order = "C") -> SharedArray:
    """Return a new array in an anonymous region of its own; its memory happens to be zero.

    Args:
        shape: As for `numpy.empty`. Arrays without elements are allowed.
        dtype: Any type that contains no Python objects.
        order: ``"C"`` for row-major, ``"F"`` for column-major order.

    Raises:
        TypeError: *dtype* contains Python objects, whose addresses mean nothing in other processes.
        ValueError: *shape* is negative or too large.
        RegionCreateError: The kernel refused the memory.

    Example:
        >>> import forkshm
        >>> a = forkshm.empty((2, 3), "float32")
        >>> a.region.size
        24
    """
    return made_in(lambda nbytes, _: anonymous_shared_memory(nbytes), shape, dtype, order)


def made_in(
    memory: Callable[[int, str], MappedRegion], shape: Shape, dtype: DTypeLike | None, order: Order = "C"
) -> SharedArray:
    """Return an array in the region that *memory* returns for a number of bytes and a description."""
    # NumPy gives text without a length a length of one, and appends the axes of a type such as "(2,3)f4" to the shape.
    sample = np.empty(0, dtype)
    kind = sample.dtype
    if kind.hasobject:
        raise TypeError(
            f"cannot share an array of dtype {kind}: it holds Python objects, which live in one process. "
            "Use a numeric or fixed-length text dtype."
        )
    extents = tuple(operator.index(extent) for extent in shape) if np.iterable(shape) else (operator.index(shape),)
    extents += sample.shape[1:]
    if any(extent < 0 for extent in extents):
        raise ValueError(f"an array cannot have a negative extent, got shape {extents}")
    nbytes = kind.itemsize
    for extent in extents:
        nbytes *= extent
    region = memory(max(nbytes, 1), f"{kind} {extents}")
    return SharedArray(extents, kind, buffer=region.buf, order=order)


def zeros(shape: Shape, dtype: DTypeLike | None = float, order: Order = "C") -> SharedArray:
    """Return a new shared array of zeros; pages take memory when first written.

    Arguments and errors are those of `empty`.

    Example:
        >>> import forkshm
        >>> forkshm.zeros((2, 3), int).tolist()
        [[0, 0, 0], [0, 0, 0]]
    """
    return empty(shape, dtype, order)  # the kernel clears new pages


def ones(shape: Shape, dtype: DTypeLike | None = float, order: Order = "C") -> SharedArray:
    """Return a new shared array of ones. Arguments and errors are those of `empty`."""
    return full(shape, 1, float if dtype is None else dtype, order)


def full(shape: Shape, fill_value: Any, dtype: DTypeLike | None = None, order: Order = "C") -> SharedArray:
    """Return a new shared array of *fill_value*, by default with the type of the value.

    The other arguments and the errors are those of `empty`.
    """
    made = empty(shape, np.asarray(fill_value).dtype if dtype is None else dtype, order)
    np.copyto(np.asarray(made), fill_value, casting="unsafe")  # as numpy.full does
    return made


def array(values: ArrayLike, dtype: DTypeLike | None = None, order: Literal["K", "A", "C", "F"] = "K") -> SharedArray:
    """Return a new shared array with a copy of *values*, which is the only copy made.

    Args:
        values: Anything `numpy.asarray` accepts, with any strides.
        dtype: By default that of *values*.
        order: As for `numpy.array`; ``"K"`` keeps the order of *values*.

    Raises:
        TypeError: The elements are Python objects.
        RegionCreateError: The kernel refused the memory.

    Example:
        >>> import forkshm
        >>> int(forkshm.array([1, 2, 3]).sum())
        6
    """
    source = np.asarray(values, dtype)
    columns = order == "F" or (order in ("A", "K") and source.flags.fnc)
    made = empty(source.shape, source.dtype, "F" if columns else "C")
    np.copyto(np.asarray(made), source)
    return made


def asarray(values: ArrayLike, dtype: DTypeLike | None = None) -> SharedArray:
    """Return *values* as a shared array, without a copy if they are in shared memory that this process can write.

    Args:
        values: Anything `numpy.asarray` accepts.
        dtype: By default that of *values*. Another type requires a copy.

    Raises:
        TypeError: The elements are Python objects.
        RegionCreateError: The kernel refused the memory.

    Example:
        >>> import forkshm, numpy
        >>> shared = forkshm.asarray(numpy.ones(3))  # a copy
        >>> forkshm.asarray(shared[1:]).base is None  # a view of the same memory
        False
    """
    source = np.asarray(values, dtype)
    mapping = mapping_at(source.__array_interface__["data"][0]) if source.size else None
    if mapping is not None and mapping.mode is Mode.read_write:
        return source.view(SharedArray)
    return array(source)


def _like(prototype: ArrayLike, dtype: DTypeLike | None, shape: Shape | None) -> tuple[Any, Any, Order]:
    source = np.asarray(prototype)
    return (
        source.shape if shape is None else shape,
        source.dtype if dtype is None else dtype,
        "F" if source.flags.fnc else "C",
    )


def empty_like(prototype: ArrayLike, dtype: DTypeLike | None = None, shape: Shape | None = None) -> SharedArray:
    """Return a new shared array with the shape, type and order of *prototype*; see `empty`."""
    return empty(*_like(prototype, dtype, shape))


def zeros_like(prototype: ArrayLike, dtype: DTypeLike | None = None, shape: Shape | None = None) -> SharedArray:
    """Return a new shared array of zeros with the shape, type and order of *prototype*."""
    return zeros(*_like(prototype, dtype, shape))


def ones_like(prototype: ArrayLike, dtype: DTypeLike | None = None, shape: Shape | None = None) -> SharedArray:
    """Return a new shared array of ones with the shape, type and order of *prototype*."""
    return ones(*_like(prototype, dtype, shape))


def full_like(
    prototype: ArrayLike, fill_value: Any, dtype: DTypeLike | None = None, shape: Shape | None = None
) -> SharedArray:
    """Return a new shared array of *fill_value* with the shape, type and order of *prototype*."""
    where, kind, order = _like(prototype, dtype, shape)
    return full(where, fill_value, kind, order)


# -- sending --------------------------------------------------------------------------


# Whether a mapped file can be found only by its name.
_MUST_BE_NAMED = kernel.name == "posix"


def reduce_array(array: np.ndarray[Any, Any]) -> Any:
    """Reduce an array: as a descriptor if it lies in shared memory, else with one copy of its elements.

    An array sent by value arrives writable, whether or not it may be written to here. Only the memory that a view
    covers is sent, once, even if the view shows an element several times.
    """
    is_shared_type = type(array) is SharedArray
    if array.base is not None and not is_shared_type and (mapping := _mmap_of(array)) is not None and array.nbytes:
        return _over_mmap(array, mapping)
    if array.base is not None and _MUST_BE_NAMED and array.nbytes >= OUT_OF_BAND and not is_shared_type:
        found = _named_of(array, as_copy=not array.flags.writeable)
        if found is not None:
            return _over_mmap(array, *found)
    flags = array.flags
    contiguous = flags.forc
    dtype = array.dtype
    if is_shared_type and contiguous and dtype.isbuiltin == 1 and array.base is not None and dtype.kind not in "mMVO":
        # Fast path for most arrays: the pickler finds out from the address whether the
        # buffer is shared. The buffer of an array that owns its elements is not.
        return rebuild_shared, (
            pickle.PickleBuffer(array),  # type: ignore[arg-type]  # typed as no buffer before Python 3.12
            dtype.str,
            array.shape,
            # NumPy's defaults need not be sent.
            None if array.ndim == 1 and array.strides[0] == dtype.itemsize else array.strides,
        )
    if not is_shared_type and is_simple(array):
        # Same as NumPy's own reduction in a third of the time: NumPy spends most of it on the dtype.
        strides = None if flags.c_contiguous else array.strides
        buffer = pickle.PickleBuffer(array) if flags.writeable else _exporter(array)  # type: ignore[arg-type]  # as above
        return rebuild_plain, (buffer, dtype.str, array.shape, strides)
    if dtype.hasobject or not array.nbytes:
        # Use the protocol without buffers: an array rebuilt from a buffer would be as read-only as this one.
        return _plain(array).__reduce_ex__(4)
    address = array.__array_interface__["data"][0]
    shared = _shares_writes(address)
    if is_shared_type and not shared:
        return reduce_array(_plain(array))
    # Send a plain type by its name: pickling a dtype takes ten times as long.
    named = dtype.str if dtype.isbuiltin == 1 else dtype
    if contiguous:
        return rebuild_array, (_exporter(array), named, array.shape, array.strides, 0, is_shared_type)
    return _reduce_strided(array, address, named, shared=shared)


def _reduce_strided(array: np.ndarray[Any, Any], address: int, named: Any, *, shared: bool) -> Any:
    """Reduce an array with gaps or repetitions: the span of memory that it sees, and its strides."""
    is_shared_type = type(array) is SharedArray
    if not shared and 0 in array.strides and (core := _seen_once(array)) is not array:
        return rebuild_broadcast, (core, array.shape)
    # Send all bytes between the first and the last element, so that views stay views of one
    # memory. With negative strides these start before the first item's address.
    reach = [stride * (extent - 1) for stride, extent in zip(array.strides, array.shape, strict=True)]
    low = address + sum(distance for distance in reach if distance < 0)
    high = address + sum(distance for distance in reach if distance > 0) + array.itemsize
    if not shared and high - low > _GAPS * array.nbytes:
        if array.nbytes < OUT_OF_BAND:
            return NotImplemented
        packed = np.ascontiguousarray(array)
        return rebuild_array, (_exporter(packed), named, packed.shape, packed.strides, 0, False)
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


def _mmap_of(array: np.ndarray[Any, Any]) -> mmap.mmap | None:
    """Return the file mapping that an array is a view of, or None if it cannot be sent."""
    origin: Any = array.base
    while isinstance(origin, np.ndarray):
        origin = origin.base
    if type(origin) is memoryview:
        origin = origin.obj
    return origin if type(origin) is mmap.mmap and can_be_sent(origin) else None


def _named_of(array: np.ndarray[Any, Any], *, as_copy: bool) -> tuple[mmap.mmap, NamedMapping] | None:
    """Return the mapping of the memmap that *array* is, or is a view of, and the object to send for it.

    For kernels that do not report which file is mapped at an address.

    Args:
        array: The array.
        as_copy: Whether the receiver may write to memory that is mapped read-only here. Nobody else sees its writes.
    """
    memmap: Any = array
    while isinstance(memmap, np.ndarray) and not isinstance(memmap, np.memmap):
        memmap = memmap.base
    if not isinstance(memmap, np.memmap):
        return None
    # These are None, or missing, for a memmap of a file without a name, and for the result of a computation with one.
    mapping, path, offset, mode = (getattr(memmap, name, None) for name in ("_mmap", "filename", "offset", "mode"))
    if type(mapping) is not mmap.mmap or mapping.closed or path is None or offset is None:
        return None
    if mode not in ("r", "r+", "w+"):
        return None  # the kernel does not report which pages of a private mapping were written
    start = kernel.address_of(mapping)
    if not start <= array.__array_interface__["data"][0] < start + len(mapping):
        return None
    access = mmap.ACCESS_COPY if as_copy else mmap.ACCESS_READ if mode == "r" else mmap.ACCESS_WRITE
    named = find_named(mapping, os.fspath(path), offset - offset % mmap.ALLOCATIONGRANULARITY, access)
    return None if named is None else (mapping, named)


def _over_mmap(array: np.ndarray[Any, Any], mapping: mmap.mmap, named: NamedMapping | None = None) -> Any:
    """Reduce a view of a file: shared if it is writable, else as a copy-on-write view."""
    where = array.__array_interface__["data"][0] - kernel.address_of(mapping)
    of = named or (mapping if array.flags.writeable else Snapshot(mapping))
    return rebuild_over_mmap, (of, array.dtype, array.shape, array.strides, where)


def rebuild_over_mmap(
    mapping: mmap.mmap, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], where: int
) -> np.ndarray[Any, Any]:
    """Return the view of the file that arrived."""
    return np.ndarray(shape, dtype, mapping, where, strides)


def reduce_memmap(array: np.memmap[Any, Any]) -> Any:
    """Reduce a memmap, or a part of one, to a memmap of the same file."""
    if not array.nbytes:
        return NotImplemented
    mapping = _mmap_of(array)
    of: Any = mapping
    if mapping is None:
        found = _named_of(array, as_copy=False) if _MUST_BE_NAMED else None
        if found is None:
            return NotImplemented
        mapping, of = found
    where = array.__array_interface__["data"][0] - kernel.address_of(mapping)
    of_file: Any = array
    state = {name: getattr(of_file, name) for name in ("filename", "offset", "mode")}
    layout = array.dtype, array.shape, array.strides, where, array.flags.writeable
    return rebuild_memmap, (of, *layout, state)


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
        self._array = array
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
    writable = array.flags.writeable or not _shares_writes(address)
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


def reduce_subclass(array: np.ndarray[Any, Any]) -> Any:
    """Reduce an ndarray subclass: as a descriptor if it lies in shared memory, else by the subclass's own method.

    It arrives as a view of that type with its attributes, after a call of ``__array_finalize__``.
    """
    if array.dtype.hasobject or not (is_shared(array) or _is_over_file(array)):
        return NotImplemented
    kind = type(array)
    if isinstance(array, np.ma.MaskedArray):
        if kind.__reduce__ is not np.ma.MaskedArray.__reduce__:
            return NotImplemented
        state = {name: value for name, value in vars(array).items() if name not in _OF_MASKED}
        mask = np.ma.getmask(array)
        masked: Any = array
        parts = array.view(np.ndarray), None if mask is np.ma.nomask else mask, masked._fill_value, masked._hardmask
        return rebuild_masked, (kind, *parts, state)
    for base in kind.__mro__:
        if base in (np.ndarray, SharedArray):
            break
        if not {"__reduce__", "__reduce_ex__", "__setstate__"}.isdisjoint(vars(base)):
            return NotImplemented  # only the type knows what it needs
    return rebuild_subclass, (kind, array.view(np.ndarray), dict(getattr(array, "__dict__", {})))


def _is_over_file(array: np.ndarray[Any, Any]) -> bool:
    """Return whether the plain view of an array crosses as a mapping of a file."""
    if array.base is None or not array.nbytes:
        return False
    if _mmap_of(array) is not None:
        return True
    return _MUST_BE_NAMED and _named_of(array, as_copy=not array.flags.writeable) is not None


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


def reduce_foreign_array(array: SharedArray) -> Any:
    """Reduce an array for a channel of the standard library: its region, and the position of the elements in it."""
    region = array.region
    if region is None or region.mode is Mode.copy_on_write:
        return array.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    where = array.__array_interface__["data"][0] - region.address
    layout = array.dtype, array.shape, array.strides, where, array.flags.writeable
    return rebuild_foreign_array, (send_region(region), *layout)


def rebuild_foreign_array(
    passage: Passage, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...], where: int, writable: bool
) -> SharedArray:
    """Return the array of the region that arrived."""
    made = SharedArray(shape, dtype, take_region(passage).buf, where, strides)
    if not writable:
        made.flags.writeable = False
    return made


register_foreign(SharedArray, reduce_foreign_array)
register(np.ndarray, reduce_array)
register(np.memmap, reduce_memmap)
register(SharedArray, reduce_array)
register_family(np.ndarray, reduce_subclass)
register(PrivateArray, lambda array: reduce_array(array.view(np.ndarray)))
# Results of many computations. Strings and structured scalars may be long.
register_plain(
    *{kind for kind in np.sctypeDict.values() if issubclass(kind, (np.number, np.bool_, np.datetime64, np.timedelta64))}
)
# The memory of a shared array, and of views of it, is found by its address.
register_simple(SharedArray, own_bytes=lambda array: 0 if array.base is not None else -1)
register_simple(np.ndarray, when=is_simple, own_bytes=lambda array: array.nbytes if array.base is None else -1)
importlib.import_module("forkshm.integrations._numpy_bundles")  # registers how containers of arrays are sent
