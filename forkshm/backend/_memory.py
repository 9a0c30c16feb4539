"""Access to memory by its address, through ctypes on every system."""

from __future__ import annotations

import ctypes
import functools
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = (
    "address_of",
    "buffer_at",
    "bytes_at",
    "clear_memory",
    "copy",
    "copy_memory",
    "global_int",
    "hide_from_gc",
    "is_same_memory",
    "new_text",
    "text_address",
)


@functools.lru_cache(maxsize=1024)
def _array_type(size: int) -> Any:
    # Creating a ctypes array type takes 15 us; from_address of a cached type takes 0.3 us.
    return ctypes.c_ubyte * size


def buffer_at(address: int, size: int) -> Any:
    """Return a ctypes array over existing memory; it supports weak references."""
    return _array_type(size).from_address(address)


_untrack = ctypes.pythonapi.PyObject_GC_UnTrack
_untrack.restype = None


def hide_from_gc(thing: Any) -> None:
    """Make the garbage collector ignore an object, which is then collected by its reference count alone."""
    # Not by argtypes, which would make an ArgumentError of a RecursionError.
    _untrack(ctypes.py_object(thing))


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
    """Return the address of the first byte of a contiguous buffer, which may be read-only."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):
        pass  # the buffer is read-only or empty: the general call below takes three times as long
    view = _PyBuffer()
    where = ctypes.addressof(view)
    try:
        _get_buffer(buffer, where, 0)
        return int(view.buf or 0)
    finally:
        _release_buffer(where)  # does nothing if there is none


def copy(address: int, source: Buffer, nbytes: int) -> None:
    """Copy *nbytes* of a buffer into raw memory by memcpy(3), without the GIL."""
    view = _PyBuffer()
    where = ctypes.addressof(view)
    try:
        _get_buffer(source, where, 0)
        if view.len < nbytes:
            raise ValueError(f"cannot copy {nbytes} bytes: the source holds only {view.len}")
        ctypes.memmove(address, view.buf, nbytes)
    finally:
        _release_buffer(where)


def copy_memory(address: int, source: int, nbytes: int) -> None:
    """Copy *nbytes* between two addresses by memcpy(3), without the GIL."""
    ctypes.memmove(address, source, nbytes)


def clear_memory(address: int, nbytes: int) -> None:
    """Fill *nbytes* with zeros by memset(3), without the GIL."""
    ctypes.memset(address, 0, nbytes)


_compare = (ctypes.CDLL(None) if os.name == "posix" else ctypes.cdll.msvcrt).memcmp  # type: ignore[attr-defined, unused-ignore]
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_compare.restype = ctypes.c_int


def is_same_memory(address: int, other: int, nbytes: int) -> bool:
    """Return whether *nbytes* at two addresses are equal, by memcmp(3) without the GIL."""
    return bool(_compare(address, other, nbytes) == 0)


def bytes_at(address: int, nbytes: int) -> bytes:
    """Return a copy of the bytes at *address*."""
    return ctypes.string_at(address, nbytes)


_new_text = ctypes.pythonapi.PyUnicode_New
_new_text.argtypes = (ctypes.c_ssize_t, ctypes.c_uint32)
_new_text.restype = ctypes.py_object
_text_address = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
_text_address.argtypes = (ctypes.py_object, ctypes.c_void_p)
_text_address.restype = ctypes.c_void_p
_LAST_ASCII = 0x7F


def text_address(text: str) -> int:
    """Return the address of the characters of an ASCII ``str``, one byte each."""
    return int(_text_address(text, None))


def new_text(length: int) -> str:
    """Return a new ASCII ``str``; the caller writes its characters to its `text_address` before using it."""
    text: str = _new_text(length, _LAST_ASCII)
    return text


def global_int(path: str, name: str) -> Any:
    """Return a C ``int`` of a loaded library, whose ``value`` can be read and set, or None if it lacks it."""
    try:
        return ctypes.c_int.in_dll(ctypes.CDLL(path, mode=getattr(os, "RTLD_NOLOAD", 0)), name)
    except (OSError, ValueError):
        return None
