"""Turns payloads into objects."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

from forkshm._ledger import ledger
from forkshm.backend import kernel
from forkshm.descriptor import (
    BLOCK,
    COPIED_IN,
    HANDLE,
    INLINE,
    LOOSE,
    READ_ONLY,
    Bare,
    is_plain,
    plain_body,
    read_head,
    read_one_region,
    read_tables,
)
from forkshm.errors import ChannelBrokenError, RegionGoneError
from forkshm.pickler._handles import ReceivedFd
from forkshm.pickler._large import load
from forkshm.region import Mode, attach, map_refused, mapping_of, view_of
from forkshm.region.blocks import Share, claim

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forkshm.descriptor import Tables

__all__ = ("ReceivedPayload", "open_plain", "plain_pair", "receive", "skip")


# The pages of an array of so many bytes are mapped when it arrives, because most receivers read all of it.
_MAP_AT_ONCE = 2**20


class ReceivedPayload:
    """A received payload, which holds its memory. Its object is not made yet.

    Attributes:
        copied: Bytes that were copied for it.
        shared: Bytes that were sent as descriptors.
    """

    __slots__ = ("_buffers", "_has_large_bytes", "_stream", "copied", "exporters", "shared")

    def __init__(self, stream: memoryview, buffers: list[Any], *, has_large_bytes: bool = False) -> None:
        self._stream = stream
        self._buffers = buffers
        self._has_large_bytes = has_large_bytes
        # Exporters of the regions that the payload names. They keep the regions mapped.
        self.exporters: list[memoryview] = []
        self.copied = 0
        self.shared = 0

    @property
    def is_inline(self) -> bool:
        """Whether the payload is only a stream, without memory."""
        return not self._buffers and not self.copied

    @property
    def nbytes(self) -> int:
        """Bytes of the stream and of all buffers."""
        return len(self._stream) + sum(int(getattr(buffer, "nbytes", 0)) for buffer in self._buffers)

    def stream_bytes(self) -> bytes:
        """Return the pickle stream, for comparison with another."""
        return bytes(self._stream)

    def open(self) -> Any:
        """Unpickle the object; its buffers are the received memory itself.

        Raises:
            Exception: Whatever unpickling raises.
        """
        if self._has_large_bytes:
            return load(self._stream, self._buffers)
        return pickle.loads(self._stream, buffers=self._buffers)


def receive(data: bytes, position: int, fds: list[int]) -> tuple[ReceivedPayload, int]:
    """Take a payload out of a message.

    Args:
        data: The message.
        position: Where the payload begins.
        fds: The fds that came beside the message and are not used yet. The payload's fds are removed from the front of
            the list, and stay open. The owner of the message closes them when all of it was read. If reading was
            interrupted, the message may be read again.

    Returns:
        The received payload, and where the next payload begins.

    Raises:
        ChannelBrokenError: The bytes are not a payload.
        RegionGoneError: The memory that the payload names did not arrive, or differs from the description.
        OSError: The kernel refused a mapping or a lock.
    """
    if fds and (one := read_one_region(data, position)) is not None:
        return _receive_one_region(data, one, fds)
    if start := is_plain(data, position):
        head, _ = read_head(data, position)
        end = start + head.body_size
        return ReceivedPayload(memoryview(data)[start:end], []), end
    head, position = read_head(data, position)
    arrived = len(fds)
    if arrived < head.fds and not (head.identities and (arrived or head.block is None)):
        raise _gone(head.fds, arrived)
    mine = fds[: head.fds]
    del fds[: head.fds]
    try:
        whole: memoryview | None = None
        if head.block is not None:
            share = Share.private if head.block.private else Share.exclusive
            whole = _block_of(mine.pop(0), head.block.offset, head.block.size, share)
        if head.body_in_block and whole is not None:
            body = whole[: head.body_size]
        else:
            body = memoryview(data)[position : position + head.body_size]
            position += head.body_size
        tables = read_tables(head, body)
        exporters = _exporters(tables, mine, arrived, head.fds)
    except ValueError as error:
        if isinstance(error, ChannelBrokenError):
            raise
        raise _not_what_it_says(error) from error
    stream = body[tables.stream : head.body_size - head.inline]
    incoming = ReceivedPayload(stream, [], has_large_bytes=head.large_bytes)
    # Blocks that are passed on are not kept for the next task: their last user returns them.
    incoming.exporters = [
        exporter for exporter, ref in zip(exporters, tables.regions, strict=True) if isinstance(ref[2], Mode)
    ]
    # Small copies lie together in memory of this process.
    inline = memoryview(bytearray(body[head.body_size - head.inline :])) if head.inline else None
    copies = _add_buffers(incoming, tables.spans, exporters, whole, inline)
    incoming.copied = _covered(copies) + (head.body_size if head.body_in_block else 0)
    ledger.bytes_copied += incoming.copied
    ledger.bytes_shared += incoming.shared
    if incoming.copied and ledger.watches:
        ledger.note([(incoming.copied, f"{len(copies)} copied buffers" if copies else "pickle stream")], "received")
    return incoming, position


def _exporters(tables: Tables, fds: list[int], arrived: int, named: int) -> list[Any]:
    """Return the memory of each region, by its fd or, without an fd, from the mappings of this process."""
    # Begin with regions that came without an fd: if one is unknown here, nothing needs to be mapped.
    here: dict[int, Any] = {}
    for index, (ref, place) in enumerate(zip(tables.regions, tables.places, strict=True)):
        if place >= len(fds):
            found = _memory_here(tables.identities[place], *ref)
            if found is None:
                raise _gone(named, arrived)
            here[index] = found
    return [
        here[index] if index in here else _memory_of(fds[place], *ref)
        for index, (ref, place) in enumerate(zip(tables.regions, tables.places, strict=True))
    ]


def _add_buffers(
    incoming: ReceivedPayload,
    spans: Sequence[tuple[int, int, int]],
    exporters: list[Any],
    block: memoryview | None,
    inline: memoryview | None,
) -> list[tuple[int, int, int]]:
    """Add the buffers of a payload, each a span of some memory; return the ranges that were copied."""
    copies: list[tuple[int, int, int]] = []
    loose: list[tuple[int, int, int]] = []
    for region, offset, nbytes in spans:
        if region <= COPIED_IN:
            source: Any = exporters[COPIED_IN - region]
            copies.append((region, offset, offset + nbytes))
        elif region >= 0:
            source = exporters[region]
            if type(source) is ReceivedFd:
                incoming._buffers.append(source)
                continue
            incoming.shared += nbytes
        else:
            source = inline if region in (INLINE, INLINE - READ_ONLY) else block
            if source is None:
                raise ChannelBrokenError("a span names copies, but the payload has none")
            if source is block:
                copies.append((BLOCK, offset, offset + nbytes))
            if region in (LOOSE, LOOSE - READ_ONLY):
                loose.append((offset, offset + nbytes, len(incoming._buffers)))
            if region in (BLOCK - READ_ONLY, INLINE - READ_ONLY, LOOSE - READ_ONLY):
                source = source.toreadonly()
        incoming._buffers.append(source[offset : offset + nbytes])
    if loose:
        _copy_out(block, loose, incoming._buffers)
    return copies


def _covered(ranges: list[tuple[int, int, int]]) -> int:
    """Return how many bytes lie in at least one of these ranges, each of a block."""
    covered = end = block = 0
    for of_block, low, high in sorted(ranges):
        if of_block != block:
            block, end = of_block, 0
        covered += max(0, high - max(low, end))
        end = max(end, high)
    return covered


def _copy_out(block: memoryview | None, loose: list[tuple[int, int, int]], buffers: list[Any]) -> None:
    """Replace small buffers with copies in memory of this process; buffers that overlap still do."""
    if block is None:
        raise ChannelBrokenError("a span names copies, but the payload has none")
    loose.sort()
    position = 0
    while position < len(loose):
        low, high, _ = loose[position]
        behind = position + 1
        while behind < len(loose) and loose[behind][0] < high:
            high = max(high, loose[behind][1])
            behind += 1
        own = memoryview(bytearray(block[low:high]))
        for start, end, index in loose[position:behind]:
            view = own[start - low : end - low]
            buffers[index] = view.toreadonly() if buffers[index].readonly else view
        position = behind


def _block_of(lease: int, offset: int, size: int, share: Share) -> memoryview:
    try:
        view = memoryview(claim(lease, offset, size, share)).cast("B")
    except OSError as error:
        raise map_refused(error, size, Mode.read_write) from error
    return view.toreadonly() if share is Share.read_only else view


def _memory_of(fd: int, offset: int, size: int, mode: Mode | Share | Bare) -> Any:
    if mode is HANDLE:
        return ReceivedFd(kernel.duplicate(fd))
    if isinstance(mode, Share):
        return _block_of(fd, offset, size, mode)
    return view_of(*attach(fd, offset, size, mode, borrowed=True))


def _memory_here(identity: tuple[int, int], offset: int, size: int, mode: Mode | Share | Bare) -> Any:
    """Return memory that this process has mapped already, for a region whose fd did not arrive, or None."""
    found = mapping_of(identity, offset, size, mode) if isinstance(mode, Mode) else None
    return None if found is None else view_of(*found)


def _gone(named: int, arrived: int) -> RegionGoneError:
    return RegionGoneError(
        f"a message named {named} memory objects and only {arrived} arrived: " + kernel.fds_lost_because
    )


def _receive_one_region(
    data: bytes, one: tuple[tuple[int, int, Mode | Share | Bare], tuple[int, int, int], int, int], fds: list[int]
) -> tuple[ReceivedPayload, int]:
    (offset, size, mode), (region, start, nbytes), stream, end = one
    try:
        whole = _memory_of(fds.pop(0), offset, size, mode)
    except ValueError as error:
        raise _not_what_it_says(error) from error
    if mode is HANDLE:
        return ReceivedPayload(memoryview(data)[stream:end], [whole]), end
    incoming = ReceivedPayload(memoryview(data)[stream:end], [whole[start : start + nbytes]])
    if isinstance(mode, Mode):
        incoming.exporters.append(whole)
    if region == BLOCK:
        if nbytes >= _MAP_AT_ONCE and mode is Share.exclusive:
            whole.obj.hold.claim.map_pages(start, nbytes)
        incoming.copied = nbytes
        ledger.bytes_copied += nbytes
        if ledger.watches:
            ledger.note([(nbytes, "1 copied buffers")], "received")
    else:
        incoming.shared = nbytes
        ledger.bytes_shared += nbytes
    return incoming, end


def _not_what_it_says(error: ValueError) -> RegionGoneError:
    return RegionGoneError(f"a message names memory that is not what arrived beside it: {error}")


def open_plain(data: bytes, position: int) -> Any:
    """Unpickle a payload that is only a stream, and the last payload of its message.

    This is a fast path for the answers of small tasks.

    Raises:
        LookupError: The payload is of another kind.
        Exception: Whatever unpickling raises.
    """
    start = is_plain(data, position)
    if not start:
        raise LookupError("not a plain payload")
    return pickle.loads(memoryview(data)[start:])


def plain_pair(data: bytes, position: int) -> tuple[int, int, int] | None:
    """Return where the streams of the two plain payloads lie that end a message, or None if they are not plain.

    The result is the start and end of the first stream, and the start of the second. This is a fast path of `receive`
    for small tasks.
    """
    first = plain_body(data, position)
    second = None if first is None else plain_body(data, first[1])
    if first is None or second is None or second[1] != len(data):
        return None
    return first[0], first[1], second[0]


def skip(data: bytes, position: int, fds: list[int]) -> int:
    """Skip a payload and its fds, and return where the next one begins.

    Raises:
        ChannelBrokenError: The bytes are not a payload.
    """
    head, position = read_head(data, position)
    del fds[: head.fds]
    return position if head.body_in_block else position + head.body_size
