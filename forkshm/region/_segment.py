"""Segments: the memory objects that arenas carve up, and the leases on their blocks.

A message that carries a copy names a *block* of a segment of the sender's arena. The
block must not be used again while anybody can see it, and any process may be killed at
any moment; so the kernel counts:

* The sender opens the segment anew, lets that open file description hold a lock on the
  block's first byte, and sends the fd beside the message: the *lease*. In flight the
  kernel keeps it.
* The receiver lets its own description of the segment hold the byte, closes the lease,
  and lets go when the last view of the block is collected (`claim`).
* The arena may use the block again when nobody holds the byte.

Guarantees: a block is never handed out while a view of it lives in any process; a killed
process's leases vanish with it, an unread message's with its socket.

This relies on: an OFD lock lives as long as any fd of its description, in whatever
process or message (fcntl(2), "Open file description locks").
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

from forkshm.backend import Access, Identity, kernel
from forkshm.region._lifetime import at_fork, guard, settle, watch
from forkshm.region._table import round_up

__all__ = ("CREATOR", "Lease", "Segment", "add_segment", "claim", "forget_abandoned", "segments_mapped")

#: The byte that the creator of a segment holds for as long as it lives. Far behind the
#: memory: locks may lie anywhere in the range of an offset.
CREATOR = 2**62


@dataclasses.dataclass(eq=False)
class Segment:
    """One arena memory object as this process sees it."""

    identity: Identity
    #: Our own open file description: it holds our leases.
    fd: int
    address: int
    size: int
    #: Whether this process carves it up.
    ours: bool
    #: First byte of each block that this process has views of, and how many claims.
    held: dict[int, int] = dataclasses.field(default_factory=dict)
    #: During fork: a description for the child, with the same locks.
    spare: int = -1


_segments: dict[Identity, Segment] = {}


class Lease:
    """An fd that holds a block, to be sent beside messages; close it when sent.

    Made under `guard`.
    """

    __slots__ = ("fd",)

    def __init__(self, segment: Segment, position: int) -> None:
        self.fd = kernel.reopen(segment.fd)
        try:
            kernel.lock_shared(self.fd, position)
        except BaseException:
            os.close(self.fd)
            raise
        _outgoing[id(self)] = self

    def close(self) -> None:
        """Let go of the block on our side. Closing twice is allowed."""
        with guard:
            if _outgoing.pop(id(self), None) is not None:
                os.close(self.fd)
                self.fd = -1


# The leases open here, so that a forked child can close its copies: it would hold the
# blocks for as long as it lives.
_outgoing: dict[int, Lease] = {}


def add_segment(fd: int, size: int, *, ours: bool) -> Segment:
    """Map a segment whole and enter it; takes over *fd* unless it raises. Needs `guard`."""
    identity, _ = kernel.identify(fd)
    address = kernel.map(fd, size, Access.SHARED)
    segment = Segment(identity, fd, address, size, ours)
    _segments[identity] = segment
    return segment


def _drop(segment: Segment) -> None:
    del _segments[segment.identity]
    kernel.unmap(segment.address, segment.size)
    os.close(segment.fd)


def _find_or_open(lease_fd: int) -> Segment:
    identity, size = kernel.identify(lease_fd)
    segment = _segments.get(identity)
    if segment is None:
        _forget_abandoned()
        fd = kernel.reopen(lease_fd)
        try:
            segment = add_segment(fd, size, ours=False)
        except BaseException:
            os.close(fd)
            raise
    return segment


def _release(segment: Segment, position: int) -> None:
    left = segment.held[position] - 1
    if left:
        segment.held[position] = left
        return
    del segment.held[position]
    kernel.unlock(segment.fd, position)
    if not segment.held and _is_abandoned(segment):
        _drop(segment)


def claim(lease_fd: int, offset: int, size: int, *, private: bool) -> Any:
    """Turn a received lease into memory that stays until the last view is gone.

    Args:
        lease_fd: As received; it is closed, also when this raises.
        offset: First byte of the block in its segment; a multiple of the page size.
        size: Bytes of the block; a multiple of the page size.
        private: Map the block copy-on-write, because others have been given it too.

    Returns:
        A window on the block's bytes: take buffers from it, and drop it.

    Raises:
        ValueError: The block does not lie in the segment, or is not aligned.
        OSError: The kernel refused a mapping, a lock or an fd.
    """
    settle()
    try:
        with guard:
            segment = _find_or_open(lease_fd)
            page = kernel.page_size
            if offset < 0 or size < 1 or offset + size > segment.size or offset % page or size % page:
                raise ValueError(
                    f"block of {size:,} bytes at {offset:,} does not fit a segment of {segment.size:,} bytes"
                )
            count = segment.held.get(offset, 0)
            if not count:
                # The lease holds the byte until it is closed below: no moment is unprotected.
                kernel.lock_shared(segment.fd, offset)
            segment.held[offset] = count + 1
            address = segment.address + offset
            if private:
                try:
                    address = kernel.map(segment.fd, size, Access.PRIVATE, offset)
                except BaseException:
                    _release(segment, offset)
                    raise
    finally:
        os.close(lease_fd)

    def end() -> None:
        if private:
            kernel.unmap(address, size)
        _release(segment, offset)

    window = kernel.window(address, size)
    watch(window, end)
    return window


def _is_abandoned(segment: Segment) -> bool:
    return not segment.ours and not kernel.is_held(segment.fd, CREATOR)


def _forget_abandoned() -> None:
    for segment in list(_segments.values()):
        if not segment.held and _is_abandoned(segment):
            _drop(segment)


def forget_abandoned() -> None:
    """Unmap the segments of dead processes, as far as no view of them is alive here."""
    settle()
    with guard:
        _forget_abandoned()


def segments_mapped() -> int:
    """How many segments are mapped here, ours and others'."""
    settle()
    with guard:
        return len(_segments)


def _before_fork() -> None:
    for segment in _segments.values():
        if segment.held:
            with contextlib.suppress(OSError):
                # On failure the child opens its own afterwards: see there.
                segment.spare = kernel.reopen(segment.fd)
                for position in segment.held:
                    kernel.lock_shared(segment.spare, position)


def _in_parent() -> None:
    for segment in _segments.values():
        if segment.spare >= 0:
            os.close(segment.spare)
            segment.spare = -1


def _in_child() -> None:
    for lease in _outgoing.values():
        os.close(lease.fd)
        lease.fd = -1
    _outgoing.clear()
    for segment in list(_segments.values()):
        # The inherited fd shares its description with the parent: unlocking through it
        # would let go of the parent's blocks, so the child needs its own.
        inherited, segment.fd = segment.fd, segment.spare
        segment.spare = -1
        segment.ours = False
        if segment.fd < 0:
            segment.fd = kernel.reopen(inherited)
        for position in segment.held:
            # Already locked when the spare was made; a second time changes nothing.
            kernel.lock_shared(segment.fd, position)
        os.close(inherited)


at_fork(before=_before_fork, in_parent=_in_parent, in_child=_in_child)


def block_size(nbytes: int) -> int:
    """Round a request up: whole pages, and at most eight sizes between powers of two."""
    return round_up(nbytes, max(kernel.page_size, 1 << max(nbytes.bit_length() - 4, 0)))
