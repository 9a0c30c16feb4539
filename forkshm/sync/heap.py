"""BufferWrapper and Arena: the memory behind `Value` and `Array`."""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.region import anonymous_shared_memory
from forkshm.sync._slab import allocate

if TYPE_CHECKING:
    from forkshm.region import MappedRegion

__all__ = ("Arena", "BufferWrapper")


def _checked(size: int) -> int:
    size = operator.index(size)
    if size < 0:
        raise ValueError(f"Size {size} out of range")
    if sys.maxsize <= size:
        raise OverflowError(f"Size {size} too large")
    return size


class BufferWrapper:
    """Shared memory with the interface of ``multiprocessing.heap.BufferWrapper``.

    Small ones share a memory object.

    Args:
        size: Bytes.

    Raises:
        ValueError: *size* is negative.
        OverflowError: *size* is larger than the address space.
        RegionCreateError: The kernel refused memory.

    Example:
        >>> from forkshm.heap import BufferWrapper
        >>> wrapper = BufferWrapper(3)
        >>> wrapper.create_memoryview()[:] = b"abc"
        >>> bytes(wrapper.create_memoryview())
        b'abc'
    """

    # Compatibility with programs that set a ``multiprocessing.heap.Heap``; forkshm needs none.
    _heap: Any = None

    def __init__(self, size: int) -> None:
        size = _checked(size)
        if self._heap is not None:
            block = self._heap.malloc(size)
            self._state = block, size
            _multiprocess.util.Finalize(self, self._heap.free, args=(block,))
            return
        self._place(*allocate(size), size)

    _region: MappedRegion | None = None

    def _place(self, region: MappedRegion, offset: int, size: int) -> None:
        self._region, self._offset, self._size = region, offset, size

    def create_memoryview(self) -> memoryview:
        """Return a view of the memory."""
        if self._region is None:
            (arena, start, _), size = self._state
            return memoryview(arena.buffer)[start : start + size]
        return self._region.buf[self._offset : self._offset + self._size]

    def __reduce__(self) -> Any:
        if self._region is None:
            return super().__reduce__()
        return _rebuild, (type(self), self._region, self._offset, self._size)


def _rebuild(kind: type[BufferWrapper], region: MappedRegion, offset: int, size: int) -> BufferWrapper:
    made = kind.__new__(kind)
    made._place(region, offset, size)
    return made


class Arena:
    """A separate memory object, with the interface of ``multiprocessing.heap.Arena``.

    Args:
        size: Bytes.

    Raises:
        RegionCreateError: The kernel refused memory.
    """

    def __init__(self, size: int) -> None:
        self._adopt(anonymous_shared_memory(size))

    def _adopt(self, region: MappedRegion) -> None:
        self._region = region
        self.size = region.size
        self.buffer = region.buf

    def __reduce__(self) -> Any:
        return _rebuild_arena, (self._region,)


def _rebuild_arena(region: MappedRegion) -> Arena:
    made = Arena.__new__(Arena)
    made._adopt(region)
    return made
