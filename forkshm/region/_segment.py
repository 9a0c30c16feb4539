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
* Who has a block may lend it on: what arrived as a copy is not copied again. It stays the
  copy that it was, so from then on whoever has it maps it copy-on-write, or is the only one.

Guarantees: a block is never handed out while a view of it lives in any process; a killed
process's leases vanish with it, an unread message's with its socket.

This relies on: an OFD lock lives as long as any fd of its description, in whatever
process or message (fcntl(2), "Open file description locks").
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import enum
from typing import Any

from forkshm import _leaks
from forkshm.backend import Access, Identity, kernel
from forkshm.region._lifetime import at_fork, guard, settle, watch
from forkshm.region._table import round_up

__all__ = (
    "CREATOR",
    "Claim",
    "Lease",
    "Segment",
    "Share",
    "add_segment",
    "claim",
    "claim_at",
    "drop_own",
    "forget_abandoned",
    "hold",
    "leases_open",
    "mend",
    "segments_mapped",
)

#: The byte that the creator of a segment holds for as long as it lives. Far behind the
#: memory: locks may lie anywhere in the range of an offset.
CREATOR = 2**62


_BY_HANDLES = kernel.leases_are_handles


class Share(enum.Enum):
    """What a block is to whoever has it."""

    #: Nobody else has it.
    exclusive = "exclusive"
    #: Others may have it, too: each maps it copy-on-write.
    private = "private"
    #: The same, for reading only.
    read_only = "read_only"
    #: All see each other's writes.
    shared = "shared"


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
    #: Address, size and offset of pages that the kernel refused to map shared again.
    stuck: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)


_segments: dict[Identity, Segment] = {}


class Lease:
    """An fd that holds a block, to be sent beside messages; close it when sent.

    Made under `guard`.
    """

    __slots__ = ("_parked", "_position", "_segment", "fd")

    def __init__(self, segment: Segment, position: int) -> None:
        self._segment = segment
        self._position = position
        self._parked = False
        self.fd = -1
        self._open()

    def _open(self) -> None:
        fd = kernel.reopen(self._segment.fd)
        try:
            kernel.lock_shared(fd, self._position)
        except BaseException:
            kernel.close(fd)
            raise
        self.fd = fd
        _outgoing[id(self)] = self

    def _shut(self) -> None:
        if _outgoing.pop(id(self), None) is not None:
            kernel.close(self.fd)
            self.fd = -1

    def park(self) -> None:
        """Hold the block without an fd, until it is to be sent: those who wait are many, fds are few."""
        with guard:
            if self.fd >= 0:
                _hold_byte(self._segment, self._position)
                self._parked = True
                _parked[id(self)] = self
                self._shut()

    def unpark(self) -> None:
        """Have an fd again.

        Raises:
            OSError: There is none; the lease stays parked.
        """
        with guard:
            if self._parked:
                self._open()
                self._let_go()

    def close(self) -> None:
        """Let go of the block on our side. Closing twice is allowed."""
        with guard:
            self._shut()
            if self._parked:
                self._let_go()

    def _let_go(self) -> None:
        del _parked[id(self)]
        self._parked = False
        _release(self._segment, self._position)


# The leases open here, so that a forked child can close its copies: it would hold the
# blocks for as long as it lives.
_outgoing: dict[int, Lease] = {}
# The same of those that are parked.
_parked: dict[int, Lease] = {}


def add_segment(fd: int, size: int, *, ours: bool) -> Segment:
    """Map a segment whole and enter it; takes over *fd* unless it raises. Needs `guard`."""
    identity, _ = kernel.identify(fd)
    address = kernel.map(fd, size, Access.SHARED)
    segment = Segment(identity, fd, address, size, ours)
    _segments[identity] = segment
    return segment


def _hold_byte(segment: Segment, position: int) -> None:
    """Let this process hold a block, once more. Needs `guard`."""
    count = segment.held.get(position, 0)
    if not count:
        kernel.lock_shared(segment.fd, position)  # an fd is all that it takes, where leases are handles
    segment.held[position] = count + 1


class Claim:
    """A block that this process has views of. All of it under `guard`, but for `lend`."""

    __slots__ = ("address", "count", "in_place", "offset", "segment", "share", "size")

    def __init__(self, segment: Segment, offset: int, size: int, share: Share) -> None:
        self.segment = segment
        self.offset = offset
        self.size = size
        self.share = share
        #: Where the views are: in the mapping of the whole segment, or in one of their own.
        self.in_place = share in (Share.exclusive, Share.shared)
        self.address = segment.address + offset
        #: Windows that are alive.
        self.count = 1

    def begin(self) -> None:
        """Hold the block, and map it if need be."""
        _hold_byte(self.segment, self.offset)
        if not self.in_place:
            access = Access.PRIVATE if self.share is Share.private else Access.READ
            try:
                self.address = kernel.map(self.segment.fd, self.size, access, self.offset)
            except BaseException:
                _release(self.segment, self.offset)
                raise
        bisect.insort(_claim_starts, self.address)
        _claims[self.address] = self

    def end(self) -> None:
        """One window less; with the last, let go of the block."""
        self.count -= 1
        if self.count:
            return
        del _claim_starts[bisect.bisect_left(_claim_starts, self.address)]
        del _claims[self.address]
        if not self.in_place:
            kernel.unmap(self.address, self.size)
        elif self.share is Share.private:
            try:
                kernel.replace(self.address, self.segment.fd, self.size, Access.SHARED, self.offset)
            except OSError:
                self.segment.stuck.append((self.address, self.size, self.offset))
        _release(self.segment, self.offset)
        if _leaks.is_on:
            _leaks.unmade(self)

    def lend(self) -> Lease:
        """Return a lease to be sent to somebody else, while a view is alive.

        Raises:
            OSError: The kernel refused an fd or a lock.
        """
        with guard:
            return Lease(self.segment, self.offset)

    def share_out(self, *, to_many: bool) -> Share:
        """Return what the block is to those who get the lease; decide it as late as can be.

        If a view is still alive here and the block was this process' alone, it is mapped
        copy-on-write from now on: neither side shall see what the other writes.

        Raises:
            OSError: The kernel refused the mapping.
        """
        settle()  # a view that is gone counts no more
        with guard:
            if self.share is Share.exclusive:
                if not self.count and not to_many:
                    return Share.exclusive
                if self.count:
                    self.part()
                return Share.private
            return self.share

    def part(self) -> None:
        """From now on let nobody see what is written here. Needs `guard`.

        Raises:
            OSError: The kernel refused the mapping.
        """
        kernel.replace(self.address, self.segment.fd, self.size, Access.PRIVATE, self.offset)
        self.share = Share.private

    def is_as_it_came(self, address: int, nbytes: int) -> bool:
        """Whether these bytes are still those of the block, for everybody who has it.

        False when this process wrote to its copy-on-write mapping, or cannot tell.
        """
        if self.in_place and self.share is not Share.private:
            return True
        start = address - address % kernel.page_size
        try:
            return not kernel.own_pages(start, round_up(address + nbytes, kernel.page_size) - start)
        except OSError:
            return False


# Sorted addresses of the claims, and the claim at each. Claims never overlap.
_claim_starts: list[int] = []
_claims: dict[int, Claim] = {}


def claim_at(address: int) -> Claim | None:
    """Return the claim on the block that *address* lies in, or None."""
    if not _claim_starts:
        return None
    settle()
    with guard:
        position = bisect.bisect_right(_claim_starts, address) - 1
        if position < 0:
            return None
        found = _claims[_claim_starts[position]]
    return found if address < found.address + found.size else None


def mend(segment: Segment) -> None:
    """Map shared again what could not be when its last view was gone. Needs `guard`.

    Raises:
        OSError: The kernel still refuses. The segment must not be used.
    """
    while segment.stuck:
        address, size, offset = segment.stuck[-1]
        kernel.replace(address, segment.fd, size, Access.SHARED, offset)
        segment.stuck.pop()


def _drop(segment: Segment) -> None:
    del _segments[segment.identity]
    kernel.unmap(segment.address, segment.size)
    if segment.fd >= 0:
        kernel.close(segment.fd)


def _find_or_open(lease_fd: int) -> Segment:
    identity, size = kernel.identify(lease_fd)
    segment = _segments.get(identity)
    if segment is None:
        if kernel.may_shrink(lease_fd, identity):
            raise ValueError("a segment of an arena that its sender can make smaller: it was not made by forkshm")
        _forget_abandoned()
        fd = kernel.reopen(lease_fd)
        try:
            segment = add_segment(fd, size, ours=False)
        except BaseException:
            kernel.close(fd)
            raise
    elif segment.fd < 0:
        segment.fd = kernel.reopen(lease_fd)
    return segment


def _release(segment: Segment, position: int) -> None:
    left = segment.held[position] - 1
    if left:
        segment.held[position] = left
        return
    del segment.held[position]
    if not _BY_HANDLES:
        kernel.unlock(segment.fd, position)
    _rest(segment)
    if not segment.held and _is_abandoned(segment):
        _drop(segment)


def claim(lease_fd: int, offset: int, size: int, share: Share = Share.exclusive) -> Any:
    """Turn a received lease into memory that stays until the last view is gone.

    Args:
        lease_fd: As received; it is closed, also when this raises.
        offset: First byte of the block in its segment; a multiple of the page size.
        size: Bytes of the block; a multiple of the page size.
        share: What the block is to this process.

    Returns:
        A window on the block's bytes: take buffers from it, and drop it.

    Raises:
        ValueError: The block does not lie in the segment, or is not aligned, or nobody else holds it.
        OSError: The kernel refused a mapping, a lock or an fd.
    """
    settle()
    try:
        with guard:
            segment = _find_or_open(lease_fd)
            try:
                _check_block(segment, offset, size)
                if segment.stuck:
                    mend(segment)
                # The lease holds the byte until it is closed below: no moment is unprotected.
                claimed = _begin(segment, offset, size, share)
            except BaseException:
                if not segment.held:
                    _rest(segment)
                    if _is_abandoned(segment):  # perhaps no segment at all
                        _drop(segment)
                raise
    finally:
        kernel.close(lease_fd)
    window = kernel.window(claimed.address, size)
    watch(window, claimed.end)
    if _leaks.is_on:
        _leaks.made(claimed, "received block", size)
    return window


def _check_block(segment: Segment, offset: int, size: int) -> None:
    page = kernel.page_size
    if offset < 0 or size < 1 or offset + size > segment.size or offset % page or size % page:
        raise ValueError(f"block of {size:,} bytes at {offset:,} does not fit a segment of {segment.size:,} bytes")
    if not kernel.is_held(segment.fd, offset):
        raise ValueError(f"nobody lends a block at {offset:,}: the lease is on another one")


def _begin(segment: Segment, offset: int, size: int, share: Share) -> Claim:
    there = _claims.get(segment.address + offset)
    if there is not None:
        if share is Share.shared is there.share and there.size == size:
            there.count += 1
            return there
        # Somebody here has it already, so it is nobody's alone.
        share = Share.private if share is not Share.read_only else share
    claimed = Claim(segment, offset, size, share)
    claimed.begin()
    return claimed


def hold(segment: Segment, offset: int, size: int, share: Share) -> Claim:
    """Claim a block of our own arena, for memory that is born there. Needs `guard`.

    It is held until its ``end`` is called, under `guard`.
    """
    return _begin(segment, offset, size, share)


def _rest(segment: Segment) -> None:
    """Let go of a segment that nobody here has a block of, where its fd alone would hold that."""
    if _BY_HANDLES and not segment.ours and segment.fd >= 0:
        # The mapping stays, because it is warm.
        kernel.close(segment.fd)
        segment.fd = -1


def drop_own(segment: Segment) -> None:
    """Have done with a segment of this process that nobody holds a block of. Needs `guard`."""
    if _BY_HANDLES:
        kernel.give_up(segment.address, segment.size)
    _drop(segment)


def _is_abandoned(segment: Segment) -> bool:
    if segment.ours:
        return False
    if _BY_HANDLES:
        return kernel.is_abandoned(segment.address, segment.size)
    return not kernel.is_held(segment.fd, CREATOR)


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


def leases_open() -> int:
    """How many leases of ours are on their way into a message."""
    with guard:
        return len(_outgoing)


def _before_fork() -> None:
    for claimed in _claims.values():
        if claimed.share is Share.exclusive:
            # It is a copy, and so it shall be to the child: neither sees the other's writes.
            try:
                claimed.part()
            except OSError:
                claimed.share = Share.shared  # no memory for mappings: it is what it is
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
            kernel.close(segment.spare)
            segment.spare = -1


def _in_child() -> None:
    for lease in _outgoing.values():
        kernel.close(lease.fd)
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
        kernel.close(inherited)
    for lease in list(_parked.values()):
        lease._let_go()


at_fork(before=_before_fork, in_parent=_in_parent, in_child=_in_child)


def block_size(nbytes: int) -> int:
    """Round a request up: whole pages, and at most eight sizes between powers of two."""
    return round_up(nbytes, max(kernel.page_size, 1 << max(nbytes.bit_length() - 4, 0)))
