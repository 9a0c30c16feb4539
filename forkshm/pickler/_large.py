"""Receives large ``bytes``, ``bytearray`` and ``str`` objects into huge pages.

Filling memory that is new to a process takes three to five times as long as copying, because the kernel has to find
and clear each page of 4 KiB. With pages of 2 MiB it takes little longer than copying, but the C library does not ask
for huge pages. If a file has ``readinto``, the unpickler reads large objects from it straight into their memory, so
this module can ask for huge pages before it copies. All other objects are unpickled faster from memory, so the head of
a payload says whether there are such objects.

Pickle copies a ``str`` once more at both ends. To avoid this, a large ASCII ``str`` is sent as a buffer if it is an
argument, a result, or an item of the list or tuple that is sent.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
from typing import TYPE_CHECKING, Any

from forkshm.backend import Advice, kernel
from forkshm.pickler._reducers import register, register_simple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("LARGE", "Text", "has_large_bytes", "is_large_text", "load", "with_large_text")

LARGE = 4 * 2**20
"""An object of so many bytes has at least one whole huge page."""

_LENGTH, _SHORT_LENGTH = struct.Struct("<Q"), struct.Struct("<I")


def has_large_bytes(pieces: Sequence[Any]) -> bool:
    """Return whether the pieces that a pickler wrote have the content of a large ``bytes`` or ``bytearray``.

    A pickler writes such content as a separate piece, behind one that ends with an opcode and the length.
    """
    before: Any = b""
    for piece in pieces:
        if len(piece) >= LARGE:
            end = bytes(before[-9:])
            if end[-5:] == pickle.BINBYTES + _SHORT_LENGTH.pack(len(piece) & 0xFFFFFFFF):
                return True
            if end in (code + _LENGTH.pack(len(piece)) for code in (pickle.BINBYTES8, pickle.BYTEARRAY8)):
                return True
        before = piece
    return False


def load(stream: memoryview, buffers: Sequence[Any]) -> Any:
    """Unpickle a stream with large ``bytes`` or ``bytearray`` objects.

    Raises:
        Exception: Whatever unpickling raises.
    """
    return pickle.Unpickler(_File(stream), buffers=buffers).load()


def _use_huge_pages(address: int, nbytes: int) -> None:
    """Ask for huge pages in memory that was not touched yet, for the whole huge pages in it."""
    page = kernel.page_size
    start = -(-address // page) * page
    size = (address + nbytes - start) // page * page
    with contextlib.suppress(OSError):  # the kernel may not have any
        kernel.advise(start, size, Advice.huge_pages)


class _File:
    """The file from which an unpickler reads a stream in memory."""

    def __init__(self, stream: memoryview) -> None:
        self._stream = stream
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        start = self._position
        end = len(self._stream) if size < 0 else min(start + size, len(self._stream))
        self._position = end
        return bytes(self._stream[start:end])

    def readline(self) -> bytes:
        # Used by older protocols, and by the few opcodes that are text.
        start = end = self._position
        while end < len(self._stream) and self._stream[end] != 0x0A:
            end += 1
        return self.read(end + 1 - start)

    def readinto(self, target: memoryview) -> int:
        start = self._position
        size = min(len(target), len(self._stream) - start)
        if size >= LARGE:
            _use_huge_pages(kernel.address_of(target), size)
            kernel.copy(kernel.address_of(target), self._stream[start : start + size], size)
        else:
            target[:size] = self._stream[start : start + size]
        self._position = start + size
        return size


class Text:
    """A large ASCII ``str`` on its way."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value


def is_large_text(thing: Any) -> bool:
    """Return whether *thing* is a ``str`` that is large enough for a buffer of its own."""
    return type(thing) is str and len(thing) >= LARGE and thing.isascii()


def with_large_text(thing: Any, parts: Sequence[Any]) -> Any:
    """Return *thing* (a call, a list, a tuple, or other) with `Text` in place of each large ``str``."""
    if type(thing) is str:
        return Text(thing)
    made = {id(part): Text(part) for part in parts if is_large_text(part)}
    new = [made.get(id(part), part) for part in parts]
    if parts is thing:
        return new if type(thing) is list else tuple(new)
    return tuple(new), thing[1]


def reduce_text(text: Text) -> Any:
    """Send the characters as a buffer."""
    window = kernel.buffer_at(kernel.text_address(text.value), len(text.value))
    window.stands_for = text.value  # while the buffer lives
    return rebuild_text, (pickle.PickleBuffer(memoryview(window).toreadonly()),)


def rebuild_text(characters: Any) -> str:
    """Return the ``str`` that arrived."""
    size = memoryview(characters).nbytes
    text = kernel.new_text(size)
    address = kernel.text_address(text)
    if size >= LARGE:
        _use_huge_pages(address, size)
    kernel.copy(address, characters, size)
    return text


register(Text, reduce_text)
register_simple(Text)
