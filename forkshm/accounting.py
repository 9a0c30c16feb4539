"""What this process has moved, and a test that nothing was copied."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from forkshm._ledger import ledger
from forkshm.backend import kernel
from forkshm.channel import ends_open
from forkshm.errors import CopiedError
from forkshm.pool import descriptors_open
from forkshm.region import region_fds, regions_mapped
from forkshm.region.blocks import arena, leases_open, segments_mapped

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Statistics", "assert_zero_copy", "statistics")

#: Lines of the message of a `CopiedError`.
_LINES = 10


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What this process has moved since it began, and what it holds now.

    The words are those of `PoolStatistics`, which is about one pool.
    """

    #: Tasks that were answered to this process, failed ones too, or done by it as a worker; a
    #: chunk of a map is one task.
    tasks: int
    #: Messages sent and received.
    messages: int
    #: Bytes of buffers and pickle streams that were copied into an arena, here for what was
    #: sent, elsewhere for what was received.
    bytes_copied: int
    #: Bytes of buffers that crossed as descriptors, sent and received.
    bytes_shared: int
    #: Memory objects of the arena.
    segments: int
    #: Blocks of the arena that are in use, here or at a receiver.
    blocks_live: int
    #: Bytes of those.
    bytes_live: int
    #: The most that those ever were.
    bytes_peak: int
    #: Bytes of the arena that nobody uses and that are kept for the next copies.
    bytes_warm: int
    #: Regions that are mapped.
    regions: int
    #: Fds that are open: one for each memory object of regions, segment (also of others), message that is being
    #: sent and end of a channel; four for each pool and three for each worker. Those of
    #: `SharedMemoryObject` and `FileMapping`, which you close, are not among them.
    descriptors: int


def statistics() -> Statistics:
    """Return what this process has moved since it began, and what it holds now.

    The counters are always on. Blocks that came back since are counted as free.

    Fork and threads:
        Any thread may ask; the numbers are those of all threads. A forked child begins at
        zero: what a worker moved is in the numbers of the worker, and what came of it here
        in those of this process.

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
        + kernel.more_fds(),
    )


@contextlib.contextmanager
def assert_zero_copy(max_bytes: int = 0, *, messages: bool = False) -> Iterator[None]:
    """Fail at the end of the block if more than *max_bytes* were copied in it, and say where.

    Counted is what goes through the arena: large buffers (from 16 KiB), large pickle
    streams, and whatever does not fit a message beside them. That is what this process
    copied to send it, and what others had copied of that which arrived here: results of
    workers, for example. Small things travel in the message itself, as a descriptor does,
    and are no copies.

    Args:
        max_bytes: How much may be copied, all together.
        messages: Count the bytes of the messages as well.

    Raises:
        ValueError: *max_bytes* is negative.
        CopiedError: More was copied; an ``AssertionError``. It names each call, by file, line
            and function, what it sent or got, and how many bytes. Not raised when the block
            itself raises.

    Fork and threads:
        What any thread of this process copies counts, and counts for each of several blocks
        that are open at the time, nested or not. A copy counts when it is made: arguments
        of an asynchronous call when they are pickled, which may be after the call if many
        are on their way, its result when it comes. So wait for results inside the block. A
        forked child is not watched.

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
    lines.append("let them be born in shared memory (forkshm.empty, forkshm.asarray), or allow them with max_bytes")
    return "\n".join(lines)
