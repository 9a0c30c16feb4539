"""Channels between processes: messages with fds, counters, and wakeup pipes."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = (
    "Callee",
    "HasFileno",
    "MessageSocket",
    "Messages",
    "Poller",
)


class HasFileno(Protocol):
    """Anything with an fd."""

    def fileno(self) -> int:
        """Return the fd."""
        ...


class MessageSocket(Protocol):
    """An end of a channel: what of ``socket.socket`` is used of one, with the meaning that it has for SOCK_SEQPACKET.

    So messages are whole, go to one of those who receive, and have fds beside them; `recvmsg` returns no bytes once
    every process that could send is gone, or has shut the socket down, and all was received.
    """

    def fileno(self) -> int:
        """Return the fd, which is readable when a message is there; -1 when closed."""
        ...

    def send(self, data: bytes, flags: int = 0, /) -> int:
        """Send a message without fds."""
        ...

    def sendmsg(self, buffers: Any, ancdata: Any = ..., flags: int = ..., /) -> int:
        """Send a message with fds; see `Backend.RIGHTS`."""
        ...

    def recvmsg(self, bufsize: int, ancbufsize: int = ..., flags: int = ..., /) -> tuple[bytes, list[Any], int, Any]:
        """Receive a message: its bytes, what `Backend.received_fds` takes, flags, and nothing of use."""
        ...

    def recv(self, bufsize: int, flags: int = ..., /) -> bytes:
        """Look at a message."""
        ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set how much the kernel is asked to hold."""
        ...

    def shutdown(self, how: int, /) -> None:
        """Send no more, from any process."""
        ...

    def dup(self) -> Any:
        """Return the same end under another fd."""
        ...

    def close(self) -> None:
        """Close it in this process."""
        ...


class Poller(Protocol):
    """What of ``select.poll`` is used."""

    def register(self, fd: int, eventmask: int = ..., /) -> object:
        """Watch an fd: for `Backend.READABLE`, or `Backend.WRITABLE`."""
        ...

    def unregister(self, fd: int, /) -> object:
        """Watch it no more."""
        ...

    def poll(self, timeout: float | None = ..., /) -> list[tuple[int, int]]:
        """Wait so many milliseconds, or forever; return the fds that are ready, each with what is."""
        ...


class Callee(Protocol):
    """Where a process is called by others of the same user."""

    address: str

    def accept(self) -> MessageSocket:
        """Wait for a caller; return this end of a new channel to it. Callers of other users are refused."""
        ...

    @property
    def closed(self) -> bool:
        """Return whether it was closed."""
        ...

    def close(self) -> None:
        """Accept no more calls. Closing twice is allowed."""
        ...


class Messages(abc.ABC):
    """Channels between processes: messages with fds, counters, and wakeup pipes."""

    DONTWAIT: int
    """Do not wait."""
    TAKE: int
    """How to take a message: fds that arrive are close-on-exec."""
    TRUNCATED: int
    """The message was longer than the room for it."""
    FDS_LOST: int
    """There was no room for all fds."""
    RIGHTS: tuple[int, int]
    """Level and kind of what is sent beside a message: fds, as ``array("i")``."""
    READABLE: int = 1
    """For a `Poller`."""
    WRITABLE: int = 4
    DIRECT_FDS: int = 16
    """The maximum number of fds in one message; more go in a carrier."""
    MOST_MESSAGES: int = 10_000
    """A number larger than the messages that a queue has at a time."""
    fds_lost_because: str = (
        "this process has reached its limit on open files (EMFILE); let arrays share a region, "
        "pass fewer at once, or raise the limit (ulimit -n)"
    )
    """The reason, for error messages, when fds of a message did not arrive."""
    loops_watch_fds: bool = True
    """Whether event loops can watch fds; otherwise a thread has to."""

    @abc.abstractmethod
    def create_counter(self, memory: int) -> int:
        """Return an fd that counts from 0 for every process that has it; *memory* is the fd of a memory object.

        The kernel keeps the count: no lock guards it that could die with its holder.
        """

    @abc.abstractmethod
    def count(self, counter: int, change: int = 0, noted: list[int] | None = None) -> int:
        """Add *change* in one step and return the new count; ``EINVAL`` if the count would be negative.

        *noted* gets an item in the C call that adds, and loses one in the C call that subtracts. After an
        interrupt, *noted* tells the caller whether it has counted.
        """

    @abc.abstractmethod
    def clear_counter(self, counter: int) -> None:
        """Reset the count to 0."""

    @abc.abstractmethod
    def message_sockets(self) -> tuple[MessageSocket, MessageSocket]:
        """Return two connected sockets that keep message boundaries and carry fds."""

    @abc.abstractmethod
    def message_socket(self, fd: int) -> MessageSocket:
        """Return the end that has arrived as *fd*; the end owns *fd* from here on.

        If *fd* is something else, the errno is ``EPROTOTYPE``, and the caller keeps owning *fd*.
        """

    @abc.abstractmethod
    def fds_space(self, count: int) -> int:
        """Return the bytes that *count* fds take in a message: the second argument of ``recvmsg``."""

    @abc.abstractmethod
    def wait_readable(self, end: HasFileno, seconds: float | None) -> bool:
        """Wait until a message is there, or no process can send one any more; return whether that happened."""

    @abc.abstractmethod
    def wait_writable(self, end: HasFileno, seconds: float) -> bool:
        """Wait until there is room for a message; return whether there may be."""

    @abc.abstractmethod
    def poller(self) -> Poller:
        """Return an object that waits for several fds."""

    @abc.abstractmethod
    def has_message(self, end: MessageSocket) -> bool:
        """Return whether a message waits at this end, without receiving it."""

    def has_ended(self, receiver: MessageSocket) -> bool:
        """Return whether no bytes came because no process can send any more, not because a message was empty."""
        return True

    @abc.abstractmethod
    def received_fds(self, ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
        """Return the fds that came with a message."""

    def forget_sent(self, sender: MessageSocket) -> None:  # noqa: B027
        """Release the fds that were sent through an end and will never be received."""

    @abc.abstractmethod
    def listen(self, address: str | None, backlog: int) -> Callee:
        """Return a listener at *address*, or at a random address that cannot be guessed."""

    @abc.abstractmethod
    def call(self, address: str) -> MessageSocket:
        """Connect to the listener at *address*; ``PermissionError`` if it is a process of another user."""

    def forget_address(self, address: str) -> None:  # noqa: B027
        """Remove what a listener at *address* may have left there."""

    @abc.abstractmethod
    def create_wakeup(self) -> tuple[int, int]:
        """Return two fds: one to wait at, for any number of processes, and one to `wake`."""

    @abc.abstractmethod
    def wake(self, wakeup: int, how_many: int) -> None:
        """Wake *how_many* waiters, or let as many later waits return at once."""

    @abc.abstractmethod
    def wait_for_wakeup(self, wakeup: int, seconds: float | None = None) -> bool | None:
        """Wait; True for a wakeup, False when no process can wake any more, None after *seconds*."""
