"""The slab of small regions: where small regions live when fds are few.

Each anonymous region has a memory object of its own, and so an fd in each process that has it. Where the hard limit on
open files is near, new ones of up to `LARGEST` bytes share one object, and its fd. What else is different:

* Their memory is free when the last region of that object is gone, in all processes, and not before.
* They cannot be sealed, for that would seal the others; the kernel refuses it.
* Who has the fd of one can map the others.
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

#: Bytes of the largest region that goes there.
LARGEST = 1024 * 1024
#: Bytes of one object; those that nobody writes to take no memory.
_OBJECT = 64 * 1024 * 1024


class _SmallRegions:
    """The object that is being carved up, in order, until it is used up. Needs `guard`."""

    def __init__(self) -> None:
        self.fd = -1
        self.end = 0

    def take(self, size: int) -> tuple[int, int]:
        """Return an fd, which the caller gives back, and where in the object it has *size* bytes."""
        size = round_up(size, kernel.page_size)
        if self.fd < 0 or self.end + size > _OBJECT:
            fd = kernel.create_memory(_OBJECT, "small-regions", sealable=False, sparse=True)
            self.leave()
            self.fd = fd
            keep(fd, self.leave)
        offset = self.end
        kernel.reserve(self.fd, offset, size)
        self.end += size
        return lend(self.fd), offset

    def leave(self) -> None:
        """Begin another one next time: this one is used up, or nobody has a part of it any more."""
        fd, self.fd, self.end = self.fd, -1, 0
        if fd >= 0:
            let_go(fd)


_small_regions = _SmallRegions()
# What the parent carves up is the parent's.
at_fork(in_child=_small_regions.leave)


@_interrupts.promptly
def map_part(own: int, size: int) -> tuple[Mapping, Any]:
    """Map a new region of *size* bytes in the slab of small regions, and close *own*, the memory object it had.

    Raises:
        OSError: The kernel refused; *own* is closed all the same.
    """
    kernel.close(own)  # its fd may be the last there was
    with guard:
        fd, offset = _small_regions.take(size)
    try:
        return new_mapping(fd, kernel.identify(fd)[0], offset, size, Mode.read_write)
    except BaseException:
        with guard:
            give_back(fd)
        raise
