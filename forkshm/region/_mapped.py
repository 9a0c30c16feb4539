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
    RegionBusyError,
    RegionClosedError,
    UnsupportedError,
)
from forkshm.region._checks import checked_address, checked_fd, checked_size, map_refused, outside
from forkshm.region._table import (
    Mapping,
    Mode,
    new_mapping,
    seal,
    shrink,
)

if TYPE_CHECKING:
    from typing import Self

__all__ = ("Mappable", "MappedRegion", "prepare", "view_of")

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
        theirs = checked_fd(mappable)
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
                f"{'is' if exports == 1 else 'are'} alive. Release all views, delete arrays made from them, and detach "
                "locks first.",
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
            f"cannot pickle {self!r}: plain pickle cannot carry shared memory, nor a lock, Value or Array that lies in "
            "it. Pass the object to a Process or Pool of forkshm, send it through a Queue or Pipe of forkshm, or "
            "pickle bytes(region.buf)."
        )


def prepare(region: MappedRegion, *, populate: bool, huge_pages: bool) -> None:
    """Request the wanted kind of pages; without them, only the speed differs."""
    if huge_pages:
        region.advise(Advice.huge_pages)
    if populate:
        region.advise(Advice.populate)


def view_of(mapping: Mapping, exporter: Any) -> memoryview:
    """Return the bytes of a live mapping, read-only unless the mapping is writable."""
    view = memoryview(exporter).cast("B")
    return view if mapping.mode in _WRITABLE else view.toreadonly()
