"""MappedRegion: shared memory that is mapped into this process."""

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
    """Any object with an fd, which can be mapped."""

    def fileno(self) -> int:
        """Return the fd."""
        ...


# References to an exporter that are not views: the region's own, and the argument of ``sys.getrefcount``.
_OWN_REFERENCES = 2

# Whether ``fileno()`` of a Python file returns an fd of the backend.
_FDS_ARE_FILES = kernel.name != "windows"

_WRITABLE = (Mode.read_write, Mode.copy_on_write)

MAX_SIZE = 2**63 - 1
"""Largest file offset, and so the largest size of a memory object."""


class MappedRegion:
    """A range of this process's addresses that is backed by shareable memory.

    `anonymous_shared_memory` returns a region, and any object with a ``fileno()`` can be mapped. The memory stays
    mapped until `close`, or until the region and all buffers and arrays taken from it have been garbage-collected. The
    kernel frees the memory when no process maps it or has an fd of it open, even if the processes were killed.

    A region that is sent through a forkshm channel, for example as an argument or result of a `forkshm.Pool`, arrives
    as a region of the same memory: only its descriptor is sent. For a ``copy_on_write`` region, the written pages are
    copied, and the receiver gets a private copy as well.

    Args:
        mappable: Any object with ``fileno()``, or an fd as an int. The region keeps its own fd, so the caller may close
            this one afterwards.
        mode: Access mode of the memory; see `Mode`.
        offset: Start of the region in the object, in bytes; it need not be a multiple of the page size.
        size: Number of bytes to map, at least 1; by default everything from *offset* to the end.
        address: Address to map at. *address* and *offset* must then be multiples of the page size. An existing mapping
            is never overwritten.
        populate: Allocate memory for all pages now instead of at the first access. If the kernel cannot, pages are
            allocated on access.
        huge_pages: Request huge pages. If the kernel has none for this kind of memory, ordinary pages are used.

    Raises:
        ValueError: *offset* is negative or past the end; *size* is less than 1 or reaches past the end; or *address* is
            given and *address* or *offset* is not a multiple of the page size.
        RegionAddressError: The address range at *address* is in use.
        RegionCreateError: The kernel refused; see ``errno``. ``ENOMEM`` means a limit on memory or address space,
            ``EACCES`` that the fd does not allow *mode*, and ``EMFILE`` the limit on open files.

    Fork and threads:
        Safe to use from any thread. A forked child inherits the mapping and sees the same bytes; closing the region
        there does not affect the parent. Writes are not ordered between processes; synchronize with a lock or a
        channel.

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
    # Marks objects whose `fileno` returns an fd of the backend.
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
        if type(mode) is not Mode:  # calling the class takes ten times as long as this comparison
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
        """The bytes, as a new memoryview of format ``"B"``; read-only if the mode is read-only.

        The memory stays mapped while the memoryview, a slice of it, or an array made from it is alive.

        Raises:
            RegionClosedError: The region was closed.
        """
        return view_of(self._mapping, self._open_exporter())

    @property
    def size(self) -> int:
        """Number of usable bytes, as requested and not rounded to pages."""
        return self._mapping.size

    @property
    def address(self) -> int:
        """Address of the first byte in this process; other processes map it elsewhere.

        Raises:
            RegionClosedError: The region was closed.
        """
        self._open_exporter()
        return self._mapping.address

    @property
    def mode(self) -> Mode:
        """Access mode of the region."""
        return self._mapping.mode

    @property
    def offset(self) -> int:
        """Start of the region in its memory object, in bytes."""
        return self._mapping.offset

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return self._exporter is None

    def fileno(self) -> int:
        """Return the fd of the memory object, which the region owns; do not close it.

        Raises:
            RegionClosedError: The region was closed.
        """
        self._open_exporter()
        return self._mapping.fd

    @staticmethod
    def page_size() -> int:
        """Return the page size in bytes; fixed addresses and their offsets must be multiples of it."""
        return kernel.page_size

    def flush(self, offset: int = 0, size: int | None = None, asynchronous: bool = False) -> None:
        """Write changes back to the file; for memory without a file, do nothing.

        Args:
            offset: First byte, relative to the region; it need not be a multiple of the page size.
            size: Number of bytes; by default up to the end of the region.
            asynchronous: Only start writing. Otherwise return after all changes were handed to the disk.

        Raises:
            ValueError: The range is not within the region.
            OSError: The disk is full or failed.
            RegionClosedError: The region was closed.

        See Also:
            msync(2); ``mapped_region::flush`` of Boost.Interprocess, whose offset must be a multiple of the page size.
        """
        self._open_exporter()
        start, length = self._range(offset, size)
        if length:
            kernel.flush(start, length, asynchronous=asynchronous)
            if not asynchronous:
                kernel.flush_to_disk(self._mapping.fd)

    def advise(self, advice: Advice | str) -> bool:
        """Advise the kernel how the region will be used; its bytes never change.

        Args:
            advice: See `Advice`.

        Returns:
            Whether the kernel accepted the advice.

        Raises:
            ValueError: *advice* is unknown.
            RegionClosedError: The region was closed.

        See Also:
            madvise(2); ``mapped_region::advise`` of Boost.Interprocess.
        """
        advice = Advice(advice)
        self._open_exporter()
        if advice is Advice.dontneed and self.mode is Mode.copy_on_write:
            return False  # the kernel would discard written pages
        try:
            kernel.advise(*self._mapping.pages, advice, writable=self.mode in _WRITABLE)
        except OSError:
            return False
        return True

    def shrink_by(self, nbytes: int, from_back: bool = True) -> None:
        """Remove *nbytes* from the end of the region or, with ``from_back=False``, from its start.

        Pages outside the new range are unmapped; the memory object keeps its size. Removing all bytes closes the
        region.

        Raises:
            ValueError: *nbytes* is negative or larger than the region.
            RegionBusyError: Views of the region are alive. Nothing was changed.
            RegionClosedError: The region was closed.

        See Also:
            ``mapped_region::shrink_by`` of Boost.Interprocess, which changes the size even if it fails.
        """
        self._open_exporter()
        nbytes = operator.index(nbytes)
        if not 0 <= nbytes <= self.size:
            raise ValueError(f"cannot shrink {self!r} by {nbytes:,} bytes: pass 0 to {self.size:,}")
        self._check_no_views("shrink")
        if nbytes == self.size:
            self._exporter = None
        elif nbytes:
            self._exporter = shrink(self._mapping, nbytes, from_back=from_back)

    def seal(self) -> None:
        """Make the memory permanently read-only for all processes except this one.

        The kernel enforces the seal: no process, not even root's, can map the memory for writing, write to its fd or
        change its size. The region stays writable in this process. Other processes receive it as ``read_only``, and it
        becomes ``read_only`` in forked children. Exceptions: processes that mapped the memory before it was sealed,
        and children forked by C code instead of ``os.fork``, keep a writable mapping. A process that may debug this one
        (ptrace(2)) can write through it.

        Raises:
            UnsupportedError: The memory has a name or belongs to a file and so cannot be sealed, or this system has no
                seals.
            ValueError: The region is not ``read_write``.
            RegionClosedError: The region was closed.

        Fork and threads:
            A forked child that writes through an existing array is killed by SIGSEGV. A forked child must remap the
            memory for reading. If that fails, because the kernel is out of memory or the region's fd was closed, the
            child ends at once with exit code ``os.EX_OSERR`` and a message on stderr.

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
                "this system has no seals. Pass MappedRegion(region, 'read_only') to processes that must only read."
                if error.errno == errno.ENOTSUP
                else f"{os.strerror(error.errno or 0)}. Only anonymous memory without other seals can be sealed."
            )
            raise UnsupportedError(f"cannot seal {self!r}: {why}", capability="seals") from error

    @property
    def sealed(self) -> bool:
        """Whether this process called `seal` on this region or on another region of the same memory."""
        return self._mapping.sealed

    def place(self, kind: type[T], offset: int = 0) -> T:
        """Return an existing object of a ctypes type in the region, as a view.

        The view keeps the memory mapped, as any view does.

        Args:
            kind: A ctypes structure, union, array or simple type. Raw pointers, Python objects and functions are
                refused, because they are meaningless to other processes.
            offset: Offset of the object in bytes; a multiple of its alignment.

        Raises:
            UnplaceableTypeError: Part of the type is valid in one process only; the message names the field and an
                alternative.
            ValueError: The object does not fit at *offset* or is not aligned.
            RegionClosedError: The region was closed.
        """
        from forkshm.region.pointers import place

        return place(self, kind, offset)

    def construct(self, kind: type[T], offset: int = 0, *args: Any, **kwargs: Any) -> T:
        """Return a new object of a ctypes type in the region, as a view.

        Bytes that the arguments do not set are zero, and each `OffsetPtr` is null.

        Args:
            kind: As for `place`.
            offset: As for `place`.
            args: Arguments of ``kind(...)``.
            kwargs: Keyword arguments of ``kind(...)``.

        Raises:
            UnplaceableTypeError: As for `place`.
            ValueError: As for `place`.
            RegionClosedError: The region was closed.
        """
        from forkshm.region.pointers import construct

        return construct(self, kind, offset, *args, **kwargs)

    def _range(self, offset: int, size: int | None) -> tuple[int, int]:
        """Return the address and size of the pages that contain a range of the region."""
        offset = operator.index(offset)
        if not 0 <= offset <= self.size:
            raise ValueError(f"offset must be within the region's {self.size:,} bytes, got {offset:,}")
        size = self.size - offset if size is None else operator.index(size)
        if size < 0 or offset + size > self.size:
            raise ValueError(f"{size:,} bytes at offset {offset:,} are not within the region's {self.size:,} bytes")
        first = self._mapping.address + offset
        start = first - first % kernel.page_size
        return start, first + size - start if size else 0

    def _check_no_views(self, what: str) -> None:
        exports = sys.getrefcount(self._exporter) - _OWN_REFERENCES
        if exports > 0:
            raise RegionBusyError(
                f"cannot {what} {self!r}: {exports} {'view' if exports == 1 else 'views'} of it "
                f"{'is' if exports == 1 else 'are'} alive. Release all views and delete arrays made from them first.",
                exports=exports,
            )

    def close(self) -> None:
        """Unmap the region and close its fd in this process. Can be repeated.

        Other processes are not affected.

        Raises:
            RegionBusyError: Buffers or arrays taken from the region are alive. Nothing was changed; release or delete
                them, then close again.
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
        # Since Python 3.12, memoryview(region) and np.frombuffer(region) use this.
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
            # The exception's traceback may hold views. Then the memory is unmapped with the last of them.
            with contextlib.suppress(RegionBusyError):
                self.close()

    def __repr__(self) -> str:
        where = "closed" if self._exporter is None else f"at {self._mapping.address:#x}"
        return f"<{type(self).__name__} {self._mapping.size:,} bytes {self._mapping.mode} {where}>"

    def _repr_html_(self) -> str:
        # HTML for notebooks.
        where = "closed" if self._exporter is None else f"{self._mapping.address:#x}"
        cells = {"size": f"{self._mapping.size:,} bytes", "mode": str(self._mapping.mode), "address": where}
        # Notebooks align the text of all cells to the right, unless a cell has its own alignment.
        left = 'style="text-align: left"'
        rows = "".join(f"<tr><th {left}>{name}</th><td {left}>{value}</td></tr>" for name, value in cells.items())
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"

    def __reduce__(self) -> Any:
        raise NotPicklableError(
            f"cannot pickle {self!r}: plain pickle cannot carry shared memory. "
            "Pass the region to a forkshm.Pool, or send bytes(region.buf)."
        )


def checked_fd(fd: int) -> int:
    """Return *fd*, or raise if it is invalid."""
    if isinstance(fd, bool):
        raise TypeError(f"cannot map {fd!r}: pass an fd as an int, or an object with fileno()")
    if fd < 0:
        raise ValueError(f"cannot map fd {fd}: it is negative. anonymous_shared_memory(size) needs no fd.")
    return fd


def checked_size(size: int) -> int:
    """Return *size* as an int, or raise if it is invalid."""
    number = operator.index(size)
    if number < 1:
        raise ValueError(f"size must be at least 1 byte, got {number}")
    if number > MAX_SIZE:
        raise ValueError(f"size must be at most 2**63 - 1 bytes, the maximum of a memory object, got {number}")
    return number


def outside(offset: int, size: int, whole: int) -> ValueError:
    """Return the error for a range that exceeds an object of *whole* bytes."""
    if not 0 <= offset < max(whole, 1):
        return ValueError(f"offset must be within the object's {whole:,} bytes, got {offset:,}")
    if size < 1:
        return ValueError("cannot map an object of 0 bytes: set its size first, for example with truncate(size)")
    return ValueError(
        f"size {size:,} at offset {offset:,} reaches past the end of the object, which has {whole:,} bytes"
    )


def checked_address(address: int | None, offset: int) -> int | None:
    """Return *address*, or raise unless *address* and *offset* are multiples of the page size."""
    if address is None:
        return None
    address = operator.index(address)
    page = kernel.page_size
    if address <= 0 or address % page:
        raise ValueError(f"address must be a positive multiple of the page size, {page:,} bytes, got {address:#x}")
    if address > 2 * sys.maxsize:
        raise ValueError(f"address must fit in a pointer, got {address:#x}")
    if offset % page:
        raise ValueError(f"with an address, offset must be a multiple of the page size, {page:,} bytes, got {offset:,}")
    return address


def prepare(region: MappedRegion, *, populate: bool, huge_pages: bool) -> None:
    """Request the wanted kind of pages; without them, only the speed differs."""
    if huge_pages:
        region.advise(Advice.huge_pages)
    if populate:
        region.advise(Advice.populate)


def map_refused(error: OSError, size: int, mode: Mode, address: int | None = None) -> RegionError:
    """Return the forkshm error for the kernel's refusal, with advice."""
    number = error.errno or 0
    if address is not None and number in (errno.EEXIST, errno.EPERM, errno.EINVAL, errno.ENOMEM):
        reason = "the address range is in use" if number == errno.EEXIST else os.strerror(number)
        return RegionAddressError(
            number,
            f"cannot map {size:,} bytes at {address:#x}: {reason}. Choose another address, or pass none.",
            address=address,
        )
    advice = {
        errno.ENOMEM: "a limit on memory or address space is reached. Map less, or raise the limit (ulimit -v).",
        errno.EMFILE: (
            f"this process has reached its limit on open files, {regions_mapped():,} of them for regions. Close some, "
            "let several arrays share a region (as views of one array), or raise the limit (ulimit -n)."
        ),
        errno.ENFILE: "the system has too many open files",
        errno.EACCES: f"the fd does not allow a {mode} mapping",
        errno.EPERM: f"the object is sealed against a {mode} mapping",
        errno.ENODEV: "this kind of file cannot be mapped",
        errno.EBADF: "its fd is not open",
        errno.ENOSPC: (
            "the file system of shared memory (/dev/shm) is full. Free some of it, or enlarge it (for a container: "
            "--shm-size)."
        ),
        errno.EFBIG: (
            "the kernel treats shared memory as a file, and the size exceeds this process's limit on file sizes. Raise "
            "the limit (ulimit -f, RLIMIT_FSIZE), or divide the memory."
        ),
    }.get(number, "see errno(3)")
    return RegionCreateError(
        number, f"cannot map {size:,} bytes as {mode} ({os.strerror(number)}): {advice}", size=size
    )


def view_of(mapping: Mapping, exporter: Any) -> memoryview:
    """Return the bytes of a live mapping, read-only unless the mapping is writable."""
    view = memoryview(exporter).cast("B")
    return view if mapping.mode in _WRITABLE else view.toreadonly()


def own_parts(region: MappedRegion) -> list[tuple[int, int]]:
    """Return the ranges of a ``copy_on_write`` region on pages that this process has written.

    If the kernel cannot tell, the whole region is returned.

    Returns:
        Start and end offset of each range.
    """
    mapping = region._mapping
    try:
        runs = kernel.own_pages(*mapping.pages)
    except OSError:
        runs = [mapping.pages]
    start, end = mapping.address, mapping.address + mapping.size
    return [(max(first, start) - start, min(first + length, end) - start) for first, length in runs]


def region_of(mapping: Mapping, exporter: Any) -> MappedRegion:
    """Return the existing region of a live mapping, or a new one."""
    region: MappedRegion | None = mapping.region() if mapping.region is not None else None
    if region is None or region.closed:
        region = MappedRegion.__new__(MappedRegion)
        region._adopt(mapping, exporter)
    return region


def region_at(address: int) -> MappedRegion | None:
    """Return the region that contains *address* in this process, or None."""
    mapping = mapping_at(address)
    exporter = mapping.exporter() if mapping is not None and mapping.exporter is not None else None
    return None if mapping is None or exporter is None else region_of(mapping, exporter)


NOT_SEALED = (
    "cannot map received memory that is not sealed: its sender could shrink it later, which would kill this process "
    "(SIGBUS). Seal the memfd with F_SEAL_SHRINK before sending it."
)
"""Message for received memory that could shrink while it is mapped."""


def attach(fd: int, offset: int, size: int, mode: Mode, *, borrowed: bool = False) -> tuple[Mapping, Any]:
    """Return a mapping of the memory that a descriptor names, existing or new.

    This function takes ownership of *fd*, even if it raises, unless *fd* is *borrowed*.

    Returns:
        The mapping and its exporter. Keep the exporter, which keeps the memory mapped.

    Raises:
        ValueError: The object is smaller than the descriptor says, or could shrink.
        RegionCreateError: The kernel refused.
    """
    try:
        identity, whole = kernel.identify(fd)
        if offset < 0 or size < 1 or offset + size > whole:
            raise ValueError(
                f"cannot map bytes {offset:,} to {offset + size:,} of a descriptor: the object has only {whole:,} "
                "bytes. It was truncated after it was sent."
            )
        # An existing copy-on-write mapping may have private writes that the new holder must not see.
        found = mapping_of(identity, offset, size, mode) if mode is not Mode.copy_on_write else None
        if found is None:
            if kernel.may_shrink(fd, identity):
                raise ValueError(NOT_SEALED)
            with guard:
                known = borrow(identity, fd)
                if known is None and borrowed:
                    # The message and the mapping share the fd until the message is closed.
                    known = lend(fd)
            if known is not None:  # another part of the object is mapped already; both use one fd
                if not borrowed:
                    kernel.close(fd)
                fd, borrowed = known, False
            made = new_mapping(fd, identity, offset, size, mode)
            borrowed = True  # the mapping owns the fd now
            return made
    except OSError as error:
        raise map_refused(error, size, mode) from error
    finally:
        if not borrowed:
            with guard:
                give_back(fd)
    return found
