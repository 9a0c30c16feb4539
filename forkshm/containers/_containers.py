"""SharedList and SharedDict: read-only containers in one region.

A forked child that reads a list of Python objects writes their reference counts, so the kernel copies the list's
pages one by one until the child has them all. These containers store the objects pickled in shared memory and
unpickle an object on access::

    header | records: buffers, then their places and the pickle stream | index | hash table of a dict

The index holds the offset of each record. The hash table uses a hash that is equal in every process; Python's own
string hash is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import numbers
import pickle
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

from forkshm.errors import NotPicklableError, UnsupportedError
from forkshm.pickler import Passage, register, register_foreign, send_region, take_region
from forkshm.region import MappedRegion, anonymous_shared_memory

if TYPE_CHECKING:
    from typing import Self

__all__ = ("SharedDict", "SharedList")

T = TypeVar("T")
K = TypeVar("K")
V_co = TypeVar("V_co", covariant=True)

_WORD = 8
# Number of entries, offset of the index, offset of the hash table, number of its slots.
_HEADER = struct.Struct("=4Q")
_Q = struct.Struct("=Q")
_ALIGNMENT = 64
_MASK = 2**64 - 1


def _can_be_pickled(thing: Any) -> bool:
    """Return whether *thing* can be pickled; if it could not a moment ago, a signal handler had raised."""
    if threading.current_thread() is not threading.main_thread():
        return False
    buffers: list[pickle.PickleBuffer] = []
    try:
        pickle.dumps(thing, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
    except Exception:
        return False
    return True


class _Builder:
    """Collects pieces and their offsets, so that the memory can be allocated at once."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, Any]] = []
        self.size = _HEADER.size

    def align(self, to: int) -> None:
        self.size = (self.size + to - 1) // to * to

    def add(self, piece: Any) -> int:
        """Append a piece and return its offset."""
        where = self.size
        self._pieces.append((where, piece))
        self.size += len(piece)
        return where

    def add_record(self, thing: Any, what: str) -> int:
        """Append a pickled object and return the offset of its record."""
        buffers: list[pickle.PickleBuffer] = []
        try:
            stream = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append)
        except Exception as error:
            if _can_be_pickled(thing):
                raise  # raised by a signal handler
            raise NotPicklableError(f"{what}, a {type(thing).__name__}, cannot be pickled: {error}") from error
        places = []
        for buffer in buffers:
            self.align(_ALIGNMENT)
            raw = buffer.raw()
            places += [self.add(raw), raw.nbytes]
        return self.add(struct.pack(f"={1 + len(places)}Q", len(buffers), *places) + stream)

    def add_words(self, words: list[int]) -> int:
        self.align(_WORD)
        return self.add(struct.pack(f"={len(words)}Q", *words))

    def finish(self, *header: int) -> MappedRegion:
        """Return the finished memory, mapped so that no process can change it, including this one."""
        with anonymous_shared_memory(self.size) as region:
            region.buf[: _HEADER.size] = _HEADER.pack(*header)
            for where, piece in self._pieces:
                region.buf[where : where + len(piece)] = piece
            _seal(region)
            return MappedRegion(region, "read_only")


class _Records:
    """Pickled objects in a region."""

    _like: type = object
    _instead = ""

    def __init__(self, region: MappedRegion) -> None:
        self._region = region
        self._memory = region.buf
        self._count, self._index, self._table, self._slots = _HEADER.unpack_from(self._memory)

    def record(self, number: int) -> Any:
        """Return a new object unpickled from a record; its arrays use the shared memory itself."""
        memory = self._memory
        (where,) = _Q.unpack_from(memory, self._index + number * _WORD)
        (end,) = _Q.unpack_from(memory, self._index + (number + 1) * _WORD)
        (buffers,) = _Q.unpack_from(memory, where)
        where += _WORD
        if not buffers:
            return pickle.loads(memory[where:end])
        places = struct.unpack_from(f"={2 * buffers}Q", memory, where)
        where += 2 * buffers * _WORD
        parts = [memory[start : start + size] for start, size in zip(places[::2], places[1::2], strict=True)]
        return pickle.loads(memory[where:end], buffers=parts)

    @property
    def nbytes(self) -> int:
        """Size of the shared memory in bytes."""
        return self._region.size

    def __len__(self) -> int:
        return int(self._count)

    def __reduce__(self) -> Any:
        # Plain pickle gets a copy of the bytes; forkshm's pickler sends a descriptor.
        return _of_bytes, (type(self), bytes(self._memory))

    # Type checkers reject these operations; at run time the error says what to do instead.
    if not TYPE_CHECKING:

        def __setitem__(self, key: object, value: object) -> NoReturn:
            raise TypeError(f"cannot set item {key!r} of a {type(self).__name__}: {self._instead}")

        def __delitem__(self, key: object) -> NoReturn:
            raise TypeError(f"cannot delete item {key!r} of a {type(self).__name__}: {self._instead}")

        def __getattr__(self, name: str) -> NoReturn:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            if hasattr(self._like, name):
                message = f"cannot call {name}() of a {type(self).__name__}: {self._instead}"
            raise AttributeError(message, name=name, obj=self)

    @classmethod
    def _of(cls, region: MappedRegion) -> Self:
        made = cls.__new__(cls)
        _Records.__init__(made, region)
        return made


def _seal(region: MappedRegion) -> None:
    # Without seals, the memory is still mapped read-only everywhere.
    with contextlib.suppress(UnsupportedError):
        region.seal()


def _of_bytes(kind: type[_Records], data: bytes) -> Any:
    with anonymous_shared_memory(len(data)) as region:
        region.buf[:] = data
        _seal(region)
        return kind._of(MappedRegion(region, "read_only"))


class SharedList(_Records, Sequence[T]):
    """A read-only list of objects, stored once for any number of processes.

    The objects are pickled once, into shared memory. Each access unpickles a new object; changing it does not change
    the list. NumPy arrays in it, and other objects that pickle their buffers out of band, use the shared memory itself
    and are read-only. Passing the list to a worker sends a descriptor.

    It is a `Sequence`, with ``len``, iteration, ``in``, ``index``, ``count`` and ``reversed``. A slice is a plain list.
    It equals lists and other SharedLists with equal elements, and cannot be changed or hashed.

    The memory is freed when the last process has dropped the list and the arrays taken from it.

    Args:
        items: The objects; each must be picklable.

    Raises:
        NotPicklableError: An object cannot be pickled; the message says which.
        RegionCreateError: The kernel lacks the memory.

    Fork and threads:
        Any thread and any process may read; there are no locks.

    Example:
        >>> from forkshm import Pool, SharedList
        >>> words = SharedList(["to", "be", "or", "not"])
        >>> with Pool(2) as pool:
        ...     pool.starmap(SharedList.index, [(words, "or"), (words, "be")])
        [2, 1]
        >>> words[1:3], len(words), words == ["to", "be", "or", "not"]
        (['be', 'or'], 4, True)
    """

    __hash__ = None  # type: ignore[assignment]  # it has the equality of a list
    _like = list
    _instead = (
        "it is read-only in every process. Create a new SharedList from a changed list, or use "
        "forkshm.Manager().list() for a list that processes can change"
    )

    def __init__(self, items: Iterable[T] = ()) -> None:
        builder = _Builder()
        starts = [builder.add_record(item, f"item {number}") for number, item in enumerate(items)]
        index = builder.add_words([*starts, builder.size])
        super().__init__(builder.finish(len(starts), index, 0, 0))

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.record(number) for number in range(self._count)[index]]
        try:
            number = range(self._count)[index]
        except IndexError:
            raise IndexError(f"index {index} is out of range: the list has {self._count:,} items") from None
        return self.record(number)  # type: ignore[no-any-return]  # it came through pickle

    def __iter__(self) -> Iterator[T]:
        return map(self.record, range(self._count))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (SharedList, list)):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._count:,} items, {self.nbytes:,} bytes>"


class SharedDict(_Records, Mapping[K, V_co]):
    """A read-only dict, stored once for any number of processes.

    As in `SharedList`, each access unpickles a new value. It is a `Mapping` in the order of the original dict, and
    equals every Mapping with equal items. A lookup unpickles the key and then the value; its time does not grow with
    the size of the dict. The hash table is in shared memory as well, so no process builds one.

    Args:
        items: A mapping, or pairs of key and value. Keys are strings, bytes, numbers, None, and tuples and frozensets
            of these, whose hashes are equal in every process.

    Raises:
        TypeError: A key is of another type.
        NotPicklableError: A value cannot be pickled; the message says which.
        RegionCreateError: The kernel lacks the memory.

    Fork and threads:
        Any thread and any process may read; there are no locks.

    Example:
        >>> from forkshm import Pool, SharedDict
        >>> capitals = SharedDict({"Peru": "Lima", "Chad": "N'Djamena"})
        >>> with Pool(2) as pool:
        ...     pool.starmap(SharedDict.get, [(capitals, "Chad"), (capitals, "Mu")])
        ["N'Djamena", None]
    """

    __hash__ = None  # type: ignore[assignment]  # it has the equality of a dict
    _like = dict
    _instead = (
        "it is read-only in every process. Create a new SharedDict from a changed dict, or use "
        "forkshm.Manager().dict() for a dict that processes can change"
    )

    def __init__(self, items: Mapping[K, V_co] | Iterable[tuple[K, V_co]] = ()) -> None:
        pairs = dict(items)
        slots = 1 << (2 * len(pairs)).bit_length()
        table = [0] * slots
        for number, key in enumerate(pairs):
            hashed = _hash(key)
            if hashed is None:
                raise TypeError(
                    f"keys of a SharedDict must be strings, bytes, numbers, None, or tuples or frozensets of these, "
                    f"got {key!r} of type {type(key).__name__}"
                )
            slot = hashed % slots
            while table[slot]:
                slot = (slot + 1) % slots
            table[slot] = number + 1
        builder = _Builder()
        # `__getitem__` relies on this order: all keys, then all values.
        starts = [builder.add_record(key, f"key {key!r}") for key in pairs]
        starts += [builder.add_record(value, f"the value of {key!r}") for key, value in pairs.items()]
        index = builder.add_words([*starts, builder.size])
        super().__init__(builder.finish(len(pairs), index, builder.add_words(table), slots))

    def _find(self, key: object) -> int:
        """Return the number of a key, or -1."""
        hash(key)  # raises TypeError for unhashable keys, like a dict
        hashed = _hash(key)
        if hashed is None:
            return -1
        slot = hashed % self._slots
        while True:
            (number,) = _Q.unpack_from(self._memory, self._table + slot * _WORD)
            if not number:
                return -1
            if self.record(number - 1) == key:
                return int(number) - 1
            slot = (slot + 1) % self._slots

    def __getitem__(self, key: K) -> V_co:
        number = self._find(key)
        if number < 0:
            raise KeyError(key)
        return self.record(self._count + number)  # type: ignore[no-any-return]  # it came through pickle

    def __contains__(self, key: object) -> bool:
        return self._find(key) >= 0

    def __iter__(self) -> Iterator[K]:
        return map(self.record, range(self._count))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._count:,} items, {self.nbytes:,} bytes>"


def _hash(key: object) -> int | None:
    """Return a hash that is the same for equal keys in every process, or None for unsupported types."""
    if isinstance(key, (str, bytes)):
        data = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    if isinstance(key, numbers.Number):
        return _mixed(hash(key))  # Python's hash of numbers is the same in all processes and for all numeric types
    if key is None:
        return _mixed(1)
    if isinstance(key, (tuple, frozenset)):
        parts = [_hash(part) for part in key]
        hashed = len(parts)
        for part in parts:
            if part is None:
                return None
            # The order of a set differs between processes, so combine its parts commutatively.
            hashed = hashed + _mixed(part) if isinstance(key, frozenset) else _mixed(hashed) ^ part
        return _mixed(hashed)
    return None


def _mixed(number: int) -> int:
    # Spreads consecutive numbers and multiples of powers of two over the slots.
    number = (number & _MASK) * 0x9E3779B97F4A7C15 & _MASK
    return number ^ number >> 32


def _reduce(container: _Records) -> Any:
    return _of_region, (type(container), container._region)


def _of_region(kind: type[_Records], region: MappedRegion) -> Any:
    return kind._of(region)


def _reduce_foreign(container: _Records) -> Any:
    return _of_passage, (type(container), send_region(container._region))


def _of_passage(kind: type[_Records], passage: Passage) -> Any:
    return kind._of(take_region(passage))


for _kind in (SharedList, SharedDict):
    register(_kind, _reduce)
    register_foreign(_kind, _reduce_foreign)
