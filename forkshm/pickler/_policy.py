"""Copy or share, and from what size."""

from __future__ import annotations

__all__ = ("ALIGNMENT", "INLINE_LIMIT", "MAY_HOLD", "MAY_HOLD_TIMES", "MOST_BLOCKS", "OUT_OF_BAND")

#: Buffers of this many bytes and more are copied into a block; smaller ones travel in
#: the message. A lease costs about as much as copying this much twice more.
OUT_OF_BAND = 16 * 1024

#: What a payload may put into its message; beyond, all of it goes into the block. Small
#: enough that a message of several payloads stays far below the socket's buffer.
INLINE_LIMIT = 20 * 1024

#: Buffers in a block start at multiples of this: a cache line, and what vector units like.
ALIGNMENT = 64

#: What a view that is kept may hold of memory that it does not see: a block has at most this many bytes, or this many
#: times the smallest buffer in it.
MAY_HOLD = 2**20
MAY_HOLD_TIMES = 4

# Blocks of one payload; each takes an fd, and 40 us. A payload with more MiB in small buffers has larger blocks.
MOST_BLOCKS = 64
