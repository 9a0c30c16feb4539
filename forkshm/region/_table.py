"""The table that finds the mapped memory of an address or of a kernel object.

An array is recognized by its address. So plain views, slices and transposes of shared memory are recognized as well, in
whatever way they were made.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import enum
import operator
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

from forkshm import _interrupts, _leaks
from forkshm.backend import Access, Identity, kernel
from forkshm.errors import RegionGoneError
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
    """Permitted uses of a region; the ``mode_t`` of Boost.Interprocess.

    A member equals its name: ``region.mode == "read_write"``.
    """

    read_only = "read_only"
    """Reads, and sees other processes' writes."""
    read_write = "read_write"
    """Reads and writes; all processes see the writes."""
    copy_on_write = "copy_on_write"
    """Reads and writes; the writes stay in this process."""
    read_private = "read_private"
    """Reads, and may or may not see later writes of other processes."""

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        raise ValueError(f"mode must be one of {', '.join(map(repr, map(str, cls)))}, got {value!r}")


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

    It ends, and its fd is closed, when the last buffer taken from its exporter is gone.
    """

    address: int
    """First usable byte; not necessarily the start of a page."""
    size: int
    """Usable bytes."""
    fd: int
    """This process's fd of the object; -1 until the mapping has taken it over."""
    identity: Identity
    """The kernel's identity of the object."""
    offset: int
    """Offset in the object of the first usable byte."""
    mode: Mode
    """The permitted use."""
    pages: tuple[int, int]
    """Address and size of the whole pages that are mapped."""
    mapped: list[int]
    """The start of the mapped pages, until they are unmapped; the kernel call and the change here are one C call."""
    sealed: bool = False
    """Whether the object is sealed, so that only the process that sealed it can write to it."""
    region: weakref.ref[Any] | None = None
    """The MappedRegion made of it, if that is alive."""
    exporter: weakref.ref[Any] | None = None
    """The exporter, if a view is alive."""
    closing: Iterator[Any] = _NOTHING
    """An iterator that closes the fd when it is first advanced."""

    def end(self) -> None:
        """Unmap the memory and close the fd. Needs `guard`. Can be repeated from any interruption."""
        # Leaves the tables before it is unmapped, because the kernel may reuse the address at once.
        _leave(self)
        length = self.pages[1]
        if self.mapped:
            try:
                kernel.unmap_from(self.mapped, length)
            except OSError:  # the limit on mappings: unmapping the middle of a mapping makes two
                _left_mapped.append((self.mapped, length))
                self.mapped = []
        fd, closing = self.fd, self.closing
        last = _when_alone.get(fd)
        if fd >= 0:
            if fd in _more_users:
                # No call between these stores.
                if self.fd >= 0:
                    self.fd = -1
                    if _more_users[fd] == 1:
                        del _more_users[fd]
                    else:
                        _more_users[fd] -= 1
                    if fd not in _more_users and last is not None:
                        last()
            else:
                kernel.close_own(closing)
                self.fd = -1
        if _leaks.is_on:
            _leaks.unmade(self)

    @property
    def sent_as(self) -> Mode:
        """The mode in which other processes receive it."""
        return Mode.read_only if self.sealed else self.mode

    def refuse_truncated(self, address: int, nbytes: int) -> None:
        """Check that bytes of the mapping can be read.

        Raises:
            RegionGoneError: The file was truncated below the end of these bytes.
        """
        _, whole = kernel.identify(self.fd)
        if self.offset + address + nbytes - self.address > whole:
            raise RegionGoneError(
                f"cannot send {nbytes:,} bytes of a {self.mode} region: its file was truncated to {whole:,} bytes "
                "after it was mapped. Map it again."
            )

    @property
    def shares_writes(self) -> bool:
        """Whether another process that maps the same object sees the same bytes."""
        return self.mode is not Mode.copy_on_write


_page, _map_into, _exporter = kernel.page_size, kernel.map_into, kernel.buffer_at

# New mappings by start address. They are entered into the tables below by the first lookup, which takes `guard`,
# because many mappings end without a lookup.
_new: dict[int, Mapping] = {}
# The mapping that starts at each address. Mappings never overlap.
_by_start: dict[int, Mapping] = {}
# The addresses, sorted. An interrupted change may leave an extra address here, which lookups skip.
_starts: list[int] = []
_by_identity: dict[Identity, dict[int, Mapping]] = {}
# Pages that the kernel refused to unmap.
_left_mapped: list[tuple[list[int], int]] = []


# Fds that several mappings of one object share, and the number of users beyond the first.
_more_users: dict[int, int] = {}
# Actions to run when an fd has a single user left.
_when_alone: dict[int, Callable[[], None]] = {}


def borrow(identity: Identity, fd: int) -> int | None:
    """Return the fd of a mapping of that object, to use instead of *fd*, or None. Needs `guard`."""
    if _new:
        _enter_new()
    for same in list(_by_identity.get(identity, {}).values()):
        try:
            if kernel.identify(same.fd)[0] == identity and kernel.may_write(same.fd) is kernel.may_write(fd):
                return lend(same.fd)
        except OSError:  # other code closed the fd, so it is useless
            continue
    return None


@_interrupts.promptly
def lend(fd: int) -> int:
    """Count one more user of *fd*, and return it. Each user calls `give_back`. Needs `guard`."""
    if fd not in _more_users:
        _more_users[fd] = 1
    else:
        _more_users[fd] += 1
    return fd


@_interrupts.promptly
def keep(fd: int, when_alone: Callable[[], None]) -> None:
    """Use *fd* while others do; the last of them calls *when_alone*, which must call `let_go`. Needs `guard`."""
    _when_alone[fd] = when_alone


@_interrupts.promptly
def let_go(fd: int) -> None:
    """Undo `keep`. Needs `guard`."""
    if fd in _when_alone:
        del _when_alone[fd]  # noqa: RUF051 - a signal handler may run after a call of `pop`
    give_back(fd)


@_interrupts.promptly
def give_back(fd: int) -> None:
    """Close the fd of a mapping, unless it has other users. Needs `guard`."""
    if fd not in _more_users:
        kernel.close(fd)
        return
    last = _when_alone[fd] if fd in _when_alone else None  # noqa: SIM401 - no call before the last user is counted
    if _more_users[fd] == 1:
        del _more_users[fd]
    else:
        _more_users[fd] -= 1
    if fd not in _more_users and last is not None:
        last()


def give_back_all(fds: list[int]) -> None:
    """Empty the list of a message's fds, and close those that no mapping uses. Can be repeated."""
    if _more_users:
        with guard:
            for fd in list(filter(_more_users.__contains__, fds)):
                position = fds.index(fd)
                # No call until the end of the loop.
                if fd not in _more_users:
                    continue
                del fds[position]
                if _more_users[fd] == 1:
                    del _more_users[fd]
                else:
                    _more_users[fd] -= 1
    kernel.close_all(fds)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of *multiple* that is at least *value*."""
    return -(-value // multiple) * multiple


def new_mapping(
    fd: int, identity: Identity, offset: int, size: int, mode: Mode, address: int | None = None
) -> tuple[Mapping, Any]:
    """Map part of an object, and take over *fd*; on failure the caller keeps it.

    Returns:
        The mapping and its exporter. Keep the exporter, which keeps the memory mapped.
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
            kernel.map_at(mapped, address, fd, length, _ACCESS[mode], offset)
        file = kernel.file_of(fd)
        mapping.address, mapping.pages = start + slack, (start, length)
        exporter = _exporter(start + slack, size)
        mapping.exporter = watch(exporter, mapping.end)
        _new[start + slack] = mapping
        if _leaks.is_on:
            _leaks.made(mapping, "region", size)
        closing = kernel.closing(fd, file)
    except BaseException:
        try:
            mapping.end()
        except BaseException:  # a signal handler has raised again
            mapping.end()
            raise
        raise
    # No call between these stores and the return: the fd has one owner at every moment.
    mapping.closing = closing
    mapping.fd = fd
    return mapping, exporter


def _unmap_rest() -> None:
    """Unmap the pages that the kernel refused to unmap before."""
    with guard:
        for rest in list(_left_mapped):
            if rest[0]:
                try:
                    kernel.unmap_from(*rest)
                except OSError:
                    continue
            with contextlib.suppress(ValueError):
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
    """Remove a mapping from the tables that it is in."""
    address, identity = mapping.address, mapping.identity
    # If this mapping was removed and unmapped before, a table may hold another mapping at this address.
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
    """Shrink a mapping by *nbytes*, and unmap the pages that it no longer needs; return the new exporter.

    The mapping must have no views.
    """
    old = mapping.exporter
    exporter = old() if old is not None else None
    if old is None or exporter is None:
        raise ValueError(f"cannot shrink a mapping of {mapping.size:,} bytes: it has no exporter")
    with guard:
        start, length = mapping.pages
        _enter_new()
        _leave(mapping)
        first, size = mapping.address + (0 if from_back else nbytes), mapping.size - nbytes
        left = first - first % kernel.page_size
        left_length = round_up(first + size, kernel.page_size) - left
        behind = left + left_length
        ends = (start, left - start), (behind, start + length - behind)
        cut = [([low], unneeded) for low, unneeded in filter(operator.itemgetter(1), ends)]
        mapped = [left]
        # No call between these stores.
        mapping.offset += first - mapping.address
        mapping.address, mapping.size, mapping.pages, mapping.mapped = first, size, (left, left_length), mapped
        _left_mapped.extend(cut)
        _new[first] = mapping
        _unmap_rest()
    exporter = _exporter(first, size)
    mapping.exporter = watch(exporter, mapping.end)
    unwatch(old)  # the mapping continues with the new exporter
    return exporter


def seal(mapping: Mapping) -> None:
    """Seal the object against writes, and mark all of its writable mappings here as sealed.

    The caller holds the lock that fork takes, so no child is forked between the two.
    """
    with guard:
        _enter_new()
        kernel.seal_writes(mapping.fd)
        for same in _by_identity[mapping.identity].values():
            same.sealed = same.mode is Mode.read_write
    settle()


def mapping_at(address: int) -> Mapping | None:
    """Return the mapping that contains *address*, or None."""
    settle()
    with guard:
        if _new:
            _enter_new()
        position = bisect.bisect_right(_starts, address) - 1
        while True:
            if position < 0:
                break
            start = _starts[position]
            mapping = _by_start.get(start)
            if mapping is not None:
                return mapping if address < mapping.address + mapping.size else None
            # An interrupted change left this address here.
            with contextlib.suppress(IndexError):
                if _starts[position] == start:
                    del _starts[position]
            position -= 1
    return None


def mapping_of(identity: Identity, offset: int, size: int, mode: Mode) -> tuple[Mapping, Any] | None:
    """Return a live mapping of that part of that object and its exporter, or None."""
    with guard:
        if _new:
            _enter_new()
        for mapping in list(_by_identity.get(identity, {}).values()):
            if mapping.offset != offset or mapping.size != size or mapping.mode is not mode:
                continue
            exporter = mapping.exporter() if mapping.exporter is not None else None
            if exporter is None:
                continue
            return mapping, exporter
    return None


def regions_mapped() -> int:
    """Return the number of mappings in this process."""
    settle()
    with guard:
        return len(_by_start) + len(_new)


def region_fds() -> int:
    """Return the number of fds of mapped regions. Regions of one object share an fd."""
    settle()
    with guard:
        return len(_by_start) + len(_new) - sum(_more_users.values())


def _in_child() -> None:
    # The parent's mapping of a sealed object stays writable, and a child inherits it. A new mapping in its place is
    # read-only, and mprotect(2) cannot change that.
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
    # A child that could write would break the seal. An exception cannot leave a fork hook, and mprotect(2) could undo
    # anything weaker than a new mapping. So the child ends.
    message = (
        f"forkshm: process {os.getpid()} ends: its parent sealed {mapping.size:,} bytes at {mapping.address:#x}, and "
        f"they cannot be mapped again for reading ({os.strerror(error.errno or 0)}). "
        "Check the limits on memory, and that the program does not close the region's fd.\n"
    )
    with contextlib.suppress(OSError):
        os.write(2, message.encode())
    os._exit(os.EX_OSERR)


at_fork(in_child=_in_child)
