"""The arena: warm shared memory, handed out in blocks.

Copying into untouched memory runs at a seventh to a tenth of the speed of memcpy, because the kernel has to find and
clear every page. So blocks are reused, lowest address first, and stay mapped here and at the receivers.

Large copies into memory without pages are written by a system call: the kernel then clears no page, and this process
takes no page faults. Such memory is mapped when it is filled a second time, in one call for all its pages. Where the
system gives huge pages to shared memory, memory is always filled through the mapping, which is faster still.

Each process carves up its own arena; a forked child starts a new one.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import os
import weakref
from typing import TYPE_CHECKING

from forkshm import _interrupts
from forkshm.backend import Advice, kernel
from forkshm.region._lifetime import at_fork, guard, new_key, settle
from forkshm.region._table import round_up
from forkshm.region.blocks._claim import Hold, Share, hold
from forkshm.region.blocks._decay import Decay
from forkshm.region.blocks._lease import Lease, lease_on
from forkshm.region.blocks._segment import (
    CREATOR,
    Ranges,
    Segment,
    add_segment,
    drop_own,
    drop_segment,
    mend,
    with_range,
    within,
    without_range,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeAlias

    from typing_extensions import Buffer

    # Starts and sizes of the free ranges, sorted by address, with adjacent ranges merged. Replaced, never changed: code
    # that has computed the next state can tell whether this is still the current one.
    _Free: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
    # A block that is not free: its segment, its offset and size, and the `Block` while that is alive.
    _Piece: TypeAlias = "tuple[_Carved, int, int, weakref.ref[Block]]"

__all__ = ("Arena", "ArenaStatistics", "Block", "arena")

MIB = 2**20
FIRST_SEGMENT = 16 * MIB
"""Size of the first segment; later ones double. Untouched memory costs nothing."""
LARGEST_STEP = 256 * MIB
BLOCKS_PER_SEGMENT = 256
"""Maximum number of blocks in a segment. The cost of a lock grows with their number: 1 us for one lock, 20 us for a
thousand, 300 us for ten thousand."""
# With leases on whole memory objects, a segment is one block, and is freed as a whole.
_WHOLE = kernel.leases_are_handles
# Number of lent blocks to check before another segment is created. Where each block is a segment, that is frequent.
_LOOK_BACK = 64 if _WHOLE else 2**31
KEEP_WARM = 64 * MIB
"""Bytes of free memory that stay warm whatever the recent demand."""
# Minimum number of allocations in the period whose demand is measured.
_EPOCH = 64

COLD_LEAST = 128 * 1024
"""Copies of at least this many bytes into memory without pages are written by a system call. For smaller copies, the
second use comes soon, and would cost more than the first one gains."""

_getpid = os.getpid


class _Carved:
    """A segment of this process, with its free ranges."""

    __slots__ = ("free", "holes", "is_huge", "live", "segment", "unmapped", "warm_end")

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        # Number of blocks that are not free.
        self.live = 0
        self.free: _Free = (0,), (segment.size,)
        # Everything from here on was never written, or was given back.
        self.warm_end = 0
        # Ranges before `warm_end` that were given back and not handed out since.
        self.holes: Ranges = ()
        # Ranges with memory that this process has not mapped, because they were written by a system call. A hint: an
        # omitted range takes a page fault for each page.
        self.unmapped: Ranges = ()
        # Whether it gets huge pages when it is filled through the mapping.
        self.is_huge = False

    @property
    def sizes(self) -> list[int]:
        """Sizes of the free ranges."""
        return list(self.free[1])

    def without(self, free: _Free, size: int) -> tuple[int, int, _Free] | None:
        """Return the offset and size to take from the first free range with *size* bytes, and the free ranges left."""
        if self.live >= BLOCKS_PER_SEGMENT:
            return None
        if _WHOLE:
            # One block fills the segment, and may waste only a bounded part of it.
            if self.live or not size <= self.segment.size <= max(size * 2, FIRST_SEGMENT // 16):
                return None
            size = self.segment.size
        starts, sizes = free
        if sizes and (there := sizes[0]) > size:  # the usual case
            start = starts[0]
            if len(sizes) == 1:
                return start, size, ((start + size,), (there - size,))
            return start, size, ((start + size, *starts[1:]), (there - size, *sizes[1:]))
        for position, there in enumerate(sizes):
            if there >= size:
                start = starts[position]
                rest = position + 1
                if there == size:
                    return start, size, (starts[:position] + starts[rest:], sizes[:position] + sizes[rest:])
                return (
                    start,
                    size,
                    (
                        (*starts[:position], start + size, *starts[rest:]),
                        (*sizes[:position], there - size, *sizes[rest:]),
                    ),
                )
        return None

    @staticmethod
    def joined(free: _Free, start: int, size: int) -> _Free:
        """Return the free ranges after a range is given back, merged with adjacent ones."""
        starts, sizes = free
        if starts and start + size == starts[0]:  # adjacent to the lowest range, which is taken first
            if len(starts) == 1:
                return (start,), (size + sizes[0],)
            return (start, *starts[1:]), (size + sizes[0], *sizes[1:])
        position = bisect.bisect_left(starts, start)
        first, rest = position, position
        if rest < len(starts) and starts[rest] == start + size:
            size += sizes[rest]
            rest += 1
        if first and starts[first - 1] + sizes[first - 1] == start:
            first -= 1
            start, size = starts[first], size + sizes[first]
        return (*starts[:first], start, *starts[rest:]), (*sizes[:first], size, *sizes[rest:])

    def warm_free(self) -> int:
        """Number of free bytes that still take memory."""
        warm = sum(max(0, min(start + size, self.warm_end) - start) for start, size in zip(*self.free, strict=True))
        return warm - sum(high - low for low, high in within(self.holes, 0, self.warm_end))

    def without_memory(self, start: int, end: int) -> Ranges:
        """Return the parts of a range that have no memory yet."""
        warm_end, holes = self.warm_end, self.holes
        if end <= warm_end and not holes:  # the usual case
            return ()
        found = within(holes, start, min(end, warm_end))
        return found if end <= warm_end else (*found, (max(start, warm_end), end))

    def fill(self, start: int, address: int, nbytes: int, cold: Ranges) -> None:
        """Copy *nbytes* from an address of this process to *start*; the parts in *cold* have no memory yet.

        Raises:
            OSError: There is no memory for the copy, or the source cannot be read.
        """
        segment, end = self.segment, start + nbytes
        position = start
        for low, high in () if self.is_huge else within(cold, start, end):
            if high - low < COLD_LEAST:
                continue
            if position < low:
                self._fill_mapped(position, address + position - start, low - position)
            # Recorded before the call: an interrupt in between only costs a later call that maps nothing.
            self.unmapped = with_range(self.unmapped, low, high)
            if not kernel.write_memory(segment.fd, segment.identity, low, address + low - start, high - low):
                self._fill_mapped(low, address + low - start, high - low)
            position = high
        if position < end:
            self._fill_mapped(position, address + position - start, end - position)

    def _fill_mapped(self, start: int, address: int, nbytes: int) -> None:
        if self.unmapped:
            self.map_pages(start, start + nbytes)
        kernel.copy_memory(self.segment.address + start, address, nbytes)

    def map_pages(self, start: int, end: int) -> None:
        """Map the pages recorded as unmapped, in one call instead of a page fault for each."""
        page = kernel.page_size
        for low, high in within(self.unmapped, start - start % page, round_up(end, page)):
            low, high = low - low % page, round_up(high, page)  # noqa: PLW2901
            with _interrupts.refused:  # the kernel lacks the call: each page takes a fault
                # Populating by reading also maps the pages writable, in two thirds of the time.
                kernel.advise(self.segment.address + low, high - low, Advice.populate, writable=False)
            self.unmapped = without_range(self.unmapped, low, high)

    def cool(self, keep: int = 0) -> None:
        """Give pages of free ranges back to the kernel, except whole pages of the first, up to *keep* bytes."""
        free, page = self.free, kernel.page_size
        start = 0
        for first, size in zip(*free, strict=True):
            start = first
            end = min(start + size, self.warm_end)
            if end > start and keep:
                kept = min(keep, end - start)
                keep -= kept
                start += kept - kept % page
            if end > start and within(self.holes, start, end) != ((start, end),):
                discarding = kernel.discarding(self.segment.address + start, end - start)
                holes, unmapped = with_range(self.holes, start, end), without_range(self.unmapped, start, end)
                # No call from here to the discarding call: a signal handler may take a block of these ranges.
                if self.free is not free:
                    return
                self.holes, self.unmapped = holes, unmapped
                next(discarding, None)
        reaches_end = bool(free[0]) and free[0][-1] + free[1][-1] == self.segment.size
        if reaches_end and self.free is free and start < self.warm_end:
            holes = within(self.holes, 0, start)
            if self.free is free:
                self.warm_end, self.holes = start, holes


class Block:
    """A piece of the arena: fill it, lend it, and forget it.

    It becomes free by itself, even if it is lost before it is lent.

    Attributes:
        offset: First byte in the segment; a multiple of the page size.
        size: Number of bytes, at least the requested number.
        used: Number of bytes, from the first, that may have been written before; the others are zeros.
        cold: The parts of the segment, within this block, that have no memory before it is filled.
        key: The key of the block in the arena.
        is_lent: Whether a lease or a claim holds the block; from then on the kernel knows whether it is in use.
    """

    __slots__ = ("__weakref__", "carved", "cold", "is_lent", "key", "offset", "size", "used")

    def __init__(self, carved: _Carved, offset: int, size: int, used: int, cold: Ranges, key: int) -> None:
        self.carved = carved
        self.offset = offset
        self.size = size
        self.used = used
        self.cold = cold
        self.key = key
        self.is_lent = False

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return self.carved.segment.address + self.offset

    def write(self, position: int, source: Buffer, nbytes: int) -> None:
        """Copy *nbytes* into the block, *position* bytes from its start.

        Raises:
            OSError: As for `copy`.
        """
        if position + nbytes > self.size:
            raise ValueError(f"{nbytes:,} bytes at {position:,} do not fit a block of {self.size:,}")
        if nbytes < COLD_LEAST:
            kernel.copy(self.address + position, source, nbytes)
            return
        view = memoryview(source)
        if view.nbytes < nbytes:
            raise ValueError(f"source holds {view.nbytes} bytes, {nbytes} were to be copied")
        self.copy(position, kernel.address_of(view), nbytes)

    def copy(self, position: int, address: int, nbytes: int) -> None:
        """Copy *nbytes* from an address of this process.

        Raises:
            OSError: There is no memory for the copy, or the source cannot be read.
        """
        if position + nbytes > self.size:
            raise ValueError(f"{nbytes:,} bytes at {position:,} do not fit a block of {self.size:,}")
        carved = self.carved
        if nbytes >= COLD_LEAST and (self.cold or carved.unmapped):
            carved.fill(self.offset + position, address, nbytes, self.cold)
        else:
            kernel.copy_memory(carved.segment.address + self.offset + position, address, nbytes)


@dataclasses.dataclass(frozen=True)
class ArenaStatistics:
    """The current contents of the arena of this process."""

    segments: int
    """Memory objects."""
    reserved_bytes: int
    """Total size of the segments; most of it is usually untouched and takes no memory."""
    blocks: int
    """Blocks that are being filled, or were lent and not yet found to be free."""
    used_bytes: int
    """Total size of these blocks."""
    peak_bytes: int
    """Largest value that this total has reached."""
    warm_bytes: int
    """Free bytes that are kept warm."""


class Arena:
    """Shared memory of this process, carved into blocks that carry copies to other processes.

    Safe to use from any thread, and in signal handlers and finalizers.
    """

    def __init__(self) -> None:
        # Gives memory back while the program makes no calls.
        self.decay = Decay(self, KEEP_WARM)
        self._begin()

    def _begin(self) -> None:
        self._owner = -1
        self._carved: list[_Carved] = []
        # All blocks that are not free, those checked longest ago first. A block is free once its `Block` is gone and no
        # open file description holds its first byte.
        self._pieces: collections.OrderedDict[int, _Piece] = collections.OrderedDict()
        # The segments whose fds were checked in this allocation.
        self._looked_at: list[Segment] = []
        self._used = 0
        self._peak = 0
        self._previous_peak = 0
        self._highest_peak = 0
        self._allocations = 0
        self._owner = os.getpid()

    def allocate(self, nbytes: int) -> Block:
        """Return a block of at least *nbytes*, which may hold old bytes: see `Block.used`.

        Raises:
            OSError: The kernel has no more memory, address space or fds for this process.
        """
        size = block_size(nbytes)
        settle()
        if self._owner != _getpid():
            self._abandon()
        with guard:
            self._looked_at = []
            block = self._take_back(4, size) or self._take(size)
            if block is None:
                self._take_back(min(len(self._pieces), _LOOK_BACK))
                block = self._take(size) or self._grow(size)
            self._note_demand()
        if self._used > KEEP_WARM and not self.decay.is_running:
            self.decay.start()
        return block

    def lend(self, block: Block, beside: Iterable[Lease] = ()) -> Lease:
        """Return a lease on *block* to send; the block becomes free by itself.

        If possible, it is one of the leases *beside*, which are sent in the same message and closed together.

        Raises:
            OSError: The kernel refused; the block is free again.
        """
        with guard:
            try:
                lease = lease_on(block.carved.segment, block.offset, beside)
            except OSError:
                self._free(block.key)
                raise
            block.is_lent = True
            return lease

    def hold(self, block: Block, share: Share) -> Hold:
        """Use *block* for memory of this process until the returned object is collected.

        Raises:
            OSError: The kernel refused; the block is free again.
        """
        with guard:
            try:
                held = hold(block.carved.segment, block.offset, block.size, share)
            except OSError:
                self._free(block.key)
                raise
            block.is_lent = True
            return held

    def free(self, block: Block) -> None:
        """Take back a block that was never lent."""
        with guard:
            self._free(block.key)

    def trim(self, keep: int = 0) -> None:
        """Give unused memory back to the kernel, except for *keep* warm bytes."""
        settle()
        with guard:
            self._looked_at = []
            self._take_back(len(self._pieces))
            self._cool(keep)

    @property
    def allocations(self) -> int:
        """Number of blocks handed out so far."""
        return self._allocations

    def has_excess(self, keep: int | None = None) -> bool:
        """Return whether `trim` may free more than *keep* bytes, by default more than stays warm. Cheap."""
        with guard:
            return sum(carved.warm_end for carved in self._carved) > (KEEP_WARM if keep is None else keep)

    def statistics(self) -> ArenaStatistics:
        """Return the current contents; blocks that became free since the last check count as free."""
        settle()
        with guard:
            self._looked_at = []
            self._take_back(len(self._pieces))
            return ArenaStatistics(
                segments=len(self._carved),
                reserved_bytes=sum(carved.segment.size for carved in self._carved),
                blocks=sum(carved.live for carved in self._carved),
                used_bytes=self._used,
                peak_bytes=max(self._highest_peak, self._peak),
                warm_bytes=sum(carved.warm_free() for carved in self._carved),
            )

    # -- under guard ------------------------------------------------------------------

    def _take(self, size: int) -> Block | None:
        for carved in self._carved:
            if carved.segment.stuck:
                mend(carved.segment)
            if (block := self._take_from(carved, size)) is not None:
                return block
        return None

    def _take_from(self, carved: _Carved, size: int) -> Block | None:
        while True:
            free = carved.free
            found = carved.without(free, size)
            if found is None:
                return None
            if carved.segment not in self._looked_at and not _WHOLE and not carved.segment.is_intact():
                self._lose(carved)
                return None
            start, taken, left = found
            end = start + taken
            key = new_key()
            cold = carved.without_memory(start, end)
            holes = without_range(carved.holes, start, end) if carved.holes else ()
            block = Block(carved, start, taken, min(max(carved.warm_end - start, 0), taken), cold, key)
            piece = carved, start, taken, weakref.ref(block)
            pieces = self._pieces
            # No call from here to the return: other code sees no part of this change, and changes nothing in between.
            if carved.free is free:
                carved.free = left
                carved.holes = holes
                carved.live += 1
                if carved.warm_end < end:
                    carved.warm_end = end
                self._used += taken
                pieces[key] = piece
                return block

    def _free(self, key: int) -> None:
        pieces = self._pieces
        while (piece := pieces.get(key)) is not None:
            carved, offset, size, _ = piece
            free = carved.free
            joined = carved.joined(free, offset, size)
            # No call from here on; see `_take_from`.
            if carved.free is free and key in pieces:
                carved.free = joined
                carved.live -= 1
                self._used -= size
                del pieces[key]

    def _take_back(self, how_many: int, size: int = 0) -> Block | None:
        """Free blocks that no process holds any more, or return one of exactly *size* bytes to use again."""
        # A new lease on a block is only made from an existing one. So once no process holds the block, none ever will:
        # asking is enough, and no lock needs to be taken.
        pieces, looked_at = self._pieces, self._looked_at
        block: Block | None
        for _ in range(min(how_many, len(pieces))):
            # A single call, because a signal handler between two calls may change the dict during iteration.
            key = next(itertools.chain(pieces), 0)
            piece = pieces.get(key)
            if piece is None:
                continue
            carved, offset, there, reference = piece
            segment = carved.segment
            if segment not in looked_at:
                if not _WHOLE and not kernel.is_object(segment.fd, segment.identity):
                    self._lose(carved)
                    continue
                looked_at.append(segment)
            if (
                ((block := reference()) is not None and not block.is_lent)
                or offset in segment.held
                or kernel.is_held(segment.fd, offset)
            ):
                try:
                    pieces.move_to_end(key)
                except KeyError:  # a signal handler has already freed it
                    continue
            elif there != size or segment.stuck:
                self._free(key)
            else:
                block = Block(carved, offset, size, size, (), key)
                again = carved, offset, size, weakref.ref(block)
                # No call from here to the return; see `_take_from`.
                if key in pieces and pieces[key] is piece:
                    del pieces[key]
                    pieces[key] = again  # as the last one
                    return block
        return None

    def _lose(self, carved: _Carved) -> None:
        """Give up a segment whose fd the program has closed: the kernel can no longer tell which blocks are held."""
        # A new list, because another thread may be iterating over the old one.
        self._carved = [other for other in self._carved if other is not carved]
        pieces = self._pieces
        for key, piece in list(pieces.items()):
            if piece[0] is carved and key in pieces:
                self._used -= piece[2]
                del pieces[key]
        # It stays mapped, because other code may be writing to one of its blocks.

    def _grow(self, size: int) -> Block:
        reserved = sum(carved.segment.size for carved in self._carved) if not _WHOLE else 0
        generous = size if _WHOLE else max(round_up(size, 2 * MIB), min(max(reserved, FIRST_SEGMENT), LARGEST_STEP))
        while True:
            try:
                carved = self._new_segment(generous)
            except OSError as error:
                if not _interrupts.is_of_kernel(error):  # raised by a signal handler
                    raise
                # A limit on address space is reached: free all that can be freed, and request only what is needed.
                self._cool(0)
                carved = self._new_segment(size)
            # The result is None if a signal handler took a block of it meanwhile.
            if (block := self._take_from(carved, size)) is not None:
                return block

    def _new_segment(self, size: int) -> _Carved:
        fd = kernel.create_memory(size, "arena")
        segment = None
        try:
            kernel.lock_shared(fd, CREATOR)
            segment = add_segment(fd, size, ours=True)
            carved = _Carved(segment)
            if kernel.fills_huge_pages():
                with _interrupts.refused:  # the kernel was built without huge pages
                    kernel.advise(segment.address, size, Advice.huge_pages)
                    carved.is_huge = True
            self._carved.append(carved)
        except BaseException:
            if segment is None:
                kernel.close(fd)
            elif not any(known.segment is segment for known in self._carved):
                drop_segment(segment)
            raise
        return carved

    def _note_demand(self) -> None:
        used = self._used
        if used > self._peak:
            self._peak = used
        self._allocations += 1
        if self._allocations % _EPOCH == 0:
            self._highest_peak = max(self._highest_peak, self._peak)
            self._previous_peak, self._peak = self._peak, used
            self._cool(max(KEEP_WARM, self._previous_peak - used))

    def _cool(self, keep: int) -> None:
        warm = 0
        if _WHOLE:
            for carved in [carved for carved in self._carved if not carved.live]:
                warm += carved.segment.size
                if warm > keep:
                    self._carved.remove(carved)
                    drop_own(carved.segment)
            return
        for carved in list(self._carved):
            free = carved.warm_free()
            if free > keep - warm:
                with _interrupts.refused:  # the kernel lacks the call: the memory stays warm
                    carved.cool(keep - warm)
            warm = min(keep, warm + free)

    def _abandon(self) -> None:
        # A forked child starts its own arena, even if no fork hook was run or the hook was interrupted.
        if self._owner != _getpid():
            self._begin()


def block_size(nbytes: int) -> int:
    """Return a block size for a request: whole pages, in at most eight sizes between powers of two."""
    return round_up(nbytes, max(kernel.page_size, 1 << max(nbytes.bit_length() - 4, 0)))


arena = Arena()
"""The arena of this process."""

at_fork(in_child=arena._abandon)
