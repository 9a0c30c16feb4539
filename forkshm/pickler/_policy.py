"""Copy or share, and from what size."""

from __future__ import annotations

__all__ = ("ALIGNMENT", "INLINE_LIMIT", "MAY_HOLD", "MAY_HOLD_TIMES", "MOST_BLOCKS", "OUT_OF_BAND")

OUT_OF_BAND = 16 * 1024
"""Buffers of this many bytes and more are copied into a block; smaller ones are part of the message. A lease costs
about as much as copying this many bytes two more times."""

INLINE_LIMIT = 20 * 1024
"""Bytes that a payload may put into its message; a larger one goes into the block entirely. This is small enough that
a message of several payloads stays far below the socket's buffer."""

ALIGNMENT = 64
"""Buffers in a block start at multiples of this: a cache line, which vector units need too."""

MAY_HOLD = 2**20
"""Size of memory that a kept view may hold without seeing it: a block has at most this many bytes, or this many times
the bytes of the smallest buffer in it."""
MAY_HOLD_TIMES = 4

# Blocks of one payload; each takes some 40 us and, except on Linux, an fd. A payload with more MiB in small buffers has
# larger blocks.
MOST_BLOCKS = 64
