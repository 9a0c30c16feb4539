"""Copy or share, and from what size."""

from __future__ import annotations

__all__ = ("ALIGNMENT", "INLINE_LIMIT", "OUT_OF_BAND")

#: Buffers of this many bytes and more are copied into a block; smaller ones travel in
#: the message. A lease costs about as much as copying this much twice more.
OUT_OF_BAND = 16 * 1024

#: What a parcel may put into its message; beyond, all of it goes into the block. Small
#: enough that a message of several parcels stays far below the socket's buffer.
INLINE_LIMIT = 20 * 1024

#: Buffers in a block start at multiples of this: a cache line, and what vector units like.
ALIGNMENT = 64
