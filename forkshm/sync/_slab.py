"""Slabs: shared memory for small objects, many in one memory object.

A lock of 128 bytes with a memory object of its own would cost a page and an fd in each process that has it. So small
objects are carved out of one object of 1 MiB, in order. No part is used twice, because nothing counts which processes
have it. The object is freed with the last of its parts, in all processes.
"""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING

from forkshm import _interrupts, _system
from forkshm.errors import RegionCreateError
from forkshm.region import anonymous_shared_memory

if TYPE_CHECKING:
    from forkshm.region import MappedRegion

__all__ = ("allocate",)

_SLAB = 1024 * 1024
# Larger objects have a memory object of their own, so that their memory is freed with them.
_LARGEST = 64 * 1024
# Alignment: objects that different processes write at the same time lie in different cache lines.
_LINE = 64


class _Slab:
    """The slab that is being carved up. It does not keep the memory alive; its parts do."""

    def __init__(self, region: MappedRegion) -> None:
        self.region = weakref.ref(region)
        self.end = 0


class _State:
    def __init__(self) -> None:
        self.lock = _interrupts.RLock()
        self.slab: _Slab | None = None


_state = _State()
# A forked child must not carve up its parent's slab.
_system.register_at_fork(after_in_child=_state.__init__)  # type: ignore[misc]


def allocate(size: int) -> tuple[MappedRegion, int]:
    """Return a region and the offset of *size* zero bytes in it for the caller.

    The caller must keep the region: the memory is freed with it.

    Raises:
        RegionCreateError: The kernel refused the memory.
    """
    size = -(-max(size, 1) // _LINE) * _LINE
    if size > _LARGEST:
        return anonymous_shared_memory(size), 0
    with _state.lock:
        slab = _state.slab
        region = slab.region() if slab is not None else None
        if slab is None or region is None or slab.end + size > region.size:
            region = _new_slab(size)
            slab = _state.slab = _Slab(region)
        # No call in between: a signal handler may allocate, too.
        offset = slab.end
        slab.end = offset + size
        return region, offset


def _new_slab(size: int) -> MappedRegion:
    """Return a region for objects, of at least *size* bytes; a smaller one where file sizes are limited."""
    nbytes = _SLAB
    while True:
        try:
            return anonymous_shared_memory(nbytes)
        except RegionCreateError as error:
            if error.errno != errno.EFBIG or nbytes // 2 < size:
                raise
        nbytes //= 2
