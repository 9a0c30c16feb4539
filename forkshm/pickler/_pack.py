"""Objects to parcels."""

from __future__ import annotations

import pickle
from types import FunctionType
from typing import TYPE_CHECKING, Any

import cloudpickle

from forkshm.backend import kernel
from forkshm.descriptor._tables import BLOCK, BlockRef, Head, body_tables, write, write_one_region, write_plain
from forkshm.pickler._names import NOTHING_KNOWN, Known, is_known
from forkshm.pickler._policy import ALIGNMENT, INLINE_LIMIT, OUT_OF_BAND
from forkshm.pickler._reducers import dispatch_table, find, simple_kinds
from forkshm.region._arena import arena
from forkshm.region._table import Mapping, Mode, mapping_at, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forkshm.region._segment import Lease

__all__ = ("Parcel", "crosses_by_name", "pack")

#: Objects of these types pickle to a few bytes, and nothing in them needs our pickler.
_PLAIN = frozenset({int, float, bool, type(None), complex})


class Parcel:
    """One object, ready to be sent any number of times; close it when it has been.

    Attributes:
        data: What goes into the message.
        copied: Bytes of buffers and stream that were copied into the arena.
        shared: Bytes of buffers that cross as descriptors.
    """

    __slots__ = ("_fds", "_keep", "_lease", "copied", "data", "shared")

    def __init__(
        self, data: bytes, lease: Lease | None = None, mappings: Sequence[Mapping] = (), keep: Any = None
    ) -> None:
        self.data = data
        self._lease = lease
        self._fds = [mapping.fd for mapping in mappings]
        self._keep = keep  # the windows of the mappings: their fds stay open with them
        self.copied = 0
        self.shared = 0

    @property
    def fds(self) -> list[int]:
        """What goes beside the message."""
        return self._fds if self._lease is None else [self._lease.fd, *self._fds]

    def close(self) -> None:
        """Let go of what was held for sending. Closing twice is allowed."""
        if self._lease is not None:
            self._lease.close()
        self._keep = None


class _Sink:
    """The file that a pickler writes to: it keeps the pieces, large ones uncopied."""

    __slots__ = ("pieces", "size")

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.size = 0

    def write(self, piece: Any) -> int:
        self.pieces.append(piece)
        nbytes = len(piece)
        self.size += nbytes
        return nbytes


class _Buffers:
    """Called with each out-of-band buffer; decides which cross how."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, int]] = []
        self.copies: list[tuple[int, memoryview]] = []
        self.copied = 0
        self.shared = 0
        self.mappings: dict[int, int] = {}
        self.refs: list[tuple[int, int, Mode]] = []
        self.in_order: list[Mapping] = []
        self.windows: list[Any] = []

    def __call__(self, buffer: pickle.PickleBuffer) -> bool:
        """Take the buffer out of band (False), or leave it in the stream (True)."""
        view = buffer.raw()
        nbytes = view.nbytes
        if not nbytes:
            return True
        address = kernel.address_of(view)
        mapping = mapping_at(address)
        if mapping is not None and mapping.shares_writes:
            region = self._region(mapping)
            if region is not None and address + nbytes <= mapping.address + mapping.size:
                self.spans.append((region, address - mapping.address, nbytes))
                self.shared += nbytes
                return False
        if nbytes < OUT_OF_BAND:
            return True
        self.spans.append((BLOCK, self.copied, nbytes))
        self.copies.append((self.copied, view))
        self.copied = round_up(self.copied + nbytes, ALIGNMENT)
        return False

    def _region(self, mapping: Mapping) -> int | None:
        known = self.mappings.get(id(mapping))
        if known is None:
            window = mapping.window() if mapping.window is not None else None
            if window is None:
                return None
            known = self.mappings[id(mapping)] = len(self.refs)
            self.refs.append((mapping.offset, mapping.size, mapping.sent_as))
            self.in_order.append(mapping)
            self.windows.append(window)
        return known


#: Modules whose functions are met in the pickle of nearly every array.
_BY_NAME = frozenset({"forkshm.integrations.numpy", "numpy._core.numeric", "numpy.core.numeric"})


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """cloudpickle's C pickler, with reducers of ours in front."""

    known: Known = NOTHING_KNOWN

    def reducer_override(self, thing: Any) -> Any:
        kind = type(thing)
        if kind is FunctionType:
            if thing.__module__ in _BY_NAME or is_known(thing, self.known):
                # By name: pickle's own way, in a tenth of the time that cloudpickle
                # takes to find that out, or where it would send a copy.
                return NotImplemented
        elif isinstance(thing, type) and is_known(thing, self.known):
            return NotImplemented
        reduce = find(kind)
        if reduce is not None:
            return reduce(thing)
        return super().reducer_override(thing)


def pack(thing: Any, *, for_many: bool = False, known: Known = NOTHING_KNOWN) -> Parcel:
    """Pickle *thing*; copy its large buffers, once, into one block of the arena.

    Args:
        thing: Anything that cloudpickle can pickle. Buffers inside shared memory cross
            as descriptors.
        for_many: The parcel goes to more than one receiver: each maps the copies
            copy-on-write, so that none sees another's writes.
        known: What of ``__main__`` the receivers have, and so crosses by name.

    Raises:
        OSError: The kernel has no memory or fds for the copies.
        Exception: Whatever pickling the object raises.
    """
    kind = type(thing)
    if kind in _PLAIN or (
        kind in (tuple, list) and len(thing) < INLINE_LIMIT // 16 and _PLAIN.issuperset(map(type, thing))
    ):
        stream = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        if len(stream) <= INLINE_LIMIT:
            return Parcel(write_plain(len(stream)) + stream)
    sink = _Sink()
    buffers = _Buffers()
    if kind is tuple and _is_simple_call(thing):
        simple = pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers)
        simple.dispatch_table = dispatch_table
        simple.dump(thing)
    else:
        pickler = _Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers)
        pickler.known = known
        pickler.dump(thing)
    if not buffers.spans and sink.size <= INLINE_LIMIT:
        return Parcel(b"".join([write_plain(sink.size), *sink.pieces]))
    if len(buffers.refs) == len(buffers.spans) == 1 and not buffers.copies and sink.size < INLINE_LIMIT // 2:
        head_and_tables = write_one_region(buffers.refs[0], buffers.spans[0], sink.size)
        parcel = Parcel(b"".join([head_and_tables, *sink.pieces]), None, buffers.in_order, buffers.windows)
        parcel.shared = buffers.shared
        return parcel
    return _assemble(sink, buffers, for_many=for_many)


def _is_simple_call(thing: tuple[Any, ...]) -> bool:
    """Tell whether *thing* is (args, {}) and the arguments are numbers, arrays and regions.

    Most calls are. cloudpickle would find nothing to do in them, in half the time of all.
    """
    return (
        len(thing) == 2
        and type(thing[0]) is tuple
        and not thing[1]
        and len(thing[0]) <= 16
        and simple_kinds.issuperset(map(type, thing[0]))
    )


def _assemble(sink: _Sink, buffers: _Buffers, *, for_many: bool) -> Parcel:
    tables = body_tables(buffers.refs, buffers.spans)
    body_size = len(tables) + sink.size
    body_in_block = body_size > INLINE_LIMIT
    lease = None
    block_ref = None
    copied = sum(view.nbytes for _, view in buffers.copies)
    if body_in_block or buffers.copies:
        start = 0
        if body_in_block:
            # The spans were numbered from 0; now the body comes first.
            start = round_up(body_size, ALIGNMENT)
            spans = [
                (region, offset + start if region == BLOCK else offset, nbytes)
                for region, offset, nbytes in buffers.spans
            ]
            tables = body_tables(buffers.refs, spans)
            copied += body_size
        block = arena.allocate(start + buffers.copied)
        try:
            if body_in_block:
                position = 0
                for piece in (tables, *sink.pieces):
                    block.write(position, piece, len(piece))
                    position += len(piece)
            for offset, view in buffers.copies:
                block.write(start + offset, view, view.nbytes)
        except BaseException:
            arena.free(block)
            raise
        lease = arena.lend(block)
        block_ref = BlockRef(block.offset, block.size, for_many)
    head = write(
        Head(
            block_ref,
            body_in_block=body_in_block,
            regions=len(buffers.refs),
            spans=len(buffers.spans),
            body_size=body_size,
        )
    )
    data = head if body_in_block else b"".join([head, tables, *sink.pieces])
    parcel = Parcel(data, lease, buffers.in_order, buffers.windows)
    parcel.copied = copied
    parcel.shared = buffers.shared
    return parcel


def crosses_by_name(function: Callable[..., Any], known: Known) -> bool:
    """Tell whether *function* crosses as its name only, so that its parcel never changes."""
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    if not module or not name or "<" in name:
        return False
    if module == "__main__":
        return isinstance(function, (FunctionType, type)) and is_known(function, known)
    sink = _Sink()
    _Pickler(sink, pickle.HIGHEST_PROTOCOL).dump(function)
    try:
        return b"".join(sink.pieces) == pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
