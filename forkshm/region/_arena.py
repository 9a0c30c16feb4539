"""The arena: warm shared memory, handed out in blocks.

Copying into memory that was never touched runs at a seventh to a tenth of the speed of
memcpy, because the kernel has to find and clear every page. So blocks are used again,
lowest address first, and stay mapped here and at the receivers.

Each process carves up its own arena; a forked child starts a new one.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
from typing import TYPE_CHECKING

from forkshm.backend import kernel
from forkshm.region._lifetime import at_fork, guard, settle
from forkshm.region._segment import CREATOR, Claim, Lease, Segment, Share, add_segment, block_size, drop_own, hold, mend
from forkshm.region._table import round_up

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ("Arena", "ArenaStatistics", "Block", "arena")

MIB = 2**20
#: Segments begin at this size and double; untouched memory costs nothing.
FIRST_SEGMENT = 16 * MIB
LARGEST_STEP = 256 * MIB
#: The price of a lock grows with the number of locks in a segment: 1 us for one, 20 us
#: for a thousand, 300 us for ten thousand.
BLOCKS_PER_SEGMENT = 256
#: Where leases are on whole memory objects, a segment is one block, and is given back as a whole.
_WHOLE = kernel.leases_are_handles
#: How many lent blocks are looked at before there is another segment. Where each is one, that happens all the time.
_LOOK_BACK = 64 if _WHOLE else 2**31
#: Free memory that is kept warm whatever the recent demand.
KEEP_WARM = 64 * MIB
#: How many allocations the recent demand looks back, at least.
_EPOCH = 64


class _Carved:
    """A segment of ours, and which of its bytes are free."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.live = 0
        # Free ranges in the order of their addresses; neighbours are merged.
        self.starts = [0]
        self.sizes = [segment.size]
        #: Everything from here on has never been written, or was given back.
        self.warm_end = 0

    def take(self, size: int) -> int | None:
        """Cut *size* bytes out of the first free range that has them."""
        if self.live >= BLOCKS_PER_SEGMENT:
            return None
        if _WHOLE:
            # One block fills a segment, and does not waste more than it needs.
            if self.live or not size <= self.segment.size <= max(size * 2, FIRST_SEGMENT // 16):
                return None
            size = self.segment.size
        for position, there in enumerate(self.sizes):
            if there >= size:
                start = self.starts[position]
                if there == size:
                    del self.starts[position], self.sizes[position]
                else:
                    self.starts[position] += size
                    self.sizes[position] -= size
                self.live += 1
                self.warm_end = max(self.warm_end, start + size)
                return start
        return None

    def give(self, start: int, size: int) -> None:
        """Put a range back, and merge it with free neighbours."""
        self.live -= 1
        position = bisect.bisect_left(self.starts, start)
        if position < len(self.starts) and self.starts[position] == start + size:
            size += self.sizes[position]
            del self.starts[position], self.sizes[position]
        if position and self.starts[position - 1] + self.sizes[position - 1] == start:
            self.sizes[position - 1] += size
        else:
            self.starts.insert(position, start)
            self.sizes.insert(position, size)

    def warm_free(self) -> int:
        """Free bytes that still take memory."""
        return sum(
            max(0, min(start + size, self.warm_end) - start)
            for start, size in zip(self.starts, self.sizes, strict=True)
        )

    def cool(self) -> None:
        """Give the pages of all free ranges back to the kernel."""
        for start, size in zip(self.starts, self.sizes, strict=True):
            end = min(start + size, self.warm_end)
            if end > start:
                kernel.discard(self.segment.address + start, end - start)
        if self.starts and self.starts[-1] + self.sizes[-1] == self.segment.size:
            self.warm_end = min(self.warm_end, self.starts[-1])


@dataclasses.dataclass(eq=False)
class Block:
    """A piece of the arena: fill it, lend it out, forget it."""

    carved: _Carved
    #: First byte in the segment; a multiple of the page size.
    offset: int
    #: Bytes, rounded up from what was asked for.
    size: int
    #: How many of them, from the first, may have been written before; the others are zeros.
    used: int

    @property
    def address(self) -> int:
        """Where to write."""
        return self.carved.segment.address + self.offset

    def write(self, position: int, source: Buffer, nbytes: int) -> None:
        """Copy *nbytes* into the block, *position* bytes from its start."""
        if position + nbytes > self.size:
            raise ValueError(f"{nbytes:,} bytes at {position:,} do not fit a block of {self.size:,}")
        kernel.copy(self.address + position, source, nbytes)

    def copy(self, position: int, address: int, nbytes: int) -> None:
        """Copy *nbytes* from an address of this process."""
        if position + nbytes > self.size:
            raise ValueError(f"{nbytes:,} bytes at {position:,} do not fit a block of {self.size:,}")
        kernel.copy_memory(self.address + position, address, nbytes)


@dataclasses.dataclass(frozen=True)
class ArenaStatistics:
    """What the arena of this process holds now."""

    #: Memory objects.
    segments: int
    #: Their sizes added up; mostly untouched, and then free of charge.
    reserved_bytes: int
    #: Blocks that are being filled or were lent and not yet found to be back.
    blocks: int
    #: Bytes of those.
    used_bytes: int
    #: The most that those ever were.
    peak_bytes: int
    #: Free bytes that are kept warm.
    warm_bytes: int


class Arena:
    """Shared memory of this process, carved into blocks that carry copies to others.

    Safe to use from any thread.
    """

    def __init__(self) -> None:
        self._carved: list[_Carved] = []
        # Lent blocks, those lent longest ago on the left: they come back first.
        self._lent: collections.deque[Block] = collections.deque()
        self._used = 0
        self._peak = 0
        self._previous_peak = 0
        self._highest_peak = 0
        self._allocations = 0

    def allocate(self, nbytes: int) -> Block:
        """Return a block of at least *nbytes*, which may hold old bytes: see `Block.used`.

        Raises:
            OSError: The kernel has no more memory, address space or fds for us.
        """
        size = block_size(nbytes)
        settle()
        with guard:
            self._take_back(4)
            block = self._take(size)
            if block is None:
                self._take_back(min(len(self._lent), _LOOK_BACK))
                block = self._take(size) or self._grow(size)
            self._used += block.size
            self._note_demand()
            return block

    def lend(self, block: Block) -> Lease:
        """Return a lease on *block*, to be sent; the block comes back by itself.

        Raises:
            OSError: The kernel refused; the block is free again.
        """
        with guard:
            try:
                lease = Lease(block.carved.segment, block.offset)
            except BaseException:
                self._free(block)
                raise
            self._lent.append(block)
            return lease

    def hold(self, block: Block, share: Share) -> Claim:
        """Let memory of this process live in *block*; it comes back once the claim has ended.

        Raises:
            OSError: The kernel refused; the block is free again.
        """
        with guard:
            try:
                held = hold(block.carved.segment, block.offset, block.size, share)
            except BaseException:
                self._free(block)
                raise
            self._lent.append(block)
            return held

    def free(self, block: Block) -> None:
        """Take back a block that was never lent."""
        with guard:
            self._free(block)

    def trim(self, keep: int = 0) -> None:
        """Give memory that nobody uses back to the kernel, but for *keep* warm bytes."""
        settle()
        with guard:
            self._take_back(len(self._lent))
            self._cool(keep)

    def has_excess(self) -> bool:
        """Whether there may be more to `trim` than is kept warm anyway. Cheap."""
        with guard:
            return sum(carved.warm_end for carved in self._carved) > KEEP_WARM

    def statistics(self) -> ArenaStatistics:
        """Look at what is held; blocks that came back since are counted as free."""
        settle()
        with guard:
            self._take_back(len(self._lent))
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
            warm_end = carved.warm_end
            start = carved.take(size)
            if start is not None:
                size = carved.segment.size if _WHOLE else size
                return Block(carved, start, size, min(max(warm_end - start, 0), size))
        return None

    def _free(self, block: Block) -> None:
        block.carved.give(block.offset, block.size)
        self._used -= block.size

    def _take_back(self, how_many: int) -> None:
        # New leases on a block are only ever made from an old one, so once nobody holds
        # it nobody will: asking is enough, no lock need be taken.
        for _ in range(min(how_many, len(self._lent))):
            block = self._lent.popleft()
            if kernel.is_held(block.carved.segment.fd, block.offset) or block.offset in block.carved.segment.held:
                self._lent.append(block)
            else:
                self._free(block)

    def _grow(self, size: int) -> Block:
        reserved = sum(carved.segment.size for carved in self._carved) if not _WHOLE else 0
        generous = size if _WHOLE else max(round_up(size, 2 * MIB), min(max(reserved, FIRST_SEGMENT), LARGEST_STEP))
        try:
            carved = self._new_segment(generous)
        except OSError:
            # Under a limit on address space: free what we can, and ask for no more than is needed.
            self._cool(0)
            carved = self._new_segment(size)
        self._carved.append(carved)
        start = carved.take(size)
        if start is None:
            raise RuntimeError(
                f"a new segment of {carved.segment.size} bytes has no room for {size}: please report this"
            )
        return Block(carved, start, size, 0)

    def _new_segment(self, size: int) -> _Carved:
        fd = kernel.create_memory(size, "arena")
        try:
            kernel.lock_shared(fd, CREATOR)
            return _Carved(add_segment(fd, size, ours=True))
        except BaseException:
            kernel.close(fd)
            raise

    def _note_demand(self) -> None:
        self._peak = max(self._peak, self._used)
        self._allocations += 1
        if self._allocations % _EPOCH == 0:
            self._highest_peak = max(self._highest_peak, self._peak)
            self._previous_peak, self._peak = self._peak, self._used
            self._cool(max(KEEP_WARM, self._previous_peak - self._used))

    def _cool(self, keep: int) -> None:
        warm = 0
        if _WHOLE:
            for carved in [carved for carved in self._carved if not carved.live]:
                warm += carved.segment.size
                if warm > keep:
                    self._carved.remove(carved)
                    drop_own(carved.segment)
            return
        for carved in self._carved:
            free = carved.warm_free()
            warm += free
            if free and warm > keep:
                with contextlib.suppress(OSError):  # a kernel that cannot: the memory stays warm
                    carved.cool()
                    warm -= free

    def _abandon(self) -> None:
        self.__init__()  # type: ignore[misc]  # the parent's arena is the parent's


#: The arena of this process.
arena = Arena()

at_fork(in_child=arena._abandon)
