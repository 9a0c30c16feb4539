"""Ranges of bytes in a segment, and the sizes of blocks."""

from __future__ import annotations

from typing import TypeAlias

from forkshm.backend import kernel
from forkshm.region._table import round_up

__all__ = (
    "Ranges",
    "with_range",
    "within",
    "without_range",
)

Ranges: TypeAlias = "tuple[tuple[int, int], ...]"
"""Ranges of start and end, sorted by address, none adjacent to another. Replaced, never changed."""


def within(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return the parts of *ranges* between *start* and *end*."""
    return tuple((max(low, start), min(high, end)) for low, high in ranges if low < end and high > start)


def without_range(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return *ranges* without the part between *start* and *end*."""
    left: list[tuple[int, int]] = []
    for low, high in ranges:
        if low < start:
            left.append((low, min(high, start)))
        if high > end:
            left.append((max(low, end), high))
    return tuple(left)


def with_range(ranges: Ranges, start: int, end: int) -> Ranges:
    """Return *ranges* with the range from *start* to *end* added, merged with adjacent ones."""
    for low, high in ranges:
        if low <= end and high >= start:
            start, end = min(low, start), max(high, end)
    return tuple(sorted([*(part for part in ranges if part[1] < start or part[0] > end), (start, end)]))


def block_size(nbytes: int) -> int:
    """Return a block size for a request: whole pages, in at most eight sizes between powers of two."""
    return round_up(nbytes, max(kernel.page_size, 1 << max(nbytes.bit_length() - 4, 0)))
