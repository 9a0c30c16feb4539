"""Objects to parcels."""

from __future__ import annotations

import pickle
from types import FunctionType
from typing import TYPE_CHECKING, Any

import cloudpickle

from forkshm._ledger import describe, ledger
from forkshm.backend import kernel
from forkshm.descriptor._tables import BLOCK, BlockRef, Head, body_tables, write, write_one_region, write_plain
from forkshm.pickler import _names
from forkshm.pickler._collect import Collector, Copies, Repeats, room_for
from forkshm.pickler._names import NOTHING_KNOWN, Known, is_known
from forkshm.pickler._policy import ALIGNMENT, INLINE_LIMIT, OUT_OF_BAND
from forkshm.pickler._reducers import dispatch_table, find, simple_kinds, simple_when
from forkshm.pickler._repeat import Repeat
from forkshm.pickler._view import Begin, End, View, second
from forkshm.region._arena import arena
from forkshm.region._segment import Share
from forkshm.region._table import round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from forkshm.region._segment import Lease

__all__ = ("Packing", "Parcel", "Repeats", "begin", "is_name", "pack", "pack_by_name")

#: Objects of these types pickle to a few bytes, and nothing in them needs our pickler.
_PLAIN = frozenset({int, float, bool, type(None), complex})
#: And of these, when they are short.
_PLAIN_OR_TEXT = _PLAIN | {str, bytes}


class Parcel:
    """One object, ready to be sent any number of times; close it when it has been.

    Attributes:
        data: What goes into the message.
        copied: Bytes of buffers and stream that were copied into the arena.
        shared: Bytes of buffers that cross as descriptors.
    """

    __slots__ = ("_keep", "_leases", "_parked", "copied", "data", "fds", "shared")

    def __init__(self, data: bytes, fds: Sequence[int] = (), leases: Sequence[Lease] = (), keep: Any = None) -> None:
        self.data = data
        #: What goes beside the message.
        self.fds = fds
        self._leases = leases
        self._parked: list[tuple[int, Lease]] = []
        self._keep = keep  # the windows of the mappings: their fds stay open with them
        self.copied = 0
        self.shared = 0

    def finish(self, *, for_many: bool = False) -> Parcel:
        """Return the parcel, which is ready; see `Packing.finish`."""
        return self

    def park(self) -> None:
        """Keep the copies, and no fds for them, until `unpark`."""
        places = {fd: place for place, fd in enumerate(self.fds)}
        self._parked = [(places[lease.fd], lease) for lease in self._leases]
        for lease in self._leases:
            lease.park()

    def unpark(self) -> None:
        """Be ready to be sent again.

        Raises:
            OSError: The limit on open files is reached; try later.
        """
        if self._parked:
            for _, lease in self._parked:
                lease.unpark()
            fds = list(self.fds)
            for place, lease in self._parked:
                fds[place] = lease.fd
            self.fds = fds
            self._parked = []

    def close(self) -> None:
        """Let go of what was held for sending. Closing twice is allowed."""
        for lease in self._leases:
            lease.close()
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


#: Modules whose functions are met in the pickle of nearly every array.
_BY_NAME = frozenset({"forkshm.integrations.numpy", "numpy._core.numeric", "numpy.core.numeric"})


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """cloudpickle's C pickler, with reducers of ours in front."""

    known: Known = NOTHING_KNOWN
    collector: Collector

    def reducer_override(self, thing: Any) -> Any:
        kind = type(thing)
        if kind is FunctionType:
            if thing.__module__ in _BY_NAME or is_known(thing, self.known):
                # By name: pickle's own way, in a tenth of the time that cloudpickle
                # takes to find that out, or where it would send a copy.
                return NotImplemented
        elif isinstance(thing, type) and is_known(thing, self.known):
            return NotImplemented
        elif kind in _names.named_kinds and is_known(thing, self.known):
            return thing.__qualname__
        reduce = find(kind)
        if reduce is not None:
            return reduce(thing)
        if kind in _MARKS:
            return self._mark(thing)
        return super().reducer_override(thing)

    def _mark(self, thing: Any) -> Any:
        # What is between two marks is pickled between them, and arrives without them.
        if isinstance(thing, View):
            return second, (Begin(thing.mode), thing.value, End())
        if isinstance(thing, Repeat):
            return second, (_BeginRepeat(thing.value), thing.value, _EndRepeat())
        if isinstance(thing, Begin):
            self.collector.begin(thing.mode)
        elif isinstance(thing, End):
            self.collector.end()
        elif isinstance(thing, _BeginRepeat):
            self.collector.begin_repeat(thing.value)
        else:
            self.collector.end_repeat()
        return int, ()


class _BeginRepeat:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _EndRepeat:
    __slots__ = ()


_MARKS = frozenset({View, Repeat, Begin, End, _BeginRepeat, _EndRepeat})


def pack(thing: Any, *, for_many: bool = False, known: Known = NOTHING_KNOWN, repeats: Repeats | None = None) -> Parcel:
    """Pickle *thing*; copy its large buffers, once, into one block of the arena.

    Args:
        thing: Anything that cloudpickle can pickle. Buffers inside shared memory cross
            as descriptors, and so do copies that arrived from others.
        for_many: The parcel goes to more than one receiver: each maps the copies
            copy-on-write, so that none sees another's writes.
        known: What of ``__main__`` the receivers have, and so crosses by name.
        repeats: Copies that other parcels have in common with this one.

    Raises:
        OSError: The kernel has no memory or fds for the copies.
        RegionAccessError: See `view`.
        Exception: Whatever pickling the object raises.
    """
    return begin(thing, known=known, repeats=repeats).finish(for_many=for_many)


def begin(thing: Any, *, known: Known = NOTHING_KNOWN, repeats: Repeats | None = None) -> Packing | Parcel:
    """Pickle *thing*, and leave the rest of `pack` to `Packing.finish`.

    Who has no more use for *thing* drops it in between. Then memory that came from
    elsewhere is the receiver's alone, and need not be mapped copy-on-write.
    """
    parts = _parts(thing)
    kinds = set(map(type, parts)) if len(parts) <= _MANY else None
    if kinds is not None and (
        _PLAIN.issuperset(kinds)
        or (
            _PLAIN_OR_TEXT.issuperset(kinds)
            and sum(len(part) for part in parts if type(part) not in _PLAIN) < INLINE_LIMIT // 4
        )
    ):
        stream = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        if len(stream) <= INLINE_LIMIT:
            return Parcel(write_plain(len(stream)) + stream)
    sink = _Sink()
    collector = Collector(repeats)
    try:
        if kinds is not None and simple_kinds.issuperset(kinds) and _are_simple(parts):
            # Most calls, chunks and results are so. cloudpickle would find nothing to do in
            # them, in half the time of all.
            collector.is_alone = sum(type(part) not in _PLAIN for part in parts) == 1
            simple = pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=collector)
            simple.dispatch_table = dispatch_table
            simple.dump(thing)
        else:
            pickler = _Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=collector)
            pickler.known = known
            pickler.collector = collector
            try:
                pickler.dump(thing)
            except BaseException:
                pickler.clear_memo()  # it has the buffers, and the traceback has it
                raise
    except BaseException:
        collector.give_up()
        raise
    return Packing(sink, collector)


def _parts(thing: Any) -> Sequence[Any]:
    """Return what is in *thing*: arguments of a call, which is (args, {}), items, or itself."""
    kind = type(thing)
    if kind is tuple and len(thing) == 2 and type(thing[0]) is tuple and type(thing[1]) is dict and not thing[1]:
        return thing[0]
    return thing if kind in (list, tuple) else (thing,)


def _are_simple(parts: Sequence[Any]) -> bool:
    """Tell whether parts of simple kinds are simple."""
    for part in parts:
        simple = simple_when.get(type(part))
        if simple is not None and not simple(part):
            return False
    return True


#: Of more parts it is not asked what they are.
_MANY = 1000


class Packing:
    """An object that is pickled, and not yet copied."""

    __slots__ = ("_collector", "_sink")

    def __init__(self, sink: _Sink, collector: Collector) -> None:
        self._sink = sink
        self._collector = collector

    def finish(self, *, for_many: bool = False) -> Parcel:
        """Copy what has to be, and return the parcel. Call it once."""
        sink, collector = self._sink, self._collector
        if not collector.spans and sink.size <= INLINE_LIMIT:
            return Parcel(b"".join([write_plain(sink.size), *sink.pieces]))
        try:
            collector.settle(for_many=for_many)
            if len(collector.refs) == len(collector.spans) == 1 and sink.size < INLINE_LIMIT // 2:
                head_and_tables = write_one_region(collector.refs[0], collector.spans[0], sink.size)
                parcel = Parcel(
                    b"".join([head_and_tables, *sink.pieces]), collector.fds, collector.leases, collector.keep
                )
            elif len(collector.copies) == len(collector.spans) == 1 and sink.size < INLINE_LIMIT // 2:
                parcel = _copy_one(sink, collector, for_many=for_many)
            else:
                parcel = _assemble(sink, collector, for_many=for_many)
        except BaseException:
            for lease in collector.leases:
                lease.close()
            raise
        parcel.copied += collector.copied
        parcel.shared = collector.shared
        ledger.bytes_copied += parcel.copied
        ledger.bytes_shared += parcel.shared
        return parcel


def _copy_one(sink: _Sink, collector: Collector, *, for_many: bool) -> Parcel:
    """The short way of `_assemble` for one buffer: most arrays are sent so."""
    address, nbytes, _, for_reading = collector.copies[0]
    if nbytes < OUT_OF_BAND or for_reading:
        return _assemble(sink, collector, for_many=for_many)
    block = room_for(nbytes)
    try:
        block.copy(0, address, nbytes)
    except BaseException:
        arena.free(block)
        raise
    lease = arena.lend(block)
    collector.leases.append(lease)
    ref = block.offset, block.size, Share.private if for_many else Share.exclusive
    parcel = Parcel(
        b"".join([write_one_region(ref, (BLOCK, 0, nbytes), sink.size), *sink.pieces]), [lease.fd], collector.leases
    )
    parcel.copied = nbytes
    if ledger.watches:
        ledger.note([(nbytes, describe(collector.views[0].obj))], "sent")
    return parcel


def _assemble(sink: _Sink, collector: Collector, *, for_many: bool) -> Parcel:
    # Head and tables have the same length whatever stands in them.
    tables_size = len(body_tables(collector.refs, collector.spans, collector.places))
    body_size = tables_size + sink.size
    body_in_block = body_size > INLINE_LIMIT
    copies = collector.place(round_up(body_size, ALIGNMENT) if body_in_block else 0, inline=not body_in_block)
    body = [body_tables(collector.refs, collector.spans, collector.places), *sink.pieces]
    if copies.inline_size:
        inline = bytearray(copies.inline_size)
        for address, nbytes, where in copies.inline:
            inline[where : where + nbytes] = kernel.bytes_at(address, nbytes)
        body.append(inline)
        body_size += copies.inline_size
    fds, leases, block_ref = collector.fds, collector.leases, None
    copied = copies.copied
    if copies.block_size:
        block = room_for(copies.block_size)
        try:
            if body_in_block:
                copied += body_size
                position = 0
                for piece in body:
                    block.write(position, piece, len(piece))
                    position += len(piece)
            for address, nbytes, where in copies.block:
                block.copy(where, address, nbytes)
        except BaseException:
            arena.free(block)
            raise
        lease = arena.lend(block)
        leases.append(lease)
        fds = [lease.fd, *fds]
        block_ref = BlockRef(block.offset, block.size, for_many)
    head = write(
        Head(
            block_ref,
            body_in_block=body_in_block,
            regions=len(collector.refs),
            spans=len(collector.spans),
            body_size=body_size,
            inline=copies.inline_size,
            files=len(collector.fds),
        )
    )
    parcel = Parcel(head if body_in_block else b"".join([head, *body]), fds, leases, collector.keep)
    parcel.copied = copied
    if copied and ledger.watches:
        ledger.note(_what_was_copied(collector, copies, sink.pieces if body_in_block else [], body_size), "sent")
    return parcel


def _what_was_copied(
    collector: Collector, copies: Copies, pieces: Sequence[Any], body_size: int
) -> Iterator[tuple[int, str]]:
    """Yield bytes and description of what went into a block."""
    for begin, nbytes, _ in copies.block:
        inside = [
            (copy[1], view)
            for copy, view in zip(collector.copies, collector.views, strict=True)
            if begin <= copy[0] < begin + nbytes
        ]
        yield nbytes, describe(max(inside, key=lambda pair: pair[0])[1].obj)
    if pieces:
        # pickle writes what is large as it is, between its frames.
        for piece in pieces:
            if len(piece) >= OUT_OF_BAND and piece[:1] not in _FRAME_STARTS:
                body_size -= len(piece)
                yield len(piece), "bytes or str"
        yield body_size, "pickle stream"


_FRAME_STARTS = (pickle.PROTO, pickle.FRAME)
#: The end of a stream that has one thing, and that of a module.
_FOUND_BY_NAME = pickle.STACK_GLOBAL + pickle.MEMOIZE + pickle.STOP


def is_name(stream: bytes) -> bool:
    """Tell whether a pickle stream is a name to be looked up, and not what makes an object of what it holds."""
    return stream.endswith(_FOUND_BY_NAME)


def pack_by_name(function: Callable[..., Any], known: Known) -> Parcel | None:
    """Return the parcel of a function that crosses as its name only, and so never changes; None for any other."""
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", None)
    if not module or not name or "<" in name:
        return None
    kind = type(function)
    if module == "__main__":
        if not isinstance(function, _names.named_kinds) or not is_known(function, known):
            return None
        if kind is not FunctionType and not isinstance(function, type):
            return pack(function, known=known)
        stream = pickle.dumps(function, pickle.HIGHEST_PROTOCOL)
    else:
        sink = _Sink()
        _Pickler(sink, pickle.HIGHEST_PROTOCOL).dump(function)
        stream = b"".join(sink.pieces)
        try:
            if not is_name(stream) or stream != pickle.dumps(function, pickle.HIGHEST_PROTOCOL):
                return None
        except (pickle.PicklingError, TypeError, AttributeError):
            return None
    return Parcel(write_plain(len(stream)) + stream)
