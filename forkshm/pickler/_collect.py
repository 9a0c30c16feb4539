"""Decides for each buffer of an object how it is sent: as a descriptor, or as a copy.

The pickler reports the buffers one by one. Copies are made only when all of them are known. Buffers that overlap, as
those of an array and its views do, are copied as one, so that they are views of one memory at the other end as well.
"""

from __future__ import annotations

import bisect
import dataclasses
import errno
import itertools
import operator
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from forkshm._ledger import describe, ledger
from forkshm.backend import kernel
from forkshm.descriptor import BLOCK, COPIED_IN, HANDLE, INLINE, LOOSE, MANY_FILES, READ_ONLY, Bare, file_at
from forkshm.errors import RegionAccessError
from forkshm.pickler._handles import FdBuffer, Handle
from forkshm.pickler._policy import ALIGNMENT, INLINE_LIMIT, MAY_HOLD, MAY_HOLD_TIMES, MOST_BLOCKS, OUT_OF_BAND
from forkshm.region import Mapping, Mode, map_refused, mapping_at, round_up
from forkshm.region.blocks import Share, arena, claim_at

if TYPE_CHECKING:
    import pickle
    from collections.abc import Sequence

    from forkshm.region.blocks import Block, Claim, Lease

__all__ = ("Collector", "Copies", "RecentCopies", "Repeats", "fill", "room_for")


def room_for(nbytes: int) -> Block:
    """Return a block of the arena for a copy.

    Raises:
        RegionCreateError: The kernel has no memory for it; the message says what to do.
    """
    try:
        return arena.allocate(nbytes)
    except OSError as error:
        raise map_refused(error, nbytes, Mode.read_write) from error


def fill(block: Block, position: int, address: int, nbytes: int) -> None:
    """Copy memory of this process into a block.

    Raises:
        RegionCreateError: The kernel has no memory for it, or the source cannot be read; the message says what to do.
    """
    try:
        block.copy(position, address, nbytes)
    except OSError as error:
        raise map_refused(error, nbytes, Mode.read_write) from error


_FOR_READING = frozenset({Mode.read_only, Mode.read_private})


# Copying a smaller buffer takes less time than asking the kernel whether it is mapped from a file. Writes to a copy
# would be lost, so the kernel is asked about every buffer that can be written.
_WORTH_ASKING = 64 * 1024
_OF_PYTHON = frozenset({"builtins", "numpy", "mmap", "_ctypes", "ctypes"})
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
# Types of these modules that were seen as owners of memory.
_owners: set[type] = set()


def _is_foreign(exporter: Any) -> bool:
    """Return whether memory belongs to a library, so that its origin is unknown."""
    for _ in range(20):
        inner = exporter.obj if type(exporter) is memoryview else getattr(exporter, "base", None)
        if inner is None or inner is exporter:
            break
        exporter = inner
    kind = type(exporter)
    if kind in _owners:
        return False
    if kind.__name__ == "PyCapsule" or str(kind.__module__).partition(".")[0] not in _OF_PYTHON:
        return True
    if not kind.__flags__ & _HEAP_TYPE:  # a type made by ``class`` may be one of many
        _owners.add(kind)
    return False


def _was_written(address: int, nbytes: int) -> bool:
    start = address - address % kernel.page_size
    try:
        return bool(kernel.own_pages(start, round_up(address + nbytes, kernel.page_size) - start))
    except OSError:
        return True


class Repeats:
    """Copies that several payloads of one call have in common; close them when the call has ended."""

    least = sys.maxsize
    """Buffers of this many bytes and more are looked up by `lend_equal`, whatever object they belong to."""

    def __init__(self) -> None:
        # Keyed by (object id, buffer index, size).
        self._known: dict[tuple[int, int, int], tuple[Lease, tuple[int, int, Share]]] = {}

    def lend(self, key: tuple[int, int, int], address: int) -> tuple[Lease, tuple[int, int, Share], bool]:
        """Return a lease on the copy of a buffer, its place, and whether the copy was made now."""
        found = self._known.get(key)
        if found is not None:
            return *found, False
        nbytes = key[2]
        block = room_for(nbytes)
        fill(block, 0, address, nbytes)
        lease = arena.lend(block)
        found = self._known.setdefault(key, (lease, (block.offset, block.size, Share.private)))
        if found[0] is not lease:  # another thread was faster
            lease.close()
        return *found, True

    def lend_equal(self, address: int, nbytes: int) -> tuple[Lease, tuple[int, int, Share], bool]:
        """Return a lease on a copy of these bytes, its place, and whether the copy was made now."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the copies. Closing twice is allowed."""
        for lease, _ in self._known.values():
            lease.close()
        self._known.clear()


class RecentCopies(Repeats):
    """Copies of large buffers, which later payloads use again while the bytes are the same.

    A copy is found by the address that it was made from, and compared with the memory there. So it stays correct if the
    memory was written to meanwhile, or was freed and belongs to another object.

    Args:
        least: Smaller buffers are copied for each payload.
        spare: A copy is dropped when so many payloads in a row did not use it.
    """

    def __init__(self, *, least: int = 2**20, spare: int = 8) -> None:
        super().__init__()
        self.least = least
        self._spare = spare
        self._payloads = 0
        self._copies: dict[tuple[int, int], _RecentCopy] = {}

    def next_payload(self) -> None:
        """Count a payload, and drop the copies that have not been used for long."""
        self._payloads += 1
        for key, copy in list(self._copies.items()):
            if self._payloads - copy.used_by > self._spare:
                self._copies.pop(key, None)

    def lend_equal(self, address: int, nbytes: int) -> tuple[Lease, tuple[int, int, Share], bool]:
        copy = self._copies.get((address, nbytes))
        if copy is not None and kernel.is_same_memory(copy.block.address, address, nbytes):
            copy.used_by = self._payloads
            return copy.lease, (copy.block.offset, copy.block.size, Share.private), False
        block = room_for(nbytes)
        try:
            fill(block, 0, address, nbytes)
        except BaseException:
            arena.free(block)
            raise
        # Payloads hold the lease themselves, so a copy that is replaced here is closed with the last of them.
        copy = self._copies[address, nbytes] = _RecentCopy(block, arena.lend(block), self._payloads)
        return copy.lease, (block.offset, block.size, Share.private), True

    def close(self) -> None:
        self._copies.clear()
        super().close()


@dataclasses.dataclass(slots=True)
class _RecentCopy:
    block: Block
    lease: Lease
    # The number of the last payload that used it.
    used_by: int


class Group(NamedTuple):
    """Copies that share a block, because none of them is small compared with the others."""

    ranges: list[tuple[int, int, int]]
    """For each range: address, bytes, and offset in the block."""
    size: int
    is_for_reading: bool
    spans: list[tuple[int, int, int]]
    """For each span: its number, and offset in the block."""


class Copies(NamedTuple):
    """The bytes to be copied: for each range, address, bytes, and offset."""

    block: list[tuple[int, int, int]]
    block_size: int
    inline: list[tuple[int, int, int]]
    inline_size: int
    groups: list[Group]
    """Copies in blocks of their own, apart from the payload's block."""
    copied: int
    """Bytes that go into blocks, each counted once."""


class Collector:
    """Receives each out-of-band buffer of the pickler."""

    shared = 0
    # Whether no buffer can be a view of another: there is only one, or each object has memory of its own.
    is_alone = False
    # Bytes that were copied already, in copies that other payloads use too.
    copied = 0
    _repeated: list[int] | None = None

    def __init__(self, repeats: Repeats | None = None) -> None:
        # Region, offset and bytes of each buffer; those of copies are set by `place`.
        self.spans: list[tuple[int, int, int]] = []
        # For each region: offset, size, mode. How a block that is passed on is shared is set when the payload is made.
        self.refs: list[tuple[int, int, Mode | Share | Bare]] = []
        # For each region, the index of its fd. Regions of one memory object share an fd.
        self.places: list[int] = []
        self.fds: list[int] = []
        # For each fd, the identity of its memory object; (0, 0) for objects that can be reached only through the fd.
        self.objects: list[tuple[int, int]] = []
        self._place_of: dict[int, int] = {}
        # Exporters, which keep their regions mapped.
        self.keep: list[Any] = []
        # Views of the buffers to be copied, in the order of `copies`.
        self.views: list[Any] = []
        # Leases of this payload, to be closed with it.
        self.leases: list[Lease] = []
        self.handed_on: list[tuple[int, Claim]] = []
        # Views of blocks that were received. Whether the blocks are passed on is decided when all views are known.
        self.of_blocks: list[tuple[Claim, int, int, Mode | None, int, Any]] = []
        # Address, bytes, number of the span, and whether the receiver only reads it.
        self.copies: list[tuple[int, int, int, bool]] = []
        self._indices: dict[tuple[int, Mode | None], int] = {}
        self._modes: list[Mode] = []
        self._repeats = repeats
        # Region, start and end here of each repeated object, for its views.
        self._lent: list[tuple[int, int, int]] = []
        self._held: list[Any] = []
        # Start and end of ranges without a file, so that many small objects on the heap cost one question.
        self._without_file: list[tuple[int, int]] = []

    # -- marks in the stream ----------------------------------------------------------

    def begin(self, mode: Mode) -> None:
        """Send the following buffers in this mode."""
        self._modes.append(mode)

    def end(self) -> None:
        """Send the following buffers in the previous mode."""
        self._modes.pop()

    def begin_repeat(self, thing: Any) -> None:
        """Note that other payloads contain *thing*, too."""
        self._repeated = [id(thing), 0]

    def end_repeat(self) -> None:
        """Note that only this payload contains the following objects."""
        self._repeated = None

    # -- buffers ----------------------------------------------------------------------

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Take the buffer out of band and return False, or return True to leave it in the stream."""
        view = buffer.raw()
        if isinstance(view.obj, FdBuffer):
            return self._handle(view.obj)
        nbytes = view.nbytes
        if not nbytes:
            return True
        address = kernel.address_of(view)
        asked = self._modes[-1] if self._modes else None
        mapping = mapping_at(address)
        if mapping is not None:
            if mapping.shares_writes and address + nbytes <= mapping.address + mapping.size:
                index = self._region(mapping, asked)
                if index >= 0:
                    self.spans.append((index, address - mapping.address, nbytes))
                    self.shared += nbytes
                    return False
            elif not mapping.shares_writes:
                mapping.refuse_truncated(address, nbytes)
        elif (claim := claim_at(address)) is not None:  # received memory, whose file is the arena of another process
            if self._can_hand_on(claim, address, nbytes, asked):
                self.of_blocks.append((claim, address, nbytes, asked, len(self.spans), view))
                self.spans.append((BLOCK, 0, nbytes))
                return False
        elif (nbytes >= _WORTH_ASKING or not view.readonly) and _is_foreign(view.obj):
            index, start = self._file(address, nbytes, asked, is_for_reading=view.readonly)
            if index >= 0:
                self.spans.append((index, address - start, nbytes))
                self.shared += nbytes
                return False
        return self._copy(view, address, nbytes, asked)

    def _copy(self, view: Any, address: int, nbytes: int, asked: Mode | None) -> bool:
        """Take private memory out of band to copy it. With repeats, use a copy that other payloads have, too."""
        if asked is Mode.read_write:
            raise RegionAccessError(
                errno.EACCES,
                f"cannot send {nbytes:,} bytes read_write: they lie in private memory of this process, so others "
                "get a copy; make them shared first, with forkshm.asarray for an array",
            )
        for index, start, end in self._lent:
            if start <= address and address + nbytes <= end:
                self.spans.append((index, address - start, nbytes))
                return False
        if self._repeated is not None and self._repeats is not None and nbytes >= OUT_OF_BAND:
            self._repeated[1] += 1
            which, manieth = self._repeated
            return self._lend(*self._repeats.lend((which, manieth, nbytes), address), view, address, nbytes, asked)
        if self._repeats is not None and nbytes >= self._repeats.least:
            return self._lend(*self._repeats.lend_equal(address, nbytes), view, address, nbytes, asked)
        if self.is_alone and nbytes < OUT_OF_BAND:
            return True
        self.copies.append((address, nbytes, len(self.spans), asked in _FOR_READING))
        self.spans.append((BLOCK, 0, nbytes))
        self.views.append(view)
        return False

    def _lend(
        self,
        lease: Lease,
        ref: tuple[int, int, Share],
        is_new: bool,
        view: Any,
        address: int,
        nbytes: int,
        asked: Mode | None,
    ) -> bool:
        if is_new:
            self.copied += nbytes
            if ledger.watches:
                ledger.note([(nbytes, f"{describe(view.obj)}, an argument of several tasks")], "sent")
        else:
            self.shared += nbytes
        self.keep.append(lease)
        self._lent.append((len(self.refs), address, address + nbytes))
        self._held.append(view)
        self.spans.append((len(self.refs), 0, nbytes))
        self._add(ref if asked not in _FOR_READING else (ref[0], ref[1], Share.read_only), lease.fd)
        return False

    def _add(self, ref: tuple[int, int, Mode | Share | Bare], fd: int, identity: tuple[int, int] = (0, 0)) -> None:
        self.refs.append(ref)
        place = self._place_of.setdefault(fd, len(self.fds))
        self.places.append(place)
        if place == len(self.fds):
            self.fds.append(fd)
            self.objects.append(identity)

    @property
    def identities(self) -> list[tuple[int, int]]:
        """The memory object of each fd, or an empty list where a receiver surely has room for all fds."""
        return self.objects if len(self.fds) >= MANY_FILES else []

    def _handle(self, handle: FdBuffer) -> bool:
        self.spans.append((len(self.refs), 0, 1))
        self._add((0, 1, HANDLE), handle.fd)
        self.keep.append(handle)
        return False

    def _region(self, mapping: Mapping, asked: Mode | None) -> int:
        known = self._indices.get((id(mapping), asked), -1)
        if known < 0:
            mode = mapping.sent_as
            if asked is not None:
                if asked is Mode.read_write is not mode:
                    raise RegionAccessError(
                        errno.EACCES, f"cannot send {mapping.size:,} bytes read_write: the region is {mode} to others"
                    )
                mode = asked
            exporter = mapping.exporter() if mapping.exporter is not None else None
            if exporter is None:
                return -1
            known = self._indices[id(mapping), asked] = len(self.refs)
            self._add((mapping.offset, mapping.size, mode), mapping.fd, mapping.identity)
            self.keep.append(exporter)
        return known

    def _file(self, address: int, nbytes: int, asked: Mode | None, *, is_for_reading: bool) -> tuple[int, int]:
        """Return the region of the file that these bytes are mapped from, and its address here; -1 if there is none."""
        if any(start <= address < end for start, end in self._without_file):
            return -1, 0
        extent = file_at(address, nbytes, self._without_file)
        if extent is None:
            return -1, 0
        try:
            if is_for_reading:
                mode = Mode.read_only
            elif extent.shared and extent.writable:
                mode = Mode.read_write
            else:
                mode = Mode.copy_on_write
            if asked is not None and not (asked is Mode.read_write is not mode):
                mode = asked
            elif asked is not None:
                return -1, 0
            if extent.writable and not extent.shared and _was_written(address, nbytes):
                return -1, 0
            key = (~extent.address, mode)
            known = self._indices.get(key, -1)
            if known < 0:
                handle = Handle(extent.fd)
                self.keep.append(handle)
                known = self._indices[key] = len(self.refs)
                self._add((extent.offset, extent.size, mode), handle.fd)
            return known, extent.address
        finally:
            kernel.close(extent.fd)

    def _can_hand_on(self, claim: Claim, address: int, nbytes: int, asked: Mode | None) -> bool:
        if address + nbytes > claim.address + claim.size:
            return False
        if claim.share is Share.shared:
            return asked is not Mode.copy_on_write  # otherwise the receiver would see others' writes
        if kernel.leases_are_handles and claim.in_place:
            return False  # it cannot become copy-on-write while it has views
        # A copy that was received or made here.
        if asked is Mode.read_write:
            return False
        if nbytes < OUT_OF_BAND:
            # For few bytes, a lease costs more than a copy. They may overlap with a larger view that is passed on.
            return not (self.is_alone or self._lent)
        return claim.is_as_it_came(address, nbytes)

    def decide(self) -> None:
        """Pass on blocks of which enough is seen, and copy from the others. Call it when all buffers are known.

        Raises:
            OSError: The kernel refused an fd or a lock.
        """
        if not self.of_blocks:
            return
        seen: dict[int, list[tuple[int, int, int, bool]]] = {}
        for claim, address, nbytes, *_ in self.of_blocks:
            if nbytes >= OUT_OF_BAND:
                seen.setdefault(id(claim), []).append((address, nbytes, 0, False))
        larger = {key: _merged(parts) for key, parts in seen.items()}
        enough = {key: MAY_HOLD_TIMES * sum(end - begin for begin, end, _ in parts) for key, parts in larger.items()}
        for claim, address, nbytes, asked, number, view in self.of_blocks:
            is_few = nbytes < OUT_OF_BAND and not _is_within(address, nbytes, larger.get(id(claim), ()))
            if claim.share is not Share.shared and (is_few or claim.size > max(MAY_HOLD, enough[id(claim)])):
                self.copies.append((address, nbytes, number, asked in _FOR_READING))
                self.views.append(view)
                continue
            self.spans[number] = self._block(claim, asked), address - claim.address, nbytes
            self.shared += nbytes
        self.of_blocks.clear()  # with the views, so that the receiver may become the only user of the block

    def _block(self, claim: Claim, asked: Mode | None) -> int:
        known = self._indices.get((id(claim), asked), -1)
        if known < 0:
            lease = claim.lend(self.leases)
            self._note(lease)
            known = self._indices[id(claim), asked] = len(self.refs)
            self._add((claim.offset, claim.size, Share.read_only), lease.fd)
            if asked not in _FOR_READING:
                self.handed_on.append((known, claim))
        return known

    def _note(self, lease: Lease) -> None:
        if all(lease is not other for other in self.leases):
            self.leases.append(lease)

    def give_up(self) -> None:
        """Release everything. Without a payload, the error's traceback would keep this object's memory alive."""
        for lease in self.leases:
            lease.close()
        for held in (self.leases, self.handed_on, self.keep, self.views, self._held, self.of_blocks):
            held.clear()

    # -- when all are known -----------------------------------------------------------

    def settle(self, *, for_many: bool) -> None:
        """Decide how the receiver shares the blocks that are passed on."""
        for index, claim in self.handed_on:
            offset, size, _ = self.refs[index]
            self.refs[index] = offset, size, claim.share_out(to_many=for_many)

    def place(self, start: int, *, inline: bool, alone: bool = True) -> Copies:
        """Assign a place to each copy, and set its span.

        Args:
            start: First free byte of the block.
            inline: Small copies may go into the message.
            alone: If a view of a copy could keep too many other bytes alive, the copy goes into a block of its own.
                Otherwise all go into the payload's block.
        """
        block: list[tuple[int, int, int]] = []
        small: list[tuple[int, int, int]] = []
        large: list[_Range] = []
        copied, inline_size = 0, 0
        for part in _merged(self.copies):
            begin, end, members = part
            nbytes = end - begin
            if inline and nbytes < OUT_OF_BAND and inline_size + nbytes <= INLINE_LIMIT:
                where, region = inline_size, INLINE
                small.append((begin, nbytes, where))
                inline_size = round_up(inline_size + nbytes, ALIGNMENT)
            elif nbytes < OUT_OF_BAND:
                where, region = start, LOOSE
                copied += nbytes
                block.append((begin, nbytes, where))
                start = round_up(start + nbytes, ALIGNMENT)
            else:
                large.append(part)
                continue
            for address, length, span, for_reading in members:
                self.spans[span] = region - READ_ONLY if for_reading else region, where + address - begin, length
        groups, mixed = _grouped(large) if alone and large else ([], large)
        if len(groups) == 1 and not start and not groups[0].is_for_reading:
            groups = []  # the payload's own block serves as well
        if groups:
            large = mixed
            copied += sum(map(operator.itemgetter(1), itertools.chain.from_iterable(group.ranges for group in groups)))
        for begin, end, members in large:
            where, nbytes = start, end - begin
            copied += nbytes
            block.append((begin, nbytes, where))
            start = round_up(start + nbytes, ALIGNMENT)
            for address, length, span, for_reading in members:
                self.spans[span] = BLOCK - READ_ONLY if for_reading else BLOCK, where + address - begin, length
        return Copies(block, start, small, inline_size, groups, copied)

    def mark(self) -> tuple[int, int, int]:
        """Return the state for `back_to`."""
        return len(self.refs), len(self.fds), len(self.leases)

    def back_to(self, mark: tuple[int, int, int]) -> None:
        """Undo what `place_group` did since a mark."""
        refs, fds, leases = mark
        for lease in self.leases[leases:]:
            lease.close()
        for fd in self.fds[fds:]:
            self._place_of.pop(fd, None)
        del self.refs[refs:], self.places[refs:], self.fds[fds:], self.objects[fds:], self.leases[leases:]

    def move_block(self, by: int) -> None:
        """Move every span in the payload's block back by this many bytes."""
        in_block = (BLOCK, BLOCK - READ_ONLY, LOOSE, LOOSE - READ_ONLY)
        self.spans = [
            (region, where + by, nbytes) if region in in_block else (region, where, nbytes)
            for region, where, nbytes in self.spans
        ]

    def place_group(self, group: Group, offset: int, size: int, lease: Lease, *, for_many: bool) -> None:
        """Point the spans of a group to the block that its bytes were copied into, and keep the lease."""
        self._note(lease)
        region = COPIED_IN - len(self.refs)
        share = Share.read_only if group.is_for_reading else Share.private if for_many else Share.exclusive
        self._add((offset, size, share), lease.fd)
        for number, where, nbytes in group.spans:
            self.spans[number] = region, where, nbytes


_Range = tuple[int, int, list[tuple[int, int, int, bool]]]


def _grouped(ranges: list[_Range]) -> tuple[list[Group], list[_Range]]:
    """Divide copies into blocks that are not large compared with any of their copies.

    Read-only copies have blocks of their own, which the kernel protects. The ranges that are only partly read-only are
    in no group, and are returned, too.
    """
    mixed: list[_Range] = []
    by_size: dict[bool, list[tuple[int, int, list[tuple[int, int, int, bool]]]]] = {False: [], True: []}
    total = 0
    for begin, end, members in ranges:
        nbytes = end - begin
        total += nbytes
        is_for_reading = members[0][3]
        if len(members) == 1 or all(member[3] is is_for_reading for member in members):
            by_size[is_for_reading].append((nbytes, begin, members))
        else:
            mixed.append((begin, end, members))
    room = max(MAY_HOLD, total // MOST_BLOCKS)
    groups: list[Group] = []
    for is_for_reading, parts in by_size.items():
        made: list[tuple[int, int, int]] = []
        spans: list[tuple[int, int, int]] = []
        size = limit = 0
        parts.sort()  # by size, so that the copies in a block have similar sizes
        for nbytes, begin, members in parts:
            if size + nbytes > limit:
                if made:
                    groups.append(Group(made, size, is_for_reading, spans))
                    made, spans, size = [], [], 0
                limit = max(room, MAY_HOLD_TIMES * nbytes)
            made.append((begin, nbytes, size))
            for address, length, span, _ in members:
                spans.append((span, size + address - begin, length))
            size += nbytes + -nbytes % ALIGNMENT
        if made:
            groups.append(Group(made, size, is_for_reading, spans))
    return groups, mixed


def _is_within(address: int, nbytes: int, ranges: Sequence[_Range]) -> bool:
    """Return whether one of these ranges, which are in order, contains all of these bytes."""
    place = bisect.bisect_right(ranges, address, key=operator.itemgetter(0)) - 1
    return place >= 0 and address + nbytes <= ranges[place][1]


def _merged(copies: list[tuple[int, int, int, bool]]) -> list[_Range]:
    """Return the ranges of memory that *copies* cover, each with the copies in it."""
    ranges: list[_Range] = []
    begin, end = 0, 0
    for copy in sorted(copies):
        address, nbytes = copy[:2]
        if address < end:
            end = max(end, address + nbytes)
            ranges[-1][2].append(copy)
            ranges[-1] = begin, end, ranges[-1][2]
        else:
            begin, end = address, address + nbytes
            ranges.append((begin, end, [copy]))
    return ranges
