"""Memory that other code mapped from a file: find the file, and name it to other processes."""

from __future__ import annotations

import os
from typing import NamedTuple

from forkshm.backend import kernel
from forkshm.errors import RegionGoneError

__all__ = ("FileExtent", "file_at")


class FileExtent(NamedTuple):
    """The part of a file that is mapped around an address."""

    # The caller has to close this fd.
    fd: int
    # Address and number of the mapped bytes, not counting those beyond the end of the file.
    address: int
    size: int
    # Position of the first byte in the file.
    offset: int
    writable: bool
    # Whether other processes see writes.
    shared: bool
    path: str


def file_at(address: int, nbytes: int, without: list[tuple[int, int]] | None = None) -> FileExtent | None:
    """Return the file that these bytes are mapped from, or None if there is none or it cannot be reopened.

    Args:
        address: Address of the first byte.
        nbytes: Number of bytes.
        without: Gets the start and end of the range around the address if no file is mapped there.

    Raises:
        RegionGoneError: The file was truncated after it was mapped, and some of the bytes are gone.
    """
    found = kernel.mapped_file(address, without)
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
                f"truncated to {whole:,} bytes after it was mapped. Map it again."
            )
        extent = FileExtent(
            fd, found.start, end - found.start, found.offset, found.writable, found.shared, os.fspath(found.path)
        )
        fd = -1
        return extent
    finally:
        if fd >= 0:
            kernel.close(fd)
