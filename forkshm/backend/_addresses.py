"""The part that all backends have in common: memory at an address of this process."""

from __future__ import annotations

from forkshm.backend import _memory
from forkshm.backend._interface import Backend

__all__ = ("Addresses",)


class Addresses(Backend):
    """Reads, writes and compares mapped memory, which is the same on all systems."""

    buffer_at = staticmethod(_memory.buffer_at)
    address_of = staticmethod(_memory.address_of)
    copy = staticmethod(_memory.copy)

    def copy_memory(self, address: int, source: int, nbytes: int) -> None:
        _memory.copy_memory(address, source, nbytes)

    def is_same_memory(self, address: int, other: int, nbytes: int) -> bool:
        return _memory.is_same_memory(address, other, nbytes)

    def clear_memory(self, address: int, nbytes: int) -> None:
        _memory.clear_memory(address, nbytes)

    def bytes_at(self, address: int, nbytes: int) -> bytes:
        return _memory.bytes_at(address, nbytes)

    text_address = staticmethod(_memory.text_address)
    new_text = staticmethod(_memory.new_text)
