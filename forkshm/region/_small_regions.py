"""The slab of small regions, which share a memory object when few fds are left.

Each anonymous region has a memory object of its own, and therefore an fd in each process that has the region. Near the
hard limit on open files, new regions of up to `LARGEST` bytes share one object and its fd. They differ from others:

* Their memory is freed only when the last region of the object is gone in all processes.
* They cannot be sealed, because the seal would apply to all regions of the object. The kernel refuses it.
* A process with the fd of one region can map the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forkshm import _interrupts
from forkshm.backend import kernel
from forkshm.region._lifetime import at_fork, guard
from forkshm.region._table import Mode, give_back, keep, lend, let_go, new_mapping, round_up

if TYPE_CHECKING:
    from forkshm.region._table import Mapping

__all__ = ("LARGEST", "map_part")

LARGEST = 1024 * 1024
"""Size in bytes of the largest region that goes into the slab."""
# Size in bytes of one object. Parts that are never written take no memory.
_OBJECT = 64 * 1024 * 1024


class _SmallRegions:
    """The current object, carved up in order until it is full. Needs `guard`."""

    def __init__(self) -> None:
        self.fd = -1
        self.end = 0

    def take(self, size: int) -> tuple[int, int]:
        """Return an fd, which the caller gives back, and an offset in the object with *size* free bytes."""
        size = round_up(size, kernel.page_size)
        if self.fd < 0 or self.end + size > _OBJECT:
            self.leave()
            # No call between the creation of the fd and this store.
            self.fd = kernel.create_memory(_OBJECT, "small-regions", sealable=False, sparse=True)
            keep(self.fd, self.leave)
        offset = self.end
        try:
            kernel.reserve(self.fd, offset, size)
        except BaseException:
            self.leave()
            raise
        self.end += size
        return lend(self.fd), offset

    @_interrupts.promptly
    def leave(self) -> None:
        """Start another object next time, because this one is full or no longer used."""
        fd, self.fd, self.end = self.fd, -1, 0
        if fd >= 0:
            let_go(fd)


_small_regions = _SmallRegions()
# A forked child starts an object of its own.
at_fork(in_child=_small_regions.leave)


@_interrupts.promptly
def map_part(own: int, size: int) -> tuple[Mapping, Any]:
    """Map a new region of *size* bytes in the slab, and close *own*, the memory object that it had.

    Raises:
        OSError: The kernel refused; *own* is closed nevertheless.
    """
    kernel.close(own)  # may free the last fd of this process
    fd = -1
    try:
        with guard:
            fd, offset = _small_regions.take(size)
        return new_mapping(fd, kernel.identify(fd)[0], offset, size, Mode.read_write)
    except BaseException:
        if fd >= 0:
            with guard:
                give_back(fd)
        raise
