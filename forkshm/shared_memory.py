"""As ``multiprocessing.shared_memory``: memory with a name, and a list in it.

What is not ours is that of ``multiprocess``. There is no tracker: the names that processes have made and not unlinked
are in files, and the first process of the family removes them when it ends.
"""

from __future__ import annotations

import multiprocessing.shared_memory
import struct
from functools import partial
from typing import TYPE_CHECKING, Any

from forkshm import _multiprocess
from forkshm.backend import kernel
from forkshm.errors import RegionExistsError
from forkshm.pickler import register
from forkshm.region import MappedRegion, SharedMemoryObject, checked_name
from forkshm.region.family import forget, note

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ("ShareableList", "SharedMemory")

if not TYPE_CHECKING:
    __getattr__, __dir__ = _multiprocess.stand_in("shared_memory", globals())

_theirs: Any = _multiprocess.shared_memory
_standard: Any = multiprocessing.shared_memory


class SharedMemory(_standard.SharedMemory, _theirs.SharedMemory):  # type: ignore[misc]
    """Memory with a name; the interface of ``multiprocessing.shared_memory.SharedMemory``.

    Passed through a channel of forkshm, it arrives as a descriptor: it need not have its name any more. Other channels
    carry the name.

    Nobody but `unlink` takes the name away while the program runs. A name that was made with *track*, and that nobody
    has unlinked, is removed when the first process of the family ends: the one that started all others. If that one is
    killed, ``python -m forkshm clean`` finds it.

    Args:
        name: 1 to 255 bytes; by default one that is made up.
        create: Create it; otherwise open what is there.
        size: Bytes of new memory.
        track: Whether it is removed at the end of the family. Of no meaning when it is opened only: whoever opens
            memory does not remove it.

    Raises:
        ValueError: *size* is not positive, or there is no *name* to open.
        FileExistsError: *create*, and the name is taken.
        FileNotFoundError: There is no such memory.
        OSError: The kernel refused it.

    Fork and threads:
        Safe to use from any thread. A forked child inherits it; closing it there leaves the parent's alone.

    Example:
        >>> from forkshm.shared_memory import SharedMemory
        >>> memory = SharedMemory(create=True, size=3)
        >>> memory.buf[:] = b"abc"
        >>> again = SharedMemory(memory.name)
        >>> bytes(again.buf)
        b'abc'
        >>> again.close(), memory.close(), memory.unlink()
        (None, None, None)

    See Also:
        `forkshm.anonymous_shared_memory`, which needs no name and leaves none behind; `forkshm.SharedMemoryObject`.
    """

    _region: MappedRegion | None = None
    _buf: memoryview | None = None
    _size = 0

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0, *, track: bool = True) -> None:
        if not size >= 0:
            raise ValueError("'size' must be a positive integer")
        if create and size == 0:
            raise ValueError("'size' must be a positive number different from zero")
        if name is None and not create:
            raise ValueError("'name' can only be None if create=True")
        self._track = track
        opened = self._create(name, size, track=track) if create else SharedMemoryObject("open_only", _bare(name or ""))
        try:
            with opened:
                self._adopt("/" + opened.name, MappedRegion(opened))
        except BaseException:
            if create:
                SharedMemoryObject.remove(opened.name)
            raise

    @staticmethod
    def _create(name: str | None, size: int, *, track: bool) -> SharedMemoryObject:
        while True:
            try:
                opened = SharedMemoryObject("create_only", _bare(name or _theirs._make_filename()))
            except RegionExistsError:
                if name is not None:
                    raise
                continue
            try:
                # First the note: whoever is killed in between leaves a note of nothing, and not a name without one.
                if track:
                    note(opened)
                opened.truncate(size)
            except BaseException:
                SharedMemoryObject.remove(opened.name)
                opened.close()
                raise
            return opened

    def _adopt(self, name: str, region: MappedRegion) -> None:
        self._name = name
        self._region = region
        self._size = region.size
        self._buf = region.buf

    def __del__(self) -> None:
        # Nothing: the memory stays mapped while there are views of it, and no longer.
        pass

    def __reduce__(self) -> Any:
        # A plain pickle, and channels of others, carry the name.
        return type(self), (self.name, False, self.size)

    @property
    def buf(self) -> Any:
        """The bytes; None when it was closed."""
        return self._buf

    @property
    def name(self) -> str:
        """The name by which others open it."""
        return _bare(self._name)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def _fd(self) -> int:
        return -1 if self._region is None else self._region.fileno()

    def close(self) -> None:
        """Unmap the memory in this process. Twice is allowed.

        Raises:
            BufferError: Arrays or other views of it are alive. It stays open: delete them, and close it again.
        """
        region = self._region
        if region is None:
            return
        if self._buf is not None:
            self._buf.release()
            self._buf = None
        try:
            region.close()
        except BufferError:
            self._buf = region.buf
            raise
        self._region = None

    def unlink(self) -> None:
        """Take the name away; the memory stays for those who have it.

        Raises:
            FileNotFoundError: It has none any more.
        """
        kernel.unlink_named(checked_name(self.name))
        forget(self.name)


def _bare(name: str) -> str:
    # A leading slash is none of the name: the standard library adds one, and takes names that have one.
    return name.removeprefix("/")


def _reduce(memory: SharedMemory) -> Any:
    if memory._region is None:
        return memory.__reduce__()
    return _rebuild, (type(memory), memory._name, memory._region)


def _rebuild(kind: Any, name: str, region: MappedRegion) -> SharedMemory:
    made: SharedMemory = kind.__new__(kind)
    made._track = False
    made._adopt(name, region)
    return made


register(SharedMemory, _reduce)


# -- the list ------------------------------------------------------------------------------------

_ENCODING = "utf8"
#: Behind what the standard library has there: of each item how many bytes it is, which tells trailing NULs from room.
_MAGIC = b"forkshm\1"
_STR, _BYTES = 1, 2


class ShareableList(_standard.ShareableList, _theirs.ShareableList):  # type: ignore[misc]
    """A list in shared memory whose length is fixed; the interface of ``multiprocessing.shared_memory.ShareableList``.

    Strings and bytes come out as they were put in, trailing NULs included. They may be replaced by others that are as
    long as the room for the first one: a multiple of 8 bytes, in UTF-8.

    Args:
        sequence: The items: int, float, bool, str, bytes or None.
        name: Of the memory; to open a list that is there, give no *sequence*.

    Raises:
        ValueError: An int has more than 64 bits, or an item more than 9,999,999 bytes.
        OSError: As for `SharedMemory`.

    Fork and threads:
        Safe to read from any process. Items of several words are not written in one step: use a lock.

    Example:
        >>> from forkshm.shared_memory import ShareableList
        >>> items = ShareableList(["a", 1, bytes(2)])
        >>> items[0] = "b"
        >>> list(items) == ["b", 1, bytes(2)]
        True
        >>> items.shm.close(), items.shm.unlink()
        (None, None)

    See Also:
        `forkshm.SharedList`, which grows and takes any object.
    """

    def __init__(self, sequence: Iterable[Any] | None = None, *, name: str | None = None) -> None:
        if name is not None and sequence is None:
            self.shm = SharedMemory(name)
            self._read_layout()
            return
        items = list(sequence or ())
        encoded = [item.encode(_ENCODING) if isinstance(item, str) else item for item in items]
        formats = [_format_of(item, value) for item, value in zip(items, encoded, strict=True)]
        self._list_len = len(items)
        self._allocated_offsets = [0]
        for form in formats:
            self._allocated_offsets.append(self._allocated_offsets[-1] + struct.calcsize(form))
        size = self._lengths_at() + self._list_len * 8 + len(_MAGIC)
        self.shm = SharedMemory(name, create=True, size=size)
        try:
            buf = self.shm.buf
            struct.pack_into(f"q{self._list_len + 1}q", buf, 0, self._list_len, *self._allocated_offsets)
            self._exact = True
            for position, (item, value, form) in enumerate(zip(items, encoded, formats, strict=True)):
                self._put(position, form, item, value)
            struct.pack_into(f"{len(_MAGIC)}s", buf, size - len(_MAGIC), _MAGIC)
        except BaseException:
            self.shm.close()
            self.shm.unlink()
            raise

    def _read_layout(self) -> None:
        buf = self.shm.buf
        self._list_len = struct.unpack_from("q", buf, 0)[0]
        self._allocated_offsets = list(struct.unpack_from(f"{self._list_len + 1}q", buf, 8))
        end = self._lengths_at() + self._list_len * 8
        # Lists that the standard library has made have no lengths.
        self._exact = bytes(buf[end : end + len(_MAGIC)]) == _MAGIC

    def _lengths_at(self) -> int:
        end: int = self._offset_back_transform_codes + self._list_len
        return -(-end // 8) * 8

    def _put(self, position: int, form: str, item: Any, value: Any) -> None:
        buf = self.shm.buf
        self._set_packing_format_and_transform(position, form, item)
        if self._exact and isinstance(value, bytes):
            struct.pack_into("q", buf, self._lengths_at() + position * 8, len(value))
        struct.pack_into(form, buf, self._offset_data_start + self._allocated_offsets[position], value)

    def _position(self, position: int, what: str) -> int:
        position = position if position >= 0 else position + self._list_len
        if not 0 <= position < self._list_len:
            raise IndexError(f"{what}index out of range")
        return position

    def __getitem__(self, position: int) -> Any:
        position = self._position(position, "")
        start = self._offset_data_start + self._allocated_offsets[position]
        (value,) = struct.unpack_from(self._get_packing_format(position), self.shm.buf, start)
        (code,) = struct.unpack_from("b", self.shm.buf, self._offset_back_transform_codes + position)
        if code not in (_STR, _BYTES):
            return self._get_back_transform(position)(value)
        stripped = value.rstrip(b"\0")
        if self._exact:
            (length,) = struct.unpack_from("q", self.shm.buf, self._lengths_at() + position * 8)
            # Not so when the standard library has put a longer one there.
            if len(stripped) <= length <= len(value):
                stripped = value[:length]
        return stripped.decode(_ENCODING) if code == _STR else stripped

    def __setitem__(self, position: int, value: Any) -> None:
        position = self._position(position, "assignment ")
        encoded = value.encode(_ENCODING) if isinstance(value, str) else value
        room = self._allocated_offsets[position + 1] - self._allocated_offsets[position]
        if isinstance(encoded, bytes):
            if len(encoded) > room:
                raise ValueError(
                    f"bytes/str item exceeds available storage: it has {len(encoded):,} bytes, item {position} of "
                    f"this list has room for {room:,}; make the list with a longer item there"
                )
            form = f"{room}s"
        else:
            form = _format_of(value, encoded)
            struct.pack(form, encoded)  # raises before anything is changed
        self._put(position, form, value, encoded)

    def __reduce__(self) -> Any:
        return partial(type(self), name=self.shm.name), ()


def _format_of(item: Any, encoded: Any) -> str:
    """Return how an item is packed, of which strings are encoded."""
    if not isinstance(encoded, bytes):
        return str(_theirs.ShareableList._types_mapping[type(encoded)])
    # What the standard library takes, which counts characters, if that is enough.
    form = f"{max(8 * (len(item) // 8 + 1), -(-len(encoded) // 8) * 8)}s"
    if len(form) > 8:
        raise ValueError(f"an item of a ShareableList has at most 9,999,999 bytes, this one has {len(encoded):,}")
    return form


def _reduce_list(items: ShareableList) -> Any:
    return _rebuild_list, (type(items), items.shm)


def _rebuild_list(kind: Any, memory: SharedMemory) -> ShareableList:
    made: ShareableList = kind.__new__(kind)
    made.shm = memory
    made._read_layout()
    return made


register(ShareableList, _reduce_list)
