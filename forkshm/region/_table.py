"""Which mapped memory does this address, or this kernel object, belong to?

An array is recognised by where its memory lies, so plain views, slices and transposes
of shared memory are recognised as well, whoever made them.
"""

from __future__ import annotations

import atexit
import bisect
import contextlib
import dataclasses
import enum
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any

from forkshm import _leaks
from forkshm.backend import Access, Identity, kernel
from forkshm.region._lifetime import at_fork, guard, settle

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = (
    "Mapping",
    "Mode",
    "borrow",
    "copy_on_write",
    "give_back",
    "keep",
    "lend",
    "let_go",
    "mapping_at",
    "mapping_of",
    "new_mapping",
    "read_only",
    "read_private",
    "read_write",
    "region_fds",
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

_ACCESS = {
    Mode.read_only: Access.READ,
    Mode.read_write: Access.SHARED,
    Mode.copy_on_write: Access.PRIVATE,
    Mode.read_private: Access.SNAPSHOT,
}


_program_is_alive = [True]
atexit.register(_program_is_alive.clear)


@dataclasses.dataclass(eq=False, slots=True)
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
    #: Address and size of the whole pages that are mapped.
    pages: tuple[int, int]
    #: Nobody but the process that sealed it can write to the object.
    sealed: bool = False
    #: The one MappedRegion made of it, if it is alive.
    region: weakref.ref[Any] | None = None
    #: The exporter, if any view is alive.
    window: weakref.ref[Any] | None = None

    # `watch` would do, and takes longer: here the mapping keeps the reference.
    # The default is there at the end of the program, when names of this module may be gone.
    def last_view_gone(self, _: object, alive: list[bool] = _program_is_alive) -> None:
        """Have the mapping end: called when its window is collected."""
        if alive:
            settle(self.end)

    def end(self) -> None:
        """Unmap the memory and close the fd; needs `guard`."""
        # First out of the tables, then unmapped: the kernel may give the address to somebody
        # else the moment it is free.
        if _new.pop(self.address, None) is None:
            _leave(self)
        start, length = self.pages
        _unmap(start, length)
        give_back(self.fd)
        if _leaks.is_on:
            _leaks.unmade(self)

    @property
    def sent_as(self) -> Mode:
        """The mode in which others get it."""
        return Mode.read_only if self.sealed else self.mode

    @property
    def shares_writes(self) -> bool:
        """Whether another process that maps the same object sees the same bytes."""
        return self.mode is not Mode.copy_on_write


_page, _map, _unmap, _window = kernel.page_size, kernel.map, kernel.unmap, kernel.window

# By start address, what nobody has looked for yet: many a mapping ends before anybody does.
# Whoever looks takes `guard`, and enters these into the tables first.
_new: dict[int, Mapping] = {}
# Sorted start addresses, and the mapping that starts at each. Mappings never overlap.
_starts: list[int] = []
_by_start: dict[int, Mapping] = {}
_by_identity: dict[Identity, list[Mapping]] = {}


# Fds that several mappings of one object have in common, and how many more than one.
_more_users: dict[int, int] = {}
# What to do when an fd has one user left.
_when_alone: dict[int, Callable[[], None]] = {}


def borrow(identity: Identity, fd: int) -> int | None:
    """Return the fd of a mapping of that object, to be used in place of *fd*, or None. Needs `guard`."""
    if _new:
        _enter_new()
    for same in _by_identity.get(identity, ()):
        with contextlib.suppress(OSError):  # somebody closed it: it is of no use
            if kernel.may_write(same.fd) is kernel.may_write(fd):
                return lend(same.fd)
    return None


def lend(fd: int) -> int:
    """Let one more use *fd*, and return it; each gives it back. Needs `guard`."""
    _more_users[fd] = _more_users.get(fd, 0) + 1
    return fd


def keep(fd: int, when_alone: Callable[[], None]) -> None:
    """Use *fd* for as long as others do: the last of them calls *when_alone*, which lets go of it. Needs `guard`."""
    _when_alone[fd] = when_alone


def let_go(fd: int) -> None:
    """End what `keep` began. Needs `guard`."""
    del _when_alone[fd]
    give_back(fd)


def give_back(fd: int) -> None:
    """Close the fd of a mapping, unless others use it, too. Needs `guard`."""
    more = _more_users.get(fd)
    if more is None:
        kernel.close(fd)
    elif more == 1:
        del _more_users[fd]
        if (last := _when_alone.get(fd)) is not None:
            last()
    else:
        _more_users[fd] = more - 1


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of *multiple* that is at least *value*."""
    return -(-value // multiple) * multiple


def new_mapping(
    fd: int, identity: Identity, offset: int, size: int, mode: Mode, address: int | None = None
) -> tuple[Mapping, Any]:
    """Map part of an object, and take over *fd*, which stays the caller's on failure.

    Returns:
        The mapping and its window. Keep the window: it is what keeps the memory.
    """
    settle()
    slack = offset % _page
    length = -(-(size + slack) // _page) * _page
    if address is None:
        start = _map(fd, length, _ACCESS[mode], offset - slack)
    else:
        start = address
        kernel.map_at(address, fd, length, _ACCESS[mode], offset)
    mapping = Mapping(start + slack, size, fd, identity, offset, mode, (start, length))
    _new[start + slack] = mapping
    window = _window(start + slack, size)
    mapping.window = weakref.ref(window, mapping.last_view_gone)
    if _leaks.is_on:
        _leaks.made(mapping, "region", size)
    return mapping, window


def _enter_new() -> None:
    while _new:
        _, mapping = _new.popitem()
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


def shrink(mapping: Mapping, nbytes: int, *, from_back: bool) -> Any:
    """Let a mapping have *nbytes* less, and unmap the pages it has no part in any more.

    Nobody may have views of it. Returns the new window.
    """
    mapping.window = None  # its end is not the mapping's
    with guard:
        start, length = mapping.pages
        _enter_new()
        _leave(mapping)
        if not from_back:
            mapping.address += nbytes
            mapping.offset += nbytes
        mapping.size -= nbytes
        left = mapping.address - mapping.address % kernel.page_size
        left_length = round_up(mapping.address + mapping.size, kernel.page_size) - left
        mapping.pages = left, left_length
        if left > start:
            kernel.unmap(start, left - start)
        if left + left_length < start + length:
            kernel.unmap(left + left_length, start + length - left - left_length)
        _new[mapping.address] = mapping
    window = _window(mapping.address, mapping.size)
    mapping.window = weakref.ref(window, mapping.last_view_gone)
    return window


def seal(mapping: Mapping) -> None:
    """Seal the object against writes, and note it for all of its mappings here that can write.

    Under the lock that fork takes: no child comes between the two.
    """
    with guard:
        _enter_new()
        kernel.seal_writes(mapping.fd)
        for same in _by_identity[mapping.identity]:
            same.sealed = same.mode is Mode.read_write
    settle()


def mapping_at(address: int) -> Mapping | None:
    """Return the mapping that holds *address*, or None."""
    settle()
    with guard:
        if _new:
            _enter_new()
        position = bisect.bisect_right(_starts, address) - 1
        if position < 0:
            return None
        mapping = _by_start[_starts[position]]
    return mapping if address < mapping.address + mapping.size else None


def mapping_of(identity: Identity, offset: int, size: int, mode: Mode) -> tuple[Mapping, Any] | None:
    """Return a live mapping of that part of that object, with its window, or None."""
    with guard:
        if _new:
            _enter_new()
        for mapping in _by_identity.get(identity, ()):
            if mapping.offset == offset and mapping.size == size and mapping.mode is mode:
                window = mapping.window() if mapping.window is not None else None
                if window is not None:
                    return mapping, window
    return None


def regions_mapped() -> int:
    """How many mappings there are here."""
    settle()
    with guard:
        return len(_by_start) + len(_new)


def region_fds() -> int:
    """How many fds they have: one for each, or for several of one object; the last of a commons may be missing."""
    settle()
    with guard:
        return len(_by_start) + len(_new) - sum(_more_users.values())


def _in_child() -> None:
    # The parent's mapping of a sealed object is the one that can write. A child inherits
    # it; a new mapping in its place cannot, and mprotect(2) cannot change that.
    _enter_new()
    for mapping in _by_start.values():
        if mapping.sealed and mapping.mode is Mode.read_write:
            start, length = mapping.pages
            try:
                kernel.replace(start, mapping.fd, length, Access.READ, mapping.offset - mapping.offset % _page)
            except OSError as error:
                _end_child(mapping, error)
            mapping.mode = Mode.read_only


def _end_child(mapping: Mapping, error: OSError) -> None:
    assert sys.platform != "win32"  # there is no fork
    # A child that could write would break the seal, an exception cannot leave a fork, and
    # what is weaker than a new mapping, mprotect(2) can undo: so there is no child.
    message = (
        f"forkshm: process {os.getpid()} ends: it was forked from one that sealed {mapping.size:,} bytes at "
        f"{mapping.address:#x}, and cannot map them anew for reading ({os.strerror(error.errno or 0)}); "
        "check the limits on memory, and that nobody closed the region's fd\n"
    )
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
    os._exit(os.EX_OSERR)


at_fork(in_child=_in_child)
