"""The two ends of a channel."""

from __future__ import annotations

import array
import dataclasses
import errno
import os
import socket
import weakref
from typing import TYPE_CHECKING, Protocol

from forkshm._ledger import ledger
from forkshm.backend import kernel
from forkshm.errors import ChannelBrokenError, ChannelClosedError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ("PrivateFd", "Received", "Receiver", "Sender", "close_in_children", "ends_open", "pair")

#: Longer messages are not sent: parcels beyond their share go into a block instead.
MAX_MESSAGE = 64 * 1024

#: unix(7): a message carries at most 253 fds.
MAX_FDS = 253

# As plain ints: combining the enum's members takes longer than the system call.
_DONTWAIT = int(socket.MSG_DONTWAIT)
_TRUNCATED = int(socket.MSG_TRUNC)
#: How to take a message: wait for one.
WAIT = int(socket.MSG_CMSG_CLOEXEC)
_RECEIVE = int(socket.MSG_DONTWAIT) | WAIT

_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)

_FULL = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS, errno.ETOOMANYREFS})
_GONE = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN})

#: A message must not be empty.
_CARRIER_ITEM = b"fds"


@dataclasses.dataclass
class Received:
    """A message as it came."""

    data: bytes
    #: Owned by whoever holds this.
    fds: list[int]


class PrivateFd:
    """An fd that no child may keep."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        close_in_children(self)

    def close(self) -> None:
        """Close it. Closing twice is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Closable(Protocol):
    """Anything with ``close()``."""

    def close(self) -> None:
        """Close it."""
        ...


class Sender:
    """The end of a channel that messages go into. Any number of processes may share it."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        _ends.add(self)

    def fileno(self) -> int:
        """Return the fd; -1 when closed."""
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        """Whether this end was closed in this process."""
        return self._socket.fileno() < 0

    def send(self, data: bytes, fds: Sequence[int] = (), *, wait: bool = True) -> bool:
        """Send one message, whole.

        Args:
            data: At most `MAX_MESSAGE` bytes, at least 1.
            fds: Sent beside it; they stay open here as well.
            wait: Wait for room in the kernel's queue.

        Returns:
            False when there is no room and *wait* is false.

        Raises:
            ChannelBrokenError: Nobody can receive any more.
            ChannelClosedError: This end was closed.
            OSError: The kernel refused, for example ``EMFILE``.
        """
        carrier = None
        flags = 0 if wait else _DONTWAIT
        try:
            if not fds:
                self._socket.send(data, flags)
                ledger.messages += 1
                if ledger.watches:
                    _note(data, "sent")
                return True
            if len(fds) > MAX_FDS:
                carrier = _carry(fds[MAX_FDS - 1 :])
                fds = [*fds[: MAX_FDS - 1], carrier.fileno()]
            self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], flags)
        except OSError as error:
            if error.errno in _FULL and not wait:
                return False
            if error.errno in _GONE:
                raise ChannelBrokenError("cannot send: every process at the other end is gone") from error
            if error.errno == errno.EBADF and self._socket.fileno() < 0:  # else one of the fds is bad
                raise ChannelClosedError(errno.EBADF, "cannot send: this end of the channel was closed") from error
            raise
        finally:
            if carrier is not None:
                carrier.close()
        ledger.messages += 1
        if ledger.watches:
            _note(data, "sent")
        return True

    def duplicate(self) -> Sender:
        """Return the same end under another fd."""
        return Sender(self._socket.dup())

    def grow(self, nbytes: int) -> None:
        """Let the kernel hold up to so many bytes, as far as it allows."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, nbytes)

    def unread_bytes(self) -> int:
        """Return how much was sent and not yet received; 0 when everything was."""
        return kernel.unread_bytes(self._socket)

    def end(self) -> None:
        """Say that nothing more will come: receivers get None once all is received."""
        if self._socket.fileno() >= 0:
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end in this process. Closing twice is allowed."""
        self._socket.close()


class Receiver:
    """The end that messages come out of. Of processes that share it, one gets each message."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        _ends.add(self)

    def fileno(self) -> int:
        """Return the fd, which is readable when a message is there; -1 when closed."""
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        """Whether this end was closed in this process."""
        return self._socket.fileno() < 0

    def receive_nowait(self) -> Received | None:
        """Receive a message that is there already.

        Raises:
            BlockingIOError: None is there.
            ChannelClosedError: This end was closed.

        Returns:
            The message, or None when every sender is gone and all was received.
        """
        taken = self.take(_RECEIVE)
        return None if taken is None else Received(*taken)

    def receive(self) -> Received | None:
        """Wait for a message; otherwise as `receive_nowait`.

        Of several processes and threads that wait here, the kernel wakes one.
        """
        taken = self.take(WAIT)
        return None if taken is None else Received(*taken)

    def take(self, how: int = _RECEIVE) -> tuple[bytes, list[int]] | None:
        """As `receive_nowait`, for those who count the nanoseconds: the data and the fds as they are."""
        try:
            # CLOEXEC at once: between receiving an fd and setting the flag another
            # thread may start a program, which would inherit it.
            data, ancillary, flags, _ = self._socket.recvmsg(MAX_MESSAGE, _ANCILLARY, how)
        except BlockingIOError:
            raise
        except ConnectionResetError:
            # The other end closed before it had read all of ours: said once, and before
            # what it had sent.
            return self.take(how)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise ChannelClosedError(errno.EBADF, "cannot receive: this end of the channel was closed") from error
            raise
        fds = kernel.received_fds(ancillary) if ancillary else []
        if len(fds) == MAX_FDS:
            fds += _unload(fds)
        if not data:
            return None
        if flags & _TRUNCATED:
            for fd in fds:
                os.close(fd)
            raise ChannelBrokenError(
                f"received a message of more than {MAX_MESSAGE:,} bytes, which forkshm never sends"
            )
        ledger.messages += 1
        if ledger.watches:
            _note(data, "received")
        return data, fds

    def duplicate(self) -> Receiver:
        """Return the same end under another fd."""
        return Receiver(self._socket.dup())

    def close(self) -> None:
        """Close this end in this process. Closing twice is allowed."""
        self._socket.close()


def _note(data: bytes, direction: str) -> None:
    ledger.note([(len(data), "a message")], direction, message=True)


#: Every end of this process.
_ends: weakref.WeakSet[Sender | Receiver] = weakref.WeakSet()


def ends_open() -> int:
    """How many ends of channels are open here, each with an fd."""
    return sum(end.fileno() >= 0 for end in list(_ends))


def pair() -> tuple[Sender, Receiver]:
    """Return a new channel: its sending and its receiving end.

    Raises:
        OSError: The limit on open files is reached.
    """
    out, into = kernel.message_sockets()
    return Sender(out), Receiver(into)


def _carry(fds: Sequence[int]) -> socket.socket:
    """Put fds into the queue of a new socket and return its receiving end.

    A message holds 253 fds; the 253rd of a fuller one is such a socket, with the rest.
    """
    out, into = kernel.message_sockets()
    try:
        for start in range(0, len(fds), MAX_FDS):
            socket.send_fds(out, [_CARRIER_ITEM], fds[start : start + MAX_FDS], socket.MSG_DONTWAIT)
    except BaseException:
        into.close()
        raise
    finally:
        out.close()
    return into


def _unload(fds: list[int]) -> list[int]:
    """If the last of a full message's fds carries more, take it off and return those."""
    more: list[int] = []
    try:
        carrier = socket.socket(fileno=fds[-1])
    except OSError:
        return more  # an ordinary fd: there were exactly as many as fit
    del fds[-1]
    with carrier:
        while True:
            data, ancillary, _, _ = carrier.recvmsg(len(_CARRIER_ITEM), _ANCILLARY, _RECEIVE)
            if not data:
                return more
            more += kernel.received_fds(ancillary)


# Ends that only this process may hold: were a child to keep a copy, the other side would
# not see that this process is gone.
_private_ends: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_in_children(*ends: Closable) -> None:
    """Close these ends in every process forked from now on."""
    _private_ends.update(ends)


def _in_child() -> None:
    for end in list(_private_ends):
        end.close()
    _private_ends.clear()


os.register_at_fork(after_in_child=_in_child)
