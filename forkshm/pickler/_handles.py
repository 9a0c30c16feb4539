"""Sends fds that do not name memory.

A reducer puts ``pickle.PickleBuffer(Handle(fd))`` into what it returns. To the pickler this is an ordinary buffer. The
collector recognizes the type, and sends the fd beside the message. The rebuilding function gets a `ReceivedFd` in its
place.
"""

from __future__ import annotations

import pickle
import socket
from typing import TYPE_CHECKING, Any

from forkshm import _system
from forkshm._interrupts import promptly
from forkshm.backend import kernel
from forkshm.pickler._reducers import register, register_family
from forkshm.region import Opened, reopened

if TYPE_CHECKING:
    from forkshm.backend import MessageSocket

__all__ = ("FdBuffer", "Handle", "ReceivedFd")


# The duplicates that are open here. A forked child closes its copies; otherwise the other end of a pipe would not
# notice that all users are gone.
_outgoing: dict[int, int] = {}


class FdBuffer(bytearray):
    """A buffer that stands for an fd, so that a pickle can refer to the fd as it refers to memory."""

    fd = -1


class Handle(FdBuffer):
    """A duplicate of an fd to send, so that the sender may close its own; closed when the message was sent."""

    _key = 0

    def __init__(self, fd: int) -> None:
        super().__init__(1)
        self._key = id(self)
        # No call may come between these assignments.
        self.fd = _outgoing[self._key] = kernel.duplicate(fd)

    # With defaults: at the end of the program the names of this module may be gone.
    @promptly
    def __del__(self, outgoing: dict[int, int] = _outgoing, close: Any = kernel.close) -> None:
        key, self._key = self._key, 0
        if key in outgoing:
            fd = outgoing[key]
            del outgoing[key]
            close(fd)


def _in_child() -> None:
    for fd in _outgoing.values():
        kernel.close(fd)
    _outgoing.clear()


_system.register_at_fork(after_in_child=_in_child)


class ReceivedFd:
    """An fd that has arrived; closed unless it is taken.

    Attributes:
        fd: Its number; -1 when it was taken.
    """

    @promptly
    def __init__(self, fd: int) -> None:
        self.fd = fd

    def take_socket(self) -> MessageSocket:
        """Return the end of a channel that has the fd from now on.

        Raises:
            OSError: The fd is not such an end; it stays here.
        """
        end = kernel.message_socket(self.fd)
        # No call may come before this.
        self.fd = -1
        return end

    def take(self) -> int:
        """Return the fd, which the caller owns from now on.

        Raises:
            ValueError: It was taken before.
        """
        fd, self.fd = self.fd, -1
        if fd < 0:
            raise ValueError("an fd that arrived was taken twice: rebuild the object once")
        return fd

    @promptly
    def __del__(self, close: Any = kernel.close) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)


def reduce_socket(end: socket.socket) -> Any:
    """Send a socket. The receiver gets the same socket under another fd."""
    return rebuild_socket, (pickle.PickleBuffer(Handle(end.fileno())), int(end.family), int(end.type), end.proto)


def rebuild_socket(received: ReceivedFd, family: int, kind: int, proto: int) -> socket.socket:
    """Return the socket that arrived."""
    # In two steps, so that the fd has one owner if a signal handler raises in between.
    made = socket.socket.__new__(socket.socket)
    try:
        made.__init__(family, kind, proto, received.fd)  # type: ignore[misc]
    except BaseException:
        made.detach()
        raise
    received.fd = -1
    return made


def reduce_opened(opened: Opened) -> Any:
    """Send an opened object or file. The receiver gets an fd of its own for it, whatever became of the name."""
    state = {key: value for key, value in vars(opened).items() if key not in ("_fd", "_closing")}
    return rebuild_opened, (pickle.PickleBuffer(Handle(opened.fileno())), type(opened), state)


def rebuild_opened(received: ReceivedFd, kind: type[Opened], state: dict[str, Any]) -> Opened:
    """Return the object that arrived, open."""
    return reopened(kind, state, received.take)


if kernel.name != "windows":  # there, the standard library's way is used
    register(socket.socket, reduce_socket)
register_family(Opened, reduce_opened)
