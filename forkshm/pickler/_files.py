"""Sends ``mmap.mmap`` objects as mappings of their file.

A shared mapping shares the file. A private one is sent as the file and a copy of the pages that were written.

To find and open the file takes a dozen system calls, and most of the time of a small call. So a pickle refers to one
`SendableMapping` for each mapping, however many arrays are views of it. The files of the latest few mappings stay open
for the next pickles, as long as the mapping exists and the file keeps its size.

Only Linux reports which file is mapped at an address. Elsewhere a library has to provide the file's name; see
`find_named`.
"""

from __future__ import annotations

import errno
import functools
import mmap
import os
import pickle
import stat
import weakref
from typing import Any, NamedTuple

from forkshm import _system
from forkshm._interrupts import is_of_kernel
from forkshm.backend import kernel
from forkshm.descriptor import FileExtent, file_at
from forkshm.errors import RegionGoneError
from forkshm.pickler._handles import FdBuffer, Handle, ReceivedFd
from forkshm.pickler._reducers import register, register_family, register_simple
from forkshm.region import OwnedFd

__all__ = (
    "NamedMapping",
    "SendableMapping",
    "Snapshot",
    "files_kept",
    "find_named",
    "forget_files",
    "reduce_mmap",
    "refuse_mmap",
    "sendable",
)

# Files that stay open for the next pickle.
_MOST_KEPT = 4


class SendableMapping(OwnedFd, FdBuffer):
    """A mapping whose file was found and is open to be sent, and what must be the same when it is sent again."""

    mapping: weakref.ref[mmap.mmap]
    address: int
    length: int
    extent: FileExtent
    _state: tuple[int, int, int]

    def __init__(self, mapping: mmap.mmap, address: int, length: int) -> None:
        FdBuffer.__init__(self, 1)
        self.mapping = weakref.ref(mapping, functools.partial(_forget, id(mapping)))
        self.address, self.length = address, length

    def open(self) -> bool:
        """Open the file, and return whether it was found. Call it once."""
        extent = file_at(self.address, self.length)
        if extent is None:
            return False
        # No call between the creation of the fd and this store.
        self.fd = extent.fd
        self.own()
        self.extent = extent._replace(fd=-1)
        self._state = _state_of(self.fd)
        return True

    def is_of(self, mapping: mmap.mmap, address: int, length: int) -> bool:
        """Return whether it is the file of that mapping, and neither was changed."""
        if self.mapping() is not mapping or (self.address, self.length) != (address, length):
            return False
        try:
            return _state_of(self.fd) == self._state
        except OSError as error:
            if not is_of_kernel(error):  # raised by a signal handler
                raise
            return False  # other code has closed the fd


# By the id of the mapping: all that a pickle in the making refers to, and those that stay open, the latest last.
_sendable: weakref.WeakValueDictionary[int, SendableMapping] = weakref.WeakValueDictionary()
_kept: dict[int, SendableMapping] = {}


def forget_files() -> None:
    """Close the files that are open for the next pickles."""
    _kept.clear()


def files_kept() -> int:
    """Return the number of files that are open for the next pickles."""
    return len(_kept)


def _in_child() -> None:
    for found in list(_sendable.values()):
        found.close()
    _sendable.clear()
    _kept.clear()


_system.register_at_fork(after_in_child=_in_child)


def sendable(mapping: mmap.mmap) -> SendableMapping | None:
    """Return what to put into a pickle for a mapping, or None if it can be sent only by its content.

    Raises:
        RegionGoneError: The file was truncated below the mapping.
    """
    key = id(mapping)
    known = _sendable.get(key)
    address, length = kernel.address_of(mapping), len(mapping)
    if known is not None and known.is_of(mapping, address, length):
        return known
    found = SendableMapping(mapping, address, length)
    if not found.open():
        return None
    _sendable[key] = found
    _kept.pop(key, None)
    _kept[key] = found
    for older in list(_kept)[:-_MOST_KEPT]:
        _kept.pop(older, None)
    return found


def _state_of(fd: int) -> tuple[int, int, int]:
    """Return which file an fd refers to, and the size of the file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size


def _forget(key: int, mapping: weakref.ref[mmap.mmap]) -> None:
    # No call between these: the id may belong to another mapping.
    if key in _kept and _kept[key].mapping is mapping:
        del _kept[key]


class Snapshot:
    """A mapping to send for a read-only view: the receiver may write to its copy, which nobody else sees."""

    __slots__ = ("found",)

    def __init__(self, found: SendableMapping) -> None:
        self.found = found


def _same(mapping: mmap.mmap) -> mmap.mmap:
    return mapping


def reduce_mmap(mapping: mmap.mmap) -> Any:
    """Send a mapping of a file.

    Raises:
        TypeError: It is not a mapping of a file, or the file cannot be opened.
        RegionGoneError: The file was truncated below the mapping.
    """
    return _same, (_needed(mapping),)


def _needed(mapping: mmap.mmap) -> SendableMapping:
    found = sendable(mapping)
    if found is None:
        raise TypeError(
            f"cannot pickle an mmap.mmap of {len(mapping):,} bytes: it is not a mapping of a file that can be opened; "
            "use forkshm.anonymous_shared_memory, which can be sent, or send bytes(mapping)"
        )
    return found


def _reduce_snapshot(snapshot: Snapshot) -> Any:
    return _reduce_sendable(snapshot.found, as_copy=True)


def _reduce_sendable(found: SendableMapping, *, as_copy: bool = False) -> tuple[Any, tuple[Any, ...]]:
    mapping, address, extent = found.mapping(), found.address, found.extent
    if mapping is None:
        raise ReferenceError("cannot send a mapping that was dropped while it was pickled")
    length = len(mapping)
    own: list[tuple[int, bytes]] = []
    access = mmap.ACCESS_COPY if as_copy else mmap.ACCESS_READ
    if extent.writable and not extent.shared:
        access = mmap.ACCESS_COPY
        own = [
            (start - address, kernel.bytes_at(start, min(size, address + length - start)))
            for start, size in _own_pages(address, -(-length // kernel.page_size) * kernel.page_size)
        ]
    elif extent.writable and not as_copy:
        access = mmap.ACCESS_WRITE
    where = extent.offset + address - extent.address
    return rebuild_mmap, (pickle.PickleBuffer(found), length, access, where, mapping.tell(), own)


def _own_pages(address: int, size: int) -> list[tuple[int, int]]:
    try:
        return kernel.own_pages(address, size)
    except OSError as error:
        if not is_of_kernel(error):  # raised by a signal handler
            raise
        # Unknown, as after setuid(2): any page may have been written.
        return [(address, size)]


def reduce_subclass(mapping: mmap.mmap) -> Any:
    """Send a mapping whose class derives from `mmap.mmap`, with its attributes.

    Raises:
        TypeError: As `reduce_mmap`.
        RegionGoneError: As `reduce_mmap`.
    """
    kind: Any = type(mapping)
    if kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__:
        return NotImplemented
    rebuild, arguments = _reduce_sendable(_needed(mapping))
    return rebuild, (*arguments, kind), getattr(mapping, "__dict__", None) or None


def refuse_mmap(mapping: mmap.mmap) -> Any:
    """Raise TypeError: this system does not report which file is mapped."""
    raise TypeError(
        f"cannot pickle an mmap.mmap of {len(mapping):,} bytes: this system does not report which file is mapped; send "
        "the path and map it there, or use np.memmap or a MappedRegion of a forkshm.FileMapping, which can be sent"
    )


class NamedMapping(NamedTuple):
    """A shared mapping to send, of a file whose name a library knows."""

    path: str
    identity: tuple[int, int]
    offset: int
    length: int
    position: int
    access: int
    """An ``mmap.ACCESS_`` constant for the receiver."""


def find_named(mapping: mmap.mmap, path: str, offset: int, access: int) -> NamedMapping | None:
    """Return what to send for a shared mapping, or None if the file of that name is not the mapped one.

    Args:
        mapping: The mapping.
        path: The name of the file when it was mapped.
        offset: Position of the mapping in the file.
        access: The receiver's access.

    Raises:
        RegionGoneError: The file was truncated after it was mapped.
    """
    try:
        status = os.stat(path)
        identity = status.st_dev, status.st_ino
        # An mmap.mmap keeps its file open. If no fd leads to the file of this name, another one has taken the name.
        is_open = any(_identity_of(int(fd)) == identity for fd in os.listdir("/dev/fd"))
    except OSError:
        return None
    if not is_open or not stat.S_ISREG(status.st_mode):
        return None
    length = len(mapping)
    if status.st_size < offset + length:
        raise RegionGoneError(
            f"cannot send {length:,} bytes that are mapped from {path!r} at {offset:,}: the file was truncated to "
            f"{status.st_size:,} bytes after it was mapped. Map it again."
        )
    return NamedMapping(path, identity, offset, length, mapping.tell(), access)


def _identity_of(fd: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def reduce_named(named: NamedMapping) -> Any:
    """Send a mapping whose file is known by its name.

    Raises:
        RegionGoneError: The file was replaced after it was found.
        OSError: The file cannot be opened.
    """
    flags = os.O_RDWR if named.access == mmap.ACCESS_WRITE else os.O_RDONLY
    fds: list[int] = []
    try:
        fds.extend(map(os.open, (named.path,), (flags,)))
        if _identity_of(fds[0]) != named.identity:
            raise RegionGoneError(
                f"cannot send a mapping of {named.path!r}: another file has replaced it. Map it again."
            )
        handle = Handle(fds[0])
    finally:
        kernel.close_all(fds)
    return rebuild_mmap, (pickle.PickleBuffer(handle), named.length, named.access, named.offset, named.position, [])


def rebuild_mmap(
    received: ReceivedFd,
    length: int,
    access: int,
    offset: int,
    position: int,
    own: list[tuple[int, bytes]],
    kind: type[mmap.mmap] = mmap.mmap,
) -> mmap.mmap:
    """Return the mapping of the file that arrived, an object of class *kind*."""
    fd = received.take()
    try:
        made = _mapped(kind, fd, length, access, offset)
    finally:
        kernel.close(fd)
    for start, content in own:
        made[start : start + len(content)] = content
    made.seek(position)
    return made


def _mapped(kind: type[mmap.mmap], fd: int, length: int, access: int, offset: int) -> mmap.mmap:
    # A class may have a __new__ of its own, with other parameters.
    make: Any = functools.partial(mmap.mmap.__new__, kind)
    made: mmap.mmap
    try:
        made = make(fd, length, access=access, offset=offset)
    except OSError as error:
        if error.errno != errno.ENOMEM or access != mmap.ACCESS_COPY:
            raise
    else:
        return made
    # A private mapping larger than memory: without this flag the kernel would reserve memory for all of it, though few
    # of its pages are written.
    made = make(fd, length, flags=_MAP_PRIVATE | _MAP_NORESERVE, prot=_PROT_READ | _PROT_WRITE, offset=offset)
    return made


_MAP_PRIVATE, _PROT_READ, _PROT_WRITE = 0x02, 0x01, 0x02
# A flag of mmap(2) that has no name in Python before 3.12.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)

if kernel.name == "linux":
    register(mmap.mmap, reduce_mmap)
    register_family(mmap.mmap, reduce_subclass)
    register(SendableMapping, _reduce_sendable)
    register(Snapshot, _reduce_snapshot)
    register_simple(mmap.mmap, SendableMapping, Snapshot)
else:
    register_family(mmap.mmap, refuse_mmap)
    register(NamedMapping, reduce_named)
    register_simple(NamedMapping)
