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

import bisect
import contextlib
import dataclasses
import enum
import errno
import functools
import os
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

from forkshm import _leaks
from forkshm.backend import Access, Advice, Identity, kernel
from forkshm.region._lifetime import at_fork, guard, new_key, settle, unwatch, watch
from forkshm.region._table import round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = (
    "CREATOR",
    "Claim",
    "Hold",
    "Lease",
    "Ranges",
    "Segment",
    "Share",
    "add_segment",
    "claim",
    "claim_at",
    "drop_own",
    "drop_segment",
    "forget_abandoned",
    "hold",
    "leases_open",
    "mend",
    "segments_mapped",
    "with_range",
    "within",
    "without_range",
)

CREATOR = 2**62
"""The byte that the creator of a segment holds while it lives. It is far behind the memory, because locks may lie
anywhere in the range of an offset."""


_BY_HANDLES = kernel.leases_are_handles


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


Ranges: TypeAlias = "tuple[tuple[int, int], ...]"
"""Ranges of start and end, sorted by address, none adjacent to another. Replaced, never changed."""


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
        with contextlib.suppress(OSError):  # the kernel lacks the call: pages are mapped when they are touched
            # Populating by reading also maps the pages writable, in two thirds of the time.
            kernel.advise(self.address + low, high - low, Advice.populate, writable=False)
        self.seen = with_range(self.seen, low, high)

    def is_intact(self) -> bool:
        """Return whether the fd still refers to the segment: a program may close the fd, and the number be reused."""
        return kernel.is_object(self.fd, self.identity)

    def close(self) -> None:
        """Close the fd, unless it refers to something else by now."""
        if self.fd >= 0:
            if _BY_HANDLES or self.is_intact():
                next(self.closing, None)
            self.fd = -1


segments_held: dict[Identity, Segment] = {}


def _enter_held(segment: Segment, position: int, key: int) -> None:
    """Record that *key* holds a block. The caller locks its byte afterwards."""
    held = segment.held
    none: dict[int, bool] = {}
    # No call from here on.
    if position not in held:
        held[position] = none
    held[position][key] = True


def _leave_held(segment: Segment, position: int, key: int) -> None:
    """Release a block, and with its last key the byte. Can be repeated."""
    held = segment.held
    if not _BY_HANDLES and segment.fd >= 0 and not segment.is_description_shared:
        unlocking = kernel.unlocking(segment.fd, position)
    else:
        unlocking = iter(())
    # No call before the unlocking call: a signal handler must not claim the block in between.
    if position in held:
        if key in held[position]:
            del held[position][key]
        if not held[position]:
            if segment.is_description_shared:
                held[position][0] = True  # while this process lives
            else:
                del held[position]
    if position not in held:
        try:  # noqa: SIM105 - a context manager takes as long as the call
            next(unlocking, None)
        except OSError:  # other code closed the fd, or reused its number
            pass
    _rest(segment)
    if not segment.held and _is_abandoned(segment):
        drop_segment(segment)


class Lease:
    """An fd that holds a block, to be sent beside messages; close it once sent.

    Created under `guard`. A lease that is garbage-collected closes itself.
    """

    __slots__ = ("__weakref__", "_fds", "_is_parked", "_key", "_position", "_segment", "_watch", "fd")

    def __init__(self, segment: Segment, position: int) -> None:
        self._segment = segment
        self._position = position
        self._is_parked = False
        self._key = new_key()
        self._fds: list[int] = []
        self.fd = -1
        _outgoing[self._key] = self._fds
        action = functools.partial(_end_lease, segment, position, self._key, self._fds)
        self._watch = watch(self, action, now=False)
        self._open()

    def _open(self) -> None:
        # Other code may have closed the fd, and its number may refer to another object: the receiver refuses that.
        fds = self._fds
        try:
            kernel.reopen_into(fds, self._segment.fd)
            kernel.lock_shared(fds[0], self._position)
        except BaseException:
            kernel.close_all(fds)
            raise
        self.fd = fds[0]

    def park(self) -> None:
        """Hold the block without an fd until it is sent: many leases may wait, and fds are few."""
        with guard:
            if self.fd >= 0:
                _parked[self._key] = self._segment, self._position
                _enter_held(self._segment, self._position, self._key)
                self._is_parked = True
                if not _BY_HANDLES:
                    kernel.lock_shared(self._segment.fd, self._position)
                self.fd = -1
                kernel.close_all(self._fds)

    def unpark(self) -> None:
        """Get an fd again.

        Raises:
            OSError: No fd is available; the lease stays parked.
        """
        with guard:
            if self._is_parked:
                if self.fd < 0:
                    self._open()
                _leave_held(self._segment, self._position, self._key)
                _parked.pop(self._key, None)
                self._is_parked = False

    def close(self) -> None:
        """Release the block in this process. Closing twice is allowed."""
        with guard:
            self.fd = -1
            _end_lease(self._segment, self._position, self._key, self._fds)
            unwatch(self._watch)


def _end_lease(segment: Segment, position: int, key: int, fds: list[int]) -> None:
    if fds:
        kernel.close_all(fds)
    if key in _parked:
        _leave_held(segment, position, key)
        _parked.pop(key, None)
    _outgoing.pop(key, None)


# The fds of the leases made here. A forked child closes its copies, which would hold the blocks while the child lives.
_outgoing: dict[int, list[int]] = {}
# The blocks held by parked leases.
_parked: dict[int, tuple[Segment, int]] = {}


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
        _enter_held(self.segment, self.offset, key)
        return held

    def begin(self) -> Hold:
        """Hold the block, and map it if needed."""
        segment = self.segment
        held = self.hold()
        if not _BY_HANDLES:
            kernel.lock_shared(segment.fd, self.offset)
        if not self.in_place:
            access = Access.PRIVATE if self.share is Share.private else Access.READ
            kernel.map_into(self.mapped, segment.fd, self.size, access, self.offset)
            self.address = self.mapped[0]
        _claims[self.address] = self
        bisect.insort(_claim_starts, self.address)
        return held

    def _let_go(self, key: int) -> None:
        """Remove one hold; with the last one, release the block. Can be repeated."""
        self.holds.pop(key, None)
        if not self.holds:
            self._end()
        _leave_held(self.segment, self.offset, key)

    def _end(self) -> None:
        address = self.address
        if address in _claims and _claims[address] is self:
            del _claims[address]
            position = bisect.bisect_left(_claim_starts, address)
            try:
                if _claim_starts[position] == address:
                    del _claim_starts[position]
            except IndexError:  # it was never entered there
                pass
        if self.mapped:
            kernel.unmap_from(self.mapped, self.size)
        elif self.in_place and self.share is Share.private and address not in _claims:
            try:
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

    def lend(self) -> Lease:
        """Return a lease to send to another process; a view must be alive.

        Raises:
            OSError: The kernel refused an fd or a lock.
        """
        with guard:
            return Lease(self.segment, self.offset)

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
            OSError: The kernel refused the mapping.
        """
        replacing = kernel.replacing(self.address, self.segment.fd, self.size, Access.PRIVATE, self.offset)
        # Stored before the call, so that the block is mapped shared again at the end even if this is interrupted. No
        # call comes in between, not even to advance the iterator.
        self.share = Share.private
        try:
            [*replacing]  # noqa: B018
        except OSError:
            self.share = Share.exclusive
            raise

    def is_as_it_came(self, address: int, nbytes: int) -> bool:
        """Return whether these bytes are unchanged in the block, for every process that has it.

        False also if this process wrote to its copy-on-write mapping, or cannot tell.
        """
        if self.in_place and self.share is not Share.private:
            return True
        start = address - address % kernel.page_size
        try:
            return not kernel.own_pages(start, round_up(address + nbytes, kernel.page_size) - start)
        except OSError:
            return False


# The claim at each address; claims never overlap. Below are the sorted addresses. An interrupted change may leave an
# extra address, which is skipped.
_claims: dict[int, Claim] = {}
_claim_starts: list[int] = []


def claim_at(address: int) -> Claim | None:
    """Return the claim on the block that contains *address*, or None."""
    if not _claim_starts:
        return None
    settle()
    with guard:
        position = bisect.bisect_right(_claim_starts, address) - 1
        while position >= 0:
            start = _claim_starts[position]
            found = _claims.get(start)
            if found is not None:
                return found if address < found.address + found.size else None
            with contextlib.suppress(IndexError):
                if _claim_starts[position] == start:
                    del _claim_starts[position]
            position -= 1
    return None


def mend(segment: Segment) -> None:
    """Map pages shared again that the kernel refused to when their last view was gone. Needs `guard`.

    Raises:
        OSError: The kernel still refuses. The segment must not be used.
    """
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


def _find_or_open(lease_fd: int) -> Segment:
    identity, size = kernel.identify(lease_fd)
    segment = segments_held.get(identity)
    if segment is not None and not _BY_HANDLES and not kernel.is_object(segment.fd, identity):
        # Other code closed the fd. The mapping keeps the description with its locks until its views are gone.
        if segment.held:
            del segments_held[identity]
        else:
            drop_segment(segment)
        segment = None
    if segment is None:
        if kernel.may_shrink(lease_fd, identity):
            raise ValueError("cannot map a segment that its sender could shrink: it was not made by forkshm")
        _forget_abandoned()
        fd = kernel.reopen(lease_fd)
        try:
            segment = add_segment(fd, size, ours=False)
        except BaseException:
            kernel.close(fd)
            raise
    elif segment.fd < 0:
        segment.take_over(kernel.reopen(lease_fd))
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
                _rest(segment)
                if _is_abandoned(segment):  # perhaps it is not a segment at all
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
    there = _claims.get(segment.address + offset)
    if there is not None:
        if share is Share.shared is there.share and there.size == size:
            return there.hold()
        # This process already has the block, so it is no longer exclusive.
        share = Share.private if share is not Share.read_only else share
    return Claim(segment, offset, size, share).begin()


def _rest(segment: Segment) -> None:
    """Close the fd of a segment without claimed blocks, where the fd alone would hold the block."""
    if _BY_HANDLES and not segment.ours and segment.fd >= 0 and not segment.held:
        # The mapping stays, because it is warm.
        segment.close()


def drop_own(segment: Segment) -> None:
    """Drop a segment of this process whose blocks no process holds. Needs `guard`."""
    if _BY_HANDLES:
        kernel.give_up(segment.address, segment.size)
    drop_segment(segment)


def _is_abandoned(segment: Segment) -> bool:
    if segment.ours or not segment.mapped:
        return False
    if _BY_HANDLES:
        return kernel.is_abandoned(segment.address, segment.size)
    try:
        return not kernel.is_held(segment.fd, CREATOR)
    except OSError:  # other code closed the fd
        return True


def _forget_abandoned() -> None:
    for segment in list(segments_held.values()):
        if not segment.held and _is_abandoned(segment):
            drop_segment(segment)


def forget_abandoned() -> None:
    """Unmap the segments of dead processes that have no views here."""
    settle()
    with guard:
        _forget_abandoned()


def segments_mapped() -> int:
    """Return the number of segments mapped here, of this process and of others."""
    settle()
    with guard:
        return len(segments_held)


def leases_open() -> int:
    """Return the number of this process's leases that wait to be sent."""
    with guard:
        return sum(map(bool, _outgoing.values()))


# -- fork: each of these is called twice, see `at_fork` -------------------------------------------


def _before_fork() -> None:
    for claimed in list(_claims.values()):
        if claimed.share is Share.exclusive:
            # The block is a copy, and must be the child's own copy: neither process sees the other's writes.
            with contextlib.suppress(OSError):  # the limit on mappings: see `_in_child`
                claimed.part()
    for segment in list(segments_held.values()):
        if segment.held and (segment.lacks_spare or not segment.spares):
            segment.lacks_spare = True
            with contextlib.suppress(OSError):  # the limit on fds: see `_in_parent`
                _lock_anew(segment, segment.spares)
                segment.lacks_spare = False


def _lock_anew(segment: Segment, own: list[int]) -> None:
    """Put into *own* a new description of a segment, which holds everything that this process holds of it."""
    if not own:
        kernel.reopen_into(own, segment.fd)
    if not kernel.is_object(own[0], segment.identity):  # the fd was closed, and its number belongs to another file
        kernel.close_all(own)
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    for position in list(segment.held):
        kernel.lock_shared(own[0], position)


def _in_parent() -> None:
    for segment in list(segments_held.values()):
        if segment.lacks_spare:
            # The child, if any, shares the description: an unlock here would unlock the child's blocks, too.
            segment.is_description_shared = not _BY_HANDLES
            segment.lacks_spare = False
        kernel.close_all(segment.spares)


# The segments for which this process, a forked child, has a description of its own.
_of_child: tuple[int, set[int]] = (0, set())


def _in_child() -> None:
    global _of_child
    if _of_child[0] != os.getpid():
        _of_child = (os.getpid(), set())
    for fds in list(_outgoing.values()):
        kernel.close_all(fds)
    for claimed in list(_claims.values()):
        if claimed.share is Share.exclusive:
            try:
                claimed.part()
            except OSError as error:
                _end_child(claimed, error)
    for segment in list(segments_held.values()):
        if id(segment) in _of_child[1]:
            continue
        segment.ours = False
        # The inherited fd shares its description with the parent: unlocking through it would release the parent's
        # blocks, so the child needs its own.
        if not segment.spares or segment.lacks_spare:
            with contextlib.suppress(OSError):
                _lock_anew(segment, segment.spares)
                segment.lacks_spare = False
        if segment.spares and not segment.lacks_spare:
            segment.close()
            segment.take_over(segment.spares[0])
            segment.spares = []
        else:
            segment.is_description_shared = True
        segment.lacks_spare = False
        _of_child[1].add(id(segment))
    for key, (segment, position) in list(_parked.items()):
        _leave_held(segment, position, key)
        _parked.pop(key, None)
    for segment in list(segments_held.values()):
        if not segment.held and segment.is_description_shared:
            drop_segment(segment)


def _end_child(claimed: Claim, error: OSError) -> None:
    assert sys.platform != "win32"  # there is no fork
    # The child would see its parent's writes to an array that belongs to the child by value. An exception cannot leave
    # a fork hook, and there is no remedy without a mapping. So the child ends.
    message = (
        f"forkshm: process {os.getpid()} ends: its parent has a received array of {claimed.size:,} bytes, and the "
        f"kernel refused the mapping that makes it the child's own ({os.strerror(error.errno or 0)}). "
        "Raise the limit on mappings (sysctl vm.max_map_count) or on address space (ulimit -v), or fork earlier.\n"
    )
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
    os._exit(os.EX_OSERR)


at_fork(before=_before_fork, in_parent=_in_parent, in_child=_in_child)


def block_size(nbytes: int) -> int:
    """Return a block size for a request: whole pages, in at most eight sizes between powers of two."""
    return round_up(nbytes, max(kernel.page_size, 1 << max(nbytes.bit_length() - 4, 0)))
