"""Memory that somebody mapped from a file: which file it is, and how it is named to others."""

from __future__ import annotations

import os
from typing import NamedTuple

from forkshm.backend import kernel
from forkshm.errors import RegionGoneError

__all__ = ("FileExtent", "file_at")


class FileExtent(NamedTuple):
    """The part of a file that is mapped around an address."""

    #: Ours, to be closed.
    fd: int
    #: Address of the first byte, and how many bytes there are; those behind the end of the file do not count.
    address: int
    size: int
    #: Where in the file that is.
    offset: int
    writable: bool
    #: Whether others see what is written.
    shared: bool
    path: str


def file_at(address: int, nbytes: int) -> FileExtent | None:
    """Return the file that these bytes are mapped from; None if it is none, or it cannot be opened anew.

    Raises:
        RegionGoneError: The file was cut since it was mapped, and some of the bytes are gone.
    """
    found = kernel.mapped_file(address)
    if found is None or address + nbytes > found.end:
        return None
    fd = kernel.open_mapped(found)
    if fd is None:
        return None
    try:
        _, whole = kernel.identify(fd)
        end = min(found.end, found.start + whole - found.offset)
        if not kernel.is_regular(fd):
            return None
        if address + nbytes > end:
            raise RegionGoneError(
                f"cannot send {nbytes:,} bytes that are mapped from {found.path!r} at {found.offset:,}: the file was "
                f"cut to {whole:,} bytes since; map it again"
            )
        extent = FileExtent(
            fd, found.start, end - found.start, found.offset, found.writable, found.shared, os.fspath(found.path)
        )
        fd = -1
        return extent
    finally:
        if fd >= 0:
            kernel.close(fd)
