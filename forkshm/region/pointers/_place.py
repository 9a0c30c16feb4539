"""place() and construct(): ctypes objects in a region.

ctypes is used only to describe layouts; nothing here calls C.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol, TypeVar

from forkshm.region._table import Mode, round_up
from forkshm.region.pointers._layout import assign, check, checked_offset, name_of, set_null
from forkshm.region.pointers._offset_ptr import check_writable

__all__ = ("aligned", "assign", "construct", "place")

T = TypeVar("T")


class Memory(Protocol):
    """Mapped memory, such as a `MappedRegion`."""

    @property
    def address(self) -> int:
        """The address of the first byte."""
        ...

    @property
    def size(self) -> int:
        """The size in bytes."""
        ...

    @property
    def mode(self) -> Mode:
        """Whether it can be written, and who sees the writes."""
        ...

    @property
    def buf(self) -> memoryview:
        """A view of all bytes."""
        ...


def place(region: Memory, kind: type[T], offset: int = 0) -> T:
    r"""Return an existing object in a region as a ctypes object; reads and writes are shared.

    The bytes are unchanged; `construct` makes a new object. The object keeps the memory mapped while it, or anything
    reached from it, is alive. Until then the region cannot be closed.

    Args:
        region: Memory of mode ``read_write`` or ``copy_on_write``.
        kind: A ctypes type. It must have the same meaning in every process: no pointers except `OffsetPtr`, no Python
            objects, no functions.
        offset: Offset of the object in the region, in bytes; a multiple of its alignment.

    Returns:
        An instance of *kind* that shares the memory of the region.

    Raises:
        UnplaceableTypeError: A region cannot hold *kind*, or the targets of its pointers; see ``path`` for the field.
        ValueError: *offset* is negative or not aligned, or the object does not fit.
        RegionAccessError: The region is not writable.
        RegionClosedError: The region was closed.

    Fork and threads:
        Safe to call from any thread. To share the object, pass the region and the offset to another process, and place
        it there.

    Example:
        >>> from forkshm import anonymous_shared_memory
        >>> class Point(ctypes.Structure):
        ...     _fields_ = [("x", ctypes.c_int), ("y", ctypes.c_int)]
        >>> region = anonymous_shared_memory(4096)
        >>> point = place(region, Point, 8)
        >>> point.x, point.y = 1, 2
        >>> bytes(region.buf[8:16])
        b'\x01\x00\x00\x00\x02\x00\x00\x00'
        >>> del point
        >>> region.close()
    """
    check(kind)
    found: T = _view(region, kind, offset)
    return found


def construct(region: Memory, kind: type[T], offset: int = 0, *args: Any, **kwargs: Any) -> T:
    """Return a new ctypes object in a region: zeros and null pointers, then initialized by its ``__init__``.

    In a union, the pointers of the first member are null. If ``__init__`` raises, the object stays partly initialized.

    Args:
        region: As for `place`.
        kind: As for `place`.
        offset: As for `place`. The existing bytes are overwritten.
        *args: Arguments of ``kind(...)``: the first fields of a structure, the items of an array, or the value of a
            simple type.
        **kwargs: Keyword arguments of ``kind(...)``: fields of a structure by name.

    Returns:
        An instance of *kind* that shares the memory of the region.

    Raises:
        UnplaceableTypeError: As for `place`.
        ValueError: As for `place`.
        RegionAccessError: As for `place`.
        RegionClosedError: As for `place`.

    Example:
        >>> from forkshm import anonymous_shared_memory
        >>> region = anonymous_shared_memory(4096)
        >>> numbers = construct(region, ctypes.c_int * 3, 0, 1, 2, 3)
        >>> list(numbers)
        [1, 2, 3]
        >>> del numbers
        >>> region.close()

    See Also:
        ``construct`` of Boost.Interprocess' managed memory; placement new of C++.
    """
    layout = check(kind)
    made: Any = _view(region, kind, offset)
    size = ctypes.sizeof(made)
    (ctypes.c_char * size).from_buffer(made).raw = bytes(size)
    set_null(made, layout)
    made.__init__(*args, **kwargs)
    found: T = made
    return found


def aligned(offset: int, kind: Any) -> int:
    """Return the first offset, starting at *offset*, at which a *kind* is aligned.

    Example:
        >>> aligned(13, ctypes.c_double), aligned(16, ctypes.c_double)
        (16, 16)
    """
    return round_up(checked_offset(offset), ctypes.alignment(kind))


def _view(region: Memory, kind: Any, offset: int) -> Any:
    offset = checked_offset(offset)
    size, multiple = ctypes.sizeof(kind), ctypes.alignment(kind)
    address = region.address + offset
    if address % multiple:
        after = offset + -address % multiple
        raise ValueError(
            f"cannot place {name_of(kind)} at offset {offset:,} of {region!r}: it must be aligned to {multiple} bytes. "
            f"The next aligned offset is {after:,}."
        )
    if offset + size > region.size:
        raise ValueError(
            f"cannot place {name_of(kind)} of {size:,} bytes at offset {offset:,}: the region has {region.size:,} bytes"
        )
    check_writable(kind, region.mode)
    return kind.from_buffer(region.buf, offset)
