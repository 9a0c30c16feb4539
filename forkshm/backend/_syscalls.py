"""The only file with ctypes: prototypes, and errno to ``OSError``."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Buffer

_libc = ctypes.CDLL(None, use_errno=True)

_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
# shm_open is part of libc since glibc 2.34 and in musl, and of librt before.
_librt = _libc if hasattr(_libc, "shm_open") else ctypes.CDLL("librt.so.1", use_errno=True)
_librt.shm_open.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_uint)
_librt.shm_unlink.argtypes = (ctypes.c_char_p,)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_MAP_FAILED = ctypes.c_void_p(-1).value


def _refused(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def mmap(fd: int, size: int, prot: int, flags: int, offset: int, where: int | None = None) -> int:
    """Map as mmap(2) says; return the address."""
    address = _libc.mmap(where, size, prot, flags, fd, offset)
    if address == _MAP_FAILED:
        raise _refused("mmap")
    return int(address)


def munmap(address: int, size: int) -> None:
    """Unmap as munmap(2) says."""
    if _libc.munmap(address, size) != 0:
        raise _refused("munmap")


def msync(address: int, size: int, flags: int) -> None:
    """Write back as msync(2) says."""
    if _libc.msync(address, size, flags) != 0:
        raise _refused("msync")


def shm_open(name: bytes, flags: int, permissions: int) -> int:
    """Open as shm_open(3) says; return the fd."""
    while True:
        fd = int(_librt.shm_open(name, flags, permissions))
        if fd >= 0:
            return fd
        if ctypes.get_errno() != errno.EINTR:
            raise _refused("shm_open")


def shm_unlink(name: bytes) -> None:
    """Unlink as shm_unlink(3) says."""
    if _librt.shm_unlink(name) != 0:
        raise _refused("shm_unlink")


def madvise(address: int, size: int, advice: int) -> None:
    """Advise as madvise(2) says."""
    if _libc.madvise(address, size, advice) != 0:
        raise _refused("madvise")


@functools.lru_cache(maxsize=1024)
def _array_type(size: int) -> Any:
    # Making a ctypes array type takes 15 us, from_address of a known one 0.3 us.
    return ctypes.c_ubyte * size


def window(address: int, size: int) -> Any:
    """Return a ctypes array over existing memory; it supports weak references."""
    return _array_type(size).from_address(address)


class _PyBuffer(ctypes.Structure):
    """``Py_buffer`` of the C API, the same in every supported version."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int)
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.c_void_p,)
_release_buffer.restype = None


def address_of(buffer: Buffer) -> int:
    """Address of a contiguous buffer's first byte, read-only ones too."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):
        pass  # read-only, or empty: three times as long
    view = _PyBuffer()
    where = ctypes.addressof(view)
    _get_buffer(buffer, where, 0)
    address = view.buf or 0
    _release_buffer(where)
    return int(address)


def copy(address: int, source: Buffer, nbytes: int) -> None:
    """memcpy(3) into raw memory, without the GIL."""
    view = _PyBuffer()
    where = ctypes.addressof(view)
    _get_buffer(source, where, 0)
    try:
        if view.len < nbytes:
            raise ValueError(f"source holds {view.len} bytes, {nbytes} were to be copied")
        ctypes.memmove(address, view.buf, nbytes)
    finally:
        _release_buffer(where)
