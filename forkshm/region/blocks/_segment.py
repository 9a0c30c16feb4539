"""Segments: the memory objects that arenas carve up, and the leases on their blocks.

A message that carries a copy names a *block* of a segment of the sender's arena. The block must not be reused while any
process can see it, and any process may be killed at any moment. So the kernel counts:

* The sender opens the segment again, lets that open file description hold a lock on the block's first byte, and sends
  the fd beside the message: the *lease*. In flight the kernel keeps it.
* The receiver lets its own description of the segment hold the byte, and closes the lease. It releases the byte when
  the last view of the block is collected (`claim`).
* The arena may reuse the block when no description holds the byte.
* A process that has a block may lend it to others: memory that arrived as a copy is not copied again. To each process
  the block remains a private copy. So from then on it is mapped copy-on-write, unless only one process has it.

Guarantees: a block is never handed out while a view of it lives in any process. The leases of a killed process vanish
with it, and those of an unread message with its socket.

This relies on OFD locks: such a lock lives as long as any fd of its description, in whatever process or message
(fcntl(2), "Open file description locks").
"""

from __future__ import annotations

import dataclasses
import errno
import os
from typing import TYPE_CHECKING, Any, TypeAlias

from forkshm import _interrupts
from forkshm.backend import Access, Advice, Identity, kernel
from forkshm.region._lifetime import guard, settle
from forkshm.region._table import round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = (
    "BY_HANDLES",
    "CREATOR",
    "Ranges",
    "Segment",
    "add_segment",
    "close_idle_fd",
    "drop_abandoned",
    "drop_own",
    "drop_segment",
    "enter_held",
    "forget_abandoned",
    "is_abandoned",
    "leave_held",
    "mend",
    "segments_held",
    "segments_mapped",
    "with_range",
    "within",
    "without_range",
)

CREATOR = 2**62
"""The byte that the creator of a segment holds while it lives. It is far behind the memory, because locks may lie
anywhere in the range of an offset."""


BY_HANDLES = kernel.leases_are_handles

Ranges: TypeAlias = "tuple[tuple[int, int], ...]"
"""Ranges of start and end, sorted by address, none adjacent to another. Replaced, never changed."""


@dataclasses.dataclass(eq=False)
class Segment:
    """One memory object of an arena, as seen by this process."""

    identity: Identity
    fd: int
    """This process's own open file description, which holds its leases."""
    address: int
    size: int
    ours: bool
    """Whether this process carves it up."""
    held: dict[int, dict[int, bool]] = dataclasses.field(default_factory=dict)
    """First byte of each block that this process holds, and the keys of the claims and parked leases that hold it."""
    spares: list[int] = dataclasses.field(default_factory=list)
    """During a fork: a description for the child with the same locks, and whether it still lacks some of them."""
    lacks_spare: bool = False
    is_description_shared: bool = False
    """Whether a process related by fork has the same description and locks; these are then never released."""
    stuck: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    """Address, size and offset of pages that the kernel refused to map shared again."""
    mapped: list[int] = dataclasses.field(default_factory=list)
    """The address, until the segment is unmapped."""
    seen: Ranges = ()
    """Ranges of another process's segment whose pages this process has mapped. A hint."""
    closing: Iterator[Any] = dataclasses.field(default_factory=lambda: iter(()))
    """An iterator that closes the fd when it is first advanced."""

    def take_over(self, fd: int) -> None:
        """Use *fd* from now on, and close it at the end."""
        closing = map(kernel.close, (fd,))
        # No call between these stores.
        self.fd = fd
        self.closing = closing

    def map_pages(self, start: int, nbytes: int) -> None:
        """Map the pages of a range that another process has filled, in one call instead of a page fault for each."""
        low = start - start % kernel.page_size
        high = round_up(start + nbytes, kernel.page_size)
        if self.ours or within(self.seen, low, high) == ((low, high),):
            return
        with _interrupts.refused:  # the kernel lacks the call: pages are mapped when they are touched
            # Populating by reading also maps the pages writable, in two thirds of the time.
            kernel.advise(self.address + low, high - low, Advice.populate, writable=False)
        self.seen = with_range(self.seen, low, high)

    def is_intact(self) -> bool:
        """Return whether the fd still refers to the segment: a program may close the fd, and the number be reused."""
        return kernel.is_object(self.fd, self.identity)

    def check(self) -> None:
        """Raise OSError unless the fd refers to the segment."""
        if not BY_HANDLES and not self.is_intact():
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def close(self) -> None:
        """Close the fd, unless it refers to something else by now."""
        if self.fd >= 0:
            if BY_HANDLES or self.is_intact():
                next(self.closing, None)
            self.fd = -1


segments_held: dict[Identity, Segment] = {}


def enter_held(segment: Segment, position: int, key: int) -> None:
    """Record that *key* holds a block. The caller locks its byte afterwards."""
    held = segment.held
    none: dict[int, bool] = {}
    # No call from here on.
    if position in held:
        held[position][key] = True
    else:
        none[key] = True
        held[position] = none


def leave_held(segment: Segment, position: int, key: int) -> None:
    """Release a block, and with its last key the byte. Can be repeated."""
    held = segment.held
    if not BY_HANDLES and segment.fd >= 0 and not segment.is_description_shared:
        unlocking = kernel.unlocking(segment.fd, position)
    else:
        unlocking = iter(())
    # No call before the unlocking call: a signal handler must not claim the block in between.
    if position in held:
        keys = held[position]
        if key in keys:
            del keys[key]
        if not keys:
            if segment.is_description_shared:
                keys[0] = True  # while this process lives
            else:
                del held[position]
    if position not in held:
        try:  # noqa: SIM105 - a context manager takes as long as the call
            next(unlocking, None)
        except OSError:  # other code closed the fd, or reused its number
            pass
    if not held and not segment.ours:
        close_idle_fd(segment)
        if is_abandoned(segment):
            drop_segment(segment)


def add_segment(fd: int, size: int, *, ours: bool) -> Segment:
    """Map a whole segment and record it; takes over *fd* unless it raises. Needs `guard`."""
    identity, _ = kernel.identify(fd)
    segment = Segment(identity, -1, 0, size, ours)
    try:
        kernel.map_into(segment.mapped, fd, size, Access.SHARED)
        segment.address = segment.mapped[0]
        segments_held[identity] = segment
        segment.take_over(fd)
        return segment
    except BaseException:
        segment.fd = -1
        if segments_held.get(identity) is segment:
            del segments_held[identity]
        if segment.mapped:
            kernel.unmap_from(segment.mapped, size)
        raise


def mend(segment: Segment) -> None:
    """Map pages shared again that the kernel refused to when their last view was gone. Needs `guard`.

    Raises:
        OSError: The kernel still refuses. The segment must not be used.
    """
    if segment.stuck:
        segment.check()
    while segment.stuck:
        address, size, offset = segment.stuck[-1]
        kernel.replace(address, segment.fd, size, Access.SHARED, offset)
        segment.stuck.pop()


def drop_segment(segment: Segment) -> None:
    """Unmap a segment that has no views here, and close its fd. Can be repeated. Needs `guard`."""
    identity = segment.identity
    if identity in segments_held and segments_held[identity] is segment:
        del segments_held[identity]
    if segment.mapped:
        kernel.unmap_from(segment.mapped, segment.size)
    segment.close()


def close_idle_fd(segment: Segment) -> None:
    """Close the fd of a segment without claimed blocks, where the fd alone would hold the block."""
    if BY_HANDLES and not segment.ours and segment.fd >= 0 and not segment.held:
        # The mapping stays, because it is warm.
        segment.close()


def drop_own(segment: Segment) -> None:
    """Drop a segment of this process whose blocks no process holds. Needs `guard`."""
    if BY_HANDLES:
        kernel.give_up(segment.address, segment.size)
    drop_segment(segment)


def is_abandoned(segment: Segment) -> bool:
    """Return whether the process that carves up a segment has ended."""
    if segment.ours or not segment.mapped:
        return False
    if BY_HANDLES:
        return kernel.is_abandoned(segment.address, segment.size)
    try:
        return not kernel.is_held(segment.fd, CREATOR)
    except OSError as error:
        if not _interrupts.is_of_kernel(error):  # raised by a signal handler
            raise
        return True  # other code closed the fd


def drop_abandoned() -> None:
    """Unmap the segments of dead processes that have no views here. Needs `guard`."""
    for segment in list(segments_held.values()):
        if not segment.held and is_abandoned(segment):
            drop_segment(segment)


def forget_abandoned() -> None:
    """Unmap the segments of dead processes that have no views here."""
    settle()
    with guard:
        drop_abandoned()


def segments_mapped() -> int:
    """Return the number of segments mapped here, of this process and of others."""
    settle()
    with guard:
        return len(segments_held)


def within(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return the parts of *ranges* between *start* and *end*."""
    return tuple((max(low, start), min(high, end)) for low, high in ranges if low < end and high > start)


def without_range(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return *ranges* without the part between *start* and *end*."""
    left: list[tuple[int, int]] = []
    for low, high in ranges:
        if low < start:
            left.append((low, min(high, start)))
        if high > end:
            left.append((max(low, end), high))
    return tuple(left)


def with_range(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return *ranges* with the range from *start* to *end* added, merged with adjacent ones."""
    for low, high in ranges:
        if low <= end and high >= start:
            start, end = min(low, start), max(high, end)
    return tuple(sorted([*(part for part in ranges if part[1] < start or part[0] > end), (start, end)]))
