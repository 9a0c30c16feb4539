"""Functions that return new arrays in shared memory."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from forkshm.integrations.numpy._array import SharedArray
from forkshm.region import MappedRegion, Mode, anonymous_shared_memory, mapping_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal, SupportsIndex

    from numpy.typing import ArrayLike, DTypeLike

    Shape = SupportsIndex | Sequence[SupportsIndex]
    Order = Literal["C", "F"]

__all__ = (
    "array",
    "asarray",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "made_in",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
)


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
