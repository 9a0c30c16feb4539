"""What happens to segments, claims and leases at a fork. Each of these functions is called twice, see `at_fork`."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from forkshm.backend import kernel
from forkshm.region._lifetime import at_fork
from forkshm.region.blocks._claim import Claim, Share, claims
from forkshm.region.blocks._lease import outgoing, parked
from forkshm.region.blocks._segment import BY_HANDLES, Segment, drop_segment, leave_held, segments_held

__all__ = ()


def _before_fork() -> None:
    for claimed in list(claims.values()):
        if claimed.share is Share.exclusive:
            # The block is a copy, and must be the child's own copy: neither process sees the other's writes.
            with contextlib.suppress(OSError, MemoryError):  # the limit on mappings: see `_in_child`
                claimed.part()
    for segment in list(segments_held.values()):
        if segment.held and (segment.lacks_spare or not segment.spares):
            segment.lacks_spare = True
            with contextlib.suppress(OSError):  # the limit on fds: see `_in_parent`
                _lock_anew(segment, segment.spares)
                segment.lacks_spare = False


def _lock_anew(segment: Segment, own: list[int]) -> None:
    """Put into *own* a new description of a segment, which holds everything that this process holds of it."""
    if not own:
        kernel.reopen_into(own, segment.fd)
    if not kernel.is_object(own[0], segment.identity):  # the fd was closed, and its number belongs to another file
        kernel.close_all(own)
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    for position in list(segment.held):
        kernel.lock_shared(own[0], position)


def _in_parent() -> None:
    for segment in list(segments_held.values()):
        if segment.lacks_spare:
            # The child, if any, shares the description: an unlock here would unlock the child's blocks, too.
            segment.is_description_shared = not BY_HANDLES
            segment.lacks_spare = False
        kernel.close_all(segment.spares)


# The segments for which this process, a forked child, has a description of its own.
_of_child: tuple[int, set[int]] = (0, set())


def _in_child() -> None:
    global _of_child
    if _of_child[0] != os.getpid():
        _of_child = (os.getpid(), set())
    for fds in list(outgoing.values()):
        kernel.close_all(fds)
    for claimed in list(claims.values()):
        if claimed.share is Share.exclusive:
            try:
                _part(claimed)
            except OSError as error:
                _end_child(claimed, os.strerror(error.errno or 0))
            except MemoryError:
                _end_child(claimed, os.strerror(errno.ENOMEM))
    for segment in list(segments_held.values()):
        if id(segment) in _of_child[1]:
            continue
        segment.ours = False
        # The inherited fd shares its description with the parent: unlocking through it would release the parent's
        # blocks, so the child needs its own.
        if not segment.spares or segment.lacks_spare:
            with contextlib.suppress(OSError):
                _lock_anew(segment, segment.spares)
                segment.lacks_spare = False
        if segment.spares and not segment.lacks_spare:
            segment.close()
            segment.take_over(segment.spares[0])
            segment.spares = []
        else:
            segment.is_description_shared = True
        segment.lacks_spare = False
        _of_child[1].add(id(segment))
    for key, (segment, positions) in list(parked.items()):
        for position in positions:
            leave_held(segment, position, key)
        parked.pop(key, None)
    for segment in list(segments_held.values()):
        if not segment.held and segment.is_description_shared:
            drop_segment(segment)


def _part(claimed: Claim) -> None:
    try:
        claimed.part()
    except OSError:
        if claimed.segment.is_intact():
            raise
        # Other code had closed the segment's fd. A child has no other threads yet.
        claimed.part_by_copy()


def _end_child(claimed: Claim, reason: str) -> None:
    assert sys.platform != "win32"  # there is no fork
    # The child would see its parent's writes to an array that belongs to the child by value. An exception cannot leave
    # a fork hook, and there is no remedy without a mapping. So the child ends.
    try:
        message = (
            f"forkshm: process {os.getpid()} ends: its parent has a received array of {claimed.size:,} bytes, and the "
            f"kernel refused the mapping that makes it the child's own ({reason}). "
            "Raise the limit on mappings (sysctl vm.max_map_count) or on address space (ulimit -v), or fork earlier.\n"
        )
        os.write(2, message.encode())
    finally:
        os._exit(os.EX_OSERR)


at_fork(before=_before_fork, in_parent=_in_parent, in_child=_in_child)
