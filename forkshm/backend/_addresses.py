"""The part that all backends have in common: memory at an address of this process."""

from __future__ import annotations

from forkshm.backend import _memory
from forkshm.backend._interface import Backend

__all__ = ("Addresses",)


class Addresses(Backend):
    """Reads, writes and compares mapped memory, which is the same on all systems."""

    buffer_at = staticmethod(_memory.buffer_at)
    hide_from_gc = staticmethod(_memory.hide_from_gc)
    address_of = staticmethod(_memory.address_of)
    copy = staticmethod(_memory.copy)
    copy_memory = staticmethod(_memory.copy_memory)
    is_same_memory = staticmethod(_memory.is_same_memory)
    clear_memory = staticmethod(_memory.clear_memory)
    bytes_at = staticmethod(_memory.bytes_at)
    text_address = staticmethod(_memory.text_address)
    new_text = staticmethod(_memory.new_text)
