"""Which mapped memory does this address, or this kernel object, belong to?

An array is recognised by where its memory lies, so plain views, slices and transposes
of shared memory are recognised as well, whoever made them.
"""

from __future__ import annotations

import bisect
import dataclasses
import enum
import os
from typing import TYPE_CHECKING, Any

from forkshm.backend import Access, Identity, kernel
from forkshm.region._lifetime import at_fork, guard, settle, unwatch, watch

if TYPE_CHECKING:
    import weakref

__all__ = (
    "Mapping",
    "Mode",
    "copy_on_write",
    "mapping_at",
    "mapping_of",
    "new_mapping",
    "read_only",
    "read_private",
    "read_write",
    "regions_mapped",
    "round_up",
    "seal",
    "shrink",
)


class Mode(str, enum.Enum):
    """What a region may be used for; Boost.Interprocess' ``mode_t``.

    A member equals its name: ``region.mode == "read_write"``.
    """

    #: Reads, and sees what others write.
    read_only = "read_only"
    #: Reads and writes, for everybody to see.
    read_write = "read_write"
    #: Reads and writes; the writes stay in this process.
    copy_on_write = "copy_on_write"
    #: Reads; may keep a private snapshot.
    read_private = "read_private"

    def __str__(self) -> str:
        return self.value


read_only = Mode.read_only
read_write = Mode.read_write
copy_on_write = Mode.copy_on_write
read_private = Mode.read_private

ACCESS = {
    Mode.read_only: Access.READ,
    Mode.read_write: Access.SHARED,
    Mode.copy_on_write: Access.PRIVATE,
    Mode.read_private: Access.SNAPSHOT,
}


@dataclasses.dataclass(eq=False)
class Mapping:
    """One mapping of one memory object in this process.

    It ends, and its fd is closed, when the last buffer taken from its window is gone.
    """

    #: First usable byte; not necessarily the start of a page.
    address: int
    #: Usable bytes.
    size: int
    #: Our own fd of the object, to hand it on.
    fd: int
    #: The kernel's name of the object.
    identity: Identity
    #: Where in the object the first usable byte lies.
    offset: int
    #: What may be done with it.
    mode: Mode
    #: Nobody but the process that sealed it can write to the object.
    sealed: bool = False
    #: The one MappedRegion made of it, if it is alive.
    region: weakref.ref[Any] | None = None
    #: The exporter, if any view is alive.
    window: weakref.ref[Any] | None = None

    @property
    def pages(self) -> tuple[int, int]:
        """Address and size of the whole pages that are mapped."""
        start = self.address - self.address % kernel.page_size
        return start, round_up(self.address + self.size, kernel.page_size) - start

    @property
    def sent_as(self) -> Mode:
        """The mode in which others get it."""
        return Mode.read_only if self.sealed else self.mode

    @property
    def shares_writes(self) -> bool:
        """Whether another process that maps the same object sees the same bytes."""
        return self.mode is not Mode.copy_on_write


# Sorted start addresses, and the mapping that starts at each. Mappings never overlap.
_starts: list[int] = []
_by_start: dict[int, Mapping] = {}
_by_identity: dict[Identity, list[Mapping]] = {}


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of *multiple* that is at least *value*."""
    return -(-value // multiple) * multiple


def new_mapping(fd: int, offset: int, size: int, mode: Mode, address: int | None = None) -> tuple[Mapping, Any]:
    """Map part of an object, and take over *fd*, which stays the caller's on failure.

    Returns:
        The mapping and its window. Keep the window: it is what keeps the memory.
    """
    settle()
    identity, _ = kernel.identify(fd)
    slack = offset % kernel.page_size
    length = round_up(size + slack, kernel.page_size)
    if address is None:
        start = kernel.map(fd, length, ACCESS[mode], offset - slack)
    else:
        start = address
        kernel.map_at(address, fd, length, ACCESS[mode], offset)
    mapping = Mapping(start + slack, size, fd, identity, offset, mode)
    with guard:
        _enter(mapping)
    return mapping, _new_window(mapping)


def _new_window(mapping: Mapping) -> Any:
    window = kernel.window(mapping.address, mapping.size)
    mapping.window = watch(window, lambda: _end(mapping))
    return window


def _enter(mapping: Mapping) -> None:
    bisect.insort(_starts, mapping.address)
    _by_start[mapping.address] = mapping
    _by_identity.setdefault(mapping.identity, []).append(mapping)


def _leave(mapping: Mapping) -> None:
    del _starts[bisect.bisect_left(_starts, mapping.address)]
    del _by_start[mapping.address]
    same = _by_identity[mapping.identity]
    same.remove(mapping)
    if not same:
        del _by_identity[mapping.identity]


def _end(mapping: Mapping) -> None:
    # First out of the tables, then unmapped: the kernel may give the address to somebody
    # else the moment it is free.
    _leave(mapping)
    kernel.unmap(*mapping.pages)
    os.close(mapping.fd)


def shrink(mapping: Mapping, nbytes: int, *, from_back: bool) -> Any:
    """Let a mapping have *nbytes* less, and unmap the pages it has no part in any more.

    Nobody may have views of it. Returns the new window.
    """
    unwatch(mapping.window)
    with guard:
        start, length = mapping.pages
        _leave(mapping)
        if not from_back:
            mapping.address += nbytes
            mapping.offset += nbytes
        mapping.size -= nbytes
        left, left_length = mapping.pages
        if left > start:
            kernel.unmap(start, left - start)
        if left + left_length < start + length:
            kernel.unmap(left + left_length, start + length - left - left_length)
        _enter(mapping)
    return _new_window(mapping)


def seal(mapping: Mapping) -> None:
    """Seal the object against writes, and note it for all of its mappings here that can write.

    Under the lock that fork takes: no child comes between the two.
    """
    with guard:
        kernel.seal_writes(mapping.fd)
        for same in _by_identity[mapping.identity]:
            same.sealed = same.mode is Mode.read_write
    settle()


def mapping_at(address: int) -> Mapping | None:
    """Return the mapping that holds *address*, or None."""
    settle()
    with guard:
        position = bisect.bisect_right(_starts, address) - 1
        if position < 0:
            return None
        mapping = _by_start[_starts[position]]
    return mapping if address < mapping.address + mapping.size else None


def mapping_of(identity: Identity, offset: int, size: int, mode: Mode) -> tuple[Mapping, Any] | None:
    """Return a live mapping of that part of that object, with its window, or None."""
    with guard:
        for mapping in _by_identity.get(identity, ()):
            if mapping.offset == offset and mapping.size == size and mapping.mode is mode:
                window = mapping.window() if mapping.window is not None else None
                if window is not None:
                    return mapping, window
    return None


def regions_mapped() -> int:
    """How many mappings there are here, each with an fd."""
    settle()
    with guard:
        return len(_by_start)


def _in_child() -> None:
    # The parent's mapping of a sealed object is the one that can write. A child inherits
    # it; a new mapping in its place cannot, and mprotect(2) cannot change that.
    for mapping in _by_start.values():
        if mapping.sealed and mapping.mode is Mode.read_write:
            start, length = mapping.pages
            kernel.replace(start, mapping.fd, length, Access.READ, mapping.offset - mapping.offset % kernel.page_size)
            mapping.mode = Mode.read_only


at_fork(in_child=_in_child)
