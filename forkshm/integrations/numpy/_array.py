"""SharedArray: an array whose elements lie in an anonymous region."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from forkshm.region import MappedRegion, region_at

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = (
    "WARNS",
    "WRITABLE",
    "PrivateArray",
    "SharedArray",
    "as_plain",
    "is_writable",
)

WRITABLE = 0x0400
"""The bit of ``flags.num`` that is ``flags.writeable`` (``NPY_ARRAY_WRITEABLE``)."""
WARNS = 0x80000000
"""The bit of results of `numpy.broadcast_arrays` (``NPY_ARRAY_WARN_ON_WRITE``), whose buffers are read-only."""

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
        plain = tuple(as_plain(value) for value in inputs)
        if out is None:
            return getattr(ufunc, method)(*plain, **kwargs)
        results = getattr(ufunc, method)(*plain, out=tuple(as_plain(value) for value in out), **kwargs)
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
        as_plain(self).imag = as_plain(values)

    @property
    def flat(self) -> Any:
        """The elements one after the other; slices of it are plain copies."""
        return as_plain(self).flat

    @flat.setter
    def flat(self, values: Any) -> None:
        as_plain(self).flat = as_plain(values)

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


def as_plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, SharedArray) else value


def is_writable(array: np.ndarray[Any, Any]) -> bool:
    """Return ``array.flags.writeable`` without a warning.

    For a result of `numpy.broadcast_arrays`, NumPy warns when the attribute is read.
    """
    return bool(array.flags.num & WRITABLE)


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
