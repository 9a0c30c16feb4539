"""Counters of what this process has moved, and a check that nothing was copied."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from forkshm._ledger import ledger
from forkshm.backend import kernel
from forkshm.channel import ends_open
from forkshm.errors import CopiedError
from forkshm.pickler import files_kept
from forkshm.pool import descriptors_open
from forkshm.region import region_fds, regions_mapped
from forkshm.region.blocks import arena, leases_open, segments_mapped

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Statistics", "assert_zero_copy", "statistics")

# Maximum number of copies listed in the message of a `CopiedError`.
_LINES = 10


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Counts of what this process has moved since it began, and of what it holds now.

    The fields are named as in `PoolStatistics`, which counts for one pool.
    """

    tasks: int
    """Tasks answered to this process, including failed ones, or run by it as a worker; a chunk of a map is one task."""
    messages: int
    """Messages sent and received."""
    bytes_copied: int
    """Bytes of buffers and pickle streams copied into an arena, by this process for sent data and by the sender for
    received data.
    """
    bytes_shared: int
    """Bytes of buffers sent and received as descriptors."""
    segments: int
    """Memory objects of the arena."""
    blocks_live: int
    """Blocks of the arena in use by this process or by receivers."""
    bytes_live: int
    """Bytes in these blocks."""
    bytes_peak: int
    """Largest value that ``bytes_live`` has had."""
    bytes_warm: int
    """Unused bytes of the arena that are kept for the next copies."""
    regions: int
    """Mapped regions."""
    descriptors: int
    """Open fds, namely one for each memory object of regions, each segment (also of other processes), each message
    being sent and each end of a channel; four for each pool, three for each worker, and those of the latest few
    ``np.memmap`` and ``mmap.mmap`` objects that were sent. The fds of `SharedMemoryObject` and `FileMapping`, which the
    program closes, are not counted.
    """


def statistics() -> Statistics:
    """Return counts of what this process has moved since it began, and of what it holds now.

    The counters are always on. Blocks that receivers have returned in the meantime count as free.

    Fork and threads:
        Any thread may call it; the counts cover all threads. A forked child begins at zero. A worker counts what it
        moves itself; this process counts what it sends to and receives from the worker.

    Example:
        >>> import forkshm
        >>> before = forkshm.statistics().bytes_shared
        >>> with forkshm.Pool(1) as pool:
        ...     pool.apply(len, (forkshm.zeros(1000),))
        1000
        >>> forkshm.statistics().bytes_shared - before
        8000
    """
    held = arena.statistics()
    regions = regions_mapped()
    return Statistics(
        tasks=ledger.tasks,
        messages=ledger.messages,
        bytes_copied=ledger.bytes_copied,
        bytes_shared=ledger.bytes_shared,
        segments=held.segments,
        blocks_live=held.blocks,
        bytes_live=held.used_bytes,
        bytes_peak=held.peak_bytes,
        bytes_warm=held.warm_bytes,
        regions=regions,
        descriptors=region_fds()
        + segments_mapped()
        + leases_open()
        + ends_open()
        + descriptors_open()
        + files_kept()
        + kernel.more_fds(),
    )


@contextlib.contextmanager
def assert_zero_copy(max_bytes: int = 0, *, messages: bool = False) -> Iterator[None]:
    """Raise at the end of the block if more than *max_bytes* were copied in it, and list the copies.

    Copies through the arena count: large buffers (from 16 KiB), large pickle streams, and other data that does not fit
    in a message beside them. Both directions count: data that this process copied to send it, and received data that
    the sender had copied, such as results of workers. Small objects travel in the message itself, as descriptors do,
    and do not count.

    Args:
        max_bytes: Total number of bytes that may be copied.
        messages: Count the bytes of messages as well.

    Raises:
        ValueError: *max_bytes* is negative.
        CopiedError: More bytes were copied. The error is an ``AssertionError``. It names the file, line and function of
            each call, the object sent or received, and its size. It is not raised if the block itself raises.

    Fork and threads:
        Copies made by any thread of this process count, in every block that is open at that time, nested or not. A copy
        counts when it is made. Arguments of an asynchronous call are copied when they are pickled, which may be after
        the call if many calls are in flight; results are counted when they arrive. So wait for results inside the
        block. Copies made by a forked child do not count.

    Example:
        >>> import forkshm, numpy as np
        >>> shared, plain = forkshm.ones(10_000), np.ones(10_000)
        >>> with forkshm.Pool(1) as pool:
        ...     with forkshm.assert_zero_copy():
        ...         pool.apply(np.sum, (shared,))
        ...     with forkshm.assert_zero_copy():
        ...         pool.apply(np.sum, (plain,))
        Traceback (most recent call last):
            ...
        forkshm.errors.CopiedError: 80,000 bytes were copied, and 0 are allowed:
          80,000 bytes: numpy.ndarray float64 (10000,), sent to sum() at ...
        ...
    """
    if max_bytes < 0:
        raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
    copies: list[tuple[int, str]] = []

    def watch(nbytes: int, what: str, message: bool) -> None:
        if messages or not message:
            copies.append((nbytes, what))

    ledger.watches[id(watch)] = watch
    try:
        yield
    finally:
        watched = ledger.watches.pop(id(watch), None) is not None  # not in a forked child
    nbytes = sum(copy[0] for copy in copies)
    if watched and nbytes > max_bytes:
        raise CopiedError(_tell(copies, nbytes, max_bytes), nbytes=nbytes, max_bytes=max_bytes, copies=copies)


def _tell(copies: list[tuple[int, str]], nbytes: int, max_bytes: int) -> str:
    by_what: dict[str, list[int]] = {}
    for size, what in copies:
        by_what.setdefault(what, []).append(size)
    groups = sorted(by_what.items(), key=lambda group: -sum(group[1]))
    lines = [f"{nbytes:,} bytes were copied, and {max_bytes:,} are allowed:"]
    for what, sizes in groups[:_LINES]:
        times = f" in {len(sizes):,} copies" if len(sizes) > 1 else ""
        lines.append(f"  {sum(sizes):,} bytes{times}: {what}")
    if len(groups) > _LINES:
        rest = sum(sum(sizes) for _, sizes in groups[_LINES:])
        lines.append(f"  {rest:,} bytes of {len(groups) - _LINES:,} others: see the attribute copies")
    lines.append("Create the arrays in shared memory (forkshm.empty, forkshm.asarray), or raise max_bytes.")
    return "\n".join(lines)
