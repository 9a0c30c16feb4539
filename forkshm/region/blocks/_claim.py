"""Claims: the blocks that this process has views of."""

from __future__ import annotations

import bisect
import contextlib
import enum
import functools
from typing import TYPE_CHECKING, Any

from forkshm import _leaks
from forkshm.backend import Access, kernel
from forkshm.region._lifetime import guard, new_key, settle, watch
from forkshm.region._table import round_up
from forkshm.region.blocks._lease import lease_on
from forkshm.region.blocks._segment import (
    BY_HANDLES,
    Segment,
    add_segment,
    close_idle_fd,
    drop_abandoned,
    drop_segment,
    enter_held,
    is_abandoned,
    leave_held,
    mend,
    segments_held,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from forkshm.region.blocks._lease import Lease

__all__ = (
    "Claim",
    "Hold",
    "Share",
    "claim",
    "claim_at",
    "claims",
    "hold",
)


class Share(enum.Enum):
    """How a block is shared with other processes."""

    exclusive = "exclusive"
    """No other process has it."""
    private = "private"
    """Other processes may also have it; each maps it copy-on-write."""
    read_only = "read_only"
    """As private, but only for reading."""
    shared = "shared"
    """All processes see each other's writes."""


class Hold:
    """Kept by an exporter of a block; when it is gone, the claim has one exporter fewer."""

    __slots__ = ("__weakref__", "claim")

    def __init__(self, claimed: Claim) -> None:
        self.claim = claimed


class Claim:
    """A block that this process has views of. All methods except `lend` need `guard`."""

    __slots__ = ("__weakref__", "address", "holds", "in_place", "mapped", "offset", "segment", "share", "size")

    def __init__(self, segment: Segment, offset: int, size: int, share: Share) -> None:
        self.segment = segment
        self.offset = offset
        self.size = size
        self.share = share
        # Whether views are in the mapping of the whole segment, or in a mapping of the block.
        self.in_place = share in (Share.exclusive, Share.shared)
        self.address = segment.address + offset
        # The keys of the exporters that are alive.
        self.holds: dict[int, bool] = {}
        # The address of the block's own mapping, if any, until it is unmapped.
        self.mapped: list[int] = []

    def hold(self) -> Hold:
        """Return the object that an exporter keeps; the hold is released when the object is collected."""
        held, key = Hold(self), new_key()
        watch(held, functools.partial(self._let_go, key))
        self.holds[key] = True
        enter_held(self.segment, self.offset, key)
        return held

    def begin(self) -> Hold:
        """Hold the block, and map it if needed."""
        segment = self.segment
        held = self.hold()
        if not BY_HANDLES:
            kernel.lock_shared(segment.fd, self.offset)
        if not self.in_place:
            access = Access.PRIVATE if self.share is Share.private else Access.READ
            kernel.map_into(self.mapped, segment.fd, self.size, access, self.offset)
            self.address = self.mapped[0]
        claims[self.address] = self
        bisect.insort(_claim_starts, self.address)
        return held

    def _let_go(self, key: int) -> None:
        """Remove one hold; with the last one, release the block. Can be repeated."""
        self.holds.pop(key, None)
        if not self.holds:
            self._end()
        leave_held(self.segment, self.offset, key)

    def _end(self) -> None:
        address = self.address
        if address in claims and claims[address] is self:
            del claims[address]
            position = bisect.bisect_left(_claim_starts, address)
            try:
                if _claim_starts[position] == address:
                    del _claim_starts[position]
            except IndexError:  # it was never entered there
                pass
        if self.mapped:
            kernel.unmap_from(self.mapped, self.size)
        elif self.in_place and self.share is Share.private and address not in claims:
            try:
                self.segment.check()
                kernel.replace(address, self.segment.fd, self.size, Access.SHARED, self.offset)
            except OSError:
                self.segment.stuck.append((address, self.size, self.offset))
            self.share = Share.exclusive
        if _leaks.is_on:
            _leaks.unmade(self)

    def map_pages(self, start: int, nbytes: int) -> None:
        """Map the pages of a part of the block that are not mapped yet, if it is used in the segment's mapping."""
        if self.in_place and self.share is not Share.private:
            self.segment.map_pages(self.offset + start, nbytes)

    def lend(self, beside: Iterable[Lease] = ()) -> Lease:
        """Return a lease to send to another process, if possible one of *beside*; a view must be alive.

        Raises:
            OSError: The kernel refused an fd or a lock.
        """
        with guard:
            return lease_on(self.segment, self.offset, beside)

    def share_out(self, *, to_many: bool) -> Share:
        """Return how the block is shared with receivers of the lease. Call it as late as possible.

        If a view is alive here and the block belonged to this process alone, it is mapped copy-on-write from now on:
        neither side may see the other's writes.

        Raises:
            OSError: The kernel refused the mapping.
        """
        settle()  # views that are gone do not count
        with guard:
            if self.share is Share.exclusive:
                if not self.holds and not to_many:
                    return Share.exclusive
                if self.holds:
                    self.part()
                return Share.private
            return self.share

    def part(self) -> None:
        """Make later writes here invisible to other processes. Needs `guard`.

        Raises:
            OSError: The kernel refused the mapping, or other code has closed the segment's fd.
        """
        self.segment.check()
        replacing = kernel.replacing(self.address, self.segment.fd, self.size, Access.PRIVATE, self.offset)
        # Stored before the call, so that the block is mapped shared again at the end even if this is interrupted. No
        # call comes in between, not even to advance the iterator.
        self.share = Share.private
        try:
            [*replacing]  # noqa: B018
        except OSError:
            self.share = Share.exclusive
            raise

    def part_by_copy(self) -> None:
        """Do as `part`, without the segment's fd, in a process whose other threads do not use the block.

        Raises:
            OSError: The kernel refused the memory.
        """
        kernel.replace_by_copy(self.address, self.size)
        self.share = Share.private

    def is_as_it_came(self, address: int, nbytes: int) -> bool:
        """Return whether the block still has the bytes that were sent, so that the block can be passed on.

        It does not if this process wrote to its copy-on-write mapping. If that is unknown, or other code has closed the
        segment's fd, return False.
        """
        if not BY_HANDLES and not self.segment.is_intact():
            return False
        if self.in_place and self.share is not Share.private:
            return True
        start = address - address % kernel.page_size
        try:
            return not kernel.own_pages(start, round_up(address + nbytes, kernel.page_size) - start)
        except OSError:
            return False


# The claim at each address; claims never overlap. Below are the sorted addresses. An interrupted change may leave an
# extra address, which is skipped.
claims: dict[int, Claim] = {}
_claim_starts: list[int] = []


def claim_at(address: int) -> Claim | None:
    """Return the claim on the block that contains *address*, or None."""
    if not _claim_starts:
        return None
    settle()
    with guard:
        position = bisect.bisect_right(_claim_starts, address) - 1
        while True:
            if position < 0:
                break
            start = _claim_starts[position]
            found = claims.get(start)
            if found is not None:
                return found if address < found.address + found.size else None
            with contextlib.suppress(IndexError):
                if _claim_starts[position] == start:
                    del _claim_starts[position]
            position -= 1
    return None


def _find_or_open(lease_fd: int) -> Segment:
    identity, size = kernel.identify(lease_fd)
    segment = segments_held.get(identity)
    if segment is not None and not BY_HANDLES and not kernel.is_object(segment.fd, identity):
        # Other code closed the fd. The mapping keeps the description with its locks until its views are gone.
        if segment.held:
            del segments_held[identity]
        else:
            drop_segment(segment)
        segment = None
    if segment is None:
        if kernel.may_shrink(lease_fd, identity):
            raise ValueError("cannot map a segment that its sender could shrink: it was not made by forkshm")
        drop_abandoned()
        fd = kernel.reopen(lease_fd)
        try:
            segment = add_segment(fd, size, ours=False)
        except BaseException:
            kernel.close(fd)
            raise
    elif segment.fd < 0:
        fd = kernel.reopen(lease_fd)
        try:
            segment.take_over(fd)
        except BaseException:
            kernel.close(fd)
            raise
    return segment


def claim(lease_fd: int, offset: int, size: int, share: Share = Share.exclusive) -> Any:
    """Turn a received lease into memory that stays until its last view is gone.

    Args:
        lease_fd: The received fd. The caller keeps it, and closes it afterwards.
        offset: First byte of the block in its segment; a multiple of the page size.
        size: Number of bytes of the block; a multiple of the page size.
        share: How the block is shared with this process.

    Returns:
        An exporter of the block's bytes: take buffers from it, and drop it.

    Raises:
        ValueError: The block is not within the segment, is not aligned, or is held by no other process.
        OSError: The kernel refused a mapping, a lock or an fd.
    """
    settle()
    with guard:
        segment = _find_or_open(lease_fd)
        try:
            _check_block(segment, offset, size)
            if segment.stuck:
                mend(segment)
            # The lease holds the byte until the caller closes it, so the block is protected at every moment.
            held = hold(segment, offset, size, share)
        except BaseException:
            if not segment.held:
                close_idle_fd(segment)
                if is_abandoned(segment):  # perhaps it is not a segment at all
                    drop_segment(segment)
            raise
    claimed = held.claim
    exporter = kernel.buffer_at(claimed.address, size)
    exporter.hold = held
    if _leaks.is_on:
        _leaks.made(claimed, "received block", size)
    return exporter


def _check_block(segment: Segment, offset: int, size: int) -> None:
    page = kernel.page_size
    if offset < 0 or size < 1 or offset + size > segment.size or offset % page or size % page:
        raise ValueError(f"block of {size:,} bytes at {offset:,} does not fit a segment of {segment.size:,} bytes")
    if not kernel.is_held(segment.fd, offset):
        raise ValueError(f"cannot claim the block at {offset:,}: the lease does not hold it")


def hold(segment: Segment, offset: int, size: int, share: Share) -> Hold:
    """Claim a block while the returned object lives. Needs `guard`."""
    there = claims.get(segment.address + offset)
    if there is not None:
        if share is Share.shared is there.share and there.size == size:
            return there.hold()
        # This process already has the block, so it is no longer exclusive.
        share = Share.private if share is not Share.read_only else share
    return Claim(segment, offset, size, share).begin()
