"""Reading payloads and claiming leases as a channel does: they are closed after they were read."""

from __future__ import annotations

from forkshm import pickler
from forkshm.backend import kernel
from forkshm.region import _table
from forkshm.region.blocks import _claim

__all__ = ("claim", "receive", "skip")


def _consume(read, data, position, fds):
    before = list(fds)
    try:
        return read(data, position, fds)
    finally:
        _table.give_back_all(before[: len(before) - len(fds)])


def receive(data, position, fds):
    return _consume(pickler.receive, data, position, fds)


def skip(data, position, fds):
    return _consume(pickler.skip, data, position, fds)


def claim(lease_fd, *args):
    try:
        return _claim.claim(lease_fd, *args)
    finally:
        kernel.close(lease_fd)
