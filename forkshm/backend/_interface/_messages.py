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
    """An end of a channel: the part of ``socket.socket`` that is used, with the semantics of SOCK_SEQPACKET.

    A message arrives whole, at one receiver, with its fds. `recvmsg` returns no bytes once every message was received
    and every possible sender is gone or has shut the socket down.
    """

    def fileno(self) -> int:
        """Return the fd, which is readable when a message is there; -1 when closed."""
        ...

    def is_intact(self) -> bool:
        """Return whether the fd still refers to this end: a program may close fds that it did not open."""
        ...

    def send(self, data: bytes, flags: int = 0, /) -> int:
        """Send a message without fds."""
        ...

    def sendmsg(self, buffers: Any, ancdata: Any = ..., flags: int = ..., /) -> int:
        """Send a message with fds; see `Backend.RIGHTS`."""
        ...

    def recvmsg(self, bufsize: int, ancbufsize: int = ..., flags: int = ..., /) -> tuple[bytes, list[Any], int, Any]:
        """Receive a message: its bytes, the fds as `Backend.received_fds` takes them, flags, and an unused value."""
        ...

    def recv(self, bufsize: int, flags: int = ..., /) -> bytes:
        """Receive a message without its fds, or only look at it, as *flags* say."""
        ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set the size of the kernel's buffers."""
        ...

    def shutdown(self, how: int, /) -> None:
        """Stop sending in every process that has this end."""
        ...

    def dup(self) -> Any:
        """Return the same end with another fd."""
        ...

    def close(self) -> None:
        """Close this end in this process. An fd that refers to something else by now stays open."""
        ...


class Poller(Protocol):
    """The part of ``select.poll`` that is used."""

    def register(self, fd: int, eventmask: int = ..., /) -> object:
        """Watch an fd: for `Backend.READABLE`, or `Backend.WRITABLE`."""
        ...

    def unregister(self, fd: int, /) -> object:
        """Stop watching an fd."""
        ...

    def poll(self, timeout: float | None = ..., /) -> list[tuple[int, int]]:
        """Wait for up to *timeout* milliseconds, or forever; return the ready fds, each with its events."""
        ...


class Callee(Protocol):
    """An address at which other processes of the same user connect."""

    address: str

    def accept(self) -> MessageSocket:
        """Wait for a caller; return this end of a new channel to it. Callers of other users are refused."""
        ...

    @property
    def closed(self) -> bool:
        """Return whether `close` was called."""
        ...

    def close(self) -> None:
        """Accept no more calls. Closing twice is allowed."""
        ...


class Messages(abc.ABC):
    """Channels between processes: messages with fds, counters, and wakeup pipes."""

    DONTWAIT: int
    """Flag: return at once instead of waiting."""
    TAKE: int
    """Flags to receive a message with; fds that arrive are close-on-exec."""
    TRUNCATED: int
    """Flag of a received message that was longer than the buffer."""
    FDS_LOST: int
    """Flag of a received message that lost fds because there was no room for all of them."""
    RIGHTS: tuple[int, int]
    """Level and type of the ancillary data that carries fds, as ``array("i")``."""
    READABLE: int = 1
    """Event of a `Poller`: a message is there."""
    WRITABLE: int = 4
    DIRECT_FDS: int = 16
    """The maximum number of fds in one message; more go in a carrier."""
    MOST_MESSAGES: int = 10_000
    """A number larger than the number of messages that a queue can hold."""
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

        The kernel keeps the count, so no lock is needed that could die with its holder.
        """

    @abc.abstractmethod
    def count(self, counter: int, change: int = 0, noted: list[int] | None = None) -> int:
        """Add *change* in one step and return the new count; ``EINVAL`` if the count would be negative.

        *noted* gets an item in the C call that adds, and loses one in the C call that subtracts. After an
        interrupt, *noted* tells the caller whether it has counted.
        """

    def counting(self, counter: int, change: int) -> tuple[Any, ...] | None:
        """Return a C function and its arguments that do what `count` does, or None if it takes more than one call.

        A caller can combine it with another C call, so that no signal handler runs between the two.
        """
        return None

    @abc.abstractmethod
    def clear_counter(self, counter: int) -> None:
        """Reset the count to 0."""

    @abc.abstractmethod
    def message_sockets(self) -> tuple[MessageSocket, MessageSocket]:
        """Return two connected sockets that keep message boundaries and carry fds."""

    @abc.abstractmethod
    def message_socket(self, fd: int) -> MessageSocket:
        """Return the end that has arrived as *fd*, and take over *fd*.

        If *fd* is not such an end, the errno is ``EPROTOTYPE``, and the caller keeps owning *fd*.
        """

    @abc.abstractmethod
    def fds_space(self, count: int) -> int:
        """Return the bytes that *count* fds take in a message: the second argument of ``recvmsg``."""

    @abc.abstractmethod
    def wait_readable(self, end: HasFileno, seconds: float | None) -> bool:
        """Wait until a message is there or no process can send one; return whether that happened."""

    @abc.abstractmethod
    def wait_writable(self, end: HasFileno, seconds: float) -> bool:
        """Wait until there may be room for a message; return False after *seconds*."""

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
        """Remove the files that a listener at *address* may have left."""

    @abc.abstractmethod
    def create_wakeup(self) -> tuple[int, int]:
        """Return two fds: one to wait at, for any number of processes, and one to `wake`."""

    @abc.abstractmethod
    def wake(self, wakeup: int, how_many: int) -> None:
        """Wake *how_many* waiters; wakeups without a waiter make later waits return at once."""

    @abc.abstractmethod
    def wait_for_wakeup(self, wakeup: int, seconds: float | None = None) -> bool | None:
        """Wait; True for a wakeup, False when no process can wake any more, None after *seconds*."""
