"""Which mapped memory does this address, or this kernel object, belong to?

An array is recognised by where its memory lies, so plain views, slices and transposes
of shared memory are recognised as well, whoever made them.
"""

from __future__ import annotations

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
from forkshm.region._lifetime import at_fork, guard, settle, unwatch, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = (
    "Mapping",
    "Mode",
    "borrow",
    "copy_on_write",
    "give_back",
    "give_back_all",
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


class Mode(enum.StrEnum):
    """What a region may be used for; Boost.Interprocess' ``mode_t``.

    A member equals its name: ``region.mode == "read_write"``.
    """

    read_only = "read_only"
    """Reads, and sees what others write."""
    read_write = "read_write"
    """Reads and writes, for everybody to see."""
    copy_on_write = "copy_on_write"
    """Reads and writes; the writes stay in this process."""
    read_private = "read_private"
    """Reads; may keep a private snapshot."""

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


_NOTHING: Iterator[Any] = iter(())


@dataclasses.dataclass(eq=False, slots=True)
class Mapping:
    """One mapping of one memory object in this process.

    It ends, and its fd is closed, when the last buffer taken from its window is gone.
    """

    address: int
    """First usable byte; not necessarily the start of a page."""
    size: int
    """Usable bytes."""
    fd: int
    """Our own fd of the object, to hand it on; -1 until the mapping has taken it over."""
    identity: Identity
    """The kernel's name of the object."""
    offset: int
    """Where in the object the first usable byte lies."""
    mode: Mode
    """What may be done with it."""
    pages: tuple[int, int]
    """Address and size of the whole pages that are mapped."""
    mapped: list[int]
    """The start of the mapped pages, until they are unmapped. The kernel call and its entry here are one C call."""
    sealed: bool = False
    """Nobody but the process that sealed it can write to the object."""
    region: weakref.ref[Any] | None = None
    """The one MappedRegion made of it, if it is alive."""
    exporter: weakref.ref[Any] | None = None
    """The exporter, if any view is alive."""
    closing: Iterator[Any] = _NOTHING
    """Closes the fd the first time it is asked for its next item."""

    def end(self) -> None:
        """Unmap the memory and close the fd; needs `guard`. Can be repeated from wherever it was interrupted."""
        # First out of the tables, then unmapped: the kernel may give the address to somebody
        # else the moment it is free.
        _leave(self)
        length = self.pages[1]
        if self.mapped:
            try:
                kernel.unmap_from(self.mapped, length)
            except OSError:  # the limit on mappings: unmapping the middle of one makes two
                _left_mapped.append((self.mapped, length))
                self.mapped = []
        fd, closing = self.fd, self.closing
        if fd >= 0:
            if fd in _more_users:
                # Nothing is called between these stores.
                if self.fd >= 0:
                    self.fd = -1
                    if _more_users[fd] == 1:
                        del _more_users[fd]
                    else:
                        _more_users[fd] -= 1
                if fd not in _more_users and (last := _when_alone.get(fd)) is not None:
                    last()
            else:
                with contextlib.suppress(OSError):  # somebody closed it
                    next(closing, None)
                self.fd = -1
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


_page, _map_into, _exporter, _close = kernel.page_size, kernel.map_into, kernel.buffer_at, kernel.close

# By start address, what nobody has looked for yet: many a mapping ends before anybody does.
# A reader takes `guard`, and enters these into the tables first.
_new: dict[int, Mapping] = {}
# The mapping that starts at each address. Mappings never overlap.
_by_start: dict[int, Mapping] = {}
# The addresses, sorted. An interrupted change may leave one too many here, which is passed over.
_starts: list[int] = []
_by_identity: dict[Identity, dict[int, Mapping]] = {}
# Pages that the kernel refused to unmap.
_left_mapped: list[tuple[list[int], int]] = []


# Fds that several mappings of one object have in common, and how many more than one.
_more_users: dict[int, int] = {}
# What to do when an fd has one user left.
_when_alone: dict[int, Callable[[], None]] = {}


def borrow(identity: Identity, fd: int) -> int | None:
    """Return the fd of a mapping of that object, to be used in place of *fd*, or None. Needs `guard`."""
    if _new:
        _enter_new()
    for same in list(_by_identity.get(identity, {}).values()):
        with contextlib.suppress(OSError):  # somebody closed it: it is of no use
            if kernel.identify(same.fd)[0] == identity and kernel.may_write(same.fd) is kernel.may_write(fd):
                return lend(same.fd)
    return None


def lend(fd: int) -> int:
    """Count one more user of *fd*, and return it. Each user gives it back. Needs `guard`."""
    if fd not in _more_users:
        _more_users[fd] = 1
    else:
        _more_users[fd] += 1
    return fd


def keep(fd: int, when_alone: Callable[[], None]) -> None:
    """Use *fd* for as long as others do: the last of them calls *when_alone*, which lets go of it. Needs `guard`."""
    _when_alone[fd] = when_alone


def let_go(fd: int) -> None:
    """End what `keep` began. Needs `guard`."""
    _when_alone.pop(fd, None)
    give_back(fd)


def give_back(fd: int) -> None:
    """Close the fd of a mapping, unless others use it, too. Needs `guard`."""
    if fd not in _more_users:
        kernel.close(fd)
        return
    if _more_users[fd] == 1:
        del _more_users[fd]
    else:
        _more_users[fd] -= 1
    if fd not in _more_users and (last := _when_alone.get(fd)) is not None:
        last()


def give_back_all(fds: list[int]) -> None:
    """Take the fds of a message out of the list, and close those that no mapping uses. Can be repeated."""
    if _more_users:
        with guard:
            for fd in [fd for fd in fds if fd in _more_users]:
                position = fds.index(fd)
                # No call up to the end of the loop.
                if fd in _more_users:
                    del fds[position]
                    if _more_users[fd] == 1:
                        del _more_users[fd]
                    else:
                        _more_users[fd] -= 1
    kernel.close_all(fds)


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
    if _left_mapped:
        _unmap_rest()
    slack = offset % _page
    length = -(-(size + slack) // _page) * _page
    mapped: list[int] = []
    mapping = Mapping(0, size, -1, identity, offset, mode, (0, length), mapped)
    try:
        if address is None:
            _map_into(mapped, fd, length, _ACCESS[mode], offset - slack)
            start = mapped[0]
        else:
            start = address
            kernel.map_at(address, fd, length, _ACCESS[mode], offset)
            mapped.append(start)
        mapping.address, mapping.pages = start + slack, (start, length)
        exporter = _exporter(start + slack, size)
        mapping.exporter = watch(exporter, mapping.end)
        _new[start + slack] = mapping
        if _leaks.is_on:
            _leaks.made(mapping, "region", size)
        closing = map(_close, (fd,))
    except BaseException:
        mapping.end()
        raise
    # No call between these and the return: the fd has one owner at every moment.
    mapping.closing = closing
    mapping.fd = fd
    return mapping, exporter


def _unmap_rest() -> None:
    """Try once more to unmap what the kernel refused to."""
    with guard:
        for rest in list(_left_mapped):
            if rest[0]:
                try:
                    kernel.unmap_from(*rest)
                except OSError:
                    continue
            if rest in _left_mapped:
                _left_mapped.remove(rest)


def _enter_new() -> None:
    for address in list(_new):
        mapping = _new.get(address)
        if mapping is None:
            continue
        _by_start[address] = mapping
        bisect.insort(_starts, address)
        _by_identity.setdefault(mapping.identity, {})[address] = mapping
        if address in _new and _new[address] is mapping:
            del _new[address]


def _leave(mapping: Mapping) -> None:
    """Take a mapping out of the tables, as far as it is in them."""
    address, identity = mapping.address, mapping.identity
    # A table holds another mapping at this address if this one has left and was unmapped before.
    if address in _new and _new[address] is mapping:
        del _new[address]
    if address in _by_start and _by_start[address] is mapping:
        del _by_start[address]
        position = bisect.bisect_left(_starts, address)
        with contextlib.suppress(IndexError):
            if _starts[position] == address:
                del _starts[position]
    if identity in _by_identity:
        if address in _by_identity[identity] and _by_identity[identity][address] is mapping:
            del _by_identity[identity][address]
        if not _by_identity[identity]:
            del _by_identity[identity]


def shrink(mapping: Mapping, nbytes: int, *, from_back: bool) -> Any:
    """Shrink a mapping by *nbytes*, and unmap the pages that it no longer needs.

    Nobody may have views of it. Returns the new window.
    """
    old = mapping.exporter
    exporter = old() if old is not None else None
    if old is None or exporter is None:
        raise ValueError(f"cannot shrink a mapping of {mapping.size:,} bytes that nobody keeps")
    with guard:
        start, length = mapping.pages
        _enter_new()
        _leave(mapping)
        first, size = mapping.address + (0 if from_back else nbytes), mapping.size - nbytes
        left = first - first % kernel.page_size
        left_length = round_up(first + size, kernel.page_size) - left
        cut = [([low], high - low) for low, high in ((start, left), (left + left_length, start + length)) if high > low]
        mapped = [left]
        # No call between these.
        mapping.offset += first - mapping.address
        mapping.address, mapping.size, mapping.pages, mapping.mapped = first, size, (left, left_length), mapped
        _left_mapped.extend(cut)
        _new[first] = mapping
        _unmap_rest()
    exporter = _exporter(first, size)
    mapping.exporter = watch(exporter, mapping.end)
    unwatch(old)  # its end is not the mapping's
    return exporter


def seal(mapping: Mapping) -> None:
    """Seal the object against writes, and note it for all of its mappings here that can write.

    Under the lock that fork takes: no child comes between the two.
    """
    with guard:
        _enter_new()
        kernel.seal_writes(mapping.fd)
        for same in _by_identity[mapping.identity].values():
            same.sealed = same.mode is Mode.read_write
    settle()


def mapping_at(address: int) -> Mapping | None:
    """Return the mapping that holds *address*, or None."""
    settle()
    with guard:
        if _new:
            _enter_new()
        position = bisect.bisect_right(_starts, address) - 1
        while position >= 0:
            start = _starts[position]
            mapping = _by_start.get(start)
            if mapping is not None:
                return mapping if address < mapping.address + mapping.size else None
            # An interrupted change left it here.
            with contextlib.suppress(IndexError):
                if _starts[position] == start:
                    del _starts[position]
            position -= 1
    return None


def mapping_of(identity: Identity, offset: int, size: int, mode: Mode) -> tuple[Mapping, Any] | None:
    """Return a live mapping of that part of that object, with its window, or None."""
    with guard:
        if _new:
            _enter_new()
        for mapping in list(_by_identity.get(identity, {}).values()):
            if mapping.offset == offset and mapping.size == size and mapping.mode is mode:
                exporter = mapping.exporter() if mapping.exporter is not None else None
                if exporter is not None:
                    return mapping, exporter
    return None


def regions_mapped() -> int:
    """Return the number of mappings in this process."""
    settle()
    with guard:
        return len(_by_start) + len(_new)


def region_fds() -> int:
    """Return how many fds the mapped regions have. Regions of one object share an fd."""
    settle()
    with guard:
        return len(_by_start) + len(_new) - sum(_more_users.values())


def _in_child() -> None:
    # The parent's mapping of a sealed object is the one that can write. A child inherits
    # it; a new mapping in its place cannot, and mprotect(2) cannot change that.
    _enter_new()
    for mapping in list(_by_start.values()):
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
