"""Turns objects into payloads."""

from __future__ import annotations

import collections
import errno
import io
import pickle
import sys
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import cloudpickle

from forkshm._ledger import describe, ledger
from forkshm.backend import kernel
from forkshm.descriptor import (
    BLOCK,
    IDENTITY_SIZE,
    LOOSE,
    READ_ONLY,
    BlockRef,
    Head,
    body_tables,
    size_of_tables,
    write_one_region,
    write_plain,
    write_tables,
)
from forkshm.pickler import _names, _reducers
from forkshm.pickler._annotations import reduce_function, with_annotations
from forkshm.pickler._attributes import attribute_of
from forkshm.pickler._code import OF_DECORATORS, global_names, reduce_array_type, reduce_code, with_slots
from forkshm.pickler._collect import Collector, Copies, Group, Repeats, fill, room_for
from forkshm.pickler._exceptions import reduce_exception
from forkshm.pickler._large import Text, has_large_bytes, is_large_text, with_large_text
from forkshm.pickler._names import (
    NO_NAMES,
    GlobalsOfMain,
    ImportableNames,
    changed_globals,
    is_importable,
    is_of_unimported_module,
    is_unchanged,
    left_to_receiver,
)
from forkshm.pickler._policy import ALIGNMENT, INLINE_LIMIT, OUT_OF_BAND
from forkshm.pickler._reducers import (
    MIN_BUNDLE,
    complete,
    dispatch_table,
    find,
    own_bytes_of,
    plain_kinds,
    plain_or_text_kinds,
    simple_kinds,
    simple_when,
    unfinished,
)
from forkshm.pickler._repeat import Repeat
from forkshm.pickler._view import Begin, End, View, second
from forkshm.region import round_up
from forkshm.region.blocks import Share, arena

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from forkshm.region.blocks import Lease

__all__ = (
    "Payload",
    "PendingPayload",
    "Repeats",
    "SmallStream",
    "begin",
    "is_name",
    "pack",
    "pack_by_name",
    "small_stream",
    "still_by_name",
    "tiny_stream",
)


class Payload:
    """One object, ready to be sent any number of times. Close it when it is no longer sent.

    Attributes:
        data: The bytes for the message.
        copied: Bytes of buffers and stream that were copied into the arena.
        shared: Bytes of buffers that are sent as descriptors.
    """

    __slots__ = ("_keep", "_leases", "_parked", "copied", "data", "fds", "shared")

    def __init__(self, data: bytes, fds: Sequence[int] = (), leases: Sequence[Lease] = (), keep: Any = None) -> None:
        self.data = data
        # The fds to send beside the message.
        self.fds = fds
        self._leases = leases
        self._parked: list[tuple[int, Lease]] = []
        self._keep = keep  # the exporters of the mappings: their fds stay open while these live
        self.copied = 0
        self.shared = 0

    def finish(self, *, for_many: bool = False) -> Payload:
        """Return the payload itself, which is complete; see `PendingPayload.finish`."""
        return self

    def park(self) -> None:
        """Keep the copies but close their fds, until `unpark`."""
        places = {fd: place for place, fd in enumerate(self.fds)}
        self._parked = [(places[lease.fd], lease) for lease in self._leases]
        for lease in self._leases:
            lease.park()

    def unpark(self) -> None:
        """Reopen the fds, so that the payload can be sent again.

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
        """Release the memory that was held for sending. Closing twice is allowed."""
        for lease in self._leases:
            lease.close()
        self._keep = None


class _Nowhere:
    """A file that discards all data."""

    def write(self, piece: Any) -> int:
        return len(piece)


class _Sink:
    """A file for a pickler to write to. It keeps the pieces, without copying large ones."""

    __slots__ = ("pieces", "size")

    def __init__(self) -> None:
        self.pieces: list[Any] = []
        self.size = 0

    def write(self, piece: Any) -> int:
        self.pieces.append(piece)
        nbytes = len(piece)
        self.size += nbytes
        return nbytes


# Modules whose functions occur in the pickle of nearly every array.
_BY_NAME = frozenset({"forkshm.integrations.numpy", "numpy._core.numeric", "numpy.core.numeric"})


def _refuse(thing: Any) -> Any:
    """Reject objects that cloudpickle would change: files become their content, memoryviews become ``bytes``."""
    if thing is sys.stdout:
        return getattr, (sys, "stdout")
    if thing is sys.stderr:
        return getattr, (sys, "stderr")
    kind = type(thing)
    if kind is memoryview:
        raise TypeError(
            f"cannot pickle a memoryview of {thing.nbytes:,} bytes: send what it is a view of, or a copy, bytes(view)"
        )
    raise TypeError(
        f"cannot pickle '{kind.__module__}.{kind.__qualname__}' object {getattr(thing, 'name', '')!r}: an open file "
        "belongs to this process; send its path, and open it there"
    )


REFUSED: dict[type, Any] = {io.TextIOWrapper: _refuse, memoryview: _refuse}
"""For the dispatch table of a pickler: rejects objects that cloudpickle would change."""

_OF_CLOUDPICKLE: Any = cloudpickle.Pickler.dispatch_table


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """cloudpickle's C pickler, with forkshm's reducers in front."""

    dispatch_table: ClassVar[Any] = collections.ChainMap(
        # As many maps as cloudpickle has: each map without the key costs an exception.
        {**_OF_CLOUDPICKLE.maps[0], **REFUSED, **OF_DECORATORS, CodeType: reduce_code},
        *_OF_CLOUDPICKLE.maps[1:],
    )
    importable: ImportableNames = NO_NAMES
    collector: Collector
    # Whether this pickles an exception of a chain. The chain is pickled by the exception that begins it.
    in_chain = False

    def reducer_override(self, thing: Any) -> Any:
        kind = type(thing)
        if kind is FunctionType:
            if thing.__module__ in _BY_NAME:
                return NotImplemented
            if is_importable(thing, self.importable):
                # Pickle sends the name. This takes a tenth of the time that cloudpickle needs to find out that
                # it can, and cloudpickle would send some of these functions by value.
                return NotImplemented if is_unchanged(thing, self.importable) else self._with_changed_globals(thing)
            if thing.__module__ == "__main__":
                return self._with_globals_of_receiver(thing)
        elif isinstance(thing, type):
            if is_importable(thing, self.importable):
                if is_unchanged(thing, self.importable):
                    return NotImplemented
            elif is_of_unimported_module(thing):
                return NotImplemented
            return reduce_array_type(thing) or with_slots(
                thing, with_annotations(thing, super().reducer_override(thing))
            )
        elif (
            kind in _names.named_kinds
            and is_importable(thing, self.importable)
            and is_unchanged(thing, self.importable)
        ):
            return thing.__qualname__
        reduce = find(kind)
        if reduce is not None:
            return reduce(thing)
        if kind in _MARKS:
            return self._mark(thing)
        if isinstance(thing, BaseException):
            return reduce_exception(thing, None if self.in_chain else self._dump_of_chain)
        if kind is FunctionType:
            return reduce_function(super().reducer_override, thing)
        return super().reducer_override(thing)

    def _dump_of_chain(self, error: BaseException) -> bytes:
        file = io.BytesIO()
        pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
        pickler.importable = self.importable
        pickler.collector = Collector()
        pickler.in_chain = True
        pickler.dump(error)
        return file.getvalue()

    def _with_changed_globals(self, function: FunctionType) -> Any:
        # By value, with the globals that were rebound; the others are looked up in the receiver's module.
        parts: Any = reduce_function(super().reducer_override, function)
        is_changed = changed_globals(self.importable)
        state = parts[2][1]
        sent = {
            name: value
            for name, value in state["__globals__"].items()
            if is_changed(name, value) and self._can_be_sent(value)
        }
        state["__globals__"] = GlobalsOfMain(sent, [name for name in global_names(function) if name not in sent])
        return parts

    def _with_globals_of_receiver(self, function: FunctionType) -> Any:
        parts: Any = reduce_function(super().reducer_override, function)
        if not isinstance(parts, tuple):
            return parts
        state = parts[2][1]
        sent = state["__globals__"]
        if found_there := left_to_receiver(sent, self.importable):
            state["__globals__"] = GlobalsOfMain(
                {name: value for name, value in sent.items() if name not in found_there}, found_there
            )
        return parts

    def _can_be_sent(self, value: Any) -> bool:
        if isinstance(value, _names.named_kinds):
            return True
        trial = _Pickler(_Nowhere(), pickle.HIGHEST_PROTOCOL, buffer_callback=lambda _: False)
        trial.importable = self.importable
        trial.collector = Collector()
        try:
            trial.dump(value)
        except Exception:
            return False  # a pool, a lock, a file: under its name, the receiver has its own
        return True

    def _mark(self, thing: Any) -> Any:
        # Objects between two marks are pickled between them, and arrive without them.
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


def pack(
    thing: Any, *, for_many: bool = False, importable: ImportableNames = NO_NAMES, repeats: Repeats | None = None
) -> Payload:
    """Pickle *thing*; copy its large buffers, once, into one block of the arena.

    Args:
        thing: Anything that cloudpickle can pickle. Buffers inside shared memory are sent as descriptors, and so are
            copies that were received.
        for_many: The payload goes to more than one receiver. Each maps the copies copy-on-write, so that none sees
            another's writes.
        importable: The names of ``__main__`` that the receivers have, which are therefore sent by name.
        repeats: Copies that other payloads have in common with this one.

    Raises:
        OSError: The kernel has no memory or fds for the copies.
        RegionAccessError: See `view`.
        Exception: Whatever pickling the object raises.
    """
    return begin(thing, importable=importable, repeats=repeats).finish(for_many=for_many)


def begin(
    thing: Any, *, importable: ImportableNames = NO_NAMES, repeats: Repeats | None = None
) -> PendingPayload | Payload:
    """Pickle *thing*, and leave the rest of `pack` to `PendingPayload.finish`.

    A caller that no longer needs *thing* drops it in between. Then the receiver may become the only user of memory that
    *thing* received, which need not be mapped copy-on-write.
    """
    if unfinished:
        complete()
    parts = _parts(thing)
    if len(parts) == 1 and (is_simple := simple_when.get(type(parts[0]))) is not None and is_simple(parts[0]):
        # A fast path of the code below: a single array.
        return _begin_simple(thing, Collector(repeats), is_alone=True)
    kinds = set(map(type, parts)) if len(parts) <= _MANY else None
    if kinds is not None and (
        plain_kinds >= kinds
        or (
            plain_or_text_kinds >= kinds
            and sum(len(part) for part in parts if type(part) not in plain_kinds) < INLINE_LIMIT // 4
        )
    ):
        stream = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
        if len(stream) <= INLINE_LIMIT:
            return Payload(write_plain(len(stream)) + stream)
    if (
        kinds is not None
        and str in kinds
        and any(map(is_large_text, parts))
        # No part can refer to the list or tuple itself, so another one can be sent in its place.
        and (parts is not thing or simple_kinds >= kinds - plain_or_text_kinds)
    ):
        thing = with_large_text(thing, parts)
        parts = _parts(thing)
        kinds = (kinds - {str}) | {Text} | set(map(type, parts))
    sink = _Sink()
    collector = Collector(repeats)
    try:
        if kinds is None or len(parts) >= MIN_BUNDLE or (not kinds.isdisjoint(_CONTAINERS) and _has_many(parts)):
            bundled = _bundled(thing, parts)
            if bundled is True:
                in_stream = pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL)
                in_stream.dispatch_table = _reducers.in_stream_table
                in_stream.dump(thing)
                return PendingPayload(sink, collector)
            if bundled is not False:
                thing = bundled
                parts = _parts(thing)
                kinds = set(map(type, parts)) if len(parts) <= _MANY else None
        found = None if kinds is None else parts if simple_kinds >= kinds else _flat(parts)
        if found is not None and _are_simple(found):
            # Most calls, chunks and results are of this kind. cloudpickle would find nothing to do in them, and that
            # would take half of the total time.
            return _begin_simple(thing, collector, is_alone=_are_apart(found))
        pickler = _Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=collector)
        pickler.importable = importable
        pickler.collector = collector
        try:
            pickler.dump(thing)
        except BaseException:
            pickler.clear_memo()  # the memo holds the buffers, and the traceback holds the memo
            raise
        collector.decide()
    except BaseException:
        collector.give_up()
        raise
    return PendingPayload(sink, collector)


def _begin_simple(thing: Any, collector: Collector, *, is_alone: bool) -> PendingPayload:
    sink = _Sink()
    collector.is_alone = is_alone
    try:
        simple = pickle.Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=collector)
        simple.dispatch_table = dispatch_table
        simple.dump(thing)
        if collector.of_blocks:
            collector.decide()
    except BaseException:
        collector.give_up()
        raise
    return PendingPayload(sink, collector)


class SmallStream(NamedTuple):
    """The whole pickle of an object, with its buffers beside the stream."""

    stream: bytes
    memory: bytearray
    places: list[tuple[int, int, bool]]
    """For each buffer: start and end in the memory, and whether it is read-only. Buffers may overlap."""


def small_stream(thing: Any, limit: int, importable: ImportableNames = NO_NAMES) -> SmallStream | None:
    """Return the whole pickle of *thing*, or None if it has more than *limit* bytes, or contains shared memory.

    Raises:
        Exception: Whatever pickling the object raises.
    """
    sink = _Sink()
    collector = Collector()
    try:
        pickler = _Pickler(sink, pickle.HIGHEST_PROTOCOL, buffer_callback=collector)
        pickler.importable = importable
        pickler.collector = collector
        pickler.dump(thing)
        if len(collector.copies) < len(collector.spans):
            return None
        copies = collector.place(0, inline=False, alone=False)
        if sink.size + copies.block_size > limit:
            return None
        memory = bytearray(copies.block_size)
        for address, nbytes, where in copies.block:
            memory[where : where + nbytes] = kernel.bytes_at(address, nbytes)
        places = [(start, start + nbytes, region in _FOR_READING) for region, start, nbytes in collector.spans]
        return SmallStream(b"".join(sink.pieces), memory, places)
    finally:
        collector.give_up()


_FOR_READING = frozenset({BLOCK - READ_ONLY, LOOSE - READ_ONLY})


def tiny_stream(thing: Any) -> bytes | None:
    """Return the pickle of a number or short text, or of a list of one; None for any other object.

    This is a fast path of `pack` for the results of tiny tasks.
    """
    part = thing[0] if type(thing) is list and len(thing) == 1 else thing
    kind = type(part)
    if kind not in plain_kinds and not (kind in plain_or_text_kinds and len(part) < _TINY):
        return None
    stream = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
    return stream if len(stream) < _TINY else None


# Longest text, in bytes, for `tiny_stream`.
_TINY = 2048


def _parts(thing: Any) -> Sequence[Any]:
    """Return the parts of *thing*: the arguments of a call (args, {}), the items of a container, or itself."""
    kind = type(thing)
    if kind is tuple and len(thing) == 2 and type(thing[0]) is tuple and type(thing[1]) is dict and not thing[1]:
        return thing[0]
    return thing if kind in (list, tuple) else (thing,)


def _are_simple(parts: Sequence[Any]) -> bool:
    """Return whether every part is simple."""
    for part in parts:
        simple = simple_when.get(type(part))
        if simple is not None and not simple(part):
            return False
    return True


# Above this many parts, skip the per-type check.
_MANY = 1000

_CONTAINERS = (list, tuple, dict)


def _flat(parts: Sequence[Any], depth: int = 0) -> list[Any] | None:
    """Return the simple objects in small containers, without short texts; None if there are other objects."""
    flat: list[Any] = []
    for part in parts:
        kind = type(part)
        if kind in simple_kinds:
            flat.append(part)
        elif kind in plain_or_text_kinds:
            if len(part) >= _TINY:
                return None
        elif kind in _CONTAINERS and len(part) < MIN_BUNDLE and depth < _DEEPEST:
            if kind is dict and not plain_or_text_kinds >= set(map(type, part)):
                return None
            inner = _flat(list(part.values()) if kind is dict else part, depth + 1)
            if inner is None:
                return None
            flat += inner
        else:
            return None
    return flat


# Bytes of the stream for one array, without its elements.
_ROOM_FOR_ARRAY = 128

# Nesting depth of the containers that `_flat` and `_has_many` search.
_DEEPEST = 3


def _are_apart(parts: Sequence[Any]) -> bool:
    """Return whether no part can be a view of another, and all small ones together fit into a message."""
    others = [part for part in parts if type(part) not in plain_kinds]
    if len(others) == 1:
        return True
    inline = 0
    for part in others:
        own_bytes = own_bytes_of.get(type(part))
        nbytes = -1 if own_bytes is None else own_bytes(part)
        if nbytes < 0:
            return False
        if nbytes < OUT_OF_BAND:
            inline += nbytes
    return inline + _ROOM_FOR_ARRAY * len(others) <= INLINE_LIMIT


def _has_many(parts: Sequence[Any], depth: int = 0) -> bool:
    """Return whether a part, or a value in a dict, is a container of many objects."""
    for part in parts:
        kind = type(part)
        if kind in _CONTAINERS:
            if len(part) >= MIN_BUNDLE:
                return True
            if part and kind is dict and depth < _DEEPEST:  # a dict may contain itself
                inner = [value for value in part.values() if type(value) in _CONTAINERS]
                if _has_many(inner, depth + 1):
                    return True
    return False


def _bundled(thing: Any, parts: Sequence[Any]) -> Any:
    """Return *thing* with bundles in place of containers of many small parts, or False if there are none.

    Return True when all of it can be sent without asking where the memory of its parts lies.
    """
    kind = type(thing)
    args: Sequence[Any] = (thing,)
    kwargs: dict[Any, Any] = {}
    is_call = kind is tuple and len(thing) == 2 and type(thing[0]) is tuple and type(thing[1]) is dict
    if is_call:
        args, kwargs = thing
    elif kind in (list, tuple) and (not thing or type(thing[0]) in _CONTAINERS):
        args = thing  # the arguments of a map, each of which may be a container
    many = [part for part in (*args, *kwargs.values()) if type(part) in _CONTAINERS and len(part) >= MIN_BUNDLE]
    if not many and args is thing and len(thing) >= MIN_BUNDLE:
        many, args = [thing], (thing,)
    if not many or len(many) > _MANY:
        return False
    if _reducers.bundler is None:
        first = many[0]
        find(type(next(iter(first.values() if type(first) is dict else first))))
        if _reducers.bundler is None:
            return False
    is_all = len(many) == 1 and all(
        part is many[0] or type(part) in plain_or_text_kinds for part in (*args, *kwargs.values())
    )
    made = {id(part): _reducers.bundler(part, is_all=is_all) for part in many}
    if True in made.values():
        return True
    made = {key: bundle for key, bundle in made.items() if bundle is not False}
    if not made:
        return False
    new_args = [made.get(id(part), part) for part in args]
    if is_call:
        return tuple(new_args), {key: made.get(id(part), part) for key, part in kwargs.items()}
    return kind(new_args) if args is thing else new_args[0]


class PendingPayload:
    """A pickled object whose buffers are not copied yet."""

    __slots__ = ("_collector", "_sink")

    def __init__(self, sink: _Sink, collector: Collector) -> None:
        self._sink = sink
        self._collector = collector

    def finish(self, *, for_many: bool = False) -> Payload:
        """Copy the buffers that have to be copied, and return the payload. Call it once."""
        sink, collector = self._sink, self._collector
        if not collector.spans and sink.size <= INLINE_LIMIT:
            return Payload(b"".join([write_plain(sink.size), *sink.pieces]))
        try:
            if collector.handed_on:
                collector.settle(for_many=for_many)
            if len(collector.spans) != 1 or sink.size >= _FEW_IN_STREAM:
                payload = _assemble(sink, collector, for_many=for_many)
            elif collector.copies:
                payload = _copy_one(sink, collector, for_many=for_many)
            else:
                head_and_tables = write_one_region(collector.refs[0], collector.spans[0], sink.size)
                payload = Payload(
                    b"".join([head_and_tables, *sink.pieces]), collector.fds, collector.leases, collector.keep
                )
        except BaseException:
            for lease in collector.leases:
                lease.close()
            raise
        payload.copied += collector.copied
        payload.shared = collector.shared
        ledger.bytes_copied += payload.copied
        ledger.bytes_shared += payload.shared
        return payload


# The stream of a single buffer is short enough to stay in the message.
_FEW_IN_STREAM = INLINE_LIMIT // 2


def _copy_one(sink: _Sink, collector: Collector, *, for_many: bool) -> Payload:
    """Assemble a payload with one buffer: a fast path of `_assemble`, which most arrays take."""
    address, nbytes, _, for_reading = collector.copies[0]
    if nbytes < OUT_OF_BAND or for_reading:
        return _assemble(sink, collector, for_many=for_many)
    block = room_for(nbytes)
    try:
        fill(block, 0, address, nbytes)
    except BaseException:
        arena.free(block)
        raise
    lease = arena.lend(block)
    collector.leases.append(lease)
    ref = block.offset, block.size, Share.private if for_many else Share.exclusive
    payload = Payload(
        b"".join([write_one_region(ref, (BLOCK, 0, nbytes), sink.size), *sink.pieces]), [lease.fd], collector.leases
    )
    payload.copied = nbytes
    if ledger.watches:
        ledger.note([(nbytes, describe(collector.views[0].obj))], "sent")
    return payload


def _assemble(sink: _Sink, collector: Collector, *, for_many: bool) -> Payload:
    before = collector.mark()
    try:
        return _assembled(sink, collector, for_many=for_many, alone=True)
    except OSError as error:
        if error.errno not in _NO_FDS or not collector.copies:
            raise
    collector.back_to(before)
    # The limit on open files is near, so use one block and one fd for all copies.
    return _assembled(sink, collector, for_many=for_many, alone=False)


_NO_FDS = (errno.EMFILE, errno.ENFILE)


def _assembled(sink: _Sink, collector: Collector, *, for_many: bool, alone: bool) -> Payload:
    # Head and tables have a fixed length, whatever their values; each group of copies is one more region.
    identities = collector.identities
    tables_size = size_of_tables(len(collector.refs), len(collector.spans), len(identities))
    body_size = tables_size + sink.size
    body_in_block = body_size - IDENTITY_SIZE * len(identities) > INLINE_LIMIT
    copies = collector.place(
        round_up(body_size, ALIGNMENT) if body_in_block else 0, inline=not body_in_block, alone=alone
    )
    groups, fds, leases, block_ref = copies.groups, collector.fds, collector.leases, None
    if groups:
        for group in groups:
            _copy_group(group, collector, for_many=for_many)
        identities = collector.identities
        more = size_of_tables(len(collector.refs), len(collector.spans), len(identities)) - tables_size
        body_size += more
        if body_in_block:
            copies = copies._replace(
                block=[(address, nbytes, where + round_up(more, ALIGNMENT)) for address, nbytes, where in copies.block],
                block_size=copies.block_size + round_up(more, ALIGNMENT),
            )
            collector.move_block(round_up(more, ALIGNMENT))
    body = [body_tables(collector.refs, collector.spans, collector.places, identities), *sink.pieces]
    if copies.inline_size:
        inline = bytearray(copies.inline_size)
        for address, nbytes, where in copies.inline:
            inline[where : where + nbytes] = kernel.bytes_at(address, nbytes)
        body.append(inline)
        body_size += copies.inline_size
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
                fill(block, where, address, nbytes)
        except BaseException:
            arena.free(block)
            raise
        lease = arena.lend(block)
        leases.append(lease)
        fds = [lease.fd, *fds]
        block_ref = BlockRef(block.offset, block.size, for_many)
    head = write_tables(
        Head(
            block_ref,
            body_in_block=body_in_block,
            regions=len(collector.refs),
            spans=len(collector.spans),
            body_size=body_size,
            inline=copies.inline_size,
            files=len(collector.fds),
            identities=bool(identities),
            large_bytes=body_in_block and has_large_bytes(sink.pieces),
        )
    )
    payload = Payload(head if body_in_block else b"".join([head, *body]), fds, leases, collector.keep)
    payload.copied = copied
    if copied and ledger.watches:
        ledger.note(_what_was_copied(collector, copies, sink.pieces if body_in_block else [], body_size), "sent")
    return payload


def _copy_group(group: Group, collector: Collector, *, for_many: bool) -> None:
    """Copy buffers that share a block into it, and record that in their spans."""
    block = arena.allocate(group.size)
    try:
        for address, nbytes, where in group.ranges:
            fill(block, where, address, nbytes)
    except BaseException:
        arena.free(block)
        raise
    lease = arena.lend(block, collector.leases)
    collector.place_group(group, block.offset, block.size, lease, for_many=for_many)


def _what_was_copied(
    collector: Collector, copies: Copies, pieces: Sequence[Any], body_size: int
) -> Iterator[tuple[int, str]]:
    """Yield the size and description of each part copied into a block."""
    for begin, nbytes, _ in [*copies.block, *(part for group in copies.groups for part in group.ranges)]:
        inside = [
            (copy[1], view)
            for copy, view in zip(collector.copies, collector.views, strict=True)
            if begin <= copy[0] < begin + nbytes
        ]
        yield nbytes, describe(max(inside, key=lambda pair: pair[0])[1].obj)
    if pieces:
        # pickle writes a large object as a separate piece, between its frames.
        for piece in pieces:
            if len(piece) >= OUT_OF_BAND and piece[:1] not in _FRAME_STARTS:
                body_size -= len(piece)
                yield len(piece), "bytes or str"
        yield body_size, "pickle stream"


_FRAME_STARTS = (pickle.PROTO, pickle.FRAME)
# The opcodes that end the stream of a name.
_FOUND_BY_NAME = pickle.STACK_GLOBAL + pickle.MEMOIZE + pickle.STOP


def is_name(stream: bytes) -> bool:
    """Return whether a pickle stream is only a name to look up, instead of the content of an object."""
    return stream.endswith(_FOUND_BY_NAME)


def still_by_name(function: Callable[..., Any], importable: ImportableNames) -> bool:
    """Return whether a result of `pack_by_name` is still valid: a global of ``__main__`` may have been rebound."""
    return attribute_of(function, "__module__") != "__main__" or is_unchanged(function, importable)


def pack_by_name(function: Callable[..., Any], importable: ImportableNames) -> Payload | None:
    """Return the payload of a function that is sent by name only and so never changes, or None."""
    module, name = attribute_of(function, "__module__"), attribute_of(function, "__qualname__")
    if not (isinstance(module, str) and isinstance(name, str) and module and name) or "<" in name:
        return None
    kind = type(function)
    if module == "__main__":
        if (
            not isinstance(function, _names.named_kinds)
            or not is_importable(function, importable)
            or not is_unchanged(function, importable)
        ):
            return None
        if kind is not FunctionType and not isinstance(function, type):
            return pack(function, importable=importable)
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
    return Payload(write_plain(len(stream)) + stream)
