"""The tables at the head of a payload: the location of the bytes of its buffers, in wire form.

A payload is one pickled object in transit. Its buffers are *spans*. A span lies in one of these places:

* the one block that carries the copies;
* the small copies at the end of the message;
* a region that both sides share;
* a block that was received and is passed on;
* none, if the span is an fd without bytes.

The fds come with the message, the block's lease first. The *files* follow: one for the regions of each memory object,
and one for each block that is passed on, in order.

Tables are named tuples, and plain tuples of the same form in the path of every array. Creating a frozen dataclass takes
four times as long as a named tuple, which takes ten times as long as a plain one.

Everything is checked while it is read: a payload that was truncated or changed is refused, and never leads to a view of
other memory than it names.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, NamedTuple

from forkshm.errors import ChannelBrokenError
from forkshm.region import Mode
from forkshm.region.blocks import Share

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "BLOCK",
    "COPIED_IN",
    "HANDLE",
    "IDENTITY_SIZE",
    "INLINE",
    "LOOSE",
    "MANY_FILES",
    "READ_ONLY",
    "BlockRef",
    "Head",
    "RegionRef",
    "Span",
    "Tables",
    "body_tables",
    "is_plain",
    "plain_body",
    "read_head",
    "read_one_region",
    "read_tables",
    "size_of_tables",
    "write_one_region",
    "write_plain",
    "write_tables",
)

# ``Span.region`` of bytes in the payload's own block.
BLOCK = -1
# ``Span.region`` of bytes at the end of the body.
INLINE = -2
# Subtracted from either, or from `LOOSE`, for bytes that the receiver may not write to.
READ_ONLY = 2
# ``Span.region`` of bytes that are copied out of the payload's own block, because they are too few to keep it.
LOOSE = -5
# Minus the number of a region: ``Span.region`` of bytes copied for this payload into a block of their own.
COPIED_IN = -16

# Flags, bytes inline, regions, spans, files, bytes of the body; offset and size of the block.
_HEAD = struct.Struct("<BxHIIIQQQ")
# Offset, size, mode, and index of the file.
_REGION = struct.Struct("<QQBI")
_SPAN = struct.Struct("<iQQ")

_HAS_BLOCK = 1
# Tables and stream did not fit the message: they are the first bytes of the block.
_BODY_IN_BLOCK = 2
_PRIVATE = 4
# The spans are followed by the identity of each file's memory object.
_HAS_IDENTITIES = 8
# The stream has large ``bytes`` or ``bytearray`` objects; only for a stream in the block.
_LARGE_BYTES = 16
_IDENTITY = struct.Struct("<QQ")
IDENTITY_SIZE = _IDENTITY.size
# Minimum number of files for identities: a receiver may have no room for their fds, but already have the objects.
MANY_FILES = 16

# A head, a region, and a span, without padding.
_ONE_REGION = struct.Struct(_HEAD.format + "QQBIiQQ")
# The fields of `_ONE_REGION` behind its first 12 bytes, except the block: such a payload has none.
_AFTER_START = struct.Struct("<12xIQ16xQQBIiQQ")
_HEAD_SIZE = _HEAD.size
_TABLES_SIZE = _ONE_REGION.size - _HEAD.size
_ONE_REGION_START = struct.pack("<BxHII", 0, 0, 1, 1)


class Bare(enum.Enum):
    """The mode of an fd that names no memory."""

    handle = "handle"


# Used in place of a mode: the fd itself is sent.
HANDLE = Bare.handle

# An fd stands for a region with a mode, a block that is passed on, or itself.
_MODES: tuple[Mode | Share | Bare, ...] = (*Mode, *Share, *Bare)
_NUMBERS = {mode: number for number, mode in enumerate(_MODES)}

# Flags, bytes inline, number of regions, number of spans.
_PLAIN_START = bytes(12)


class BlockRef(NamedTuple):
    """Part of the segment whose lease comes with the message."""

    offset: int
    size: int
    # Other receivers got the block too: map it copy-on-write.
    private: bool


class RegionRef(NamedTuple):
    """Part of the memory object whose fd comes with the message."""

    offset: int
    size: int
    # A `Mode` for a region; a `Share` for a block, whose fd is a lease.
    mode: Mode | Share | Bare


class Span(NamedTuple):
    """One buffer: bytes of a region, of the block, or of the end of the body."""

    region: int
    offset: int
    nbytes: int


class Head(NamedTuple):
    """The fixed part of a payload."""

    block: BlockRef | None
    body_in_block: bool
    regions: int
    spans: int
    body_size: int
    # Bytes of small copies at the end of the body.
    inline: int = 0
    # Number of fds of the regions; by default one for each.
    files: int = -1
    # Whether the tables identify the memory object of each file.
    identities: bool = False
    # Whether the stream has ``bytes`` or ``bytearray`` objects that are worth huge pages.
    large_bytes: bool = False

    @property
    def fds(self) -> int:
        """The number of fds that belong to the payload."""
        return (self.block is not None) + (self.regions if self.files < 0 else self.files)


class Tables(NamedTuple):
    """The part of a payload's body before its stream."""

    regions: Sequence[tuple[int, int, Mode | Share | Bare]]
    spans: Sequence[tuple[int, int, int]]
    # Position of the pickle stream in the body.
    stream: int
    # The index of the file of each region.
    places: Sequence[int]
    # The kernel's identity of each file's object, if there are enough files; (0, 0) for a block.
    identities: Sequence[tuple[int, int]] = ()


def body_tables(
    regions: Sequence[tuple[int, int, Mode | Share | Bare]],
    spans: Sequence[tuple[int, int, int]],
    places: Sequence[int] | None = None,
    identities: Sequence[tuple[int, int]] = (),
) -> bytes:
    """Return the wire form of the tables: each `RegionRef` with its file, each `Span`, each file's identity."""
    parts = [
        _REGION.pack(offset, size, _NUMBERS[mode], place)
        for (offset, size, mode), place in zip(regions, range(len(regions)) if places is None else places, strict=True)
    ]
    parts += [_SPAN.pack(*span) for span in spans]
    parts += [_IDENTITY.pack(*identity) for identity in identities]
    return b"".join(parts)


def size_of_tables(regions: int, spans: int, identities: int) -> int:
    """Return the size of the wire form of tables with these numbers of entries."""
    return regions * _REGION.size + spans * _SPAN.size + identities * _IDENTITY.size


def write_tables(head: Head) -> bytes:
    """Return the wire form of a head."""
    block, files = head.block, head.regions if head.files < 0 else head.files
    known = (_HAS_IDENTITIES if head.identities else 0) | (_LARGE_BYTES if head.large_bytes else 0)
    if block is None:
        return _HEAD.pack(known, head.inline, head.regions, head.spans, files, head.body_size, 0, 0)
    flags = known | _HAS_BLOCK | (_BODY_IN_BLOCK if head.body_in_block else 0) | (_PRIVATE if block.private else 0)
    return _HEAD.pack(flags, head.inline, head.regions, head.spans, files, head.body_size, block.offset, block.size)


def read_one_region(
    data: bytes, position: int
) -> tuple[tuple[int, int, Mode | Share | Bare], tuple[int, int, int], int, int] | None:
    """Read a payload of one region and one span: one array, shared or copied.

    Most payloads with tables have this form, and the general function takes three times as long.

    Returns:
        The region, the span, and the start and end of the stream. The span's region is 0 or,
        for a copy, `BLOCK`. None for another kind of payload, and for an invalid one.
    """
    if data[position : position + 12] != _ONE_REGION_START:
        return None
    try:
        files, body_size, offset, size, number, place, region, start, nbytes = _AFTER_START.unpack_from(data, position)
        mode = _MODES[number]
    except (struct.error, IndexError):
        return None
    if files != 1 or place or not 1 <= size < 2**63 - offset or start + nbytes > size:
        return None
    if region and (region != BLOCK or type(mode) is not Share):
        return None
    body = position + _HEAD_SIZE
    if not _TABLES_SIZE <= body_size <= len(data) - body:
        return None
    return (offset, size, mode), (region, start, nbytes), body + _TABLES_SIZE, body + body_size


def write_one_region(
    region: tuple[int, int, Mode | Share | Bare], span: tuple[int, int, int], stream_size: int
) -> bytes:
    """Return the wire form of head and tables of a payload of one region and one span of it; see `read_one_region`."""
    offset, size, mode = region
    return _ONE_REGION.pack(0, 0, 1, 1, 1, _TABLES_SIZE + stream_size, 0, 0, offset, size, _NUMBERS[mode], 0, *span)


def write_plain(body_size: int) -> bytes:
    """Return the wire form of a head with no block and no tables, the most common kind."""
    return _HEAD.pack(0, 0, 0, 0, 0, body_size, 0, 0)


def is_plain(data: bytes, position: int) -> int:
    """Return the start of the stream of a payload that is only a stream; 0 for any other."""
    start = position + _HEAD.size
    return start if len(data) >= start and data[position : position + 12] == _PLAIN_START else 0


def plain_body(data: bytes, position: int) -> tuple[int, int] | None:
    """Return the start and end of the stream of a payload that is only a stream; None for any other."""
    start = position + _HEAD.size
    if len(data) < start or data[position : position + 12] != _PLAIN_START:
        return None
    end = start + _HEAD.unpack_from(data, position)[5]
    return (start, end) if end <= len(data) else None


def read_head(data: bytes, position: int) -> tuple[Head, int]:
    """Return the head, and the start of the body unless the body is in the block.

    Raises:
        ChannelBrokenError: These bytes are not a payload.
    """
    try:
        flags, inline, regions, spans, files, body_size, offset, size = _HEAD.unpack_from(data, position)
    except struct.error:
        raise _broken(f"its head needs {_HEAD.size} bytes, {len(data) - position} are there") from None
    known = flags & _HAS_IDENTITIES
    of_block = flags & ~(_HAS_IDENTITIES | _LARGE_BYTES)
    if of_block & ~(_HAS_BLOCK | _BODY_IN_BLOCK | _PRIVATE) or (of_block and not of_block & _HAS_BLOCK):
        raise _broken(f"unknown flags {flags:#x}")
    block = BlockRef(offset, size, bool(flags & _PRIVATE)) if of_block else None
    head = Head(
        block,
        bool(flags & _BODY_IN_BLOCK),
        regions,
        spans,
        body_size,
        inline,
        files,
        bool(known),
        bool(flags & _LARGE_BYTES),
    )
    room = size if head.body_in_block else len(data) - position - _HEAD.size
    if files > regions:
        raise _broken(f"{files} files for {regions} regions")
    names = files * _IDENTITY.size if known else 0
    if body_size > room or regions * _REGION.size + spans * _SPAN.size + names + inline > body_size:
        raise _broken(
            f"{regions} regions, {spans} spans and {inline:,} bytes inline in a body of {body_size:,} bytes, "
            f"of which {room:,} are there"
        )
    return head, position + _HEAD.size


def read_tables(head: Head, body: memoryview) -> Tables:
    """Return the tables at the start of *body*, which has ``head.body_size`` bytes.

    Raises:
        ChannelBrokenError: The tables name memory that does not belong to the payload.
    """
    here = head.regions * _REGION.size
    regions, places = [], []
    files = head.regions if head.files < 0 else head.files
    for offset, size, mode, place in _REGION.iter_unpack(body[:here]):
        if place >= files:
            raise _broken(f"region of file {place}, but there are {files}")
        places.append(place)
        if mode >= len(_MODES) or size < 1 or offset + size > 2**63 - 1:
            raise _broken(f"region of {size:,} bytes at {offset:,} with mode {mode}")
        regions.append((offset, size, _MODES[mode]))
    stream = here + head.spans * _SPAN.size
    spans = list(_SPAN.iter_unpack(body[here:stream]))
    for region, offset, nbytes in spans:
        if 0 <= region < len(regions):
            room = regions[region][1]
        elif 0 <= COPIED_IN - region < len(regions) and isinstance(regions[COPIED_IN - region][2], Share):
            room = regions[COPIED_IN - region][1]
        elif region in (BLOCK, BLOCK - READ_ONLY, LOOSE, LOOSE - READ_ONLY):
            room = head.block.size if head.block is not None else 0
        elif region in (INLINE, INLINE - READ_ONLY):
            room = head.inline
        else:
            raise _broken(f"span of region {region}, but there are {len(regions)}")
        if offset + nbytes > room:
            raise _broken(f"span of {nbytes:,} bytes at {offset:,}, but there are {room:,}")
    if not head.identities:
        return Tables(regions, spans, stream, places)
    named = list(_IDENTITY.iter_unpack(body[stream : stream + files * _IDENTITY.size]))
    return Tables(regions, spans, stream + files * _IDENTITY.size, places, named)


def _broken(what: str) -> ChannelBrokenError:
    return ChannelBrokenError(f"received a payload that forkshm did not send, or only part of one: {what}")
