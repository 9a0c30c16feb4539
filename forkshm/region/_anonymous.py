"""anonymous_shared_memory(): memory without a name."""

from __future__ import annotations

import os

from forkshm.backend import kernel
from forkshm.region._mapped import MappedRegion, Mode, checked_size, map_refused, region_of
from forkshm.region._table import new_mapping

__all__ = ("anonymous_shared_memory",)


def anonymous_shared_memory(size: int) -> MappedRegion:
    """Create a shared region with no name.

    The region is zero-filled, readable and writable. It belongs to this process, to
    every child forked from it afterwards, and to every process it is passed to; all of
    them see each other's writes. The kernel frees the memory when the last of them
    closes the region or ends, however it ends: there is nothing to unlink. It does not
    use ``/dev/shm``, so that mount's size does not bound it. Pages take memory when
    they are first written.

    Args:
        size: Usable bytes, at least 1. The kernel rounds the mapping up to whole pages;
            ``region.size`` and ``len(region.buf)`` are what you asked for.

    Returns:
        The mapped region. Use it as a context manager, or call ``close()``, or let it go.

    Raises:
        TypeError: *size* is not an integer.
        ValueError: *size* is less than 1 or more than ``2**63 - 1``.
        RegionCreateError: The kernel refused; an ``OSError``, see ``errno``. ``ENOMEM``
            means address space or memory limits.

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
    try:
        fd = kernel.create_memory(size, "region")
        try:
            mapping, window = new_mapping(fd, 0, size, Mode.read_write)
        except BaseException:
            os.close(fd)
            raise
    except OSError as error:
        raise map_refused(error, size, Mode.read_write) from error
    return region_of(mapping, window)
