"""Fixtures for the tests of packing and receiving."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from consuming import receive

from forkshm.backend import kernel
from forkshm.pickler import pack


@dataclasses.dataclass
class Crossing:
    """An object that went through a payload, and the cost of that."""

    value: Any
    # Size of the message in bytes.
    message: int
    # Bytes copied, bytes shared and fds, as reported by the payload.
    copied: int
    shared: int
    fds: int


@pytest.fixture
def cross():
    """Pack an object, pass its fds as the kernel would, and open it again."""

    def through(thing, *, for_many=False):
        payload = pack(thing, for_many=for_many)
        data, copied, shared = payload.data, payload.copied, payload.shared
        fds = [kernel.duplicate(fd) for fd in payload.fds]
        count = len(fds)
        payload.close()
        incoming, end = receive(data, 0, fds)
        assert end == len(data)
        assert fds == []
        assert (incoming.copied, incoming.shared) == (copied, shared)
        assert len(data) < 64 * 1024
        return Crossing(incoming.open(), len(data), copied, shared, count)

    return through


@pytest.fixture
def received_twice():
    """Pack an object for many receivers, and open it as two of them."""

    def through(thing):
        payload = pack(thing, for_many=True)
        fds = [[kernel.duplicate(fd) for fd in payload.fds] for _ in range(2)]
        payload.close()
        first, second = (receive(payload.data, 0, mine)[0] for mine in fds)
        return first.open(), second.open()

    return through
