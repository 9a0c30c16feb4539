"""MappedRegion: shared memory, mapped into this process."""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from forkshm.backend import Advice, kernel
from forkshm.errors import (
    NotPicklableError,
    RegionAddressError,
    RegionBusyError,
    RegionClosedError,
    RegionCreateError,
    RegionError,
    UnsupportedError,
)
from forkshm.region._lifetime import guard
from forkshm.region._table import (
    Mapping,
    Mode,
    borrow,
    give_back,
    lend,
    mapping_at,
    mapping_of,
    new_mapping,
    regions_mapped,
    seal,
    shrink,
)

if TYPE_CHECKING:
    from typing import Self

__all__ = ("Mappable", "MappedRegion", "Mode", "attach", "region_at", "region_of", "view_of")


T = TypeVar("T")


class Mappable(Protocol):
    """Anything that can be mapped: it has an fd."""

    def fileno(self) -> int:
        """Return the fd."""
        ...


#: References to a window that are not views: the region's own, and the argument of
#: ``sys.getrefcount``.
_OWN_REFERENCES = 2

#: Whether ``fileno()`` of a file of Python is what the backend calls an fd.
_FDS_ARE_FILES = kernel.name != "exporters"

_WRITABLE = (Mode.read_write, Mode.copy_on_write)

#: What a file offset can hold, and so the largest memory object there can be.
MAX_SIZE = 2**63 - 1


class MappedRegion:
    """A range of addresses of this process that is backed by shareable memory.

    You get a region from `anonymous_shared_memory`, or by mapping anything that has a
    ``fileno()``. The memory stays mapped until `close`, or until the region *and* every
    buffer and array taken from it have been collected. The kernel frees the memory
    itself when no process maps it and no fd of it is open, however they ended.

    Passed through a forkshm channel (an argument or result of a `forkshm.Pool`), a
    region arrives as a region of the same memory: its descriptor crosses, not its bytes.
    Of a ``copy_on_write`` region the pages that were written are copied, and the receiver
    has them to itself, too.

    Args:
        mappable: Anything with ``fileno()``, or an fd as an int. The region keeps an fd of
            its own; yours may be closed afterwards.
        mode: What the memory may be used for.
        offset: Where the region starts in the object, in bytes; need not be a multiple
            of the page size.
        size: Bytes to map, at least 1; by default all from *offset* to the end.
        address: Map exactly there, in every process that does the same; a multiple of
            the page size, as *offset* must be then. What is there is never overwritten.
        populate: Take memory for all pages now, instead of when each is first touched.
            Where the kernel cannot, they are taken as they are touched.
        huge_pages: Ask for huge pages. Where the kernel has none for this kind of
            memory, the pages are ordinary.

    Raises:
        ValueError: *offset* is negative or past the end, or *size* is less than 1 or
            reaches past the end; or *address* is given and not a multiple of the page
            size, or *offset* is not.
        RegionAddressError: Something is mapped at *address* already.
        RegionCreateError: The kernel refused, see ``errno``: ``ENOMEM`` for address
            space or memory limits, ``EACCES`` when the fd does not allow *mode*,
            ``EMFILE`` for the limit on open files.

    Fork and threads:
        Safe to use from any thread. A forked child inherits the mapping and sees the
        same bytes; closing it there leaves the parent's alone. Writes are not ordered
        between processes: use a lock or a channel to say "ready".

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     _ = file.write(b"hello world")
        ...     file.flush()
        ...     region = MappedRegion(file, Mode.read_only, offset=6)
        >>> bytes(region.buf)
        b'world'
        >>> region.close()

    See Also:
        ``mapped_region`` of Boost.Interprocess; mmap(2).
    """

    __slots__ = ("__weakref__", "_exporter", "_mapping")
    #: `fileno` is an fd of the backend.
    _has_kernel_fd = True

    def __init__(
        self,
        mappable: Mappable | int,
        mode: Mode | str = Mode.read_write,
        offset: int = 0,
        size: int | None = None,
        address: int | None = None,
        *,
        populate: bool = False,
        huge_pages: bool = False,
    ) -> None:
        if type(mode) is not Mode:  # to ask the class takes ten times as long
            mode = Mode(mode)
        offset = operator.index(offset)
        if address is not None:
            address = checked_address(address, offset)
        theirs = checked_fd(mappable) if isinstance(mappable, int) else mappable.fileno()
        try:
            if not _FDS_ARE_FILES and not hasattr(mappable, "_has_kernel_fd"):
                theirs = kernel.of_file(theirs)
            fd = kernel.duplicate(theirs)
            try:
                identity, whole = kernel.identify(fd)
                size = whole - offset if size is None else checked_size(size)
                if offset < 0 or not 0 < size <= whole - offset:
                    raise outside(offset, size, whole)
                mapping, exporter = new_mapping(fd, identity, offset, size, mode, address)
            except BaseException:
                kernel.close(fd)
                raise
        except OSError as error:
            raise map_refused(error, size or 0, mode, address) from error
        self._mapping = mapping
        self._exporter: Any = exporter
        mapping.region = weakref.ref(self)
        if populate or huge_pages:
            prepare(self, populate=populate, huge_pages=huge_pages)

    def _adopt(self, mapping: Mapping, exporter: Any) -> None:
        self._mapping = mapping
        self._exporter = exporter
        mapping.region = weakref.ref(self)

    @property
    def buf(self) -> memoryview:
        """The bytes, as a new memoryview of format ``"B"``; read-only where the mode is.

        It keeps the memory mapped for as long as it, a slice of it, or an array made
        from it is alive.

        Raises:
            RegionClosedError: The region was closed.
        """
        return view_of(self._mapping, self._open_exporter())

    @property
    def size(self) -> int:
        """Usable bytes; what you asked for, not rounded to pages."""
        return self._mapping.size

    @property
    def address(self) -> int:
        """Address of the first byte in this process; it differs in others.

        Raises:
            RegionClosedError: The region was closed.
        """
        self._open_exporter()
        return self._mapping.address

    @property
    def mode(self) -> Mode:
        """What the region may be used for."""
        return self._mapping.mode

    @property
    def offset(self) -> int:
        """Where in its memory object the region starts, in bytes."""
        return self._mapping.offset

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._exporter is None

    def fileno(self) -> int:
        """Return the fd of the memory object, which stays the region's: do not close it.

        Raises:
            RegionClosedError: The region was closed.
        """
        self._open_exporter()
        return self._mapping.fd

    @staticmethod
    def page_size() -> int:
        """Bytes of a page: fixed addresses and their offsets are multiples of it."""
        return kernel.page_size

    def flush(self, offset: int = 0, size: int | None = None, asynchronous: bool = False) -> None:
        """Write what was changed back to the file; of memory without a file, do nothing.

        Args:
            offset: First byte, counted in the region, not in the file; any byte.
            size: Bytes, by default to the end of the region.
            asynchronous: Only have it begun. Otherwise all is on its way to the disk's
                own keeping when this returns.

        Raises:
            ValueError: The range does not lie in the region.
            OSError: The disk is full or broken.
            RegionClosedError: The region was closed.

        See Also:
            msync(2); ``mapped_region::flush`` of Boost.Interprocess, whose offset must
            be that of a page.
        """
        self._open_exporter()
        start, length = self._range(offset, size)
        if length:
            kernel.flush(start, length, asynchronous=asynchronous)
            if not asynchronous:
                kernel.flush_to_disk(self._mapping.fd)

    def advise(self, advice: Advice | str) -> bool:
        """Tell the kernel how the region is going to be used; no byte ever changes.

        Args:
            advice: See `Advice`.

        Returns:
            Whether the kernel took the advice.

        Raises:
            ValueError: There is no such advice.
            RegionClosedError: The region was closed.

        See Also:
            madvise(2); ``mapped_region::advise`` of Boost.Interprocess.
        """
        advice = Advice(advice)
        self._open_exporter()
        if advice is Advice.dontneed and self.mode is Mode.copy_on_write:
            return False  # it would throw away what was written
        try:
            kernel.advise(*self._mapping.pages, advice, writable=self.mode in _WRITABLE)
        except OSError:
            return False
        return True

    def shrink_by(self, nbytes: int, from_back: bool = True) -> None:
        """Let the region end, or with ``from_back=False`` begin, *nbytes* earlier or later.

        Pages that are no longer part of it are unmapped; the memory object keeps its
        size. By all its bytes, it closes the region.

        Raises:
            ValueError: *nbytes* is negative, or more than there are.
            RegionBusyError: Views of the region are alive. Nothing was changed.
            RegionClosedError: The region was closed.

        See Also:
            ``mapped_region::shrink_by`` of Boost.Interprocess, which changes the size
            even when it fails.
        """
        self._open_exporter()
        nbytes = operator.index(nbytes)
        if not 0 <= nbytes <= self.size:
            raise ValueError(f"cannot shrink {self!r} by {nbytes:,} bytes")
        self._check_no_views("shrink")
        if nbytes == self.size:
            self._exporter = None
        elif nbytes:
            self._exporter = shrink(self._mapping, nbytes, from_back=from_back)

    def seal(self) -> None:
        """Let nobody but this process write to the memory, from now on and for ever.

        The kernel enforces it: no process, not even root's, can map the memory for
        writing, write to its fd or change its size. This region stays writable, here;
        where it is passed to it arrives ``read_only``, and in a forked child it becomes
        so. Children that are forked by C code, without Python's ``os.fork``, keep a
        writable mapping, and so does who mapped the memory before it was sealed. Who may
        debug this process (ptrace(2)) can write through it.

        Raises:
            UnsupportedError: The memory has a name or is a file's, which cannot be sealed; or this system has no
                seals.
            ValueError: The region is not ``read_write``.
            RegionClosedError: The region was closed.

        Fork and threads:
            A forked child that writes through an array made before ends by SIGSEGV. One
            that cannot map the memory anew for reading, because the kernel's is exhausted or
            somebody closed the region's fd, ends at once with exit code ``os.EX_OSERR`` and a
            message on stderr.

        Example:
            >>> from forkshm import anonymous_shared_memory
            >>> region = anonymous_shared_memory(3)
            >>> region.seal()
            >>> region.buf[:] = b"abc"
            >>> MappedRegion(region, "read_write")  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            forkshm.errors.RegionCreateError: [Errno 1] cannot map 3 bytes as read_write ...

        See Also:
            ``F_SEAL_FUTURE_WRITE`` of fcntl(2).
        """
        self._open_exporter()
        if self._mapping.sealed:
            return
        if self.mode is not Mode.read_write:
            raise ValueError(f"cannot seal {self!r}: only a read_write region can be sealed")
        try:
            seal(self._mapping)
        except OSError as error:
            why = (
                "this system has no seals; pass MappedRegion(region, 'read_only') to those who shall only read"
                if error.errno == errno.ENOTSUP
                else f"{os.strerror(error.errno or 0)}; only anonymous memory can be, and none sealed otherwise"
            )
            raise UnsupportedError(f"cannot seal {self!r}: {why}", capability="seals") from error

    @property
    def sealed(self) -> bool:
        """Whether `seal` was called here, on this region or another one of the same memory."""
        return self._mapping.sealed

    def place(self, kind: type[T], offset: int = 0) -> T:
        """Return a view of a ctypes type in the region, of what is there already.

        It keeps the memory mapped, as any view does.

        Args:
            kind: A ctypes structure, union, array or simple type. Raw pointers, Python
                objects and functions mean nothing to other processes, and are refused.
            offset: Where it lies, in bytes; a multiple of its alignment.

        Raises:
            UnplaceableTypeError: The type has a part that means something in one
                process only; the message names the field, and what to use instead.
            ValueError: It does not fit there, or is not aligned.
            RegionClosedError: The region was closed.
        """
        from forkshm.region.pointers import place

        return place(self, kind, offset)

    def construct(self, kind: type[T], offset: int = 0, *args: Any, **kwargs: Any) -> T:
        """Make a new object of a ctypes type in the region, and return a view of it.

        Bytes that the arguments do not set are zero, and each `OffsetPtr` is null.

        Args:
            kind: As for `place`.
            offset: As for `place`.
            args: As for ``kind(...)``.
            kwargs: The same.

        Raises:
            UnplaceableTypeError: As for `place`.
            ValueError: As for `place`.
            RegionClosedError: The region was closed.
        """
        from forkshm.region.pointers import construct

        return construct(self, kind, offset, *args, **kwargs)

    def _range(self, offset: int, size: int | None) -> tuple[int, int]:
        """Return the pages around a range of the region: address and size."""
        offset = operator.index(offset)
        if not 0 <= offset <= self.size:
            raise ValueError(f"offset must lie in the region's {self.size:,} bytes, got {offset:,}")
        size = self.size - offset if size is None else operator.index(size)
        if size < 0 or offset + size > self.size:
            raise ValueError(f"{size:,} bytes at {offset:,} do not lie in the region's {self.size:,}")
        first = self._mapping.address + offset
        start = first - first % kernel.page_size
        return start, first + size - start if size else 0

    def _check_no_views(self, what: str) -> None:
        exports = sys.getrefcount(self._exporter) - _OWN_REFERENCES
        if exports > 0:
            raise RegionBusyError(
                f"cannot {what} {self!r}: {exports} {'view' if exports == 1 else 'views'} of it "
                f"{'is' if exports == 1 else 'are'} alive; release them and delete the arrays made from them first",
                exports=exports,
            )

    def close(self) -> None:
        """Unmap the region and close its fd in this process. Closing twice is allowed.

        Other processes are not affected.

        Raises:
            RegionBusyError: Buffers or arrays taken from the region are alive. Nothing
                was changed: release or delete them, then close again.
        """
        if self._exporter is not None:
            if sys.getrefcount(self._exporter) > _OWN_REFERENCES:
                self._check_no_views("close")
            self._exporter = None

    def _open_exporter(self) -> Any:
        exporter = self._exporter
        if exporter is None:
            raise RegionClosedError(f"cannot use {self!r}: it was closed in this process")
        return exporter

    def __buffer__(self, flags: int) -> memoryview:
        # From Python 3.12 on, memoryview(region) and np.frombuffer(region) work.
        return self.buf

    def __len__(self) -> int:
        return self._mapping.size

    def __enter__(self) -> Self:
        self._open_exporter()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self.close()
        else:
            # The traceback of what went wrong may hold views; the last one unmaps.
            with contextlib.suppress(RegionBusyError):
                self.close()

    def __repr__(self) -> str:
        where = "closed" if self._exporter is None else f"at {self._mapping.address:#x}"
        return f"<{type(self).__name__} {self._mapping.size:,} bytes {self._mapping.mode} {where}>"

    def _repr_html_(self) -> str:
        # For notebooks.
        where = "closed" if self._exporter is None else f"{self._mapping.address:#x}"
        cells = {"size": f"{self._mapping.size:,} bytes", "mode": str(self._mapping.mode), "address": where}
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells.items())
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"

    def __reduce__(self) -> Any:
        raise NotPicklableError(
            f"cannot pickle {self!r}: a plain pickle cannot carry shared memory; "
            "pass the region to a forkshm.Pool, or send bytes(region.buf)"
        )


def checked_fd(fd: int) -> int:
    """Return *fd*, or raise with what is wrong about it."""
    if isinstance(fd, bool):
        raise TypeError(f"cannot map {fd!r}: an fd is an int, or something with fileno()")
    if fd < 0:
        raise ValueError(f"cannot map fd {fd}: an fd is not negative; anonymous_shared_memory(size) needs none")
    return fd


def checked_size(size: int) -> int:
    """Return *size* as an int, or raise with what is wrong about it."""
    number = operator.index(size)
    if number < 1:
        raise ValueError(f"size must be at least 1 byte, got {number}")
    if number > MAX_SIZE:
        raise ValueError(f"size must be at most 2**63 - 1 bytes, which is all an object can have, got {number}")
    return number


def outside(offset: int, size: int, whole: int) -> ValueError:
    """Return what is wrong about a part that an object of *whole* bytes has not."""
    if not 0 <= offset < max(whole, 1):
        return ValueError(f"offset must lie in the object's {whole:,} bytes, got {offset:,}")
    if size < 1:
        return ValueError("cannot map an object of 0 bytes: give it a size first")
    return ValueError(
        f"size {size:,} at offset {offset:,} reaches past the end of the object, which has {whole:,} bytes"
    )


def checked_address(address: int | None, offset: int) -> int | None:
    """Return *address*, or raise: the kernel maps whole pages."""
    if address is None:
        return None
    address = operator.index(address)
    page = kernel.page_size
    if address <= 0 or address % page:
        raise ValueError(f"address must be a positive multiple of the page size, {page:,} bytes, got {address:#x}")
    if address > 2 * sys.maxsize:
        raise ValueError(f"address must be one that a pointer can hold, got {address:#x}")
    if offset % page:
        raise ValueError(f"with an address, offset must be a multiple of the page size, {page:,} bytes, got {offset:,}")
    return address


def prepare(region: MappedRegion, *, populate: bool, huge_pages: bool) -> None:
    """Ask for what was wished; a kernel that cannot changes nothing but the speed."""
    if huge_pages:
        region.advise(Advice.huge_pages)
    if populate:
        region.advise(Advice.populate)


def map_refused(error: OSError, size: int, mode: Mode, address: int | None = None) -> RegionError:
    """Turn the kernel's refusal into an error that says what to do."""
    number = error.errno or 0
    if address is not None and number in (errno.EEXIST, errno.EPERM, errno.EINVAL, errno.ENOMEM):
        reason = "something is mapped there" if number == errno.EEXIST else os.strerror(number)
        return RegionAddressError(
            number,
            f"cannot map {size:,} bytes at {address:#x} ({reason}): choose another address, or none",
            address=address,
        )
    advice = {
        errno.ENOMEM: "address space or a memory limit is exhausted: map less, or raise the limit (ulimit -v)",
        errno.EMFILE: (
            f"this process has as many files open as it may, {regions_mapped():,} of them for regions: close some, "
            "let arrays share a region (views of one array need no more than that does), or raise the limit (ulimit -n)"
        ),
        errno.ENFILE: "the system has too many open files",
        errno.EACCES: f"the fd does not allow a {mode} mapping",
        errno.EPERM: f"the object is sealed against a {mode} mapping",
        errno.ENODEV: "this kind of file cannot be mapped",
        errno.EBADF: "its fd is not open",
        errno.ENOSPC: (
            "the file system that shared memory is in (/dev/shm) is full: free some of it, or make it larger (of a "
            "container, by --shm-size)"
        ),
        errno.EFBIG: (
            "memory that is shared is a file to the kernel, and this would be larger than this process may make one: "
            "raise the limit (ulimit -f, RLIMIT_FSIZE), or divide the memory"
        ),
    }.get(number, "see the error number")
    return RegionCreateError(
        number, f"cannot map {size:,} bytes as {mode} ({os.strerror(number)}): {advice}", size=size
    )


def view_of(mapping: Mapping, exporter: Any) -> memoryview:
    """Return the bytes of a live mapping; a view for reading where a write would be a SIGSEGV."""
    view = memoryview(exporter).cast("B")
    return view if mapping.mode in _WRITABLE else view.toreadonly()


def own_parts(region: MappedRegion) -> list[tuple[int, int]]:
    """Return which bytes of a ``copy_on_write`` region are this process' own, because it wrote to their pages.

    All of them, where the kernel does not tell.

    Returns:
        First byte and the byte behind the last, of each run.
    """
    mapping = region._mapping
    try:
        runs = kernel.own_pages(*mapping.pages)
    except OSError:
        runs = [mapping.pages]
    start, end = mapping.address, mapping.address + mapping.size
    return [(max(first, start) - start, min(first + length, end) - start) for first, length in runs]


def region_of(mapping: Mapping, exporter: Any) -> MappedRegion:
    """Return the region of a live mapping: the one there is, or a new one."""
    region: MappedRegion | None = mapping.region() if mapping.region is not None else None
    if region is None or region.closed:
        region = MappedRegion.__new__(MappedRegion)
        region._adopt(mapping, exporter)
    return region


def region_at(address: int) -> MappedRegion | None:
    """Return the region that holds *address* in this process, or None."""
    mapping = mapping_at(address)
    exporter = mapping.exporter() if mapping is not None and mapping.exporter is not None else None
    return None if mapping is None or exporter is None else region_of(mapping, exporter)


#: Why memory that arrived is not mapped.
NOT_SEALED = (
    "whoever sent it can make it smaller while it is mapped, which would end this process (SIGBUS): a memfd has to be "
    "sealed against that (F_SEAL_SHRINK) before it is sent"
)


def attach(fd: int, offset: int, size: int, mode: Mode, *, borrowed: bool = False) -> tuple[Mapping, Any]:
    """Map what a descriptor names, or find it mapped; takes over *fd* in every case, unless it is *borrowed*.

    Returns:
        The mapping and its window. Keep the window: it is what keeps the memory.

    Raises:
        ValueError: The object is not as large as the descriptor says.
        RegionCreateError: The kernel refused.
    """
    try:
        identity, whole = kernel.identify(fd)
        if offset < 0 or size < 1 or offset + size > whole:
            raise ValueError(
                f"object has {whole:,} bytes, the descriptor names {offset:,} to {offset + size:,}; "
                "the file was cut since"
            )
        # What was written to a copy-on-write mapping is for those who have it already.
        found = mapping_of(identity, offset, size, mode) if mode is not Mode.copy_on_write else None
        if found is None:
            if kernel.may_shrink(fd, identity):
                raise ValueError(NOT_SEALED)
            with guard:
                known = borrow(identity, fd)
                if known is None and borrowed:
                    # The message and the mapping have it in common, until the message is closed.
                    known = lend(fd)
            if known is not None:  # another part of what is here already: one fd does for both
                if not borrowed:
                    kernel.close(fd)
                fd, borrowed = known, False
            made = new_mapping(fd, identity, offset, size, mode)
            borrowed = True  # the mapping's
            return made
    except OSError as error:
        raise map_refused(error, size, mode) from error
    finally:
        if not borrowed:
            with guard:
                give_back(fd)
    return found
