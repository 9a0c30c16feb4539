"""Leases: fds that hold blocks, to be sent beside messages."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from forkshm.backend import kernel
from forkshm.region._lifetime import guard, new_key, unwatch, watch
from forkshm.region.blocks._segment import BY_HANDLES, Segment, enter_held, leave_held

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = (
    "Lease",
    "lease_on",
    "leases_open",
    "outgoing",
    "parked",
)


class Lease:
    """An fd that holds blocks of a segment, to be sent beside messages; close it once sent.

    Created under `guard`. A lease that is garbage-collected closes itself.
    """

    __slots__ = ("__weakref__", "_fds", "_is_parked", "_key", "_positions", "_segment", "_watch", "fd")

    def __init__(self, segment: Segment, position: int) -> None:
        self._segment = segment
        self._positions = [position]
        self._is_parked = False
        self._key = new_key()
        self._fds: list[int] = []
        self.fd = -1
        outgoing[self._key] = self._fds
        action = functools.partial(_end_lease, segment, self._positions, self._key, self._fds)
        self._watch = watch(self, action, now=False)
        self._open()

    def _open(self) -> None:
        # Other code may have closed the fd, and its number may refer to another object: the receiver refuses that.
        fds = self._fds
        try:
            kernel.reopen_into(fds, self._segment.fd)
            for position in self._positions:
                kernel.lock_shared(fds[0], position)
        except BaseException:
            kernel.close_all(fds)
            raise
        self.fd = fds[0]

    def extend(self, segment: Segment, position: int) -> bool:
        """Hold another block by the same fd; return False if it is of another segment. Needs `guard`.

        Raises:
            OSError: The kernel refused the lock.
        """
        if segment is not self._segment or self.fd < 0:
            return False
        # Locked first: a lock without a position ends with the fd.
        kernel.lock_shared(self.fd, position)
        self._positions.append(position)
        return True

    def park(self) -> None:
        """Hold the block without an fd until it is sent: many leases may wait, and fds are few."""
        with guard:
            if self.fd >= 0:
                parked[self._key] = self._segment, self._positions
                _waited[self._key] = True
                self._is_parked = True
                for position in self._positions:
                    enter_held(self._segment, position, self._key)
                    if BY_HANDLES:
                        continue
                    kernel.lock_shared(self._segment.fd, position)
                self.fd = -1
                kernel.close_all(self._fds)

    def unpark(self) -> None:
        """Get an fd again.

        Raises:
            OSError: No fd is available; the lease stays parked.
        """
        with guard:
            if self._is_parked:
                if self.fd < 0:
                    self._open()
                for position in self._positions:
                    leave_held(self._segment, position, self._key)
                parked.pop(self._key, None)
                self._is_parked = False

    def close(self) -> None:
        """Release the block in this process. Closing twice is allowed."""
        with guard:
            self.fd = -1
            _end_lease(self._segment, self._positions, self._key, self._fds, is_late=self._key in _waited)
            unwatch(self._watch)


def _end_lease(segment: Segment, positions: list[int], key: int, fds: list[int], *, is_late: bool = True) -> None:
    if fds:
        if is_late and not BY_HANDLES and not kernel.is_object(fds[0], segment.identity):
            fds.clear()  # other code has closed the fd meanwhile, and its number may belong to another file
        kernel.close_all(fds)
    if key in _waited:
        _waited.pop(key, None)
    if key in parked:
        for position in positions:
            leave_held(segment, position, key)
        parked.pop(key, None)
    outgoing.pop(key, None)


# The fds of the leases made here. A forked child closes its copies, which would hold the blocks while the child lives.
outgoing: dict[int, list[int]] = {}
# The leases that were parked, and so may keep an fd for long.
_waited: dict[int, bool] = {}
# The blocks held by parked leases.
parked: dict[int, tuple[Segment, list[int]]] = {}


def lease_on(segment: Segment, position: int, beside: Iterable[Lease] = ()) -> Lease:
    """Return a lease on a block: one of *beside* if possible, all of which are sent and closed together.

    Needs `guard`.

    Raises:
        OSError: The kernel refused an fd or a lock.
    """
    if kernel.one_fd_leases_many:
        for other in beside:
            if other.extend(segment, position):
                return other
    return Lease(segment, position)


def leases_open() -> int:
    """Return the number of this process's leases that wait to be sent."""
    with guard:
        return sum(map(bool, outgoing.values()))
