"""anonymous_shared_memory(): memory without a name."""

from __future__ import annotations

import errno

from forkshm.backend import kernel
from forkshm.errors import RegionCreateError
from forkshm.region._mapped import (
    MappedRegion,
    Mode,
    checked_address,
    checked_size,
    map_refused,
    prepare,
    region_of,
)
from forkshm.region._small_regions import LARGEST, map_part
from forkshm.region._table import new_mapping

__all__ = ("anonymous_shared_memory", "sparse_memory")


def anonymous_shared_memory(
    size: int, address: int | None = None, *, populate: bool = False, huge_pages: bool = False
) -> MappedRegion:
    """Create a shared region with no name.

    The region is zero-filled, readable and writable. It belongs to this process, to
    every child forked from it afterwards, and to every process it is passed to; all of
    them see each other's writes. The kernel frees the memory when the last of them
    closes the region or ends, however it ends: there is nothing to unlink. It does not
    use ``/dev/shm``, so that mount's size does not bound it. Pages take memory when
    they are first written.

    Each region takes an fd. Where the hard limit on open files is near, small ones (to 1 MiB) share
    a memory object, which is freed with the last of them; those cannot be sealed.

    Args:
        size: Usable bytes, at least 1. The kernel rounds the mapping up to whole pages;
            ``region.size`` and ``len(region.buf)`` are what you asked for.
        address: Map exactly there; a multiple of the page size. What is there is never
            overwritten.
        populate: Take memory for all pages now: creation takes longer, first writes do
            not. Where the kernel cannot, they are taken as they are touched. More than a
            limit on the memory of this process's control group leaves is refused; without
            this, the kernel kills whoever touches a page too many.
        huge_pages: Ask for huge pages. Where the kernel has none for shared memory
            (``/sys/kernel/mm/transparent_hugepage/shmem_enabled``), they are ordinary.

    Returns:
        The mapped region. Use it as a context manager, or call ``close()``, or let it go.

    Raises:
        TypeError: *size* is not an integer.
        ValueError: *size* is less than 1 or more than ``2**63 - 1``, or *address* is
            not a multiple of the page size.
        RegionAddressError: Something is mapped at *address* already.
        RegionCreateError: The kernel refused; an ``OSError``, see ``errno``. ``ENOMEM``
            means address space or memory limits: map less, or raise them.

    Fork and threads:
        Safe to call from any thread. Workers that started earlier do not inherit the
        region: pass it to them, as an argument, and its descriptor crosses.

    Example:
        >>> import os
        >>> with anonymous_shared_memory(3) as region:
        ...     if (pid := os.fork()) == 0:
        ...         region.buf[:] = b"abc"
        ...         os._exit(0)
        ...     _ = os.waitpid(pid, 0)
        ...     bytes(region.buf)
        b'abc'

    See Also:
        ``anonymous_shared_memory`` of Boost.Interprocess; memfd_create(2).
    """
    size = checked_size(size)
    address = checked_address(address, 0)
    if populate and (left := kernel.memory_left()) is not None and size > left:
        raise RegionCreateError(
            errno.ENOMEM,
            f"cannot take {size:,} bytes of memory: the control group of this process has {max(left, 0):,} left, and "
            "the kernel kills whoever asks for more; take less, raise the group's limit, or leave populate out",
            size=size,
        )
    try:
        fd = kernel.create_memory(size, "region")
        if size <= LARGEST and address is None and kernel.is_scarce(fd):
            mapping, exporter = map_part(fd, size)
        else:
            try:
                mapping, exporter = new_mapping(fd, kernel.identify(fd)[0], 0, size, Mode.read_write, address)
            except BaseException:
                kernel.close(fd)
                raise
    except OSError as error:
        raise map_refused(error, size, Mode.read_write, address) from error
    region = region_of(mapping, exporter)
    prepare(region, populate=populate, huge_pages=huge_pages)
    return region


def sparse_memory(size: int) -> MappedRegion:
    """Return a region most of which is never touched: its parts are reserved with ``kernel.reserve`` before that.

    Raises:
        RegionCreateError: The kernel refused.
    """
    try:
        fd = kernel.create_memory(size, "region", sparse=True)
        try:
            return region_of(*new_mapping(fd, kernel.identify(fd)[0], 0, size, Mode.read_write))
        except BaseException:
            kernel.close(fd)
            raise
    except OSError as error:
        raise map_refused(error, size, Mode.read_write) from error
