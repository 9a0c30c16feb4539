"""Handles: fds that cross by themselves, and name no memory.

A reducer puts ``pickle.PickleBuffer(Handle(fd))`` into what it returns. To the pickler that is a buffer as any other;
the collector knows it by its type, and sends the fd beside the message. The rebuilding function gets a
`ReceivedFd` in its place.
"""

from __future__ import annotations

import pickle
import socket
from typing import Any

from forkshm import _system
from forkshm.backend import kernel
from forkshm.pickler._reducers import register

__all__ = ("Handle", "ReceivedFd")


class Handle(bytearray):
    """An fd on its way out: a duplicate, so the sender may close its own; closed when the message was sent."""

    def __init__(self, fd: int) -> None:
        super().__init__(1)
        self.fd = kernel.duplicate(fd)
        _outgoing[id(self)] = self.fd

    def __del__(self) -> None:
        if _let_go is not None:  # the end of the program
            _let_go(id(self))


# The duplicates open here: a forked child closes its copies, or the other end of a pipe
# would never be told that everybody is gone.
_outgoing: dict[int, int] = {}


# With defaults: at the end of the program the names of this module may be gone.
def _let_go(key: int, outgoing: dict[int, int] = _outgoing, close: Any = kernel.close) -> None:
    fd = outgoing.pop(key, None)
    if fd is not None:
        close(fd)


def _in_child() -> None:
    for fd in _outgoing.values():
        kernel.close(fd)
    _outgoing.clear()


_system.register_at_fork(after_in_child=_in_child)


class ReceivedFd:
    """An fd that has arrived; closed unless somebody takes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def take(self) -> int:
        """Return the fd, which is the caller's from now on.

        Raises:
            ValueError: It was taken before.
        """
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise ValueError("an fd that arrived was asked for twice")
        return fd

    def __del__(self, close: Any = kernel.close) -> None:
        if self._fd >= 0:
            close(self._fd)
            self._fd = -1


def reduce_socket(end: socket.socket) -> Any:
    """Send a socket: it is the same one at the other end, under another fd."""
    return rebuild_socket, (pickle.PickleBuffer(Handle(end.fileno())), int(end.family), int(end.type), end.proto)


def rebuild_socket(received: ReceivedFd, family: int, kind: int, proto: int) -> socket.socket:
    """Return the socket that arrived."""
    return socket.socket(family, kind, proto, received.take())


if kernel.name != "windows":  # else the standard library's way
    register(socket.socket, reduce_socket)
