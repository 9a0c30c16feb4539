"""anonymous_shared_memory(): create shared memory without a name."""

from __future__ import annotations

import errno

from forkshm.backend import kernel
from forkshm.errors import RegionCreateError
from forkshm.region._attach import region_of
from forkshm.region._checks import checked_address, checked_size, map_refused
from forkshm.region._mapped import MappedRegion, prepare
from forkshm.region._small_regions import LARGEST, map_part
from forkshm.region._table import Mode, new_mapping

__all__ = ("anonymous_shared_memory", "sparse_memory")


def anonymous_shared_memory(
    size: int, address: int | None = None, *, populate: bool = False, huge_pages: bool = False
) -> MappedRegion:
    """Return a new shared region without a name.

    The region is zero-filled, readable and writable. This process, children forked from it later, and processes that
    receive the region share the memory and see each other's writes. The kernel frees the memory when the last of them
    closes the region or ends, even if it is killed; there is nothing to unlink. The memory is not in ``/dev/shm``, so
    the size of that mount is no limit. A page takes memory when it is first written.

    Each region needs an fd. Near the hard limit on open files, small regions (up to 1 MiB) share a memory object, which
    is freed with the last of them. These regions cannot be sealed.

    Args:
        size: Number of usable bytes, at least 1. The kernel rounds the mapping up to whole pages; ``region.size`` and
            ``len(region.buf)`` are the requested size.
        address: Address to map at; a multiple of the page size. An existing mapping is never overwritten.
        populate: Allocate memory for all pages now, which makes creation slower and first writes faster. If the kernel
            cannot, pages are allocated on access. A size above what the memory limit of this process's control group
            leaves is refused. Without *populate*, the kernel kills a process that exceeds the limit by touching pages.
        huge_pages: Request huge pages. If the kernel has none for shared memory
            (``/sys/kernel/mm/transparent_hugepage/shmem_enabled``), ordinary pages are used.

    Returns:
        The mapped region. Use it as a context manager, call ``close()``, or leave it to the garbage collector.

    Raises:
        TypeError: *size* is not an integer.
        ValueError: *size* is less than 1 or more than ``2**63 - 1``, or *address* is not a multiple of the page size.
        RegionAddressError: The address range at *address* is in use.
        RegionCreateError: The kernel refused; an ``OSError``, see ``errno``. ``ENOMEM`` means a limit on memory or
            address space: map less, or raise the limit.

    Fork and threads:
        Safe to call from any thread. Workers that started earlier do not inherit the region; pass it to them as an
        argument, which sends its descriptor.

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
            f"cannot allocate {size:,} bytes of memory: the control group of this process has {max(left, 0):,} left, "
            "and the kernel kills a process that exceeds it. Allocate less, raise the limit, or omit populate.",
            size=size,
        )
    try:
        fd = kernel.create_memory(size, "region")
        try:
            is_part = size <= LARGEST and address is None and kernel.is_scarce(fd)
            if not is_part:
                mapping, exporter = new_mapping(fd, kernel.identify(fd)[0], 0, size, Mode.read_write, address)
        except BaseException:
            kernel.close(fd)
            raise
        if is_part:
            mapping, exporter = map_part(fd, size)
    except OSError as error:
        raise map_refused(error, size, Mode.read_write, address) from error
    region = region_of(mapping, exporter)
    prepare(region, populate=populate, huge_pages=huge_pages)
    return region


def sparse_memory(size: int) -> MappedRegion:
    """Return a region for sparse use; parts must be reserved with ``kernel.reserve`` before they are accessed.

    Raises:
        RegionCreateError: The kernel refused.
    """
    try:
        fd = kernel.create_memory(size, "region", sparse=True)
        try:
            made = new_mapping(fd, kernel.identify(fd)[0], 0, size, Mode.read_write)
        except BaseException:
            kernel.close(fd)
            raise
    except OSError as error:
        raise map_refused(error, size, Mode.read_write) from error
    return region_of(*made)
