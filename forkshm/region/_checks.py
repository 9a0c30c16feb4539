"""Checks of what a region is asked for, and errors for what the kernel refuses."""

from __future__ import annotations

import errno
import operator
import os
import sys
from typing import Any

from forkshm._interrupts import is_of_kernel
from forkshm.backend import kernel
from forkshm.errors import (
    RegionAddressError,
    RegionCreateError,
    RegionError,
)
from forkshm.region._table import (
    Mode,
    regions_mapped,
)

__all__ = (
    "MAX_SIZE",
    "TOO_LARGE_A_FILE",
    "checked_address",
    "checked_fd",
    "checked_size",
    "map_refused",
    "outside",
)

MAX_SIZE = 2**63 - 1
"""Largest file offset, and so the largest size of a memory object."""

# What to do about a file that was not opened for writing, and about one that was not opened for reading.
_REOPEN = {True: "Open it for reading and writing, or pass mode='read_only'.", False: "Open it for reading."}


def checked_fd(mappable: Any) -> int:
    """Return the fd of an object that is to be mapped, or raise if there is none."""
    fileno = getattr(mappable, "fileno", None)
    if fileno is not None:
        fd: int = fileno()
        return fd
    fd = mappable
    if isinstance(fd, bool) or not isinstance(fd, int):
        raise TypeError(
            f"cannot map {fd!r}: pass a SharedMemoryObject, a FileMapping, another object with fileno(), or an fd. "
            "SharedMemoryObject('open_only', name) opens a name."
        )
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


TOO_LARGE_A_FILE = (
    "the kernel treats shared memory as a file, and the size exceeds this process's limit on file sizes. Raise the "
    "limit (ulimit -f, RLIMIT_FSIZE), or divide the memory."
)
"""What ``EFBIG`` means, and what to do."""


def map_refused(error: OSError, size: int, mode: Mode, address: int | None = None) -> RegionError:
    """Return the forkshm error for the kernel's refusal, with advice; raise an error of a signal handler as it is."""
    number = error.errno
    if number is None or not is_of_kernel(error):
        raise error
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
        errno.EACCES: f"the fd does not allow a {mode} mapping. {_REOPEN[mode is Mode.read_write]}",
        errno.EPERM: f"the object is sealed against a {mode} mapping",
        errno.ENODEV: "this kind of file cannot be mapped",
        errno.EBADF: "its fd is not open",
        errno.ENOSPC: (
            "the file system of shared memory (/dev/shm) is full. Free some of it, or enlarge it (for a container: "
            "--shm-size)."
        ),
        errno.EFBIG: TOO_LARGE_A_FILE,
    }.get(number, "see errno(3)")
    return RegionCreateError(
        number, f"cannot map {size:,} bytes as {mode} ({os.strerror(number)}): {advice}", size=size
    )
